"""What makes a run fast changes neither its curve nor, once it is under way, what is compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models import gpt2
from models.head import LossHead, plain_losses
from tests.training.runs import lines, tiny
from training.compose import compose
from training.loop import Reporter
from training.recording.ledger import CompilationClock
from training.run import execute

STEPS = 120
WARM = 10  # steps after which nothing may be compiled any more: two refreshes and an evaluation have been seen
# A gamma at which a tenth of the coordinates is unclipped, as the paper advises: pure sign descent at a high rate
# doubles any rounding every few steps.
SETTINGS = [
    f"train.steps={STEPS}",
    "schedule=cosine",
    "schedule.warmup_steps=20",
    "optimizer=sophiag",
    "optimizer.lr=4e-4",
    "optimizer.gamma=0.5",
    "optimizer.hessian_interval=5",
    "train.micro_batch_size=4",
    "eval.interval=10",
    "checkpoint.interval=null",
]
#: Largest difference of the training loss (nats) between all fast paths and none, over all steps.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


@pytest.fixture(scope="module")
def compilations() -> list[int]:
    """How often anything had been compiled when each step of the fast run was reported."""
    return []


@pytest.fixture(scope="module")
def fast(
    corpus: list[str], tmp_path_factory: pytest.TempPathFactory, compilations: list[int]
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The training lines of compiled runs with every fast path on, by precision.

    Under bf16 the model is traced and differentiated as it is compiled, and no code is generated: that is PyTorch's part,
    takes the longest, and is what float32 has gone through. The optimizer's kernels, in float32 under both, are compiled.
    """
    clock, original = CompilationClock.installed(), Reporter.step

    def counted(self: Reporter, step: int, *rest: Any) -> None:
        if self._run.config.train.precision == "fp32":
            compilations.append(clock.count)
        original(self, step, *rest)

    directory = tmp_path_factory.mktemp("fast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", counted)
        torch._dynamo.reset()
        for precision in TOLERANCE:
            if precision == "bf16":
                patch.setattr(gpt2.GPT2, "compile", functools.partialmethod(gpt2.GPT2.compile, backend="aot_eager"))
            given = [*SETTINGS, f"train.precision={precision}", "train.compile=true"]
            assert execute(compose(tiny(corpus, directory, *given, name=precision))).status == "completed"
        torch._dynamo.reset()
    return {precision: lines(directory / precision, "train") for precision in TOLERANCE}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_curve_with_every_fast_path_is_the_curve_with_none(
    fast: dict[str, list[dict[str, Any]]], corpus: list[str], tmp_path: Path, precision: str, monkeypatch: Any
) -> None:
    """None: eager, full logits, the curvature pass with its own forward, uncompiled optimizer."""

    def full_logits(self: Any, hidden: Any, weight: Any, targets: Any, uniforms: Any) -> Any:
        return plain_losses(hidden, weight, targets, uniforms, self.vocab_size)

    monkeypatch.setattr(LossHead, "forward", full_logits)
    given = [*SETTINGS, f"train.precision={precision}", "train.compile=false", "train.shared_forward=false"]
    assert execute(compose(tiny(corpus, tmp_path, *given))).status == "completed"
    slow = lines(tmp_path / "run", "train")
    assert len(slow) == STEPS
    assert slow[-1]["loss"] < slow[0]["loss"] - 0.5
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(fast[precision], slow, strict=True)]
    assert max(differences) < TOLERANCE[precision]


def test_nothing_is_compiled_after_the_first_ten_steps(
    fast: dict[str, list[dict[str, Any]]], compilations: list[int]
) -> None:
    assert len(compilations) == STEPS
    assert compilations[0] > 0
    assert compilations[-1] == compilations[WARM - 1]
