"""The training loop, in the order in which things happen.

    batches.at(step) → [when due: curvature pass] → forward and backward of each micro-batch → clip and step → record
    → [when due: evaluation, checkpoint]

The loop does not know which strategy, optimizer or tracker it has.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch, Batches, ValidationWindows
from models.flops import evaluation_flops, forward_backward_flops
from training.config import RunConfig
from training.curvature import CurvaturePass
from training.diagnostics import describe_curvature
from training.evaluation import validation_loss
from training.ledger import Ledger
from training.records import Status
from training.schedule import learning_rate_factor
from training.strategies.base import StepStatistics, Strategy

Line = Mapping[str, Any]


@dataclass
class TrainingState:
    """What a run must carry over an interruption, besides weights and optimizer state. JSON values only."""

    step: int = 0
    best_val_loss: float | None = None
    final_val_loss: float | None = None
    skipped_in_a_row: int = 0


@dataclass
class Run:
    """Everything that one run consists of, ready to go."""

    config: RunConfig
    strategy: Strategy
    batches: Batches
    validation: ValidationWindows
    curvature: CurvaturePass | None
    ledger: Ledger
    micro_batch_size: int
    eval_micro_batch_size: int
    parameters: int  # of the whole model
    write: Callable[[Line], None]  # rank 0: to the record, the display and the trackers; elsewhere nothing
    save: Callable[[TrainingState], None]  # a checkpoint; called on every rank
    stop_requested: Callable[[], bool]  # this rank has been asked to stop
    profiler_step: Callable[[], None] = lambda: None
    state: TrainingState = field(default_factory=TrainingState)


@dataclass(frozen=True)
class _Report:
    """A step whose numbers may still be on their way from the device."""

    step: int
    lr: float
    numbers: Tensor  # (5,) float64: loss, gradient norm, clipped, skipped, unclipped fraction (-1: none)
    arrived: torch.cuda.Event | None
    tokens: int
    flops: int


class Reporter:
    """Writes train lines, on CUDA one step behind, so that reading the loss never makes the device wait for the host.

    All ranks see the same numbers, so that they agree on `diverged` without asking.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending: list[_Report] = []
        self._on_cuda = run.strategy.device.type == "cuda"
        self._seconds = run.ledger.seconds
        self.diverged = False

    def step(self, step: int, lr: float, loss: Tensor, statistics: StepStatistics) -> None:
        """Queue a step: `loss` is this rank's share of the mean loss before the update."""
        run = self._run
        fraction = statistics.unclipped_fraction
        numbers = torch.stack(
            [
                run.strategy.distributed.all_reduce(loss.double()),
                statistics.grad_norm.double(),
                statistics.clipped.double(),
                statistics.skipped.double(),
                fraction.double() if fraction is not None else loss.new_full((), -1.0, dtype=torch.float64),
            ]
        )
        arrived = None
        if self._on_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        tokens = step * run.config.train.global_batch_size * run.config.train.sequence_length
        self._pending.append(_Report(step, lr, numbers, arrived, tokens, run.ledger.flops))
        if len(self._pending) > (1 if self._on_cuda else 0):
            self._write(self._pending.pop(0))

    def flush(self) -> None:
        """Write what is pending; the device is waited for."""
        while self._pending:
            self._write(self._pending.pop(0))

    def _write(self, report: _Report) -> None:
        run, state = self._run, self._run.state
        if report.arrived is not None:
            report.arrived.synchronize()
        loss, norm, clipped, skipped, fraction = report.numbers.tolist()
        run.ledger.settle()
        seconds = run.ledger.seconds
        elapsed, self._seconds = max(seconds - self._seconds, 1e-9), seconds
        line: dict[str, Any] = {
            "kind": "train",
            "step": report.step,
            "tokens": report.tokens,
            "flops": report.flops,
            "seconds": seconds,
            "loss": loss,
            "lr": report.lr,
            "grad_norm": norm,
            "clipped_norm": bool(clipped),
            "tokens_per_second": run.config.train.global_batch_size * run.config.train.sequence_length / elapsed,
        }
        if run.curvature is not None and fraction >= 0:
            line["unclipped_fraction"] = fraction
        if skipped:
            line["skipped"] = True
        run.write(line)
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped or not math.isfinite(loss) else 0
        self.diverged = state.skipped_in_a_row > run.config.train.max_skipped_steps


