"""Is an optimizer what it says? Checks of its behaviour on a tiny model, before a run of hours depends on it.

Some checks train the model in the project's step (clip, skipping, curvature pass); the others feed the optimizer gradients
drawn at random, so that it can be compared with itself or with another optimizer coordinate by coordinate.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import Batch
from models import GPT2, GPT2Config
from training import factories
from training.compose import compose
from training.config import (
    SQUARED_GRADIENTS,
    ConfigurationError,
    DeepSpeedConfig,
    ExternalConfig,
    FSDPConfig,
    RunConfig,
    refuse_impossible_pairs,
)
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.optimizers import build_optimizers
from training.strategies.base import NumberPiece, Piece, StepStatistics
from training.strategies.ddp import DDP
from training.strategies.gradients import clip_and_step, update_hessian
from training.strategies.state import changed_numbers
from training.weights import InitialWeights

Result = Literal["pass", "note", "fail"]

SHAPE = GPT2Config(vocab_size=128, n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True)
BATCH = 8
STEPS = 40  # of the check that the loss falls
# A round trip after step CUT is within any period of 2 to 6 or 10 steps, and step END is in a later one.
CUT, END = 13, 25
SAME = 3e-3  # nats per token: what micro-batches and ranks may change a loss by, through rounding
SINGLE = Distributed(0, 0, 1, torch.device("cpu"))
# The model of the speed check: two million coordinates in a few tensors.
SPEED_SHAPE = GPT2Config(vocab_size=2048, n_layer=2, n_head=2, n_embd=256, block_size=64, bias=True)
ROUNDS = 15


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    result: Result
    detail: str


def check(overrides: Sequence[str], reference: str | None = None) -> Iterator[Check]:
    """Yield the checks of the optimizer that the overrides choose, in order; some take seconds.

    An exception of the optimizer fails the check, and the others follow.

    Args:
        overrides: of train.py, such as optimizer=lion optimizer.lr=1e-4.
        reference: an optimizer= of this project to compare the trajectory with.

    Raises:
        ConfigurationError: the configuration is invalid, or the optimizer cannot be built.
    """
    config = configured(overrides)
    Fed(config)  # raises if it cannot be built
    checks: dict[str, Callable[[RunConfig], Check | Iterator[Check]]] = {
        "loss falls": _loss_falls,
        "randomness": _randomness,
        "micro-batches": lambda one: _same_curve("micro-batches", "of 2 sequences", one, curve(one, 5, micro=2)),
        "ranks": lambda one: _same_curve("ranks", "two processes", one, _on_two_ranks(overrides)),
        "learning rate": _learning_rate,
        "weight decay": _weight_decay,
        "state_dict": _state_dict,
        "checkpoint": _checkpoint,
        "non-finite gradient": _non_finite,
        "state": _state,
        "elementwise": _elementwise,
        "curvature": _curvature,
        "host waits": _synchronizations,
        "speed": _speed,
    }
    if reference is not None:
        checks[f"like {reference}"] = partial(_trajectory, reference=reference)
    for name, run in checks.items():
        try:
            found = run(config)
            yield from [found] if isinstance(found, Check) else found
        except Exception as error:
            yield Check(name, "fail", _told(error, config))


def _told(error: Exception, config: RunConfig) -> str:
    """Return what a failed check says: the exception, and whether the step raises it because it needs a closure."""

    def raised(*closure: Callable[[], float]) -> str | None:
        fed = Fed(config)
        fed.give(1)
        try:
            for optimizer in fed.optimizers:
                optimizer.step(*closure)
        except Exception as error:
            return _said(error)
        return None

    said = _said(error)
    if raised() == said != raised(lambda: 1.0):
        return (
            f"its step needs a closure ({said}), which the loop does not give; choose an optimizer whose step() takes the "
            "gradients as they are"
        )
    return said


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ConfigurationError) else factories.said(error)


def configured(overrides: Sequence[str]) -> RunConfig:
    return compose([*overrides, "model=gpt2_nano", "train.device=cpu", "train.precision=fp32"])


# In the project's step.


class Trainer:
    """The optimizer in the project's step, with a tiny model, in one process or as one rank of several."""

    def __init__(self, config: RunConfig, distributed: Distributed = SINGLE, micro: int = BATCH) -> None:
        self.strategy = DDP(distributed, bf16=False, compile_model=False)
        self.curvature = CurvaturePass.of(config.optimizer, 0, BATCH, micro)
        self._clip, self._micro = config.train.grad_clip, micro
        with torch.device("meta"):
            model = GPT2(SHAPE)
        weights = InitialWeights(config.model, model, 0)
        self.strategy.prepare(model, weights, build_optimizers(config.optimizer, compile_step=False))

    def step(self, step: int, factor: float = 1.0, *, poison: bool = False) -> tuple[float, StepStatistics]:
        """Make step 1, 2, …; return the mean loss of the batch before it, and the step's statistics."""
        strategy, predictions = self.strategy, BATCH * SHAPE.block_size
        batch = _batch(step, strategy.distributed.rank, strategy.distributed.world_size)
        if self.curvature is not None and self.curvature.due(step):
            self.curvature.run(strategy, batch, step)
        share = torch.zeros(())
        for start in range(0, len(batch.tokens), self._micro):
            tokens, targets = (torch.from_numpy(part[start : start + self._micro]) for part in batch[:2])
            with strategy.micro_batch(last=start + self._micro >= len(batch.tokens)):
                loss_sum = strategy.forward(tokens, targets).loss_sum
                assert loss_sum is not None
                strategy.backward(loss_sum / predictions)
            share += loss_sum.detach() / predictions
        if poison:
            next(iter(strategy.parameters().values())).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        loss = strategy.distributed.all_reduce(share.double())
        strategy.set_learning_rate(factor)
        return float(loss), strategy.step(self._clip, loss)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.strategy.parameters().items()}


