"""One run has one curve: two ranks under any strategy match a single process, and neutral settings change nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.training.runs import lines, summary
from tests.training.strategies import parity, ranks
from tests.training.strategies.conftest import (
    MOVED_STEPS,
    OWN_MODEL,
    PAIRS,
    POISONED,
    SHARES,
    STEPS,
    VARIANTS,
    Launch,
)
from training.reliability.checkpoints import newest_valid

REFUSED = [("fsdp×2", "sophiah"), ("zero3×2", "sophiah")]


def trained(directory: Path) -> list[dict]:
    return lines(directory, "train")


@pytest.mark.parametrize(("strategy", "optimizer"), [(s, o) for s, optimizers in PAIRS.items() for o in optimizers])
def test_two_ranks_with_accumulation_have_the_single_process_curve_and_curvature(
    two_ranks: Launch, strategy: str, optimizer: str
) -> None:
    cell = parity.compared(parity.Cell(strategy, optimizer, accumulation=2), two_ranks.directory)
    assert cell.within, cell
    assert cell.steps == STEPS
    assert cell.clipped_steps > 0


def test_impossible_pairs_are_refused_with_the_alternative(tmp_path: Path) -> None:
    cells, _ = parity.plan(tmp_path, [], PAIRS, ["sophiah"], STEPS, accumulations=(1,))
    refused = {(cell.strategy, cell.optimizer): cell.refused for cell in cells if cell.refused}
    assert sorted(refused) == sorted(REFUSED)
    assert all("choose optimizer.estimator=hutchinson_differences or gnb" in reason for reason in refused.values())


@pytest.mark.parametrize("strategy", PAIRS)
def test_norms_fractions_and_histograms_are_those_of_all_ranks(two_ranks: Launch, strategy: str) -> None:
    here = two_ranks.directory / parity.run_name(parity.Cell(strategy, "sophiag", 2))
    reference = two_ranks.directory / parity.run_name(parity.Cell("single", "sophiag", 1))
    for line, expected in zip(trained(here), trained(reference), strict=True):
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert line["unclipped_fraction"] == pytest.approx(expected["unclipped_fraction"], abs=2e-4)
    for line, expected in zip(lines(here, "hessian"), lines(reference, "hessian"), strict=True):
        assert line["hessian_norm"] == pytest.approx(expected["hessian_norm"], rel=1e-5)
        assert line["positive_fraction"] == pytest.approx(expected["positive_fraction"], abs=1e-3)
        counts, expected_counts = sum(line["histogram"]), sum(expected["histogram"])
        assert counts == pytest.approx(expected_counts, rel=1e-3)
    for line, expected in zip(lines(here, "eval"), lines(reference, "eval"), strict=True):
        assert line["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-5)
        assert line["val_tokens"] == expected["val_tokens"]


def test_a_checkpoint_moves_between_strategies_and_world_sizes_without_changing_the_curve(two_ranks: Launch) -> None:
    """single → FSDP on two ranks → ZeRO 2 on two → DDP on two → single, each stopped midway."""
    for name in ("moved fsdp", "moved zero2", "moved ddp"):
        assert two_ranks.status(name) == "preempted"
    moved, undisturbed = two_ranks.directory / "moved", two_ranks.directory / "undisturbed"
    assert summary(moved)["status"] == "completed"
    resumed = [line for line in lines(moved, "event") if line["event"] == "resumed"]
    assert [line["world_size"] for line in resumed] == [2, 2, 2, 1]
    # The ranks agree on a stop about a step after the request.
    assert all(line["step"] >= asked for line, asked in zip(resumed, (3, 6, 9, 12), strict=True))
    assert resumed[-1]["step"] < MOVED_STEPS
    assert [line["step"] for line in trained(moved)] == list(range(1, MOVED_STEPS + 1))
    for line, expected in zip(trained(moved), trained(undisturbed), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert parity.relative_difference(parity.curvature(moved), parity.curvature(undisturbed)) < 1e-5
    for part in ("exp_avg", "step"):
        here, there = (newest_valid(run / "checkpoints")[0] for run in (moved, undisturbed))
        assert here is not None
        assert there is not None
        names = [name for name in there.names() if name.endswith(f".{part}")]
        assert names
        assert sorted(names) == sorted(name for name in here.names() if name.endswith(f".{part}"))
        difference = parity.relative_difference(*({n: c.tensor(n) for n in names} for c in (here, there)))
        assert difference < 1e-4


@pytest.mark.parametrize("kind", POISONED)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks: Launch, kind: str) -> None:
    """NaN on rank 1: in the training gradient of step 3, and in the curvature estimate before step 6."""
    assert two_ranks.status(f"poisoned {kind}") == "completed"
    run, plain = two_ranks.directory / f"poisoned-{kind}", two_ranks.directory / "plain"
    steps = trained(run)
    assert [line.get("skipped", False) for line in steps] == [False, False, True, False, False, False]
    assert [line["held_back"] for line in lines(run, "hessian")] == [False, True]
    assert all(math.isfinite(line["loss"]) for line in steps)
    # Step 4 begins from the weights that step 3 left alone, and no strategy differs in that from another.
    for line, expected in zip(steps[:3], trained(plain)[:3], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    for line, expected in zip(steps, trained(two_ranks.directory / "poisoned-ddp"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_differences_that_are_not_finite_on_one_rank_are_skipped_under_an_engine_that_skips_by_itself(
    two_ranks: Launch,
) -> None:
    assert two_ranks.status("poisoned differences") == "completed"
    run = two_ranks.directory / "poisoned-differences"
    assert [line["held_back"] for line in lines(run, "hessian")] == [False, True]
    assert not any(line.get("skipped", False) for line in trained(run))


def test_ranks_draw_different_dropout_masks(two_ranks: Launch) -> None:
    assert two_ranks.status("dropout") == "completed"
    checkpoint, _ = newest_valid(two_ranks.directory / "dropout" / "checkpoints")
    assert checkpoint is not None
    assert not torch.equal(checkpoint.tensor("rng.cpu.0"), checkpoint.tensor("rng.cpu.1"))


def test_bytes_are_those_of_every_step_and_every_refresh(two_ranks: Launch) -> None:
    """Six steps and two refreshes. Each of two ranks sends half of what is gathered or scattered, and twice half of what
    is all-reduced; a float32 has four bytes."""

    def sent(strategy: str, optimizer: str) -> int:
        run = two_ranks.directory / parity.run_name(parity.Cell(strategy, optimizer, 2))
        count: int = summary(run)["bytes_communicated"]
        return count

    checkpoint, _ = newest_valid(two_ranks.directory / "plain" / "checkpoints")
    assert checkpoint is not None
    sizes = {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names() if name.startswith("model.")}
    everything = sum(sizes.values())
    blocks = sum(size for name, size in sizes.items() if name.startswith("model.blocks."))
    assert sent("ddp×2", "adamw") == 6 * 4 * everything
    assert sent("ddp×2", "sophiag") == (6 + 2) * 4 * everything
    assert sent("ddp×2", "sophiah") == (6 + 2) * 4 * everything
    assert sent("ddp×2", "sophiah, differences") == (6 + 2 * 2) * 4 * everything
    # A step has two micro-batches, a refresh one; each gathers the blocks twice and the rest once.
    gathered = 6 * 2 + 2
    assert sent("fsdp×2", "sophiag") == gathered * 2 * (2 * blocks + everything - blocks) + (6 + 2) * 2 * everything


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_recomputation_gathering_and_offload_do_not_change_the_curve(two_ranks: Launch, name: str) -> None:
    assert two_ranks.status(name) == "completed"
    run, plain = two_ranks.directory / name, two_ranks.directory / "plain"
    for line, expected in zip(trained(run), trained(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert parity.relative_difference(parity.curvature(run), parity.curvature(plain)) < 1e-5


@pytest.mark.parametrize("kind", OWN_MODEL)
def test_a_model_that_is_no_gpt2_has_the_single_process_curve_on_two_ranks(two_ranks: Launch, kind: str) -> None:
    assert two_ranks.status(f"own model {kind}") == "completed"
    run, single = two_ranks.directory / f"own-model-{kind}", two_ranks.directory / "own-model-single"
    for line, expected in zip(trained(run), trained(single), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert parity.relative_difference(parity.curvature(run), parity.curvature(single)) < 1e-5


@pytest.mark.parametrize("share", SHARES)
def test_a_refresh_within_the_training_forward_of_two_ranks_equals_the_pass_of_a_single_process(
    two_ranks: Launch, share: float
) -> None:
    assert two_ranks.status(f"share {share}") == "completed"
    run, single = two_ranks.directory / f"share-{share}", two_ranks.directory / f"share-{share}-single"
    for line, expected in zip(trained(run), trained(single), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert parity.relative_difference(parity.curvature(run), parity.curvature(single)) < 1e-5
    billed, own = (summary(directory)["ledger"]["curvature"] for directory in (run, single))
    assert (billed["tokens"], billed["count"]) == (own["tokens"], own["count"])
    assert billed["flops"] < 2 / 3 * own["flops"]


@pytest.mark.parametrize("kind", list(ranks.KINDS))
def test_bf16_stays_close_to_float32_and_keeps_its_state_in_float32(two_ranks: Launch, kind: str) -> None:
    assert two_ranks.status(f"bf16 {kind}") == "completed"
    run, plain = two_ranks.directory / f"bf16-{kind}", two_ranks.directory / "plain"
    for line, expected in zip(trained(run), trained(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=2e-3)
    checkpoint, _ = newest_valid(run / "checkpoints")
    assert checkpoint is not None
    assert {str(checkpoint.dtype(name)) for name in checkpoint.names() if name.endswith("weight")} == {"torch.float32"}


@pytest.mark.parametrize("kind", list(ranks.KINDS))
def test_a_checkpoint_is_written_by_all_ranks_in_parallel(two_ranks: Launch, kind: str) -> None:
    """Two files of about the same size, whatever the strategy."""
    checkpoint, _ = newest_valid(two_ranks.directory / f"bf16-{kind}" / "checkpoints")
    assert checkpoint is not None
    files = json.loads((checkpoint.directory / "manifest.json").read_text())["files"].values()
    sizes = [sum(piece["count"] for piece in entry["pieces"]) for entry in files]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("kind", list(ranks.KINDS))
def test_the_curvature_pass_changes_the_curvature_and_nothing_else(two_ranks: Launch, kind: str) -> None:
    seen = two_ranks.look("curvature_pass", kind)
    assert seen["weights_unchanged"]
    assert seen["counters_unchanged"]
    assert seen["h_before"] == 0 < seen["h_after"]
    assert seen["momentum"] > 0
    assert seen["engine_clip"] == 0


@pytest.mark.parametrize("kind", list(ranks.KINDS))
def test_the_gradient_is_the_mean_over_all_tokens_however_the_batch_is_split(two_ranks: Launch, kind: str) -> None:
    norms = two_ranks.look("gradient_of_the_mean", kind)
    expected = two_ranks.look("gradient_of_the_mean", "ddp")["1"]
    assert list(norms.values()) == pytest.approx([expected] * 3, rel=1e-5)


@pytest.mark.parametrize("kind", ranks.LOOKED_AT["collectives"])
def test_gradients_are_reduced_once_in_an_accumulation(two_ranks: Launch, kind: str) -> None:
    """Four micro-batches need as many collectives of gradients as one."""
    seen = two_ranks.look("collectives", kind)
    gathers = ("c10d::_allgather_base_", "c10d::allgather_")  # of weights, which FSDP needs in every forward
    once, four = ({k: n for k, n in seen[m].items() if not k.startswith(gathers)} for m in ("1", "4"))
    assert once == four
    assert once
