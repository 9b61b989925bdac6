"""A run killed repeatedly at random moments has the curve of an undisturbed run.

These tests make a few kills of each kind; `make test-faults` runs the whole campaign.
"""

from __future__ import annotations

from pathlib import Path

from tests.faults.kills import kill_again_and_again


def test_a_run_killed_at_random_moments_has_the_same_record_and_state_bit_for_bit(
    corpus: list[str], tmp_path: Path
) -> None:
    found = kill_again_and_again(corpus, tmp_path, kills=5, seed=0, steps=60)
    assert found["faults"] == []
    assert found["kills"] >= 1
    assert found["largest_difference"] == 0


def test_two_ranks_killed_at_random_moments_have_the_same_record_and_state(corpus: list[str], tmp_path: Path) -> None:
    found = kill_again_and_again(corpus, tmp_path, kills=2, seed=3, steps=40, ranks=2)
    assert found["faults"] == []
    assert found["kills"] >= 1
    assert found["largest_difference"] <= 1e-6