def _batch(step: int, rank: int, world_size: int) -> Batch:
    """Return a rank's sequences of a language whose next token is mostly 5 x + 1."""
    rng = np.random.default_rng(step)
    rows = np.empty((BATCH, SHAPE.block_size + 1), dtype=np.int64)
    rows[:, 0] = rng.integers(0, SHAPE.vocab_size, BATCH)
    for place in range(SHAPE.block_size):
        noise = np.where(rng.random(BATCH) < 0.1, rng.integers(0, SHAPE.vocab_size, BATCH), 0)
        rows[:, place + 1] = (5 * rows[:, place] + 1 + noise) % SHAPE.vocab_size
    own = np.arange(rank, BATCH, world_size)
    return Batch(rows[own, :-1], rows[own, 1:], own)


def curve(config: RunConfig, steps: int, distributed: Distributed = SINGLE, micro: int = BATCH) -> list[float]:
    """Return the loss before each of the first steps."""
    trainer = Trainer(config, distributed, micro)
    return [trainer.step(step)[0] for step in range(1, steps + 1)]


def _loss_falls(config: RunConfig) -> Check:
    losses = curve(config, STEPS)
    start, end = losses[0], statistics.mean(losses[-5:])
    detail = f"{start:.3f} to {end:.3f} nats in {STEPS} steps at lr={config.optimizer.lr:g}"
    if not math.isfinite(end):
        return Check("loss falls", "fail", f"the loss is not finite after {STEPS} steps at lr={config.optimizer.lr:g}")
    if end < start - 0.02:
        return Check("loss falls", "pass", detail)
    return Check("loss falls", "fail", f"{detail}: it does not fall; try another optimizer.lr")


def _same_curve(name: str, how: str, config: RunConfig, other: Sequence[float]) -> Check:
    losses = curve(config, len(other))
    apart = [abs(a - b) for a, b in zip(losses, other, strict=True)]
    first = next((step for step, value in enumerate(apart, start=1) if not value <= SAME), None)
    if first is None:
        return Check(name, "pass", f"{how}: losses equal to {max(apart):.1e} nats over {len(other)} steps")
    return Check(name, "fail", f"{how}: from step {first} on the loss differs, by {apart[first - 1]:.2g} nats")


