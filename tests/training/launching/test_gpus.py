"""Trials that run side by side have GPUs of their own."""

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor

from training.launching.gpus import take_gpus


@pytest.fixture
def fresh_workers() -> Iterator[None]:
    """joblib keeps its workers from call to call; CUDA_VISIBLE_DEVICES does not change in one."""
    get_reusable_executor().shutdown(wait=True)
    yield
    get_reusable_executor().shutdown(wait=True)


def trial(place: Path, given: str | None, gpus: int, ranks: int, workers: int) -> str | None:
    """Take GPUs, wait until all workers have, and return what the worker may see."""
    if given is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = given
    torch.cuda.device_count = lambda: gpus  # type: ignore[method-assign]
    take_gpus(ranks)
    place.mkdir(exist_ok=True)
    (place / str(os.getpid())).touch()
    until = time.monotonic() + 120
    while len(list(place.iterdir())) < workers:
        assert time.monotonic() < until, "the other workers have not come"
        time.sleep(0.02)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("fresh_workers")
@pytest.mark.parametrize(
    ("gpus", "ranks", "seen"),
    [
        (4, 1, [[0], [1], [2]]),
        (7, 2, [[0, 1], [2, 3], [4, 5]]),
        (2, 1, [[0], [0], [1]]),
        (1, 1, [[0], [0], [0]]),
        (2, 4, [[0, 1], [0, 1], [0, 1]]),
    ],
    ids=["one each", "two each", "shared evenly", "one GPU", "more ranks than GPUs"],
)
def test_workers_of_joblib_divide_the_gpus(gpus: int, ranks: int, seen: list[list[int]], tmp_path: Path) -> None:
    """The driver says how many GPUs there are; CUDA_VISIBLE_DEVICES names them, and may name more."""
    names = [f"GPU-{uuid.uuid4()}" for _ in range(gpus)]  # no other test has them
    with Parallel(n_jobs=3, batch_size=1) as parallel:
        for turn in ("first", "second"):  # the workers stay, and so do their GPUs
            given = ",".join([*names, "none"]) if turn == "first" else None
            found = parallel(delayed(trial)(tmp_path / turn, given, gpus, ranks, 3) for _ in range(3))
            shown = sorted([names.index(name) for name in one.split(",") if name in names] for one in found if one)
            assert shown == seen


@pytest.mark.usefixtures("fresh_workers")
def test_a_worker_takes_others_for_a_trial_of_more_ranks(tmp_path: Path) -> None:
    names = ",".join(f"GPU-{uuid.uuid4()}" for _ in range(4))
    with Parallel(n_jobs=2, batch_size=1) as parallel:
        parallel(delayed(trial)(tmp_path / "one", names, 4, 1, 2) for _ in range(2))
        (found,) = parallel(delayed(trial)(tmp_path / "two", None, 4, 2, 1) for _ in range(1))
        assert found == ",".join(names.split(",")[2:])  # the other worker keeps one of the first two
        assert parallel(delayed(trial)(tmp_path / "four", None, 4, 4, 2) for _ in range(2)) == [names, names]


def test_a_process_of_its_own_keeps_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    take_gpus(1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
