"""Synthetic run records with a known truth, in the format of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.trial_tables import TrialRow, checked, curves_of, write_curves, write_trials
from training.records import RunRecord

BATCH, LENGTH = 16, 64
TOKENS_PER_STEP = BATCH * LENGTH
FLOPS_PER_TOKEN = 6e6
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "lion": {"lr": 2e-4, "betas": [0.9, 0.98], "weight_decay": 0.1},
    "sophiag": {"lr": 6e-4, "betas": [0.96, 0.99], "gamma": 0.05, "hessian_interval": 10, "weight_decay": 0.1},
}


def power_law(tokens: float, *, speedup: float = 1.0) -> float:
    """Final loss (nats) of a run of `tokens`, for an arm that needs 1/speedup of the baseline's tokens."""
    return 2.0 + 40.0 * (speedup * tokens) ** -0.3


def write_run(
    directory: Path,
    *,
    optimizer: str = "adamw",
    seed: int = 1,
    steps: int = 200,
    final: float | None = None,
    evaluations: int = 10,
    curvature_share: float = 0.0,
    shared_forwards: int | None = None,
    seconds_per_step: float = 0.05,
    status: str = "completed",
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    train_lines: bool = True,
    unclipped: float | None = None,
    clipped_every: int = 10,
    curve: Callable[[float], float] | None = None,
) -> Path:
    """One run record; `config` and `environment` hold dotted keys to override.

    `curvature_share` is what the curvature passes add to the FLOPs and seconds of forward and backward; of the
    passes, one every ten steps, so many took the training forward (None: the record does not say). The gradient's norm
    is clipped every `clipped_every` steps.
    """
    tokens = steps * TOKENS_PER_STEP
    final = power_law(tokens) if final is None else final
    curve = curve or (lambda progress: final + 6.0 * (1 - progress) ** 3)
    resolved = _resolved(directory.name, optimizer, seed, steps)
    _override(resolved, config or {})
    surroundings: dict[str, Any] = {
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "git": {"commit": "0" * 40, "dirty": False},
        "hardware": {"device": "cpu", "cores": 2},
        "data_manifest_sha256": "d" * 64,
        "initial_weights_sha256": f"{seed:064d}",
    }
    _override(surroundings, environment or {})

    flops_per_step = FLOPS_PER_TOKEN * TOKENS_PER_STEP * (1 + curvature_share)
    seconds = seconds_per_step * (1 + curvature_share)

    def counters(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * TOKENS_PER_STEP,
            "flops": step * flops_per_step,
            "seconds": step * seconds,
        }

    lines: list[dict[str, Any]] = []
    at = sorted({round(steps * i / evaluations) for i in range(evaluations + 1)})
    for step in range(steps + 1):
        if step and train_lines:
            line = {"kind": "train", **counters(step), "loss": curve((step - 1) / steps), "lr": 1e-3}
            clipped = step % clipped_every == 0
            line |= {"grad_norm": 1.0 + clipped, "clipped_norm": clipped, "tokens_per_second": 2e4}
            if optimizer.startswith("sophia"):
                line["unclipped_fraction"] = 0.3 * step / steps if unclipped is None else unclipped
            lines.append(line)
        if step in at:
            lines.append({"kind": "eval", **counters(step), "val_loss": curve(step / steps)})
        if optimizer.startswith("sophia") and step % 50 == 1:
            described = {
                "hessian_norm": 0.1,
                "momentum_norm": 0.01,
                "positive_fraction": 0.9,
                "histogram": [0, 0, 0, 10, 40, 90, 300, 200, 80, 30, 5, 0, 0, 0, 0, 0, 0, 0],
            }
            by_kind = {"embedding": described, "mlp": described}
            decades = list(range(-12, 5))
            lines.append({"kind": "hessian", **counters(step), **described, "decades": decades, "by_kind": by_kind})

    ledger = {
        "forward_backward": _entry(tokens, FLOPS_PER_TOKEN * tokens, seconds_per_step * steps * 0.9, steps),
        "curvature": _entry(
            round(tokens * curvature_share),
            FLOPS_PER_TOKEN * tokens * curvature_share,
            seconds_per_step * steps * curvature_share,
            len(range(0, steps, 10)) if curvature_share else 0,
        ),
        "optimizer": _entry(0, 0.0, seconds_per_step * steps * 0.1, steps),
        "data": _entry(0, 0.0, 0.0, steps),
        "evaluation": _entry(1000 * len(at), 1e9 * len(at), 0.4 * len(at), len(at)),
        "checkpoint": _entry(0, 0.0, 0.2, 1),
        "compilation": _entry(0, 0.0, 30.0, 1),
    }
    summary = {
        "status": status,
        "final_val_loss": curve(1.0) if status == "completed" else None,
        "best_val_loss": min(curve(step / steps) for step in at),
        "steps": steps,
        "tokens": tokens,
        "flops": steps * flops_per_step,
        "seconds": steps * seconds,
        "ledger": ledger,
        "bytes_communicated": 0,
        "peak_memory_bytes": 5 * 10**8,
        "parameters": 1_000_000,
    }
    if shared_forwards is not None:
        summary["shared_forwards"] = shared_forwards
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.dump(resolved, Dumper=yaml.CSafeDumper, sort_keys=False))
    (directory / "environment.json").write_text(json.dumps(surroundings))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def write_tables(
    directory: Path, study: Mapping[str, Any], trials: Sequence[tuple[Mapping[str, Any], Path | None]]
) -> Path:
    """A study's directory: study.yaml, and tables of trials, each what a row says of it and the run directory, if any."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "study.yaml").write_text(yaml.safe_dump(dict(study), sort_keys=False))
    rows, curves = [], []
    for number, (trial, run) in enumerate(trials):
        row = TrialRow(run.name if run else f"missing-{number}", **trial)
        if run is not None:
            record = RunRecord.open(run)
            row = replace(row, config=record.config, environment=record.environment, summary=record.summary)
            curves.append(curves_of(row.trial, record.metrics()))
        rows.append(checked(row))
    write_trials(directory, rows)
    write_curves(directory, curves)
    return directory


def write_study(directory: Path, *, speedup: float = 1.2, models: Mapping[str, float] | None = None) -> Path:
    """A small complete study of AdamW, Lion (0.9 times as fast) and Sophia-G, with tuning, ablations and a (β2, γ)
    grid.

    AdamW has four horizons, the others the two longest; three reported seeds; two models of different size.
    """
    models = {"tiny": 1e6, "small": 4e6} if models is None else models
    speeds = {"adamw": 1.0, "lion": 0.9, "sophiag": speedup}
    search = {"optimizer.lr": {"values": [5e-4, 1e-3, 2e-3]}, "optimizer.betas[0]": {"values": [0.8, 0.9, 0.95]}}
    ablations: dict[str, Any] = {}
    trials: list[tuple[dict[str, Any], Path]] = []
    scratch = directory.with_name(f"{directory.name}.runs")

    def add(arm: str, phase: str, model: str, horizon: int, seed: int, loss: float, **more: Any) -> None:
        name = f"{model}-{arm}-{horizon}-{phase}-{len(trials)}"
        optimizer = arm.split("_")[0]
        config = {"model.name": model, **more.pop("config", {})}
        options = {"evaluations": 8, "curvature_share": 0.05 if optimizer == "sophiag" else 0.0, **more}
        run = write_run(
            scratch / name,
            optimizer=optimizer,
            seed=seed,
            steps=horizon,
            final=loss - 0.3 * (model == "small"),
            config=config,
            train_lines=optimizer == "sophiag" and phase == "reporting",
            **options,
        )
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"parameters": models[model]}))
        trials.append(({"arm": arm, "phase": phase, "model": model, "horizon": horizon, "seed": seed}, run))

    for model in models:
        for arm, speed in speeds.items():
            for horizon in (50, 100, 200, 400) if arm == "adamw" else (200, 400):
                best = power_law(horizon * TOKENS_PER_STEP, speedup=speed)
                for seed in (1, 2, 3):
                    loss = best + noise(seed, horizon, scale=0.002) + noise(seed, horizon, len(arm), scale=0.002)
                    add(arm, "reporting", model, horizon, seed, loss)
                for rate, excess in zip((5e-4, 1e-3, 2e-3), (0.05, 0.0, 0.05), strict=True):
                    for momentum, lag in zip((0.8, 0.9, 0.95), (0.02, 0.0, 0.02), strict=True):
                        config = {"optimizer.lr": rate, "optimizer.betas": [momentum, 0.95]}
                        add(arm, "tuning", model, horizon, 100, best + excess + lag, config=config)
    model = next(iter(models))
    best = power_law(200 * TOKENS_PER_STEP, speedup=speedup)
    for interval in (1, 100):
        arm = f"sophiag_k{interval}"
        ablations[arm] = {"of": "sophiag", "overrides": [f"optimizer.hessian_interval={interval}"]}
        for seed in (1, 2, 3):
            config = {"optimizer.hessian_interval": interval}
            add(arm, "reporting", model, 200, seed, best + 0.001 * interval + noise(seed, scale=0.002), config=config)
    for gamma in (0.02, 0.1):
        for beta in (0.9, 0.999):
            arm = f"sophiag_g{gamma:g}_b{beta:g}"
            ablations[arm] = {"of": "sophiag", "values": {"optimizer.gamma": gamma, "optimizer.betas[1]": beta}}
            config = {"optimizer.gamma": gamma, "optimizer.betas": [0.96, beta]}
            add(arm, "reporting", model, 200, 1, best + gamma, config=config)
    study = {
        "name": "synthetic",
        "description": "Records made with a known truth.",
        "baseline": "adamw",
        "models": {model: {"seeds": [1, 2, 3]} for model in models},
        "tuning": {"method": "grid", "trials": 9},
        "arms": {arm: {"search": search} for arm in speeds},
        "ablations": ablations,
    }
    return write_tables(directory, study, trials)


def noise(*key: int, scale: float) -> float:
    """A normal number (nats) that is a function of its key alone."""
    return float(np.random.default_rng([7, *key]).normal(0.0, scale))


def _entry(tokens: int, flops: float, seconds: float, count: int) -> dict[str, Any]:
    return {"tokens": tokens, "flops": flops, "seconds": seconds, "count": count}


def _resolved(name: str, optimizer: str, seed: int, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "output_dir": "runs",
        "overwrite": False,
        "model": {"name": "tiny", "n_layer": 2, "n_head": 2, "n_embd": 32},
        "data": {"name": "sample"},
        "tokenizer": {"name": "bytes"},
        "optimizer": {"name": optimizer, **HYPERPARAMETERS.get(optimizer, {"lr": 1e-3})},
        "schedule": {"name": "cosine", "warmup_steps": 10, "final_ratio": 0.05},
        "strategy": {"name": "ddp"},
        "train": {
            "steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "sequence_length": LENGTH,
            "precision": "fp32",
            "compile": False,
            "grad_clip": 1.0,
            "deterministic": False,
        },
        "seeds": {"model": seed, "data": seed, "curvature": seed},
        "eval": {"interval": 20, "tokens": 65536},
        "checkpoint": {"interval": 1000},
    }


def _override(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