def _on_two_ranks(overrides: Sequence[str], steps: int = 5) -> list[float]:
    """Return the curve of two processes with half of the batch each.

    Raises:
        ConfigurationError: with what the first process that fails says.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            mp.spawn(_rank, (directory, [*overrides], steps), nprocs=2)
        except mp.ProcessRaisedException as error:  # ends with a line "<class>: <what _rank says>"
            raise ConfigurationError(str(error).strip().rpartition("\n")[2].partition(": ")[2]) from error
        return list(map(float, json.loads(Path(directory, "losses.json").read_text())))


def _rank(rank: int, directory: str, overrides: list[str], steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # ranks of a run do not share a generator
    try:
        losses = curve(configured(overrides), steps, Distributed(rank, rank, 2, torch.device("cpu"), joined=True))
    except Exception as error:
        raise ConfigurationError(_said(error)) from error
    if rank == 0:
        Path(directory, "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def _checkpoint(config: RunConfig) -> Check:
    through, resumed = Trainer(config), Trainer(config)
    for step in range(1, CUT + 1):
        through.step(step)
    resumed.strategy.load(_Pieces(through.strategy.pieces()))
    part = _parted(through, resumed)
    if part is None:
        return Check("checkpoint", "pass", "a run resumed from the run's own checkpoint has the same bits")
    return Check("checkpoint", "fail", f"a run resumed from a checkpoint has other weights: {part}")


class _Pieces:
    """A checkpoint in memory."""

    def __init__(self, pieces: Iterator[Piece | NumberPiece]) -> None:
        self._tensors: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        self._numbers: dict[str, Any] = {}
        for piece in pieces:
            if isinstance(piece, Piece):
                self._tensors[piece.name] = (piece.shape, piece.values.detach().clone())
            else:
                self._numbers[piece.name] = piece.value

    def numbers(self) -> Mapping[str, Any]:
        return self._numbers

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name][1].dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name][1][start:stop]


def _non_finite(config: RunConfig) -> Check:
    trainer = Trainer(config)
    for step in range(1, 3):
        trainer.step(step)
    before, state = trainer.weights(), _Pieces(trainer.strategy.pieces())
    _, told = trainer.step(3, poison=True)
    part = _first_difference(before, trainer.weights())
    after = _Pieces(trainer.strategy.pieces())
    changed = [
        name
        for name in state.names()
        if name.startswith("optimizer.") and not torch.equal(state._tensors[name][1], after._tensors[name][1])
    ]
    curvature = trainer.curvature is not None and trainer.curvature.due(3)
    if part is not None or (changed and not curvature):
        return Check("non-finite gradient", "fail", f"it changes {part or changed[0]}: the step must change nothing")
    if not bool(told.skipped):
        return Check("non-finite gradient", "fail", "the step is not counted as skipped")
    return Check("non-finite gradient", "pass", "weights and state stay as they were")


# With gradients drawn at random.


class Fed:
    """The optimizer over the tiny model's parameters, with gradients from outside."""

    def __init__(self, config: RunConfig, shape: GPT2Config = SHAPE, *, compile_step: bool = False) -> None:
        self.parameters = {name: nn.Parameter(p.detach().clone()) for name, p in _model(shape).items()}
        self._shapes = [p.shape for p in self.parameters.values()]
        self.optimizers = build_optimizers(config.optimizer, compile_step=compile_step)(self.parameters)
        curvature = config.optimizer.curvature
        self.interval = None if curvature is None else curvature.hessian_interval
        self._squares = curvature is not None and curvature.estimator in SQUARED_GRADIENTS

    def step(self, step: int, factor: float = 1.0, estimate_scale: float = 1.0) -> None:
        """Make step 1, 2, … with gradients, and estimates if due, that depend on the step alone."""
        if self.interval is not None and (step - 1) % self.interval == 0:
            self.refresh(1_000_000 + step, estimate_scale)
        self.give(step)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * factor
        clip_and_step(self.optimizers, None)

    def give(self, key: int) -> None:
        """Set the gradients of a step; part of them is the same in all, as Prodigy's rate grows with the distance moved."""
        for parameter, value, common in zip(self.parameters.values(), self.drawn(key), self.drawn(0), strict=True):
            parameter.grad = 1e-2 * (value + common)

    def refresh(self, key: int, scale: float = 1.0) -> None:
        """Fold estimates of a scale that depend on the key alone, given as the run's estimator gives them."""
        estimates = [scale * value.abs() for value in self.drawn(key)]
        if not self._squares:
            update_hessian(self.optimizers, self.parameters.values(), None, estimates)
            return
        for parameter, estimate in zip(self.parameters.values(), estimates, strict=True):
            parameter.grad = estimate.sqrt()
        update_hessian(self.optimizers, self.parameters.values(), 1, None)

    def drawn(self, key: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(key)
        return [torch.randn(shape, generator=generator) for shape in self._shapes]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def states(self) -> Iterator[tuple[str, Any]]:
        """Yield ("<parameter>.<key>", value) of the optimizers' state, with the members of lists and tuples."""
        for name, parameter in self.parameters.items():
            for optimizer in self.optimizers:
                yield from _members(optimizer.state.get(parameter, {}), name)


class Shard(Fed):
    """One of two ranks that share every parameter, in flat parts, with the groups of the whole parameters."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        super().__init__(config)
        self._rank = rank
        whole = self.parameters
        self.parameters = {name: nn.Parameter(self.cut(parameter)) for name, parameter in whole.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self.parameters[name] for name in group["names"]]
            for name, parameter in whole.items():
                if parameter in optimizer.state:  # made at construction
                    optimizer.state[self.parameters[name]] = {
                        key: self.cut(value) if isinstance(value, Tensor) and value.shape == parameter.shape else value
                        for key, value in optimizer.state.pop(parameter).items()
                    }

    def cut(self, whole: Tensor) -> Tensor:
        """(n) this rank's part, which begins or ends within a row."""
        flat = whole.detach().flatten()
        return flat.tensor_split([len(flat) // 3 + 1])[self._rank].clone()

    def drawn(self, key: int) -> list[Tensor]:
        return [self.cut(value) for value in super().drawn(key)]


def _members(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _members(member, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            yield from _members(member, f"{path}[{index}]")
    else:
        yield path, value


def _model(shape: GPT2Config) -> dict[str, Tensor]:
    return dict(GPT2(shape).named_parameters())


def _learning_rate(config: RunConfig) -> Check:
    """Compare the size of the third step at the full rate, at half of it, and at zero."""
    moved = {}
    for factor in (1.0, 0.5, 0.0):
        fed = Fed(config)
        for step in (1, 2):
            fed.step(step)
        before = fed.weights()
        fed.step(3, factor)
        moved[factor] = _distance(before, fed.weights())
    share = moved[0.5] / moved[1.0] if moved[1.0] else math.nan
    detail = f"at half the rate a step has {share:.2f} of its size"
    if moved[0.0] == 0 and abs(share - 0.5) < 0.02:
        return Check("learning rate", "pass", detail)
    if share < 0.8 and moved[0.0] < moved[1.0]:
        detail += f", and {moved[0.0] / moved[1.0]:.2f} at zero: something else moves the weights too"
        return Check("learning rate", "note", detail)
    return Check("learning rate", "fail", f"{detail}: it ignores a schedule that changes group['lr']")


def _weight_decay(config: RunConfig) -> Check:
    """Compare one step with and without weight decay, from the same weights, with the same gradients."""
    if not config.optimizer.weight_decay:
        return Check("weight decay", "note", "optimizer.weight_decay=0: not measured")
    decay, rate = 1.0, config.optimizer.lr
    rivals = [
        Fed(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"weight_decay": value})}))
        for value in (decay, 0.0)
    ]
    matrices = [name for name, p in rivals[0].parameters.items() if p.dim() == 2 and "embedding" not in name]
    weights = torch.cat([rivals[0].parameters[name].detach().double().flatten() for name in matrices])
    for step in (1, 2):  # some skip the first
        for fed in rivals:
            fed.step(step)
        with_decay, without = (
            torch.cat([fed.parameters[name].detach().double().flatten() for name in matrices]) for fed in rivals
        )
        difference = with_decay - without
        if float(difference.norm()):
            break
    coefficient = -float(difference @ weights / (weights @ weights))
    rest = float((difference + coefficient * weights).norm() / max(float(difference.norm()), 1e-30))
    if float(difference.norm()) == 0:
        return Check("weight decay", "fail", "it has no effect on the matrices")
    if rest > 0.2:  # some decay the weights after the step
        full = -rate * decay * weights
        masked = torch.where(difference.abs() > full.abs() / 2, full, 0.0)
        if float((difference - masked).norm() / difference.norm()) < 0.02:
            share = float((masked != 0).double().mean())
            detail = f"decoupled and masked: lr · weight_decay · θ on {share:.0%} of the coordinates"
            return Check("weight decay", "pass", detail)
        return Check("weight decay", "fail", "it is coupled: it goes into the gradient, and is rescaled with it")
    share = coefficient / (rate * decay)
    if abs(share - 1) < 0.02:
        return Check("weight decay", "pass", "decoupled, lr · weight_decay · θ")
    return Check("weight decay", "note", f"decoupled, but {share:.2g} times lr · weight_decay · θ")


# A count of `sophia` for its warnings; a resumed run begins it again.
HOST_COUNTS = ("_steps_since_refresh",)


def _state_dict(config: RunConfig) -> Check:
    through, resumed = Fed(config), Fed(config)
    before = [{**vars(optimizer)} for optimizer in through.optimizers]
    for step in range(1, CUT + 1):
        through.step(step)
    counts = [
        f"{type(optimizer).__qualname__}.{name}"
        for optimizer, values in zip(through.optimizers, before, strict=True)
        for name, value in vars(optimizer).items()
        if type(value) in (int, float) and value != values.get(name) and name not in HOST_COUNTS
    ]
    for name, parameter in resumed.parameters.items():
        parameter.data.copy_(through.parameters[name].data)
    for source, target in zip(through.optimizers, resumed.optimizers, strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    part = _parted(through, resumed)
    beside = f"{', '.join(counts)} changes from step to step and is not saved: keep it in state or param_groups"
    if part is not None:
        lost = beside if counts else "state is lost"
        return Check("state_dict", "fail", f"after a round trip the next steps differ: {part}; {lost}")
    if counts:
        return Check("state_dict", "note", beside)
    return Check("state_dict", "pass", "a round trip leaves every bit of the next steps")


def _state(config: RunConfig) -> Check:
    fed = Fed(config)
    sizes = []
    for step in range(1, 7):
        fed.step(step)
        sizes.append(sum(v.nbytes for _, v in fed.states() if isinstance(v, Tensor)))
    tensors = [(name, value) for name, value in fed.states() if isinstance(value, Tensor)]
    parameters = sum(p.numel() for p in fed.parameters.values())
    bad = [name for name, value in tensors if value.is_floating_point() and not bool(value.isfinite().all())]
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for _, value in tensors if value.numel() > 1})
    keys = sorted(
        {name.removeprefix(f"{p}.") for p in fed.parameters for name, _ in tensors if name.startswith(f"{p}.")}
    )
    detail = (
        f"{sizes[-1] / parameters:.1f} bytes per parameter, {', '.join(dtypes) or 'no tensors'} ({', '.join(keys)})"
    )
    if bad:
        return Check("state", "fail", f"{bad[0]} is not finite")
    if sizes[-1] > sizes[2]:
        return Check("state", "fail", f"{detail}: it grows from step to step")
    return Check("state", "pass", detail)


