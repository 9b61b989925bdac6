"""The training step against a plain GPT-2 of the same shape: throughput, peak memory and the cost of curvature passes.

    python benchmarks/training_step.py                30M, T = 512, batch 16: about nine minutes on two cores
    python benchmarks/training_step.py --size 124m    124M, T = 1024, batch 4: about fifteen
    python benchmarks/training_step.py --rounds 6     more rounds

Each arm runs in its own process, since memory allocation is a property of a process. The arms take turns, one step each,
round after round; only one runs at a time. Ratios are of medians. A step is forward, backward, clip, optimizer and
clearing the gradients. The arms "here" are this framework's model and step; "plain" is benchmarks/plain_gpt2.py;
"transformers" and "litgpt" are the models of these libraries with the loss of their own training code, compiled. litgpt is
left out unless it is installed (pip install --no-deps litgpt lightning lightning-utilities pytorch-lightning torchmetrics
jsonargparse docstring-parser typeshed-client importlib-resources; its own version limits do not fit those here).
Utilisation is model FLOPs over the step's time, relative to the measured rate of large products. Prints tables and writes
them, with the hardware, to results/benchmarks/training_step_<size>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.calibration import datasheet_rate, matrix_product_rate
from benchmarks.plain_gpt2 import PlainGPT2
from benchmarks.record import provenance, write_results
from models import GPT2, GPT2Config
from sophia import SophiaG
from sophia.random import normals_like
from training.hardware import keep_memory_mapped
from training.strategies.gradients import clip_and_step

RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"
HESSIAN_INTERVAL = 10
HUTCHINSON = "Hutchinson on 32/480 of the batch, double backward"
ACCUMULATED = "accumulated step"


@dataclass(frozen=True)
class Shape:
    config: GPT2Config
    batch_size: int  # sequences of config.block_size tokens
    target: float  # smallest ratio of throughputs to the plain model

    @property
    def tokens(self) -> int:
        return self.batch_size * self.config.block_size

    @property
    def hutchinson_micro_batches(self) -> int:
        """Batches of this shape that make up about 480/32 sequences, of which Hutchinson's pass takes one."""
        return max(1, round(480 / 32 / self.batch_size))


SHAPES = {
    "tiny": Shape(
        GPT2Config(vocab_size=1000, n_layer=2, n_head=2, n_embd=64, block_size=64), 4, 1.0
    ),  # to try this file
    "30m": Shape(GPT2Config(n_layer=6, n_head=6, n_embd=384, block_size=512), 16, 1.6),
    "124m": Shape(GPT2Config(block_size=1024), 4, 1.4),
}


@dataclass(frozen=True)
class Arm:
    model: Literal["here", "plain", "transformers", "litgpt"]
    compiled: bool = True
    bf16: bool = True
    kept: bool = False  # keep memory mapped between steps
    sophia: bool = False  # Sophia-G and its curvature passes instead of AdamW
    every: int = 1  # runs in every n-th round

    @property
    def plain(self) -> bool:
        return self.model != "here"


BASELINE = "plain"
HERE = "here"
ARMS: dict[str, Arm] = {
    BASELINE: Arm("plain"),
    "plain, memory kept": Arm("plain", kept=True),
    "plain, uncompiled": Arm("plain", compiled=False, every=3),
    "plain, uncompiled, fp32": Arm("plain", compiled=False, bf16=False, every=3),
    "transformers": Arm("transformers"),
    **({"litgpt": Arm("litgpt")} if find_spec("litgpt") else {}),
    HERE: Arm("here", kept=True),
    "here, default allocator": Arm("here"),
    "here, Sophia-G": Arm("here", kept=True, sophia=True),
}

#: Smallest speed-up of "here" over other arms, by size.
TARGETS: dict[str, dict[str, float]] = {
    "tiny": {},
    "30m": {BASELINE: 1.6, "plain, uncompiled": 3.0, "plain, uncompiled, fp32": 6.0},
    "124m": {BASELINE: 1.4, "plain, uncompiled": 3.0, "plain, uncompiled, fp32": 6.0},
}
MEMORY_TARGET = 0.6
# Largest share of a step's time for a curvature pass, averaged over the interval.
CURVATURE_TARGETS = {
    "Gauss-Newton-Bartlett on half of the batch, own forward": 0.055,
    "Gauss-Newton-Bartlett on half of the batch, one forward for both losses": 0.04,
    HUTCHINSON: 0.05,
}


