"""The training loop, in order of execution.

    batches.at(step) → [when due: curvature pass] → forward and backward of each micro-batch → clip and step → record
    → [when due: evaluation, checkpoint]

If the strategy allows it, the curvature pass samples its labels from the training forward.

The loop does not know which strategy, optimizer or tracker it has. A signal, a full disk or a damaged shard may be seen
by one rank only. The ranks therefore agree between steps and between the forwards of an evaluation, and all stop at the
same place.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, Batches, ValidationWindows, next_batch
from models import ModelOutput
from models.flops import Flops
from sophia.diagnostics import UnclippedAlarm
from training.config import RunConfig
from training.curvature import CurvaturePass
from training.evaluation import bits_per_byte, validation_loss
from training.hardware import to_device
from training.recording.diagnostics import curvature_sums_by_kind, describe_curvature
from training.recording.ledger import Ledger
from training.records import Status
from training.reliability.guards import LossSpikes, compare_ranks
from training.schedule import learning_rate_factor
from training.strategies.base import KeepsGraphs, StepStatistics, Strategy

Line = Mapping[str, Any]


@dataclass
class TrainingState:
    """What a checkpoint holds besides weights and optimizer state. JSON values only."""

    step: int = 0
    evaluated_step: int = -1  # the step of the last evaluation; 0 is the start
    best_val_loss: float | None = None
    final_val_loss: float | None = None
    val_bytes_per_token: float | None = None  # of the validation set; None if the tokenizer is missing
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    estimates_held_back: int = 0
    loss_spikes: int = 0
    spikes: dict[str, Any] | None = None  # of LossSpikes
    alarm: dict[str, Any] | None = None  # of UnclippedAlarm


@dataclass
class Run:
    """The parts of one run, ready to train."""

    config: RunConfig
    strategy: Strategy
    batches: Batches
    validation: ValidationWindows
    curvature: CurvaturePass | None
    ledger: Ledger
    micro_batch_size: int
    eval_micro_batch_size: int
    parameters: int  # of the whole model
    flops: Flops  # of its forward, per token
    write: Callable[[Line], None]  # rank 0: to the record, the display and the trackers; other ranks: no-op
    message: Callable[[str], None]  # rank 0: print a line
    save: Callable[[TrainingState], None]  # save a checkpoint; called on every rank
    stop_requested: Callable[[], bool]  # whether this rank got a stop signal
    token_bytes: np.ndarray | None = (
        None  # (vocab_size,) the bytes of text of each id; None if the tokenizer is missing
    )
    failure: Callable[[], str | None] = lambda: None  # why this rank can no longer record, if so
    progress: Callable[[str], None] = lambda doing: None  # report progress to the watchdog
    profiler_step: Callable[[], None] = lambda: None
    state: TrainingState = field(default_factory=TrainingState)
    saved_step: int = 0  # step of the newest checkpoint; the start needs none
    reason: str | None = None  # why the run did not complete


class NotSaved(RuntimeError):
    """Raised on every rank if a checkpoint could not be written. The previous checkpoint is intact."""


class Verdict(IntEnum):
    """What the ranks agree to do next; the highest value of any rank wins."""

    GO_ON = 0
    STOP = 1  # save and end as preempted
    NO_DATA = 2  # save and end as failed
    FAIL = 3  # end as failed without saving, since the record cannot be written


@dataclass(frozen=True)
class _Report:
    """Numbers of a step or a refresh that may not have arrived from the device yet."""

    numbers: Tensor
    arrived: torch.cuda.Event | None
    step: int
    tokens: int
    flops: int
    write: Callable[["_Report"], None]


class Reporter:
    """Writes train and hessian lines, on CUDA one step late, so that reading their numbers never stalls the device.

    All ranks see the same numbers, so they agree on `diverged` without communication.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending: deque[_Report] = deque()
        self._on_cuda = run.strategy.device.type == "cuda"
        self._behind = int(self._on_cuda)  # reports that may be pending
        self._seconds = run.ledger.seconds
        guards, state = run.config.guards, run.state
        self._spikes = LossSpikes(guards.spike_deviations) if guards.spike_deviations is not None else None
        if self._spikes is not None and state.spikes is not None:
            self._spikes.load_state_dict(state.spikes)
        self._alarm = UnclippedAlarm(run.curvature.interval) if run.curvature is not None else None
        if self._alarm is not None and state.alarm is not None:
            self._alarm.load_state_dict(state.alarm)
        self.diverged = False

    def step(self, step: int, lr: float, loss: Tensor, statistics: StepStatistics) -> None:
        """Queue a step. `loss` is the mean loss over the global batch, before the update."""
        fraction = statistics.unclipped_fraction
        numbers = torch.stack(
            [
                loss,
                statistics.grad_norm.double(),
                statistics.clipped.double(),
                statistics.skipped.double(),
                fraction.double() if fraction is not None else loss.new_full((), -1.0, dtype=torch.float64),
            ]
        )
        self._queue(step, step, numbers, lambda report: self._write_step(report, lr))

    def refresh(self, step: int, held_back: Tensor) -> None:
        """Queue a curvature pass: its hessian line has h right before the step of the same number uses it."""
        numbers = curvature_sums_by_kind(self._run.strategy)
        numbers = torch.cat((held_back.to(numbers).expand(len(numbers), 1), numbers), dim=1)
        self._queue(step, step - 1, numbers, self._write_refresh)

    def flush(self) -> None:
        """Write the pending reports. Synchronizes the device."""
        while self._pending:
            self._write_next()

    def _queue(self, step: int, done: int, numbers: Tensor, write: Callable[[_Report], None]) -> None:
        """Write a report after `done` updates, or on CUDA the one before it."""
        run, arrived = self._run, None
        if self._on_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Report(numbers, arrived, step, tokens_after(run, done), run.ledger.flops, write))
        if len(self._pending) > self._behind:
            self._write_next()

    def _write_next(self) -> None:
        report = self._pending.popleft()
        if report.arrived is not None:
            report.arrived.synchronize()
        self._run.ledger.settle()
        report.write(report)

    def _write_refresh(self, report: _Report) -> None:
        run, held_back = self._run, bool(report.numbers[0, 0])
        if held_back:
            run.state.estimates_held_back += 1
            run.message(f"step {report.step}: non-finite curvature estimate skipped")
        line = {
            "kind": "hessian",
            "step": report.step,
            "tokens": report.tokens,
            "flops": report.flops,
            "seconds": run.ledger.seconds,
            "held_back": held_back,
        }
        run.write(line | describe_curvature(report.numbers[:, 1:], run.strategy.model.kinds))

    def _write_step(self, report: _Report, lr: float) -> None:
        run = self._run
        loss, norm, clipped, skipped, fraction = report.numbers.tolist()
        seconds = run.ledger.seconds
        elapsed, self._seconds = max(seconds - self._seconds, 1e-9), seconds
        line: dict[str, Any] = {
            "kind": "train",
            "step": report.step,
            "tokens": report.tokens,
            "flops": report.flops,
            "seconds": seconds,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "clipped_norm": bool(clipped),
            "tokens_per_second": run.config.train.global_batch_size * run.config.train.sequence_length / elapsed,
        }
        if run.curvature is not None and fraction >= 0:
            line["unclipped_fraction"] = fraction
        if skipped:
            line["skipped"] = True
        run.write(line)
        self._guard(report.step, loss, skipped=bool(skipped), fraction=line.get("unclipped_fraction"))

    def _guard(self, step: int, loss: float, *, skipped: bool, fraction: float | None) -> None:
        """Count skipped steps, and record events for skipped steps, loss spikes and the alarm."""
        run, state = self._run, self._run.state
        state.skipped_steps += skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
        allowed = run.config.train.max_skipped_steps
        if skipped:
            what = "gradient" if math.isfinite(loss) else "loss"
            run.message(
                f"step {step}: {what} is not finite, step skipped ({state.skipped_in_a_row} in a row, "
                f"{allowed} allowed)"
            )
        if state.skipped_in_a_row > allowed and not self.diverged:
            self.diverged = True
            run.reason = f"{state.skipped_in_a_row} non-finite steps in a row, up to step {step}"
        if self._spikes is not None:
            spike = self._spikes.observe(loss)
            state.spikes = self._spikes.state_dict()
            if spike is not None:
                state.loss_spikes += 1
                run.write({"kind": "event", "event": "loss_spike", "step": step, **spike})
                run.message(f"step {step}: loss spike, {loss:.4f} instead of the expected {spike['expected']:.4f}")
        if self._alarm is not None and fraction is not None:
            alarm = self._alarm.observe(step, fraction)
            state.alarm = self._alarm.state_dict()
            if alarm is not None:
                run.write({"kind": "event", "event": "all_clipped", "step": step, "reason": alarm})
                run.message(alarm)


