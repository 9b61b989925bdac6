from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data import IGNORED_TARGET, Batch, Batches, DataError, TokenDataset, ValidationWindows
from data import batches as batches_module
from data.batches import next_batch
from data.permutation import permute
from models.head import IGNORED
from tests.data.token_directory import write_token_directory


def counting(directory: Path, tokens: int, shards: int = 3, split: str = "train") -> TokenDataset:
    """A split whose token at position p is p, in shards of unequal sizes."""
    cuts = np.sort(np.random.default_rng(tokens).choice(np.arange(1, tokens), size=shards - 1, replace=False))
    arrays = np.split(np.arange(tokens), cuts)
    write_token_directory(directory, arrays, arrays)
    return TokenDataset(directory, split)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return counting(tmp_path_factory.mktemp("tokens"), 1003)


def test_targets_are_the_tokens_one_place_further_across_shards(stream: TokenDataset) -> None:
    batches = Batches(stream, seed=0, global_batch_size=100, sequence_length=10)
    batch = batches.at(1)
    assert batch.tokens.dtype == batch.targets.dtype == np.int64
    assert batch.tokens.flags.c_contiguous
    assert batch.targets.flags.c_contiguous
    assert np.array_equal(batch.tokens, batch.tokens[:, :1] + np.arange(10))
    assert np.array_equal(batch.targets, batch.tokens + 1)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    seed=st.integers(0, (1 << 64) - 1),
    batch_size=st.integers(1, 40),
    length=st.integers(1, 120),
)
def test_each_epoch_has_every_window_once_also_where_a_batch_straddles_epochs(
    stream: TokenDataset, seed: int, batch_size: int, length: int
) -> None:
    batches = Batches(stream, seed, batch_size, length)
    windows = batches.windows_per_epoch
    steps = -(-3 * windows // batch_size)
    starts = np.concatenate([batches.at(step).tokens[:, 0] for step in range(1, steps + 1)])
    for epoch in range(3):
        seen = starts[epoch * windows : (epoch + 1) * windows]
        assert np.array_equal(np.sort(seen), np.arange(windows) * length)


@pytest.mark.parametrize("batch_size", [30, 5000])
def test_a_batch_is_a_function_of_its_step_each_epoch_in_the_order_of_its_own_permutation(
    stream: TokenDataset, batch_size: int
) -> None:
    batches = Batches(stream, seed=1 << 63, global_batch_size=batch_size, sequence_length=10)
    for step in (1, 4, 300, 136, 137, 4):
        epochs, places = np.divmod((step - 1) * batch_size + np.arange(batch_size), 100)
        orders = {epoch: permute(np.arange(100), 100, 1 << 63, epoch) for epoch in set(epochs.tolist())}
        windows = [orders[epoch][place] for epoch, place in zip(epochs.tolist(), places, strict=True)]
        assert batches.at(step).tokens[:, 0].tolist() == [10 * window for window in windows]


def test_late_steps_permute_the_epochs_that_they_touch_and_none_before(
    stream: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(batches_module, "permute", lambda *of: seen.append(of[-1]) or permute(*of))
    Batches(stream, seed=0, global_batch_size=5000, sequence_length=10).at(300)
    assert seen == list(range(14950, 15000))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    world_size=st.integers(1, 9), batch_size=st.integers(1, 20), step=st.integers(1, 1000), seed=st.integers(0, 1 << 32)
)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    stream: TokenDataset, world_size: int, batch_size: int, step: int, seed: int
) -> None:
    whole = Batches(stream, seed, batch_size, 16).at(step)
    assert whole.indices.tolist() == list(range(batch_size))
    for rank in range(world_size):
        part = Batches(stream, seed, batch_size, 16, rank, world_size).at(step)
        assert part.indices.tolist() == list(range(rank, batch_size, world_size))
        assert np.array_equal(part.tokens, whole.tokens[rank::world_size])
        assert np.array_equal(part.targets, whole.targets[rank::world_size])


def test_the_batch_does_not_depend_on_how_the_stream_is_cut_into_shards(tmp_path: Path) -> None:
    one = Batches(counting(tmp_path / "one", 500, shards=1), 7, 30, 16).at(3)
    many = Batches(counting(tmp_path / "many", 500, shards=40), 7, 30, 16).at(3)
    assert np.array_equal(one.tokens, many.tokens)
    assert np.array_equal(one.targets, many.targets)


def test_given_arrays_are_written_in_place(stream: TokenDataset) -> None:
    batches = Batches(stream, 0, 8, 16)
    out = Batch(np.zeros((8, 16), np.int64), np.zeros((8, 16), np.int64), np.zeros(8, np.int64))
    batch = batches.at(2, out)
    assert batch.tokens is out.tokens
    assert batch.targets is out.targets
    assert np.array_equal(out.tokens, batches.at(2).tokens)


def test_prefetched_batches_are_those_of_their_steps(stream: TokenDataset) -> None:
    batches = Batches(stream, 0, 8, 16)
    with batches.prefetch(5, last_step=30, depth=3) as ahead:
        read = list(ahead)
        assert next(ahead, None) is None
    assert len(read) == 26
    for step, batch in enumerate(read, start=5):
        assert np.array_equal(batch.tokens, batches.at(step).tokens)


