"""Contrasts over several studies, paired by seed."""

import pytest

from analysis.comparison import paired_interval
from analysis.contrasts import Combination, differences, table

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