def forward_backward(
    run: Run, batch: Batch, first: int = 0, forward: Callable[[Tensor, Tensor], ModelOutput] | None = None
) -> Tensor:
    """Accumulate the gradient of the mean loss over the global batch, starting at this rank's sequence `first`.

    Args:
        forward: replaces the strategy's forward, whose last backward reduces the gradients over the ranks.

    Returns:
        This rank's share of the mean loss, 0-D on the device. The shares of all ranks add up to the mean over all tokens.
    """
    strategy, size = run.strategy, run.micro_batch_size
    forward = forward or strategy.forward
    tokens, targets = to_device(batch.tokens, strategy.device), to_device(batch.targets, strategy.device)
    predictions = run.config.train.global_batch_size * run.config.train.sequence_length
    share = torch.zeros((), device=strategy.device)
    for start in range(first, len(tokens), size):
        run.progress(f"at step {run.state.step + 1}, sequence {start} of {len(tokens)}")
        with strategy.micro_batch(last=start + size >= len(tokens)):
            loss_sum = forward(tokens[start : start + size], targets[start : start + size]).loss_sum
            assert loss_sum is not None
            strategy.backward(loss_sum / predictions)
        share += loss_sum.detach() / predictions
    return share


def forward_backward_refresh(
    run: Run, curvature: CurvaturePass, strategy: KeepsGraphs, batch: Batch, step: int
) -> tuple[Tensor, Tensor]:
    """`forward_backward` with a curvature pass that samples its labels from the same forward.

    Returns this rank's share of the mean loss, and 1 if a non-finite estimate was skipped, else 0.
    """
    ledger, config = run.ledger, run.config.train
    length, predictions = config.sequence_length, config.global_batch_size * config.sequence_length
    share, done, held_back = curvature.run_within_training(strategy, batch, step, predictions, ledger)
    flops = curvature.flops(run.flops, length, shared_forward=True)
    ledger.add("curvature", curvature.tokens(length), flops)
    ledger.shared_forwards += 1
    rows = len(batch.tokens)
    with ledger.measure("forward_backward", part=True):
        if curvature.covers_batch(rows, strategy.distributed.world_size):
            # A rank without remaining sequences has no last micro-batch to reduce in: all ranks reduce explicitly.
            share += forward_backward(run, batch, done, strategy.forward_locally)
            strategy.reduce_gradients()
        else:
            share += forward_backward(run, batch, done)
    return share, held_back


