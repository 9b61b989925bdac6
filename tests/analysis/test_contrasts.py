"""Contrasts over several studies, paired by seed."""

from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import paired_interval
from analysis.contrasts import Combination, differences, read_losses, table
from tests.analysis.synthetic import write_run, write_tables

LOSSES = {("a", "x"): {1: 3.0, 2: 3.5, 3: 9.0}, ("a", "y"): {1: 1.0, 2: 1.0}, ("b", "x"): {2: 2.0, 1: 2.0}}


def test_a_contrast_takes_the_seeds_that_all_cells_have_and_its_family_s_level() -> None:
    family = [
        Combination("both", (("a", "x"), ("b", "x")), (("a", "y"),)),
        Combination("one", (("a", "x"),), (("a", "y"),)),
    ]
    both, one = differences(LOSSES, family)
    assert both.by_seed == {1: 4.0, 2: 4.5}
    assert one.by_seed == {1: 2.0, 2: 2.5}
    assert both.interval == paired_interval([4.0, 4.5], 0.975)
    assert "| contrast of final losses, nats | mean [97.5% interval] | seeds |" in table([both, one])


def test_a_contrast_without_a_common_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="new: no seed with runs of all of a/x, c/z"):
        differences(LOSSES, [Combination("new", (("a", "x"),), (("c", "z"),))])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"status": "diverged"}, "one: runs of adamw diverged with seeds 2"),
        ({"missing": True}, "The study one is under way: 1 of at most 2"),
    ],
)
def test_a_study_that_is_not_whole_has_no_contrast(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = {"name": "one", "baseline": "adamw", "models": {"tiny": {"seeds": [1, 2]}}}
    values |= {
        "tuning": {"method": "grid", "trials": 1},
        "arms": {"adamw": {"search": {}}},
        "plan": {"trials_at_most": 2},
    }
    trials: list[tuple[dict[str, Any], Path | None]] = []
    for seed, arguments in ((1, {}), (2, {key: value for key, value in changed.items() if key != "missing"})):
        run = write_run(tmp_path / str(seed), seed=seed, steps=4, train_lines=False, **arguments)
        row = {"arm": "adamw", "phase": "reporting", "model": "tiny", "horizon": 4, "seed": seed}
        trials.append((row, None if seed == 2 and "missing" in changed else run))
    write_tables(tmp_path / "one", values, trials)
    with pytest.raises(ValueError, match=said):
        read_losses(tmp_path, ["one"])
