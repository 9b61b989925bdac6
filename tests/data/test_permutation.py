from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.permutation import permute

seeds = st.integers(0, (1 << 64) - 1)


@given(n=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 1 << 40))
def test_every_place_is_reached_exactly_once(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(1, 1 << 45), seed=seeds, data=st.data())
def test_places_do_not_depend_on_which_others_are_requested(n: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(positions, n, seed, 0)
    assert ((together >= 0) & (together < n)).all()
    assert together.tolist() == [permute(positions[i : i + 1], n, seed, 0).item() for i in range(positions.size)]


def test_the_order_is_frozen() -> None:
    # A change here changes the batches of every run, so that new records cannot be paired with old ones.
    assert permute(np.arange(8), 1000, 1337, 0).tolist() == [957, 658, 35, 877, 592, 475, 193, 407]
    assert permute(np.arange(4), 10**10, 0, 3).tolist() == [4848816817, 7083027277, 3781501959, 7512160895]


@pytest.mark.parametrize("n", [30, 64, 100])
@pytest.mark.slow
def test_orders_of_many_seeds_are_uniform_over_places(n: int) -> None:
    first = np.array([permute(np.array([0, 1]), n, seed, 0) for seed in range(60 * n)])
    for column in first.T:
        assert chisquare(np.bincount(column, minlength=n)).pvalue > 1e-4


def test_epochs_and_seeds_have_unrelated_orders() -> None:
    n = 10_000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.05