def forward_backward(run: Run, batch: Batch) -> Tensor:
    """Accumulate the gradient of the mean loss over the global batch.

    Returns this rank's share of the mean loss: 0-D, on the device; the sum over the ranks is the mean over all tokens.
    """
    strategy, size = run.strategy, run.micro_batch_size
    tokens = torch.from_numpy(batch.tokens).to(strategy.device, non_blocking=True)
    targets = torch.from_numpy(batch.targets).to(strategy.device, non_blocking=True)
    predictions = run.config.train.global_batch_size * run.config.train.sequence_length
    share = torch.zeros((), device=strategy.device)
    for first in range(0, len(tokens), size):
        with strategy.micro_batch(last=first + size >= len(tokens)):
            loss_sum = strategy.forward(tokens[first : first + size], targets[first : first + size]).loss_sum
            assert loss_sum is not None
            strategy.backward(loss_sum / predictions)
        share += loss_sum.detach() / predictions
    return share


def train(run: Run) -> Status:
    """Train to the end of the schedule, or until the run is asked to stop or diverges."""
    config, strategy, ledger, state = run.config, run.strategy, run.ledger, run.state
    shape, length = strategy.model.config, config.train.sequence_length
    step_tokens = config.train.global_batch_size * length
    step_flops = forward_backward_flops(shape, step_tokens, length)
    reporter = Reporter(run)
    if state.step == 0:
        evaluate(run)
    first = state.step + 1
    with run.batches.prefetch(first, config.train.steps) as prefetched:
        for step in range(first, config.train.steps + 1):
            with ledger.measure("data"):
                batch = next(prefetched)

            if run.curvature is not None and run.curvature.due(step):
                flops = run.curvature.flops(shape, length)
                with ledger.measure("curvature", run.curvature.sequences * length, flops):
                    held_back = run.curvature.run(strategy, batch, step)
                ledger.bytes_communicated += run.curvature.bytes_communicated(strategy)
                reporter.flush()
                write_curvature(run, step, held_back)

            with ledger.measure("forward_backward", step_tokens, step_flops):
                loss = forward_backward(run, batch)
            ledger.bytes_communicated += strategy.bytes_communicated(len(batch.tokens) // run.micro_batch_size)

            with ledger.measure("optimizer"):
                factor = learning_rate_factor(config.schedule, step, config.train.steps)
                strategy.set_learning_rate(factor)
                statistics = strategy.step(config.train.grad_clip)

            reporter.step(step, config.optimizer.lr * factor, loss, statistics)
            state.step = step
            run.profiler_step()
            last = step == config.train.steps

            if last or step % config.eval.interval == 0:
                reporter.flush()
                evaluate(run)
            if reporter.diverged or not math.isfinite(state.final_val_loss or 0.0):
                return "diverged"
            stop = strategy.distributed.any(run.stop_requested())
            interval = config.checkpoint.interval
            if last or stop or (interval is not None and step % interval == 0):
                reporter.flush()
                with ledger.measure("checkpoint"):
                    run.save(state)
            if stop and not last:
                return "preempted"
    return "completed"


def evaluate(run: Run) -> None:
    """An eval line: the validation loss after `state.step` updates."""
    ledger, state, config = run.ledger, run.state, run.config
    with ledger.measure("evaluation"):
        loss, tokens = validation_loss(run.strategy, run.validation, run.eval_micro_batch_size)
    entry = ledger.entries["evaluation"]
    entry.tokens += tokens
    entry.flops += evaluation_flops(run.strategy.model.config, tokens, config.train.sequence_length)
    state.final_val_loss = loss
    if math.isfinite(loss) and (state.best_val_loss is None or loss < state.best_val_loss):
        state.best_val_loss = loss
    run.write({"kind": "eval", **position(run), "val_loss": loss, "val_tokens": tokens})


def write_curvature(run: Run, step: int, held_back: Tensor) -> None:
    """A hessian line about h as the step of the same number is about to use it."""
    numbers = describe_curvature(run.strategy)
    run.write({"kind": "hessian", **position(run), "step": step, "held_back": bool(held_back), **numbers})


def position(run: Run) -> dict[str, Any]:
    """Where a run stands on each axis: steps, training tokens, FLOPs, training seconds."""
    run.ledger.settle()
    tokens = run.state.step * run.config.train.global_batch_size * run.config.train.sequence_length
    return {"step": run.state.step, "tokens": tokens, "flops": run.ledger.flops, "seconds": run.ledger.seconds}
