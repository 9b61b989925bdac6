"""Is an optimizer what it says? Checks of its behaviour on a tiny model, before a run of hours depends on it.

Some checks train the model in the project's step (clip, skipping, curvature pass); the others feed the optimizer gradients
drawn at random, so that it can be compared with itself or with another optimizer coordinate by coordinate.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import Batch
from models import GPT2, GPT2Config
from training.compose import compose
from training.config import (
    SQUARED_GRADIENTS,
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

    Args:
        overrides: of train.py, such as optimizer=lion optimizer.lr=1e-4.
        reference: an optimizer= of this project to compare the trajectory with.

    Raises:
        ConfigurationError: the configuration is invalid, or the optimizer cannot be built.
    """
    config = configured(overrides)
    yield _loss_falls(config)
    yield _randomness(config)
    yield _same_curve("micro-batches", "of 2 sequences", config, curve(config, 5, micro=2))
    yield _same_curve("ranks", "two processes", config, _on_two_ranks(overrides))
    yield _learning_rate(config)
    yield _weight_decay(config)
    yield _state_dict(config)
    yield _checkpoint(config)
    yield _non_finite(config)
    yield _state(config)
    yield _elementwise(config)
    if config.optimizer.curvature is not None:
        yield from _curvature(config)
    yield _synchronizations(config)
    yield _speed(config)
    if reference is not None:
        yield _trajectory(config, reference)


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
    """Return the curve of two processes with half of the batch each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        processes = [context.Process(target=_rank, args=(rank, directory, [*overrides], steps)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        result = Path(directory, "losses.json")
        return list(map(float, json.loads(result.read_text()))) if result.is_file() else [math.nan] * steps


def _rank(rank: int, directory: str, overrides: list[str], steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # ranks of a run do not share a generator
    losses = curve(configured(overrides), steps, Distributed(rank, rank, 2, torch.device("cpu"), joined=True))
    if rank == 0:
        Path(directory, "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def _checkpoint(config: RunConfig) -> Check:
    through, resumed = Trainer(config), Trainer(config)
    for step in range(1, 4):
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
        self.optimizers = build_optimizers(config.optimizer, compile_step=compile_step)(self.parameters)
        curvature = config.optimizer.curvature
        self.interval = None if curvature is None else curvature.hessian_interval
        self._squares = curvature is not None and curvature.estimator in SQUARED_GRADIENTS

    def step(self, step: int, factor: float = 1.0, estimate_scale: float = 1.0) -> None:
        """Make step 1, 2, … with gradients, and estimates if due, that depend on the step alone."""
        if self.interval is not None and (step - 1) % self.interval == 0:
            self.refresh(1_000_000 + step, estimate_scale)
        for parameter, value in zip(self.parameters.values(), self.drawn(step), strict=True):
            parameter.grad = 1e-2 * value
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * factor
        clip_and_step(self.optimizers, None)

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
        return [torch.randn(p.shape, generator=generator) for p in self.parameters.values()]

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def states(self) -> Iterator[tuple[str, Any]]:
        """Yield ("<parameter>.<key>", value) of the optimizers' state, with the members of lists and tuples."""
        for name, parameter in self.parameters.items():
            for optimizer in self.optimizers:
                yield from _members(optimizer.state.get(parameter, {}), name)


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
        return Check("weight decay", "fail", "it is coupled: it goes into the gradient, and is rescaled with it")
    share = coefficient / (rate * decay)
    if abs(share - 1) < 0.02:
        return Check("weight decay", "pass", "decoupled, lr · weight_decay · θ")
    return Check("weight decay", "note", f"decoupled, but {share:.2g} times lr · weight_decay · θ")