def _randomness(config: RunConfig) -> Check:
    ends = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fed = Fed(config)
            for step in range(1, CUT + 1):
                fed.step(step)
            ends.append(fed.weights())
    part = _first_difference(*ends[:2])
    if part is not None:
        return Check(
            "randomness",
            "fail",
            f"the same steps under the same seed differ ({part}): something outside of its state changes them, such as a "
            "count of the class or module",
        )
    part = _first_difference(*ends[1:])
    if part is None:
        return Check("randomness", "pass", "none: a step is a function of weights, gradients and state")
    return Check(
        "randomness",
        "fail",
        f"it draws from torch's global generator ({part}), which differs between ranks: replicas drift apart, and the curve "
        "depends on their number; draw from a function of seed, step, name and position (sophia.random)",
    )


def _elementwise(config: RunConfig) -> Check:
    """Step every parameter as a whole, and in two flat parts, each with an optimizer of its own as on two ranks."""
    whole = Fed(config)
    made = any(optimizer.state for optimizer in whole.optimizers)
    for step in range(1, CUT + 1):
        whole.step(step)
    try:
        other = _other_in_parts(config, whole)
    except Exception:
        other = "it needs whole matrices"
    counts = any(changed_numbers(group) for optimizer in whole.optimizers for group in optimizer.param_groups)
    strategies = strategies_of(config, elementwise=other is None, in_parts=not (made or counts))
    if other is None:
        return Check("elementwise", "pass", f"yes: strategies {strategies}")
    return Check("elementwise", "note", f"no, {other}: strategies {strategies}")


