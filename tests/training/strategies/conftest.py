"""One launch of two ranks for all tests of this folder, by whichever pytest worker needs it first."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import prepare_corpus
from tests.training.strategies import parity, ranks

STEPS = 6
STRATEGIES = ["ddp×2", "fsdp×2", "zero1×2", "zero2×2", "zero3×2"]
MOVES = (("fsdp", 6), ("zero2", 9), ("ddp", 12))  # strategy on two ranks, steps after which it is stopped
MOVED_STEPS = 15
#: Shares of a batch of 8: one rank has no part of the estimate, the ranks' parts differ, the whole batch.
SHARES = [0.125, 0.875, 1.0]


@dataclass(frozen=True)
class Launch:
    """The results of the two ranks."""

    directory: Path
    corpus: list[str]
    seen: dict[str, Any]

    def look(self, name: str, kind: str) -> Any:
        result = self.seen["looks"][f"{name} {kind}"]
        assert not isinstance(result, dict) or "error" not in result, result["error"]
        return result

    def status(self, run: str) -> str:
        result = self.seen["runs"][run]
        assert not isinstance(result, dict), result["error"]
        return str(result)


def small(corpus: list[str], directory: Path, name: str, *overrides: str) -> list[str]:
    """The command line of a run of six steps, with a refresh of the Hessian at steps 1 and 6."""
    given = {o.split("=")[0] for o in overrides}
    defaults = [
        *("model=gpt2_nano", "model.n_embd=32", f"output_dir={directory}", f"name={name}", "optimizer=sophiag"),
        *("optimizer.hessian_interval=5", "optimizer.embedding_lr_ratio=0.5", f"train.steps={STEPS}"),
        *("train.global_batch_size=8", "train.micro_batch_size=4", "train.sequence_length=32"),
        *("train.precision=fp32", "train.compile=false", "train.device=cpu", "train.grad_clip=0.5"),
        *(f"eval.interval={STEPS}", "eval.tokens=256"),
        *("schedule.warmup_steps=1", "checkpoint.interval=null"),
    ]
    return [*corpus, *(d for d in defaults if d.split("=")[0] not in given), *overrides]


def moved(corpus: list[str], directory: Path, name: str, *overrides: str) -> list[str]:
    return small(corpus, directory, name, f"train.steps={MOVED_STEPS}", "eval.interval=5", *overrides)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "corpus.json").exists():
            launch(directory)
    return Launch(
        directory,
        json.loads((directory / "corpus.json").read_text()),
        json.loads((directory / "seen.json").read_text()),
    )


def launch(directory: Path) -> None:
    """Single processes here, everything else in one launch of two ranks."""
    corpus = prepare_corpus(directory)
    model = [*corpus, "model=gpt2_nano", "model.n_embd=32"]
    _, here = parity.plan(directory, model, ["single"], parity.OPTIMIZERS, STEPS, accumulations=(1,))
    _, there = parity.plan(directory, model, STRATEGIES, parity.OPTIMIZERS, STEPS, accumulations=(2,))
    for overrides in here[1]:
        ranks.run({"overrides": overrides})
    ranks.run({"overrides": moved(corpus, directory, "undisturbed", "strategy=single")})
    ranks.run({"overrides": moved(corpus, directory, "moved", "strategy=single"), "stop": 3})

    for share in SHARES:
        own = ["strategy=single", "train.shared_forward=false", f"optimizer.batch_fraction={share}"]
        ranks.run({"overrides": small(corpus, directory, f"share-{share}-single", *own)})

    runs: dict[str, Any] = {f"parity {i}": {"overrides": overrides} for i, overrides in enumerate(there[2])}
    for kind, stop in MOVES:
        runs[f"moved {kind}"] = {"overrides": moved(corpus, directory, "moved", *ranks.KINDS[kind]), "stop": stop}
    for kind, strategy in ranks.KINDS.items():
        # Backward passes: refresh and step 1, steps 2 to 5, refresh and step 6. Two of them give NaN: step 3, refresh 6.
        # DDP, whose refresh takes part in the training forward, has one more: of the slice's training loss.
        overrides = small(corpus, directory, f"poisoned-{kind}", *strategy)
        runs[f"poisoned {kind}"] = {"overrides": overrides, "poison": [5, 8] if kind == "ddp" else [4, 7]}
        runs[f"bf16 {kind}"] = {
            "overrides": small(corpus, directory, f"bf16-{kind}", *strategy, "train.precision=bf16")
        }
    # Of a refresh by differences two: before step 6 they are the eighth and the ninth.
    differences = [*ranks.KINDS["zero2"], "optimizer.estimator=hutchinson_differences"]
    runs["poisoned differences"] = {
        "overrides": small(corpus, directory, "poisoned-differences", *differences),
        "poison": [8],
    }
    runs["dropout"] = {
        "overrides": small(corpus, directory, "dropout", "strategy=ddp", "model.dropout=0.1", "train.steps=2")
    }
    for name, variant in VARIANTS.items():
        runs[name] = {"overrides": small(corpus, directory, name, *variant)}
    for share in SHARES:
        overrides = small(corpus, directory, f"share-{share}", "strategy=ddp", f"optimizer.batch_fraction={share}")
        runs[f"share {share}"] = {"overrides": overrides}
    looks = [[look, kind] for look in ranks.LOOKS for kind in ranks.KINDS]
    (directory / "work.json").write_text(json.dumps({"runs": runs, "looks": looks}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--redirects=3", f"--log-dir={directory / 'logs'}", ranks.__file__, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONFAULTHANDLER"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:] + ends_of_logs(directory / "logs")

    ranks.run({"overrides": moved(corpus, directory, "moved", "strategy=single")})
    (directory / "corpus.json").write_text(json.dumps(corpus))


def ends_of_logs(directory: Path) -> str:
    """Return the end of each rank's log."""
    logs = sorted(directory.rglob("std*.log"), key=lambda log: log.parent.name)
    return "".join(f"\n{log.parent.name}/{log.name}:\n{log.read_text()[-3000:]}" for log in logs)


#: Settings that must not change the curve of the strategy.
VARIANTS = {
    "plain": ["strategy=ddp"],
    "ddp-own-forward": ["strategy=ddp", "train.shared_forward=false"],
    "ddp-micro-batches": ["strategy=ddp", "train.micro_batch_size=1"],
    "fsdp-recomputed": ["strategy=fsdp", "strategy.activation_checkpointing=true"],
    "fsdp-gathered": ["strategy=fsdp", "strategy.reshard_after_forward=false"],
    "zero2-offloaded": [*ranks.KINDS["zero2"], "strategy.offload_optimizer=true"],
    "zero3-offloaded": [*ranks.KINDS["zero3"], "strategy.offload_optimizer=true"],
}
