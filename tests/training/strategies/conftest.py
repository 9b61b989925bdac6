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
from training.compose import compose

STEPS = 6
#: What is held against the single process here; `python -m tests.training.strategies.parity` does it for all pairs. Each
#: strategy has Sophia-G. A rule without curvature is a step like another, and ZeRO 1 and 2 keep one state: these take turns.
PAIRS = {
    "ddp×2": [*parity.OPTIMIZERS],
    "fsdp×2": ["adamw", "sophiag", "sophiah, differences"],
    "zero1×2": ["lion", "sophiag"],
    "zero2×2": ["sophiag", "sophiah"],
    "zero3×2": ["adamw", "sophiag", "sophiah, differences"],
}
POISONED = ["ddp", "fsdp", "zero1", "zero3"]  # and zero2 under differences
OWN_MODEL = ["ddp", "zero3"]  # a replica of it, and shards with a head that gathers the output layer
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


def job(overrides: list[str], **more: Any) -> dict[str, Any]:
    """For `ranks.run`, composed here once instead of on each rank."""
    return {"config": compose(overrides).model_dump(mode="json"), **more}


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
    for config in here[1]:
        ranks.run({"config": config})
    ranks.run(job(moved(corpus, directory, "undisturbed", "strategy=single")))
    ranks.run(job(moved(corpus, directory, "moved", "strategy=single"), stop=3))

    rotary = "model.architecture=examples.my_model:Rotary"
    ranks.run(job(small(corpus, directory, "own-model-single", "strategy=single", rotary)))
    for share in SHARES:
        own = ["strategy=single", "train.shared_forward=false", f"optimizer.batch_fraction={share}"]
        ranks.run(job(small(corpus, directory, f"share-{share}-single", *own)))

    runs: dict[str, Any] = {}
    for strategy, optimizers in PAIRS.items():
        _, there = parity.plan(directory, model, [strategy], optimizers, STEPS, accumulations=(2,))
        runs |= {config["name"]: {"config": config} for config in there[2]}
    for kind, stop in MOVES:
        runs[f"moved {kind}"] = job(moved(corpus, directory, "moved", *ranks.KINDS[kind]), stop=stop)
    for kind, given in ranks.KINDS.items():
        runs[f"bf16 {kind}"] = job(small(corpus, directory, f"bf16-{kind}", *given, "train.precision=bf16"))
        # Backward passes: refresh and step 1, steps 2 to 5, refresh and step 6. Two of them give NaN: step 3, refresh 6.
        # DDP, whose refresh takes part in the training forward, has one more: of the slice's training loss.
        if kind in POISONED:
            overrides = small(corpus, directory, f"poisoned-{kind}", *given)
            runs[f"poisoned {kind}"] = job(overrides, poison=[5, 8] if kind == "ddp" else [4, 7])
    # Of a refresh by differences two: before step 6 they are the eighth and the ninth.
    differences = [*ranks.KINDS["zero2"], "optimizer.estimator=hutchinson_differences"]
    runs["poisoned differences"] = job(small(corpus, directory, "poisoned-differences", *differences), poison=[8])
    runs["dropout"] = job(small(corpus, directory, "dropout", "strategy=ddp", "model.dropout=0.1", "train.steps=2"))
    for kind in OWN_MODEL:
        runs[f"own model {kind}"] = job(small(corpus, directory, f"own-model-{kind}", *ranks.KINDS[kind], rotary))
    for name, variant in VARIANTS.items():
        runs[name] = job(small(corpus, directory, name, *variant))
    for share in SHARES:
        own = ["strategy=ddp", f"optimizer.batch_fraction={share}"]
        runs[f"share {share}"] = job(small(corpus, directory, f"share-{share}", *own))
    looks = [[look, kind] for look, kinds in ranks.LOOKED_AT.items() for kind in kinds]
    (directory / "work.json").write_text(json.dumps({"runs": runs, "looks": looks}))
    command = [sys.executable, ranks.__file__, str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONFAULTHANDLER"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]

    ranks.run(job(moved(corpus, directory, "moved", "strategy=single")))
    (directory / "corpus.json").write_text(json.dumps(corpus))


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
