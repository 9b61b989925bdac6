"""SIGTERM, SIGINT and SIGUSR1 at random moments lose no step; a second signal ends a run at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.stops import stop_again_and_again, stop_torchrun, stop_twice


@pytest.mark.parametrize(("ranks", "stops"), [(1, 6), (2, 2)])
def test_a_signal_at_a_random_moment_is_honoured_and_no_step_is_lost(
    ranks: int, stops: int, corpus: list[str], tmp_path: Path
) -> None:
    found = stop_again_and_again(corpus, tmp_path, stops, seed=1, ranks=ranks)
    assert found["faults"] == []
    assert found["honoured"] == stops
    assert found["largest_difference"] <= (0 if ranks == 1 else 1e-6)


def test_a_signal_to_every_process_of_torchrun_is_one_request_and_no_step_is_lost(
    corpus: list[str], tmp_path: Path
) -> None:
    found = stop_torchrun(corpus, tmp_path, 1, seed=0)
    assert found["faults"] == []
    assert found["honoured"] == 1


def test_a_second_signal_ends_a_run_in_the_middle_of_a_step(corpus: list[str], tmp_path: Path) -> None:
    found = stop_twice(corpus, tmp_path, 2, seed=0)
    assert found["faults"] == []