# ----------------------------------------------------------------------------------------------------------------
# An arm's process: reads an action's name from a line, performs it, answers with a line.


class TransformersGPT2(torch.nn.Module):
    """transformers' GPT2LMHeadModel with its usual loss."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        from models.huggingface import to_huggingface  # seconds of imports

        self.model = to_huggingface(GPT2(config))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) and (B, T) int64 -> () the mean cross entropy."""
        logits = self.model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class LitGPT(torch.nn.Module):
    """litgpt's GPT, with GPT-2's layers but for the positions, which are none, and the loss of its pretraining script."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        from litgpt.config import Config
        from litgpt.model import GPT

        shape = {
            name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "vocab_size", "bias")
        }
        layers = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "tanh"}
        positions = {"rotary_percentage": 0.0, "parallel_residual": False}
        self.model = GPT(
            Config(name="gpt2", padded_vocab_size=config.padded_vocab_size, **shape, **layers, **positions)
        )
        self.model.lm_head.weight = self.model.transformer.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T) and (B, T) int64 -> () the mean cross entropy."""
        from litgpt.utils import chunked_cross_entropy

        loss: Tensor = chunked_cross_entropy(self.model(tokens), targets)
        return loss


MODELS = {"here": GPT2, "plain": PlainGPT2, "transformers": TransformersGPT2, "litgpt": LitGPT}


