"""Files of killed compilations are removed and compiled again; complete files and those being built stay."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from training import hardware
from training.config import TrainConfig
from training.reliability import compiler_cache
from training.reliability.compiler_cache import drop_unfinished

LIBRARY = next(Path(sysconfig.get_path("stdlib"), "lib-dynload").glob("*.so"))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete library in the cache, which also has a precompiled header."""
    monkeypatch.setattr(compiler_cache, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(compiler_cache, "default_cache_dir", lambda: str(tmp_path))
    path = tmp_path / "ab" / "cabc.main.so"
    path.parent.mkdir()
    shutil.copy(LIBRARY, path)
    header(tmp_path).parent.mkdir()
    header(tmp_path).write_bytes(b"gpch")
    return path


def header(root: Path) -> Path:
    return root / "precompiled_headers" / "cdef.h.gch"


def test_complete_libraries_and_headers_stay(library: Path, tmp_path: Path) -> None:
    assert drop_unfinished() == []
    assert library.exists()
    assert header(tmp_path).exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
    ids=["empty", "headers only", "last byte missing", "zeros"],
)
def test_an_incomplete_library_is_removed(damage: Callable[[Path], object], library: Path) -> None:
    damage(library)
    assert drop_unfinished() == [library]
    assert drop_unfinished() == []


def test_a_header_whose_compilation_was_killed_is_removed(library: Path, tmp_path: Path) -> None:
    building = tmp_path / "precompiled_headers" / "cdef.h_CxxBuild"
    building.mkdir()
    assert drop_unfinished() == [header(tmp_path)]
    assert not building.exists()


def test_what_another_process_is_building_stays(library: Path, tmp_path: Path) -> None:
    os.truncate(library, 1000)
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "cabc.lock"):
        assert drop_unfinished() == []
    assert drop_unfinished() == [library]


def test_a_run_reports_what_it_removed_and_still_compiles(
    library: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(library, 1000)
    monkeypatch.setattr(hardware, "compiler_failure", lambda: "truncated" if library.exists() else None)
    with caplog.at_level(logging.WARNING):
        assert hardware.resolve_compile(
            TrainConfig(steps=1, global_batch_size=1, sequence_length=1, compile="auto"), warn=True
        )
    assert [record.message for record in caplog.records if str(library) in record.message]


def test_torch_keeps_its_cache_where_it_is_looked_for(tmp_path: Path) -> None:
    """These are private names of torch, which another version may change."""
    from torch._inductor import codecache, cpp_builder

    assert cpp_builder._BUILD_TEMP_DIR == "CxxBuild"
    assert Path(codecache._HEADER_DIR).name == "precompiled_headers"
    assert Path(codecache.get_lock_dir()) == Path(codecache.cache_dir()) / "locks"
    assert Path(codecache._HEADER_LOCK_DIR) == Path(codecache._HEADER_DIR) / "locks"