def test_no_more_batches_are_read_ahead_than_requested(stream: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(stream, 0, 8, 16)
    read: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(Batches, "at", lambda self, step: read.put(step) or Batch(*[np.zeros(1)] * 3))
    with batches.prefetch(1, 30, depth=2) as ahead:
        next(ahead)
        assert [read.get(timeout=60) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(queue.Empty):
            read.get(timeout=0.3)
    with pytest.raises(ValueError, match="depth=0"), batches.prefetch(1, 30, depth=0):
        pass


def test_reading_ahead_leaves_no_thread_behind(stream: TokenDataset) -> None:
    before = set(threading.enumerate())
    with Batches(stream, 0, 8, 16).prefetch(1, 30) as ahead:
        next(ahead)
    assert set(threading.enumerate()) <= before


def test_an_error_while_reading_ahead_reaches_the_reader(tmp_path: Path) -> None:
    write_token_directory(tmp_path, [np.array([1, 2, 3, 900, 4])], vocab_size=512)
    with (
        Batches(TokenDataset(tmp_path, "train"), 0, 1, 4).prefetch(1, 9) as ahead,
        pytest.raises(DataError, match="token 3 is 900"),
    ):
        next(ahead)


def test_a_split_shorter_than_a_sequence_is_refused(stream: TokenDataset) -> None:
    with pytest.raises(DataError, match=r"has 1003 tokens, but one sequence of 1003 needs 1004; .*sequence_length"):
        Batches(stream, 0, 1, 1003)
    assert Batches(stream, 0, 1, 1002).at(1).targets[0, -1] == 1002


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1},
        {"seed": 1 << 64},
        {"global_batch_size": 0},
        {"sequence_length": 0},
        {"rank": 2, "world_size": 2},
        {"rank": -1},
    ],
)
def test_arguments_out_of_range_are_refused(stream: TokenDataset, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected|at least"):
        Batches(stream, **{"seed": 0, "global_batch_size": 4, "sequence_length": 8, **arguments})


def test_steps_are_counted_from_one(stream: TokenDataset) -> None:
    with pytest.raises(ValueError, match="step=0"):
        Batches(stream, 0, 4, 8).at(0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    limit=st.none() | st.integers(1, 1100),
    length=st.integers(1, 300),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 12),
)
@example(limit=1100, length=7, world_size=2, batch_size=3)  # more than the split has
def test_validation_predicts_each_of_the_first_tokens_exactly_once_over_all_ranks(
    stream: TokenDataset, limit: int | None, length: int, world_size: int, batch_size: int
) -> None:
    predicted: list[int] = []
    counts = set()
    for rank in range(world_size):
        windows = ValidationWindows(stream, limit, length, rank, world_size)
        batches = list(windows.batches(batch_size))
        counts.add(len(batches))
        for batch in batches:
            assert batch.tokens.shape == batch.targets.shape == (batch_size, length)
            real = batch.targets != IGNORED_TARGET
            assert np.array_equal(batch.tokens[real] + 1, batch.targets[real])
            assert not real[batch.indices < 0].any()
            assert not batch.tokens[~real].any(), "padding is looked up in the embedding like any token"
            assert real[batch.indices >= 0].any(axis=1).all()
            predicted.extend(batch.targets[real].tolist())
    expected = 1002 if limit is None else min(limit, 1002)
    assert sorted(predicted) == list(range(1, expected + 1))
    assert windows.predictions == expected
    assert len(counts) == 1, "ranks with unequal numbers of batches would hang in a collective"


def test_torch_and_the_loss_head_ignore_the_same_target() -> None:
    assert IGNORED_TARGET == IGNORED == torch.nn.CrossEntropyLoss().ignore_index


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_validation_split_without_a_token_to_predict_is_refused(tmp_path: Path, tokens: int) -> None:
    write_token_directory(tmp_path, [np.arange(10)], [np.arange(tokens)] if tokens else [])
    with pytest.raises(DataError, match=rf"validation split of .* has {tokens} tokens.*validation.fraction"):
        ValidationWindows(TokenDataset(tmp_path, "validation"), None, 4)


@pytest.mark.parametrize(
    ("arguments", "named"), [((0, 4), "tokens_limit=0"), ((4, 0), "sequence_length=0"), ((4, 4, 2, 2), "rank=2")]
)
def test_validation_arguments_out_of_range_are_refused(
    stream: TokenDataset, arguments: tuple[int, ...], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        ValidationWindows(stream, *arguments)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(ValidationWindows(stream, 4, 4).batches(0))


@pytest.mark.parametrize("error", [DataError("damaged"), OSError("no such device")])
def test_an_unreadable_batch_is_reported_and_the_end_is_not_an_error(error: Exception) -> None:
    batch = Batch(*[np.zeros(1)] * 3)

    def batches() -> Iterator[Batch]:
        yield batch
        raise error

    iterator = batches()
    assert next_batch(iterator) == (batch, None)
    assert next_batch(iterator) == (None, str(error))
    assert next_batch(iterator) == (None, None)


def test_the_package_does_not_import_torch_or_what_preparation_needs() -> None:
    heavy = ("torch", "datasets", "pyarrow", "pandas", "transformers")
    command = f"import sys, data; print([m for m in {heavy!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
