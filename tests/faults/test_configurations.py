"""Any valid configuration runs; any other is refused in one line. `make test-faults` draws many more of each."""

from __future__ import annotations

from pathlib import Path

from tests.faults.configurations import (
    mutate_configurations,
    spoil_command_lines,
    spoil_files,
    step_configurations,
)


def test_random_valid_configurations_build_and_step(corpus: list[str], tmp_path: Path) -> None:
    found = step_configurations(corpus, tmp_path, 25, 0)
    assert found["faults"] == []
    assert found["completed"] > 12


def test_random_mutations_are_valid_or_refused_in_a_line(corpus: list[str], tmp_path: Path) -> None:
    found = mutate_configurations(corpus, tmp_path, 100, 0)
    assert found["faults"] == []
    assert found["refused"] > 25


def test_random_command_lines_are_refused_in_a_line(tmp_path: Path) -> None:
    found = spoil_command_lines(tmp_path, 15, 0)
    assert found["faults"] == []
    assert found["refused"] > 7


def test_random_damage_to_a_file_is_refused_in_a_line(tmp_path: Path) -> None:
    found = spoil_files(tmp_path, 15, 0)
    assert found["faults"] == []
