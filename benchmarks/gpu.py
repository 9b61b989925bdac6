"""What depends on the device, on one GPU, in ten minutes: `make bench-gpu`.

    python benchmarks/gpu.py                       everything that fits into ten minutes, on the first GPU
    python benchmarks/gpu.py --minutes 25 --only training_124m,training_355m
    python benchmarks/gpu.py --rehearse            every part at a tiny size, uncompiled, on a CPU: it measures nothing

Each part runs in its own process, one after another; a part that fails or takes too long is named with the reason, and
the others go on. Arms of one part take turns. Nothing is downloaded. Writes benchmark.json, README.md and a figure to
results/benchmarks/gpu/<name>/ after each part.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import optimizer_step, page
from benchmarks.calibration import datasheet_rate, matrix_product_rate
from benchmarks.record import provenance
from benchmarks.training_step import HESSIAN_INTERVAL, SHAPES, Arm, Shape, Worker, held_memory
from data import prepare
from data.batches import Batch
from data.files import write_atomically, write_json
from models import GPT2Config
from training.architectures import build_model
from training.compose import compose
from training.corpus import source_of, token_directory_of, tokenizer_of
from training.curvature import CurvaturePass
from training.distributed import Distributed
from training.launching import command
from training.loop import Run, forward_backward, forward_backward_refresh
from training.optimizers import build_optimizers
from training.recording.diagnostics import curvature_sums_by_kind
from training.recording.ledger import Ledger
from training.records import RunRecord
from training.run import resolve
from training.strategies import build_strategy
from training.weights import InitialWeights

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "benchmarks" / "gpu"

#: What the parts import, all of it in requirements.lock; a CUDA build of torch brings triton.
NEEDS = ("torch", "triton", "transformers", "hydra", "pydantic", "matplotlib", "pytest")

ESTIMATORS = {
    "Gauss-Newton-Bartlett, within the training forward": ["optimizer=sophiag"],
    "Gauss-Newton-Bartlett, own forward": ["optimizer=sophiag", "train.shared_forward=false"],
    "empirical Fisher": ["optimizer=sophiag", "optimizer.estimator=empirical_fisher"],
    "Hutchinson, double backward": ["optimizer=sophiah"],
    "Hutchinson, central differences": ["optimizer=sophiah", "optimizer.estimator=hutchinson_differences"],
}


@dataclass(frozen=True)
class Plan:
    """What to run, where and at which size."""

    device: torch.device
    rehearsal: bool
    scratch: Path  # the run and its tokens

    @property
    def rounds(self) -> int:
        return 1 if self.rehearsal else 10

    def shape(self, size: str) -> Shape:
        if self.rehearsal:
            return SHAPES["tiny"]
        if size == "124m":
            return Shape(GPT2Config(), 16, 1.0)
        return Shape(GPT2Config(n_layer=24, n_head=16, n_embd=1024), 8, 1.0)

    def run_overrides(self) -> list[str]:
        """The overrides of the run: the paper's recipe, fewer and smaller batches of the sample corpus."""
        given = ["experiment=paper/125m_sophiag", "name=run", f"output_dir={self.scratch}", "tracker=none"]
        given += [
            f"data.directory={self.scratch}/tokens",
            "checkpoint.interval=null",
            f"train.device={self.device.type}",
        ]
        if self.rehearsal:
            given += ["model=gpt2_nano", "data=text", f"data.paths=[{self.scratch}/corpus.jsonl]", "tokenizer=bpe"]
            given += ["tokenizer.vocab_size=300", "train.steps=4", "train.global_batch_size=4", "eval.tokens=256"]
            given += ["train.micro_batch_size=2", "train.sequence_length=32", "train.compile=false", "eval.interval=2"]
            return [*given, "schedule.warmup_steps=1"]
        given += ["data=sample", "train.steps=300", "train.global_batch_size=32", "train.micro_batch_size=8"]
        return [*given, "schedule.warmup_steps=30", "eval.interval=50", "eval.tokens=131072"]


class SkippedError(Exception):
    """Why a part or an arm does not run here."""


# ----------------------------------------------------------------------------------------------------------------
# The parts