def _other_in_parts(config: RunConfig, whole: Fed) -> str | None:
    """Return what differs between the steps of parts and those of the whole."""
    for rank in (0, 1):
        shard = Shard(config, rank)
        start = shard.weights()
        for step in range(1, CUT + 1):
            shard.step(step)
        for name, part in shard.weights().items():
            expected = shard.cut(whole.parameters[name])
            moved = float((expected - start[name]).abs().max())
            if not torch.allclose(part, expected, rtol=1e-6, atol=1e-3 * moved):
                return f"a part of {name} alone gets other steps"
    return None


def strategies_of(config: RunConfig, *, elementwise: bool, in_parts: bool = True) -> str:
    """Return the strategies that a configuration with this optimizer may choose.

    Args:
        in_parts: whether it can step in parts made later, as under DeepSpeed: a step changes no numbers in `param_groups`,
            and no state is made at construction.
    """
    optimizer = config.optimizer
    if isinstance(optimizer, ExternalConfig):
        optimizer = optimizer.model_copy(update={"elementwise": elementwise})

    def works(strategy: FSDPConfig | DeepSpeedConfig) -> bool:
        try:
            refuse_impossible_pairs(config.model_copy(update={"optimizer": optimizer, "strategy": strategy}))
        except ValueError:
            return False
        return in_parts or not isinstance(strategy, DeepSpeedConfig)

    strategies = ["single", "ddp", *(["fsdp"] if works(FSDPConfig(name="fsdp")) else [])]
    if works(DeepSpeedConfig(name="deepspeed", zero_stage=3)):
        strategies.append("deepspeed")
    elif works(DeepSpeedConfig(name="deepspeed", zero_stage=2)):
        strategies.append("deepspeed (ZeRO 1, 2)")
    return ", ".join(strategies)