class Worker:
    """One arm's model and optimizer, and the timed actions."""

    def __init__(self, shape: Shape, arm: Arm, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.arm, self.device = shape, arm, device
        config = shape.config
        self.model = MODELS[arm.model](config).to(device)
        if arm.compiled:
            self.model.compile()
        parameters = list(self.model.parameters())
        self.optimizer: torch.optim.Optimizer
        if arm.sophia:
            warnings.filterwarnings(
                "ignore", message=".*without update_hessian"
            )  # steps are timed without refreshes, too
            self.optimizer = SophiaG(parameters, lr=1e-4, hessian_interval=HESSIAN_INTERVAL, compile=arm.compiled)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        size = (shape.batch_size, config.block_size)
        self.tokens, self.targets = (torch.randint(config.vocab_size, size, device=device) for _ in range(2))
        self.uniforms = torch.rand(shape.batch_size // 2, config.block_size, device=device)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.arm.bf16 else nullcontext()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The part's contribution to the batch's mean loss."""
        with self.autocast():
            if not isinstance(self.model, GPT2):
                return self.model(tokens, targets) * (len(tokens) / self.shape.batch_size)
            return self.model(tokens, targets).loss_sum / self.shape.tokens

    def update(self) -> None:
        if self.arm.plain:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        else:
            clip_and_step([self.optimizer], 1.0)
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.loss(self.tokens, self.targets).backward()
        self.update()

    def accumulated(self) -> None:
        """A step of as many micro-batches as make one sequence the paper's share for Hutchinson."""
        micro_batches = self.shape.hutchinson_micro_batches
        for _ in range(micro_batches):
            (self.loss(self.tokens, self.targets) / micro_batches).backward()
        self.update()

    def own_forward(self) -> None:
        """A due step: Gauss-Newton-Bartlett on half of the batch with its own forward pass, then the step."""
        half = self.shape.batch_size // 2
        with self.autocast():
            sampled_loss_sum = self.model(self.tokens[:half], None, self.uniforms).sampled_loss_sum
        self.fold(sampled_loss_sum)
        self.step()

    def one_forward(self) -> None:
        """A due step that draws labels in the training forward pass of the half whose curvature is estimated."""
        half = self.shape.batch_size // 2
        with self.autocast():
            output = self.model(self.tokens[:half], self.targets[:half], self.uniforms)
        self.fold(output.sampled_loss_sum, retain_graph=True)
        (output.loss_sum / self.shape.tokens).backward()
        self.loss(self.tokens[half:], self.targets[half:]).backward()
        self.update()

    def hutchinson(self) -> None:
        """A due step: an exact Hessian-vector product on the paper's share of the batch, one sequence; then the step."""
        assert isinstance(self.model, GPT2)
        assert isinstance(self.optimizer, SophiaG)
        part = max(1, round(self.shape.batch_size * self.shape.hutchinson_micro_batches * 32 / 480))
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        noise = [normals_like(p, 0, 1, name) for name, p in zip(names, parameters, strict=True)]
        with self.model.maths_attention(), self.autocast():
            loss_sum = self.model(self.tokens[:part], self.targets[:part]).loss_sum
            mean = loss_sum / self.targets[:part].numel()
            gradients = torch.autograd.grad(mean, parameters, create_graph=True)
            products = list(torch.autograd.grad(gradients, parameters, grad_outputs=noise))
        torch._foreach_mul_(products, noise)
        self.optimizer.update_hessian(estimates=products)
        self.accumulated()

    def fold(self, sampled_loss_sum: Tensor, *, retain_graph: bool = False) -> None:
        assert isinstance(self.optimizer, SophiaG)
        count = self.uniforms.numel()
        (sampled_loss_sum / count).backward(retain_graph=retain_graph)
        self.optimizer.update_hessian(num_predictions=count)
        self.optimizer.zero_grad()

    def seconds(self, what: str) -> float:
        passes = (self.own_forward, self.one_forward, self.hutchinson)
        actions: dict[str, Callable[[], None]] = {
            "step": self.step,
            ACCUMULATED: self.accumulated,
            **dict(zip(CURVATURE_TARGETS, passes, strict=True)),
        }
        self.synchronize()
        started = time.perf_counter()
        actions[what]()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int:
        """The most memory held during a step: the process's resident set, or the GPU's allocations."""
        with peak_memory(self.device) as peak:
            self.step()
        return peak()

    def memory(self) -> dict[str, int]:
        """Bytes by kind. On a CPU they come from the resident set, so freed memory must be given back."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        state = sum(
            t.numel() * t.element_size()
            for s in self.optimizer.state.values()
            for t in s.values()
            if torch.is_tensor(t)
        )
        before = held_memory(self.device)
        with peak_memory(self.device) as peak_forward:
            loss = self.loss(self.tokens, self.targets)
        after = held_memory(self.device)
        with peak_memory(self.device) as peak_backward:
            loss.backward()
        self.optimizer.zero_grad()
        if self.arm.plain:  # autograd keeps the logits of the head
            kept = self.shape.tokens * self.shape.config.padded_vocab_size * (2 if self.arm.bf16 else 4)
        else:  # the gradients of the weight (fp32) and of the hidden states, computed in the forward pass
            kept = self.shape.config.padded_vocab_size * self.shape.config.n_embd * 4
            kept += self.shape.tokens * self.shape.config.n_embd * (2 if self.arm.bf16 else 4)
        peak = max(peak_forward(), peak_backward())
        return {
            "runtime": max(0, before - weights - state),
            "weights": weights,
            "optimizer state": state,
            "gradients": weights,
            "activations": after - before - kept,
            "head": peak_forward() - after + kept,
            "peak": peak,
        }


def held_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _process_status("VmRSS")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure the block's peak memory; afterwards, the yielded function returns it."""
    peak = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the resident set's high-water mark
    yield lambda: peak
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_status("VmHWM")


def _process_status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def serve(shape: Shape, arm: Arm, device: torch.device, *, unmap: bool) -> None:
    """Answer requests from standard input until it ends. `unmap` returns all freed memory, to measure what is held."""
    if unmap:
        _unmap_freed_memory()
    elif arm.kept:
        keep_memory_mapped()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error
    worker = Worker(shape, arm, device)
    for line in sys.stdin:
        what = line.strip()
        if what == "memory":
            answer: Any = worker.memory()
        elif what == "peak":
            answer = worker.peak_bytes()
        else:
            answer = worker.seconds(what)
        print(json.dumps(answer), file=answers, flush=True)


def _unmap_freed_memory() -> None:
    import ctypes

    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: map blocks of a megabyte separately


# ----------------------------------------------------------------------------------------------------------------
# The benchmark: starts the arms' processes and runs one at a time.


class Process:
    """The parent's handle of an arm's process."""

    def __init__(self, size: str, arm: str, device: str, *, unmap: bool = False) -> None:
        command = [sys.executable, __file__, "--size", size, "--device", device, "--serve", arm]
        self._process = subprocess.Popen(
            command + (["--unmap"] if unmap else []), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"an arm's process ended with code {self._process.wait()}; see its error above")
        return json.loads(answer)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure_steps(size: str, arms: list[str], rounds: int, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time steps by arm, and steps with a curvature pass; arms take turns."""
    stack: dict[str, Process] = {}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, int] = {}
    due: dict[str, list[float]] = {name: [] for name in (*CURVATURE_TARGETS, ACCUMULATED)}
    try:
        for name in arms:
            stack[name] = Process(size, name, device)
            stack[name].ask("step")  # compiles
            if ARMS[name].sophia:
                for what in due:
                    stack[name].ask(what)
            if ARMS[name].every == 1:
                stack[name].ask("step")
        for number in range(rounds):
            order = arms[number % len(arms) :] + arms[: number % len(arms)]
            for name in order:
                if number % ARMS[name].every:
                    continue
                seconds[name].append(stack[name].ask("step"))
                if ARMS[name].sophia:
                    for what in due:
                        due[what].append(stack[name].ask(what))
        for name in arms:
            peaks[name] = stack[name].ask("peak")
    finally:
        for process in stack.values():
            process.__exit__()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    steps = {
        name: {"seconds": seconds[name], "median_seconds": medians[name], "peak_bytes": peaks[name]} for name in arms
    }
    curvature: dict[str, Any] = {}
    for name in arms:
        if ARMS[name].sophia:
            for what in CURVATURE_TARGETS:
                values = due[what]
                without = statistics.median(due[ACCUMULATED]) if what == HUTCHINSON else medians[name]
                share = (statistics.median(values) - without) / (HESSIAN_INTERVAL * without)
                curvature[what] = {"due_step_seconds": values, "step_seconds": without, "share_of_step": share}
    return steps, curvature


def measure_memory(size: str, device: str) -> dict[str, Any]:
    """Bytes by kind, for the plain model and for this one."""
    kinds = {}
    for name in (BASELINE, HERE):
        with Process(size, name, device, unmap=True) as process:
            process.ask("step")
            process.ask("step")
            kinds[name] = process.ask("memory")
    return kinds


def measure(size: str, rounds: int, device: torch.device) -> dict[str, Any]:
    bf16, fp32 = (matrix_product_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    on_cpu = device.type == "cpu"
    # Arms are grouped so that their processes fit into memory; "here" runs in each group.
    others = [name for name, arm in ARMS.items() if name != HERE and (on_cpu or not arm.kept or not arm.plain)]
    together = 2 if size == "124m" else len(others)
    results: dict[str, Any] = {"groups": [], "curvature": {}}
    for first in range(0, len(others), together):
        group = [*others[first : first + together], HERE]
        steps, curvature = measure_steps(size, group, rounds, str(device))
        results["groups"].append(steps)
        results["curvature"] |= curvature
    results["memory"] = measure_memory(size, str(device))
    results["matrix_product_rate"] = {"bf16": bf16, "fp32": fp32, "bf16_datasheet": datasheet_rate(device)}
    # Time of a step's products alone, at the measured rate.
    shape = SHAPES[size]
    results["flops"] = shape.config.flops(shape.config.block_size).forward_backward(shape.tokens)
    results["products_alone_seconds"] = results["flops"] / bf16
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="30m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--serve", choices=ARMS, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--unmap", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.serve is not None:
        serve(SHAPES[arguments.size], ARMS[arguments.serve], device, unmap=arguments.unmap)
        return 0
    output = arguments.output or RESULTS / f"training_step_{arguments.size}.json"
    results: dict[str, Any] = {
        **provenance(device),
        "size": arguments.size,
        "rounds": arguments.rounds,
        "targets": {"throughput": TARGETS[arguments.size], "memory": MEMORY_TARGET, "curvature": CURVATURE_TARGETS},
        **measure(arguments.size, arguments.rounds, device),
    }
    from benchmarks import page  # whose pandas would count as memory of the measured processes

    print("\n".join(page.training_step(results)))
    write_results(output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