def machine(plan: Plan) -> dict[str, Any]:
    sizes = (256,) if plan.rehearsal else None
    seconds = 0.01 if plan.rehearsal else 1.0
    rates = {
        name: matrix_product_rate(dtype, plan.device, seconds, sizes)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    return {**provenance(plan.device), "matrix_product_rate": rates, "bf16_datasheet": datasheet_rate(plan.device)}


def device_tests(plan: Plan) -> dict[str, Any]:
    """`make test-gpu`: the tests that need a GPU."""
    if plan.device.type != "cuda":
        raise SkippedError("no CUDA device")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "failed": lines, "summary": done.stdout.strip().splitlines()[-1]}


def optimizer(plan: Plan, size: str) -> dict[str, Any]:
    """Sophia, Lion and update_hessian against fused AdamW."""
    warnings.filterwarnings("ignore", message=".*without update_hessian")
    torch.manual_seed(0)
    params = optimizer_step.parameters("tiny" if plan.rehearsal else size, plan.device)
    return {
        "parameters": sum(p.numel() for p in params),
        "targets": optimizer_step.TARGETS,
        "steps": optimizer_step.measure(optimizer_step.arms(params, slow=False), 3 * plan.rounds, plan.device),
    }


def training(plan: Plan, size: str) -> dict[str, Any]:
    """The training step against the plain compiled model and transformers: time, utilisation and peak memory."""
    compiled, shape = not plan.rehearsal, plan.shape(size)
    arms = {  # ours last: compiling it switches off donated buffers in the whole process
        "plain": Arm("plain", compiled=compiled),
        "transformers": Arm("transformers", compiled=compiled),
        "here": Arm("here", compiled=compiled),
    }
    workers: dict[str, Worker] = {}
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name, arm in arms.items():
        before = held_memory(plan.device)
        try:
            worker = Worker(shape, arm, plan.device)
            began = time.perf_counter()
            worker.seconds("step")
            first = time.perf_counter() - began
            worker.seconds("step")
            # The other arms hold theirs meanwhile.
            rows[name] = {"first_step_seconds": first, "peak_bytes": worker.peak_bytes() - before, "seconds": []}
            workers[name] = worker
        except Exception as error:
            skipped[name] = reason(error)
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
    for _ in range(plan.rounds):
        for name, worker in workers.items():
            rows[name]["seconds"].append(worker.seconds("step"))
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
    config = shape.config
    return {
        "batch_size": shape.batch_size,
        "sequence_length": config.block_size,
        "flops": config.flops(config.block_size).forward_backward(shape.tokens),
        "tokens": shape.tokens,
        "arms": rows,
        "skipped": skipped,
    }


def curvature(plan: Plan) -> dict[str, Any]:
    """The share of a step's time that the curvature pass takes, by estimator, as the training loop runs it."""
    rows: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, overrides in ESTIMATORS.items():
        try:
            rows[name] = curvature_pass(plan, overrides)
        except Exception as error:
            skipped[name] = reason(error)
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    return {"estimators": rows, "skipped": skipped}


