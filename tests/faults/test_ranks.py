"""What two real ranks do about a rank that hangs, and about weights that are no longer the same."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from tests.faults.kills import overrides_of
from tests.faults.sittings import Sitting, completed
from tests.training.runs import curve, lines, summary
from training import checkpoints, watchdog


def hang_on_rank_1(step: int) -> None:
    """A loop without end on one rank; the other, which has the store, waits for it in a collective.

    The stuck rank is slow to see that both have shown their stacks: if the store left first, its heartbeat would end it
    for that.
    """
    from training import loop

    original = loop.forward_backward
    tell_peers = watchdog.Watchdog._tell_peers
    slow = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(3))

    def tell_late(self, reason):
        tell_peers(self, reason)
        time.sleep(0.5)

    if os.environ["RANK"] == "1":
        watchdog.time = slow  # type: ignore[assignment]
    else:
        watchdog.Watchdog._tell_peers = tell_late  # type: ignore[method-assign]

    def endless(run, *rest):
        while os.environ["RANK"] == "1" and run.state.step == step - 1:
            time.sleep(0.01)
        return original(run, *rest)

    loop.forward_backward = endless


def flip_on_rank_1(step: int) -> None:
    """A bit of one weight changes after the update, as in a chip that computes wrongly."""
    import torch

    from training.strategies.ddp import DDP

    original, steps = DDP.step, [0]

    def struck(self, *arguments):
        statistics = original(self, *arguments)
        steps[0] += 1
        if os.environ["RANK"] == "1" and steps[0] == step:
            with torch.no_grad():
                weight = self.model.get_parameter("blocks.1.mlp.up.weight").view(torch.int32)
                weight[3, 5] ^= 1
        return statistics

    DDP.step = struck  # type: ignore[method-assign]


def unreadable_on_rank_1(step: int) -> None:
    """A shard on the second machine's disk: the training data of a step cannot be read, nor any validation data."""
    from data.batches import Batches, ValidationWindows
    from data.errors import DataError
    from tests.training.runs import before

    def unreadable() -> None:
        raise DataError(
            "validation-00000.npy: token 7 cannot be read" if step == 0 else "train-00000.npy: token 7 is 301"
        )

    if os.environ["RANK"] == "1":
        before(Batches, "at", unreadable, lambda _, at: at == step)
        before(ValidationWindows, "_batch", unreadable, lambda *_: step == 0)


def test_data_that_one_rank_cannot_read_ends_all_after_a_save(corpus: list[str], tmp_path: Path) -> None:
    command = overrides_of(corpus, tmp_path, "run", 12)
    for step, saved, reason in ((8, 7, "train-00000.npy"), (0, 8, "validation-00000.npy")):
        sitting = Sitting(command, tmp_path / "log", ranks=2, prepare=partial(unreadable_on_rank_1, step))
        assert sitting.wait(60) == [1, 1]
        ended = summary(tmp_path / "run")
        assert (ended["status"], ended["steps"]) == ("failed", saved)
        assert reason in ended["reason"]
        assert checkpoints.step_of(checkpoints.available(tmp_path / "run" / "checkpoints")[0]) == saved
        assert f"from step-{saved:08d}" in sitting.said()
    completed(command, tmp_path / "log", ranks=2)


def test_a_rank_that_hangs_ends_all_with_the_stacks_of_all(corpus: list[str], tmp_path: Path) -> None:
    command = overrides_of(corpus, tmp_path, "run", 12, "guards.hang_minutes=0.05")
    sitting = Sitting(command, tmp_path / "log", ranks=2, prepare=partial(hang_on_rank_1, 8))
    assert sitting.wait(60) == [watchdog.EXIT_HANG] * 2
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    # The stuck rank is in its loop, the other further on, in a collective.
    assert "in endless" in stacks["rank-00001.txt"]
    assert "in forward_backward" not in stacks["rank-00001.txt"]
    assert "in forward_backward" in stacks["rank-00000.txt"]
    for rank in range(2):
        assert f"stacks of rank {rank}:" in sitting.said()
    assert summary(tmp_path / "run")["status"] == "failed"
    said = completed(command, tmp_path / "log", ranks=2)
    assert "step-00000005 at step 5" in said


def test_weights_that_differ_between_ranks_end_the_run_before_they_are_saved(corpus: list[str], tmp_path: Path) -> None:
    completed(overrides_of(corpus, tmp_path, "undisturbed", 24), tmp_path / "log", ranks=2)
    command = overrides_of(corpus, tmp_path, "run", 24)  # compared every 7 steps and before each save, every 5
    sitting = Sitting(command, tmp_path / "log", ranks=2, prepare=partial(flip_on_rank_1, 12))
    assert sitting.wait() == [1, 1]
    reason = summary(tmp_path / "run")["reason"]
    # The momentum of the next steps differs as well, and other weights with it.
    assert "the ranks no longer hold the same values: " in reason
    assert "model.blocks.1.mlp.up.weight on rank 1" in reason
    assert lines(tmp_path / "run", "train")[-1]["step"] == 14
    assert checkpoints.step_of(checkpoints.available(tmp_path / "run" / "checkpoints")[0]) == 10
    completed(command, tmp_path / "log", ranks=2)
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")