def _state_dict(config: RunConfig) -> Check:
    through, resumed = Fed(config), Fed(config)
    for step in (1, 2, 3):
        through.step(step)
    for name, parameter in resumed.parameters.items():
        parameter.data.copy_(through.parameters[name].data)
    for source, target in zip(through.optimizers, resumed.optimizers, strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    part = _parted(through, resumed)
    if part is None:
        return Check("state_dict", "pass", "a round trip leaves every bit of the next steps")
    return Check("state_dict", "fail", f"after a round trip the next steps differ: {part}; state is lost")


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
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fed = Fed(config)
            for step in (1, 2, 3):
                fed.step(step)
            ends.append(fed.weights())
    part = _first_difference(*ends)
    if part is None:
        return Check("randomness", "pass", "none: a step is a function of weights, gradients and state")
    return Check(
        "randomness",
        "fail",
        f"it draws from torch's global generator ({part}), which differs between ranks: replicas drift apart, and the curve "
        "depends on their number; draw from a function of seed, step, name and position (sophia.random)",
    )


def _elementwise(config: RunConfig) -> Check:
    """Rearrange the coordinates of one matrix: an elementwise update is rearranged with them."""
    ends = []
    name = "blocks.0.mlp.up.weight"
    order = torch.randperm(math.prod(_model(SHAPE)[name].shape), generator=torch.Generator().manual_seed(0))
    for rearranged in (False, True):
        fed = Fed(config)
        parameter = fed.parameters[name]
        draw = fed.drawn

        def moved(value: Tensor, rearranged: bool = rearranged) -> Tensor:
            return value.flatten()[order].view_as(value) if rearranged else value

        def drawn(key: int, draw: Callable[[int], list[Tensor]] = draw, fed: Fed = fed) -> list[Tensor]:
            return [moved(v) if n == name else v for n, v in zip(fed.parameters, draw(key), strict=True)]

        parameter.data.copy_(moved(parameter.data))
        fed.drawn = drawn  # type: ignore[method-assign]
        for step in (1, 2, 3):
            fed.step(step)
        end = parameter.detach().flatten()
        ends.append(end[order] if not rearranged else end)
    straight, rearranged_end = ends
    elementwise = torch.allclose(straight, rearranged_end, rtol=1e-5, atol=1e-3 * config.optimizer.lr)
    counts = any(changed_numbers(group) for optimizer in fed.optimizers for group in optimizer.param_groups)
    strategies = strategies_of(config, elementwise=elementwise, counts_in_groups=counts)
    if elementwise:
        return Check("elementwise", "pass", f"yes: strategies {strategies}")
    return Check("elementwise", "note", f"no, it needs whole matrices: strategies {strategies}")


def strategies_of(config: RunConfig, *, elementwise: bool, counts_in_groups: bool = False) -> str:
    """Return the strategies that a configuration with this optimizer may choose.

    Args:
        counts_in_groups: whether a step changes numbers in `param_groups`, which DeepSpeed's steps in parts do not allow.
    """
    optimizer = config.optimizer
    if isinstance(optimizer, ExternalConfig):
        optimizer = optimizer.model_copy(update={"elementwise": elementwise})

    def works(strategy: FSDPConfig | DeepSpeedConfig) -> bool:
        try:
            refuse_impossible_pairs(config.model_copy(update={"optimizer": optimizer, "strategy": strategy}))
        except ValueError:
            return False
        return not (counts_in_groups and isinstance(strategy, DeepSpeedConfig))

    strategies = ["single", "ddp", *(["fsdp"] if works(FSDPConfig(name="fsdp")) else [])]
    if works(DeepSpeedConfig(name="deepspeed", zero_stage=3)):
        strategies.append("deepspeed")
    elif works(DeepSpeedConfig(name="deepspeed", zero_stage=2)):
        strategies.append("deepspeed (ZeRO 1, 2)")
    return ", ".join(strategies)


def _curvature(config: RunConfig) -> Iterator[Check]:
    """An optimizer that gets curvature estimates has to use them, keep them between refreshes, and scale them with N."""
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

    curvature = config.optimizer.curvature
    if curvature is None or curvature.estimator not in SQUARED_GRADIENTS:
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
        if isinstance(result, Tensor) and not any(isinstance(one, Tensor) for one in args):
            self._on_host.append(result)
        return result


def _synchronizations(config: RunConfig) -> Check:
    fed = Fed(config)
    for step in (1, 2):
        fed.step(step)
    for parameter, value in zip(fed.parameters.values(), fed.drawn(3), strict=True):
        parameter.grad = 1e-2 * value
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
        for parameter, value in zip(fed.parameters.values(), fed.drawn(2), strict=True):
            parameter.grad = 1e-2 * value
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
    """Make the steps 4 to 6 with both, and return where their weights differ."""
    for step in (4, 5, 6):
        through.step(step)
        resumed.step(step)
    return _first_difference(through.weights(), resumed.weights())