def curvature_pass(plan: Plan, overrides: list[str]) -> dict[str, float]:
    size, micro = (8, 4) if plan.rehearsal else (60, 12)
    settings = ["model=gpt2_nano", "train.sequence_length=32", "train.compile=false"]
    if not plan.rehearsal:
        settings = ["model=gpt2_small", "train.sequence_length=1024"]
    settings += [
        f"train.global_batch_size={size}",
        f"train.micro_batch_size={micro}",
        f"train.device={plan.device.type}",
    ]
    config = resolve(compose([*settings, *overrides]), plan.device)
    strategy = build_strategy(config, Distributed(0, 0, 1, plan.device))
    vocab_size = 300 if plan.rehearsal else 50257
    model = build_model(config.model, vocab_size)
    weights = InitialWeights(config.model, model, 0)
    strategy.prepare(model, weights, build_optimizers(config.optimizer, compile_step=bool(config.train.compile)))
    shared = config.train.shared_forward
    refresh = CurvaturePass.of(config.optimizer, 0, size, micro, shared_forward=shared)
    assert refresh is not None
    unused: Any = None
    run = Run(
        config=config,
        strategy=strategy,
        batches=unused,
        validation=unused,
        curvature=refresh,
        ledger=Ledger(plan.device),
        micro_batch_size=micro,
        eval_micro_batch_size=micro,
        parameters=0,
        flops=model.flops(config.train.sequence_length),
        write=lambda line: None,
        message=lambda line: None,
        save=lambda state: None,
        stop_requested=lambda: False,
    )
    drawn = np.random.default_rng(0).integers(0, vocab_size, (size, config.train.sequence_length + 1))
    batch = Batch(drawn[:, :-1].copy(), drawn[:, 1:].copy(), np.arange(size))

    def step() -> None:
        strategy.step(1.0, forward_backward(run, batch).double())

    def due() -> None:
        if refresh.shares_forward(strategy):
            loss, _ = forward_backward_refresh(run, refresh, strategy, batch, 1)
        else:
            refresh.run(strategy, batch, 1)
            loss = forward_backward(run, batch)
        strategy.step(1.0, loss.double())

    calls: dict[str, Callable[[], object]] = {
        "step": step,
        "due": due,
        "statistics": lambda: curvature_sums_by_kind(strategy),
    }
    measured = optimizer_step.measure(calls, max(1, plan.rounds // 3), plan.device)
    medians = {name: row["median_seconds"] for name, row in measured.items()}
    every = HESSIAN_INTERVAL * medians["step"]
    return {
        "step_seconds": medians["step"],
        "due_step_seconds": medians["due"],
        "share_of_step": (medians["due"] - medians["step"]) / every,
        "statistics_share_of_step": medians["statistics"] / every,
    }


def paper_run(plan: Plan) -> dict[str, Any]:
    """The paper's 125M Sophia-G recipe for 300 steps, with reduced batch on the sample corpus."""
    if plan.rehearsal:
        prepare_text(plan)
    code = command.main(plan.run_overrides())
    record = RunRecord.open(plan.scratch / "run")
    lines = list(record.metrics("train"))
    return {
        "command": "python train.py " + " ".join(plan.run_overrides()),
        "exit_code": code,
        "summary": record.summary,
        "steps": [line["step"] for line in lines],
        "loss": [line["loss"] for line in lines],
        "unclipped_fraction": [line.get("unclipped_fraction") for line in lines],
        "tokens_per_second": [line["tokens_per_second"] for line in lines],
        "validation": [[line["step"], line["val_loss"]] for line in record.metrics("eval")],
    }


def prepare_text(plan: Plan) -> None:
    """Write and prepare the rehearsal's corpus, lines of the README; the sample corpus prepares itself."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    documents = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (plan.scratch / "corpus.jsonl").write_text(documents, encoding="utf-8")
    config = compose(plan.run_overrides())
    prepare(source_of(config), tokenizer_of(config), token_directory_of(config), workers=1)


def sample(plan: Plan) -> dict[str, Any]:
    """Text from the run's checkpoint, by scripts/sample.py."""
    if not (plan.scratch / "run").is_dir():
        raise SkippedError("there is no run to sample from")
    tokens = 8 if plan.rehearsal else 200
    script = str(ROOT / "scripts" / "sample.py")
    arguments = [str(plan.scratch / "run"), "--prompt", "It was", "--tokens", str(tokens), "--device", plan.device.type]
    sys.argv = [script, *arguments]
    text = io.StringIO()
    began = time.perf_counter()
    try:
        with redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"scripts/sample.py ended with code {ended.code}") from ended
    return {"seconds": time.perf_counter() - began, "tokens": tokens, "text": text.getvalue()}


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "machine": machine,
    "tests": device_tests,
    "optimizer_124m": lambda plan: optimizer(plan, "124m"),
    "training_124m": lambda plan: training(plan, "124m"),
    "curvature_124m": curvature,
    "run": paper_run,
    "sample": sample,
    "optimizer_355m": lambda plan: optimizer(plan, "355m"),
    "training_355m": lambda plan: training(plan, "355m"),
}