def _curvature(config: RunConfig) -> Iterator[Check]:
    """An optimizer that gets curvature estimates has to use them, keep them between refreshes, and scale them with N."""
    curvature = config.optimizer.curvature
    if curvature is None:
        return
    ends = []
    for scale in (1e-6, 1e6):
        fed = Fed(config)
        for step in (1, 2, 3):
            fed.step(step, estimate_scale=scale)
        ends.append(fed.weights())
    if _first_difference(*ends) is None:
        yield Check("curvature is used", "fail", "no: the steps do not depend on the estimates (momentum-sign?)")
    else:
        yield Check("curvature is used", "pass", "the steps depend on the estimates")

    fed = Fed(config)
    fed.step(1)
    fed.refresh(7)
    before = {name: value.clone() for name, value in fed.states() if isinstance(value, Tensor)}
    fed.refresh(8, scale=100)
    of_curvature = [n for n, v in fed.states() if isinstance(v, Tensor) and not torch.equal(v, before[n])]
    kept = {name: value.clone() for name, value in fed.states() if name in of_curvature}
    for step in range(2, 2 + max(1, (fed.interval or 2) - 1)):
        if (step - 1) % (fed.interval or 1):
            fed.step(step)
    changed = [name for name, value in fed.states() if name in kept and not torch.equal(value, kept[name])]
    if not of_curvature:
        yield Check("curvature is kept", "fail", "update_hessian changes no state")
    elif changed and (fed.interval or 1) > 1:
        yield Check("curvature is kept", "fail", f"step() changes {changed[0]}: does it square the training gradient?")
    else:
        yield Check("curvature is kept", "pass", "only update_hessian changes it")

    if curvature.estimator not in SQUARED_GRADIENTS:
        return
    states = []
    for predictions, scale in ((100, 1.0), (400, 0.5)):  # N g² is the same
        fed = Fed(config)
        for parameter, value in zip(fed.parameters.values(), fed.drawn(9), strict=True):
            parameter.grad = scale * value
        update_hessian(fed.optimizers, fed.parameters.values(), predictions, None)
        states.append({name: value for name, value in fed.states() if isinstance(value, Tensor) and value.numel() > 1})
    apart = [n for n, v in states[0].items() if not torch.allclose(v, states[1][n], rtol=1e-4, atol=0)]
    if apart:
        yield Check("number of predictions", "fail", f"{apart[0]} is not N g²: N is ignored or miscounted")
    else:
        yield Check("number of predictions", "pass", "ĥ = N g²")


