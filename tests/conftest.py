"""Shared by all tests: few threads, no network, no W&B, files in memory."""

import gc
import os
import shutil
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")
# What a run writes is synchronised to the disk, for which a tiny one would wait as long as it trains.
MEMORY = "/dev/shm"
if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > 4 << 30 and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

import torch  # noqa: E402

from tests.permissions import NoCapabilitiesError, bound_by_permissions  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

#: What a test that starts processes, trains a run, prepares a corpus, plans by tracing or opens a browser names, or
#: something of tests/ that it calls or is given does.
SLOW = {"subprocess", "Process", "spawn", "start_processes", "Page", "command", "execute", "prepare", "write_report"}
SLOW |= {"report", "run_study", "make_plan", "planned_memory", "check_case"}
#: Of a whole session, and made from the first test on: the other worker has something else to do meanwhile.
FIRST = {"two_ranks", "fast"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    items.sort(key=lambda item: FIRST.isdisjoint(getattr(item, "fixturenames", ())))
    seen: dict[Any, bool] = {}
    for item in items:
        fixtures = [definitions[-1] for definitions in item._fixtureinfo.name2fixturedefs.values()]
        # A small run that a whole session shares is none of one test's cost.
        given = [one.func for one in fixtures if one.scope != "session" or one.argname in FIRST]
        if any(_is_slow(function, seen) for function in (item.function, *given)):
            item.add_marker(pytest.mark.slow)


def _is_slow(thing: Any, seen: dict[Any, bool]) -> bool:
    """Whether a function or a class of the tests names what is slow, or what it calls does."""
    if isinstance(thing, type):
        return any(_is_slow(member, seen) for member in vars(thing).values() if isinstance(member, FunctionType))
    if not isinstance(thing, FunctionType):
        return False
    if thing not in seen:
        seen[thing] = False
        names = _names(thing.__code__)
        called = (thing.__globals__.get(name) for name in names)
        ours = [one for one in called if str(getattr(one, "__module__", "")).startswith("tests.")]
        seen[thing] = not names.isdisjoint(SLOW) or any(_is_slow(one, seen) for one in ours)
    return seen[thing]


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*inner)


def pytest_collection_finish() -> None:
    """What is there by now stays: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def permissions_bind() -> Iterator[None]:
    """The bits of files count in this test also where root runs it."""
    try:
        with bound_by_permissions():
            yield
    except NoCapabilitiesError as error:
        pytest.skip(str(error))
