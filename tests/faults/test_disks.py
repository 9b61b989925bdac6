"""A full disk ends a run with one clear line and loses nothing that was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disks import MountRefusedError, full_while_logging, full_while_saving
from tests.training.runs import curve, run, run_in_child, tiny


@pytest.mark.parametrize("scenario", [full_while_saving, full_while_logging])
def test_a_run_on_a_full_disk_says_so_and_goes_on_bit_for_bit_once_there_is_room(
    scenario: Callable[..., dict[str, Any]], corpus: list[str], tmp_path: Path
) -> None:
    try:
        found = scenario(corpus, tmp_path)
    except MountRefusedError as refusal:
        pytest.skip(f"no tmpfs can be mounted here: {refusal}")
    assert found["faults"] == []


def test_a_log_that_cannot_be_written_neither_stops_a_run_nor_changes_its_exit_code(
    corpus: list[str], tmp_path: Path
) -> None:
    assert run_in_child(tiny(corpus, tmp_path, name="unseen"), errors=Path("/dev/full")) == 0
    assert run(tiny(corpus, tmp_path, name="seen")) == 0
    assert curve(tmp_path / "unseen") == curve(tmp_path / "seen")
