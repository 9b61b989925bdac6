"""The optimizer step against torch's fused AdamW, on parameters in GPT-2's shapes: time and cold start.

    python benchmarks/optimizer_step.py                    124M parameters, fp32: about two minutes
    python benchmarks/optimizer_step.py --model 30m --rounds 50
    python benchmarks/optimizer_step.py --slow             also the forms that pass over memory once per operation

All arms take turns, round after round, in one process on the same weights and gradients. Ratios are of medians. "As in
training" is the training loop's call, whose kernel also clips the gradient norm and skips the update on overflow. Prints
a table and writes it, with the hardware, to results/benchmarks/optimizer_step.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import page
from benchmarks.record import provenance, write_results
from models.gpt2 import GPT2, GPT2Config
from sophia import Lion, SophiaG, SophiaH

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "optimizer_step.json"

MODELS = {
    "tiny": GPT2Config(vocab_size=16, n_layer=1, n_head=1, n_embd=8, block_size=8),  # to try this file; not compiled
    "30m": GPT2Config(n_layer=6, n_head=6, n_embd=384),
    "124m": GPT2Config(),
    "355m": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
}

# Largest allowed ratio of medians to torch.optim.AdamW(fused=True).
TARGETS = {"Sophia": 0.95, "Lion": 0.80, "update_hessian, GNB": 0.60, "update_hessian, estimates": 0.60}
COLD_START_TARGET = 30.0


def parameters(model: str, device: torch.device) -> list[Tensor]:
    """Weights and gradients of realistic magnitudes in the model's shapes, fp32."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT2(MODELS[model]).parameters()]
    params: list[Tensor] = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def arms(params: list[Tensor], slow: bool) -> dict[str, Callable[[], object]]:
    """Calls by name. The first is the baseline."""
    device = params[0].device
    scale, held = torch.tensor(1.25, device=device), torch.tensor(0.0, device=device)
    adamw = torch.optim.AdamW(params, lr=1e-6, fused=True)
    sophia, lion = SophiaG(params, lr=1e-6, compile=True), Lion(params, lr=1e-6, compile=True)
    powered = SophiaG(params, lr=1e-6, hessian_power=0.75, hessian_scale=1e-3, compile=True)
    gradients = [p.grad for p in params]

    def as_in_training(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.grad_scale, optimizer.found_inf = scale, held  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]

        return step

    copies = [torch.empty_like(p) for p in params]
    result: dict[str, Callable[[], object]] = {
        "AdamW, fused": adamw.step,
        "Sophia": sophia.step,
        "Sophia, hessian_power = 0.75": powered.step,
        "Lion": lion.step,
        "update_hessian, GNB": lambda: sophia.update_hessian(num_predictions=1000),
        "update_hessian, estimates": lambda: sophia.update_hessian(estimates=gradients),
        "AdamW, fused, as in training": as_in_training(adamw),
        "Sophia, as in training": as_in_training(sophia),
        "Lion, as in training": as_in_training(lion),
        "copy of the parameters": lambda: torch._foreach_copy_(copies, params),
    }
    if slow:
        result |= {
            "AdamW, foreach": torch.optim.AdamW(params, lr=1e-6, foreach=True).step,
            "Sophia, foreach": SophiaH(params, lr=1e-6, hessian_interval=None, foreach=True).step,
            "Sophia, eager": SophiaH(params, lr=1e-6, hessian_interval=None, foreach=False, compile=False).step,
        }
    return result


def measure(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Time the calls, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(2):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            _wait_for(device)
            begin = time.perf_counter()
            call()
            _wait_for(device)
            seconds[name].append(time.perf_counter() - begin)
    reference = statistics.median(next(iter(seconds.values())))
    fastest = min(next(iter(seconds.values())))
    return {
        name: {
            "median_seconds": statistics.median(values),
            "ratio": statistics.median(values) / reference,
            "ratio_of_fastest": min(values) / fastest,
        }
        for name, values in seconds.items()
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


COLD_START = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from sophia import SophiaG
params = [torch.nn.Parameter(torch.zeros(size, device=sys.argv[2])) for size in (1 << 21, 64)]
for p in params:
    p.grad = torch.zeros_like(p)
optimizer = SophiaG(params, compile=True)
begin = time.perf_counter()
optimizer.update_hessian(num_predictions=1)
optimizer.step()
print(time.perf_counter() - begin)
"""


def measure_cold_start(device: torch.device) -> dict[str, float]:
    """Time the first refresh and step of a new process, with an empty and with a full compiler cache."""
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="benchmark-compile-") as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        found = []
        for _ in range(2):
            command = [sys.executable, "-c", COLD_START, root, device.type]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append(float(done.stdout))
    return {"empty_cache_seconds": found[0], "full_cache_seconds": found[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slow", action="store_true", help="also the foreach and eager forms")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    warnings.filterwarnings("ignore", message=".*without update_hessian")
    torch.manual_seed(0)
    cold_start = measure_cold_start(device)
    params = parameters(arguments.model, device)
    results: dict[str, Any] = {
        **provenance(device),
        "model": arguments.model,
        "parameters": sum(p.numel() for p in params),
        "rounds": arguments.rounds,
        "targets": TARGETS | {"cold start, seconds": COLD_START_TARGET},
        "steps": measure(arms(params, arguments.slow), arguments.rounds, device),
        "cold_start": cold_start,
    }
    print("\n".join(page.optimizer_step(results)))
    write_results(arguments.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