def train(run: Run) -> Status:
    """Train to the end of the schedule, or until the run is told to stop, fails or diverges.

    Raises:
        NotSaved: a checkpoint could not be written.
        RanksDiffer: the ranks' weights differ; these weights are not saved.
    """
    config, strategy, ledger, state = run.config, run.strategy, run.ledger, run.state
    length = config.train.sequence_length
    step_tokens = config.train.global_batch_size * length
    step_flops = run.flops.forward_backward(step_tokens)
    reporter = Reporter(run)
    first = state.step + 1
    # At the start, or if the run was interrupted before this evaluation.
    if evaluation_due(run):
        if (verdict := evaluate(run)) is not Verdict.GO_ON:
            return end_early(run, verdict)
        if validation_diverged(run):
            return "diverged"
    unsaved = False  # a checkpoint is due, but delayed until a step is not skipped
    with run.batches.prefetch(first, config.train.steps) as prefetched:
        for step in range(first, config.train.steps + 1):
            run.progress(f"waiting for the batch of step {step}")
            with ledger.measure("data"):  # with the wait for the rank whose batch comes last
                batch, problem = next_batch(prefetched)
                verdict = agree(run, problem)
            if verdict is not Verdict.GO_ON:
                reporter.flush()
                return "diverged" if reporter.diverged else end_early(run, verdict)
            assert batch is not None

            run.progress(f"at step {step}")
            curvature = run.curvature if run.curvature is not None and run.curvature.due(step) else None
            if curvature is not None and curvature.shares_forward(strategy):
                loss, held_back = forward_backward_refresh(run, curvature, strategy, batch, step)
                ledger.add("forward_backward", step_tokens, step_flops)
            else:
                if curvature is not None:
                    flops = curvature.flops(run.flops, length)
                    with ledger.measure("curvature", curvature.tokens(length), flops):
                        held_back = curvature.run(strategy, batch, step)
                with ledger.measure("forward_backward", step_tokens, step_flops):
                    loss = forward_backward(run, batch)
            if curvature is not None:
                ledger.bytes_communicated += curvature.bytes_communicated(strategy)
                reporter.refresh(step, held_back)
            ledger.bytes_communicated += strategy.bytes_communicated(len(batch.tokens) // run.micro_batch_size)

            with ledger.measure("optimizer"):
                factor = learning_rate_factor(config.schedule, step, config.train.steps)
                strategy.set_learning_rate(factor)
                mean_loss = strategy.distributed.all_reduce(loss.double())
                statistics = strategy.step(config.train.grad_clip, mean_loss)

            reporter.step(step, config.optimizer.lr * factor, mean_loss, statistics)
            state.step = step
            run.profiler_step()
            last = step == config.train.steps
            interval = config.checkpoint.interval
            unsaved |= (interval is not None and step % interval == 0) or step in config.checkpoint.export_at
            evaluates = evaluation_due(run)

            if evaluates or last or unsaved or reporter.diverged:
                reporter.flush()
            if reporter.diverged:
                return "diverged"
            if evaluates:
                if (verdict := evaluate(run)) is not Verdict.GO_ON:  # a resumed run evaluates first
                    return end_early(run, verdict)
                if validation_diverged(run):
                    return "diverged"
            if last or unsaved:
                # Weights may be broken while steps are skipped: keep the last good checkpoint the newest.
                if last or state.skipped_in_a_row == 0:
                    save(run)
                    unsaved = False
            elif config.guards.weights_interval is not None and step % config.guards.weights_interval == 0:
                compare_ranks(strategy)
    return "completed" if agree(run, None) is not Verdict.FAIL else "failed"


def agree(run: Run, problem: str | None) -> Verdict:
    """Return what all ranks do next. `problem` is the reason why this rank has no data, if so."""
    mine = Verdict.STOP if run.stop_requested() else Verdict.GO_ON
    if problem is not None:
        mine = Verdict.NO_DATA
    if (failure := run.failure()) is not None:
        mine, problem = Verdict.FAIL, failure
    verdict = Verdict(run.strategy.distributed.highest(mine))
    if verdict >= Verdict.NO_DATA:
        run.reason = next(filter(None, run.strategy.distributed.gather_objects(problem)))
    return verdict


def end_early(run: Run, verdict: Verdict) -> Status:
    """Save a checkpoint if the newest one is older and the record can be written. Returns the run's status."""
    if verdict is not Verdict.FAIL and run.saved_step < run.state.step:
        save(run)
    return "preempted" if verdict is Verdict.STOP else "failed"


def evaluation_due(run: Run) -> bool:
    step, config = run.state.step, run.config
    due = step % config.eval.interval == 0 or step == config.train.steps
    return due and run.state.evaluated_step < step


def evaluate(run: Run) -> Verdict:
    """Write an eval line: the validation loss after `state.step` updates. Stops without one if a rank has to stop.

    The whole validation set may take longer than a cluster's grace period after its signal.
    """
    ledger, state = run.ledger, run.state
    verdict = Verdict.GO_ON

    def interrupted(problem: str | None) -> bool:
        nonlocal verdict
        verdict = agree(run, problem)
        return verdict is not Verdict.GO_ON

    run.progress(f"evaluating after step {state.step}")
    with ledger.measure("evaluation", part=True), run.strategy.evaluating():
        found = validation_loss(
            run.strategy, run.validation, run.eval_micro_batch_size, run.progress, interrupted, run.token_bytes
        )
    if found is None:
        return verdict
    loss, tokens, size = found
    ledger.add("evaluation", tokens, run.flops.evaluation(tokens))
    state.evaluated_step = state.step
    state.final_val_loss = loss
    if math.isfinite(loss) and (state.best_val_loss is None or loss < state.best_val_loss):
        state.best_val_loss = loss
    line: dict[str, Any] = {"kind": "eval", **position(run), "val_loss": loss, "val_tokens": tokens}
    if size:
        state.val_bytes_per_token = size / tokens
        line["val_bits_per_byte"] = bits_per_byte(loss, state.val_bytes_per_token)
    run.write(line)
    return Verdict.GO_ON


def validation_diverged(run: Run) -> bool:
    """Return whether the last validation loss is not finite, and if so set the run's `reason`."""
    if math.isfinite(run.state.final_val_loss or 0.0):
        return False
    run.reason = f"the validation loss after step {run.state.step} is not finite"
    return True


def save(run: Run) -> None:
    """Save a checkpoint after `state.step` updates, once the ranks' weights are checked to be equal."""
    run.progress(f"saving after step {run.state.step}")
    with run.ledger.measure("checkpoint"):
        if run.config.guards.weights_interval is not None:
            compare_ranks(run.strategy)
        try:
            run.save(run.state)
        except OSError as error:
            raise NotSaved(error.strerror or str(error)) from error
    run.saved_step = run.state.step


def position(run: Run) -> dict[str, Any]:
    """Return the run's position on each axis: steps, training tokens, FLOPs, training seconds."""
    run.ledger.settle()
    tokens = tokens_after(run, run.state.step)
    return {"step": run.state.step, "tokens": tokens, "flops": run.ledger.flops, "seconds": run.ledger.seconds}


def tokens_after(run: Run, steps: int) -> int:
    """Return the number of training tokens of so many updates."""
    return steps * run.config.train.global_batch_size * run.config.train.sequence_length