class _Reads(TorchDispatchMode):
    """Counts the operations that read a tensor back to the host, except numbers that the host made."""

    def __init__(self, on_host: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._on_host = [*on_host]  # kept, so that no other tensor gets their place in memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.count += not any(args[0].data_ptr() == known.data_ptr() for known in self._on_host)
        result = function(*args, **(kwargs or {}))
        made = name == "aten::lift_fresh" or not any(
            isinstance(one, Tensor) for one in args
        )  # lift_fresh: torch.tensor
        if isinstance(result, Tensor) and made:
            self._on_host.append(result)
        return result


def _synchronizations(config: RunConfig) -> Check:
    fed = Fed(config)
    for step in (1, 2):
        fed.step(step)
    fed.give(3)
    counts = [v for _, v in fed.states() if isinstance(v, Tensor) and v.numel() == 1]
    with _Reads(counts) as reads:
        for optimizer in fed.optimizers:
            optimizer.step()
    detail = f"{reads.count} reads of a tensor by the host in a step, {len(fed.parameters)} tensors"
    if reads.count >= len(fed.parameters) / 2:
        return Check("host waits", "fail", f"{detail}: on a GPU each waits for the device")
    return Check("host waits", "pass" if reads.count == 0 else "note", detail)


def _speed(config: RunConfig) -> Check:
    adamw = compose(["optimizer=adamw", "model=gpt2_nano"])
    rivals = [Fed(one, SPEED_SHAPE, compile_step=True) for one in (config, adamw)]
    seconds: list[list[float]] = [[], []]
    for fed in rivals:
        fed.step(1)
        fed.give(2)
    with warnings.catch_warnings(action="ignore"):  # of stale curvature
        for turn in range(ROUNDS + 3):
            for fed, own in zip(rivals, seconds, strict=True):
                start = time.perf_counter()
                for optimizer in fed.optimizers:
                    optimizer.step()
                if turn >= 3:
                    own.append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    size = sum(p.numel() for p in rivals[0].parameters.values())
    return Check("speed", "note", f"a step takes {ratio:.2f} times that of fused AdamW ({size / 1e6:.1f}M parameters)")


def _trajectory(config: RunConfig, reference: str, steps: int = 20) -> Check:
    """Compare with one of our optimizers, given the keys that both have."""
    own = config.optimizer.model_dump()
    given = {**own, **(own.get("arguments") or {})}
    other: Any = compose([f"optimizer={reference}"]).optimizer
    shared = {key: given[key] for key in type(other).model_fields if key != "name" and given.get(key) is not None}
    if "betas" in shared:
        shared["betas"] = (*shared["betas"], *other.betas[len(shared["betas"]) :])[: len(other.betas)]  # signum has one
    other = type(other).model_validate({**other.model_dump(), **shared})
    ours, theirs = Fed(config), Fed(config.model_copy(update={"optimizer": other}))
    name = f"like {reference}"
    for step in range(1, steps + 1):
        for fed in (ours, theirs):
            if fed.interval is None and theirs.interval is not None:
                return Check(name, "fail", "it gets no curvature: set optimizer.estimator")
            fed.step(step)
        for tensor, value in ours.weights().items():
            apart = float((value - theirs.weights()[tensor]).abs().max())
            if not apart <= 1e-2 * config.optimizer.lr:
                detail = (
                    f"it parts from {reference} at step {step} in {tensor}, by {apart / config.optimizer.lr:.2g} lr"
                )
                return Check(name, "fail", detail)
    return Check(name, "pass", f"the weights of {steps} steps agree to a hundredth of the rate")


def _distance(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((value - others[name]).double().square().sum()) for name, value in some.items()))


def _first_difference(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that differs in a bit, with the largest difference."""
    for name, value in some.items():
        if not torch.equal(value, others[name]):
            return f"{name}, by up to {float((value - others[name]).abs().max()):.2g}"
    return None


def _parted(through: Trainer | Fed, resumed: Trainer | Fed) -> str | None:
    """Make the steps after the cut with both, and return where their weights differ."""
    for step in range(CUT + 1, END + 1):
        through.step(step)
        resumed.step(step)
    return _first_difference(through.weights(), resumed.weights())