# ----------------------------------------------------------------------------------------------------------------
# The parts, one after another


def reason(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]


def _part(name: str, plan: Plan, answer: Connection) -> None:
    os.setsid()  # what it starts is killed with it
    if plan.rehearsal:
        torch.set_num_threads(1)  # tiny tensors
    try:
        answer.send(("done", PARTS[name](plan)))
    except SkippedError as skipped:
        answer.send(("skipped", str(skipped)))
    except Exception as error:
        traceback.print_exc()
        answer.send(("failed", reason(error)))


def run_part(name: str, plan: Plan, seconds: float) -> tuple[str, Any]:
    """Run a part in its own process. Returns "done" and its result, or "skipped" or "failed" and the reason."""
    # Forked, since the imports take seconds. This process must not have touched CUDA.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_part, args=(name, plan, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(seconds) else ("skipped", f"stopped after {seconds:.0f} s: time is up")
    except EOFError:
        process.join()
        found = ("failed", f"its process ended with code {process.exitcode}")
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return found


def missing() -> list[str]:
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the folder with the results (default: the GPU's name)")
    parser.add_argument("--minutes", type=float, default=10.0, help="what does not fit is left out (10)")
    parser.add_argument("--only", default=",".join(PARTS), help="names of parts (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the folder is made")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - PARTS.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the usual check would touch CUDA here
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device; --rehearse runs every part at a tiny size on a CPU")
    print(f"needs, from requirements.lock: {', '.join(NEEDS)}; a C++ compiler; nothing is downloaded")
    lacking = missing()
    if lacking:
        print(f"not installed: {', '.join(lacking)}; what needs it will fail (make setup, make wheels)")
    import models.huggingface  # noqa: F401  # once, before the parts are forked

    deadline = time.monotonic() + 60 * arguments.minutes
    scratch = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", 0)
    plan = Plan(device, arguments.rehearse, scratch)
    record: dict[str, Any] = {"rehearsal": plan.rehearsal, "minutes": arguments.minutes, "parts": {}, "skipped": {}}
    record["skipped"] = {name: "not chosen" for name in PARTS if name not in chosen and name != "machine"}
    folder: Path | None = None
    found: Any
    try:
        for name in PARTS:
            if name != "machine" and name not in chosen:
                continue
            left = deadline - time.monotonic()
            began = time.monotonic()
            print(f"\n{name}: {left:.0f} s left", flush=True)
            outcome, found = run_part(name, plan, left) if left > 1 else ("skipped", "time is up")
            if outcome == "done":
                record["parts"][name] = {**found, "wall_seconds": time.monotonic() - began}
            else:
                print(f"{name}: {outcome}: {found}", flush=True)
                record["skipped"][name] = f"{outcome}: {found}" if outcome == "failed" else found
            folder = folder or arguments.output / (arguments.name or default_name(record))
            write(folder, record)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\nwritten to {folder}")
    return int(any(str(why).startswith("failed") for why in record["skipped"].values()))


def default_name(record: Mapping[str, Any]) -> str:
    hardware = record["parts"].get("machine", {}).get("hardware", {})
    name = "rehearsal" if record["rehearsal"] else str(hardware.get("gpu", "gpu"))
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ----------------------------------------------------------------------------------------------------------------
# The page


def write(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "benchmark.json", record)
    if run := record["parts"].get("run"):
        draw(folder / "loss.svg", run)
    write_atomically(folder / "README.md", "\n".join(lines(record)) + "\n")


def draw(path: Path, run: Mapping[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(run["steps"], run["loss"], linewidth=1, label="training")
    axes.plot(*zip(*run["validation"], strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the page."""
    parts = record["parts"]
    machine = parts.get("machine", {})
    yield f"# {page.where(machine) if machine else 'GPU'}"
    yield ""
    if record["rehearsal"]:
        yield "A rehearsal at tiny sizes on a CPU: it shows that every part runs, and measures nothing."
        yield ""
    yield "Made by `make bench-gpu` (`benchmarks/gpu.py`). Times are medians, and arms take turns."
    yield ""
    if machine:
        rates, versions = machine["matrix_product_rate"], machine["versions"]
        yield f"- torch {versions['torch']}, commit {machine['git']['commit']}"
        yield f"- large products: bf16 {rates['bf16'] / 1e12:.1f}, fp32 {rates['fp32'] / 1e12:.1f} TFLOP/s"
        if machine["bf16_datasheet"]:
            yield f"- the datasheet's bf16 rate: {machine['bf16_datasheet'] / 1e12:.0f} TFLOP/s"
        yield ""
    if tests := parts.get("tests"):
        yield f"Tests that need a GPU: {tests['summary'].strip('= ')}"
        yield from (f"- `{line}`" for line in tests["failed"])
        yield ""
    for size in ("124m", "355m"):
        if found := parts.get(f"optimizer_{size}"):
            yield from page.optimizer_step({**machine, **found})
            yield ""
        if found := parts.get(f"training_{size}"):
            yield from training_lines(size, found, machine)
            yield ""
    if found := parts.get("curvature_124m"):
        yield from curvature_lines(found)
        yield ""
    if found := parts.get("run"):
        yield from run_lines(found)
        yield ""
    if found := parts.get("sample"):
        yield f"## `scripts/sample.py`, {found['tokens']} tokens in {found['seconds']:.1f} s"
        yield ""
        yield from (f"    {line}" for line in found["text"].strip().splitlines())
        yield ""
    yield "## Skipped"
    yield ""
    nested = [(f"{part}, {arm}", why) for part in parts for arm, why in parts[part].get("skipped", {}).items()]
    skipped = [*record["skipped"].items(), *nested]
    yield from (f"- {name}: {why}" for name, why in skipped)
    if not skipped:
        yield "Nothing."


def training_lines(size: str, found: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterator[str]:
    batch, length = found["batch_size"], found["sequence_length"]
    yield f"### Training step, {size.upper()}, batch {batch}, T = {length}, bf16, fused AdamW"
    yield ""
    rate, datasheet = machine.get("matrix_product_rate", {}).get("bf16"), machine.get("bf16_datasheet")
    here = found["arms"].get("here", {}).get("median_seconds")
    rows = []
    for name, row in found["arms"].items():
        seconds = row["median_seconds"]
        rows.append(
            (
                name,
                f"{1e3 * seconds:.1f}",
                f"{found['tokens'] / seconds:,.0f}",
                f"{seconds / here:.2f}" if here else "",
                f"{found['flops'] / seconds / rate:.0%}" if rate else "",
                f"{found['flops'] / seconds / datasheet:.0%}" if datasheet else "",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{row['first_step_seconds']:.0f}",
            )
        )
    header = (
        "",
        "median ms",
        "tokens/s",
        "here is faster by",
        "of measured rate",
        "of datasheet",
        "peak GB",
        "first step s",
    )
    yield from page.table(header, rows)


def curvature_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"### Curvature pass, 124M, every {HESSIAN_INTERVAL} steps"
    yield ""
    rows = [
        (
            name,
            f"{1e3 * row['step_seconds']:.0f}",
            f"{1e3 * row['due_step_seconds']:.0f}",
            f"{row['share_of_step']:.1%}",
            f"{row['statistics_share_of_step']:.1%}",
        )
        for name, row in found["estimators"].items()
    ]
    yield from page.table(("", "step ms", "step with a pass ms", "share of a step", "statistics of h"), rows)


def run_lines(found: Mapping[str, Any]) -> Iterator[str]:
    summary = found["summary"] or {}
    yield f"## A run: {len(found['steps'])} steps, {summary.get('status')}"
    yield ""
    yield f"    {found['command']}"
    yield ""
    rate = statistics.median(found["tokens_per_second"])
    peak = summary.get("peak_memory_bytes", 0) / 1e9
    yield f"Median {rate:,.0f} tokens/s, peak memory {peak:.2f} GB."
    yield ""
    yield "![loss](loss.svg)"
    yield ""
    yield from page.table(
        ("step", "validation loss"), [(str(step), f"{loss:.4f}") for step, loss in found["validation"]]
    )


if __name__ == "__main__":
    sys.exit(main())
