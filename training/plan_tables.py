"""The planner's numbers for people: a plan in the terminal, the table of models in Markdown, the check against measured
memory."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.files import write_atomically
from models import GPT2Config
from training import hardware
from training.cluster import ClusterConfig
from training.compose import compose
from training.config import RunConfig
from training.memory_trace import KINDS, Kind
from training.planned_memory import PHASES, planned_memory
from training.planner import OptimizerPlan, Plan, Remedy, make_plan, planned_shape

GIB = 2**30
KIND_NAMES: dict[Kind, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "curvature": "curvature state (h)",
    "activations": "activations",
    "head": "loss head",
    "engine": "engine's buffers, bf16 copies",
    "workspace": "update's workspace",
}


def print_plan(plan: Plan, console: Console) -> None:
    """What the run is, memory by kind, time and cost, traffic, and what fits."""
    cluster, train = plan.cluster, plan.config.train
    accumulated = f"{plan.micro_batches} x {plan.micro_batch_size} sequences on each"
    console.print(
        f"[bold]{plan.config.model.name}[/]: {_count(plan.parameters)} parameters, {_strategy(plan.config)}, "
        f"{train.precision}, {cluster.gpus} x {cluster.gpu}\n"
        f"{train.steps:,} steps of {train.global_batch_size} sequences of {train.sequence_length} tokens "
        f"({accumulated}): {_count(plan.tokens)} tokens, {plan.training_flops_per_step:.3e} FLOPs a step, "
        f"{plan.training_flops_per_step * train.steps:.3e} in all",
        highlight=False,
    )
    for note in plan.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    console.print(memory_table(plan), time_table(plan), traffic_table(plan))
    for name, reason in plan.refused.items():
        console.print(f"{name}: {escape(reason)}", highlight=False)
    for line in verdict(plan):
        console.print(line, highlight=False)


def verdict(plan: Plan) -> Iterator[str]:
    """What fits, and where the configuration's own optimizer does not, the nearest settings that do."""
    usable = plan.cluster.usable_bytes
    chosen = plan.config.optimizer.name
    fitting = [one.optimizer for one in plan.optimizers if one.fits]
    missing = [one.optimizer for one in plan.optimizers if not one.fits]
    room = f"of the {usable / GIB:.1f} GiB that a {plan.cluster.gpu} has for tensors"
    if fitting:
        yield f"[green]fits[/] ({room}): {', '.join(fitting)}"
    if missing:
        yield f"[red]does not fit[/] ({room}): {', '.join(missing)}"
    if chosen in missing:
        yield (
            f"nearest settings with which {chosen} fits:"
            if plan.remedies
            else f"no setting of micro-batch, checkpointing, strategy or number of GPUs was found with which {chosen} "
            "fits; choose a smaller model= or a larger cluster.gpu="
        )
    for remedy in plan.remedies:
        yield f"  {_remedy(remedy)}"


def memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of each GPU at the peak, GiB", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for one in plan.optimizers:
        table.add_column(one.optimizer, justify="right")
    for kind in KINDS:
        table.add_row(KIND_NAMES[kind], *[_gib(one.memory[one.peak_phase][kind]) for one in plan.optimizers])
    table.add_row("[bold]sum[/]", *[f"[bold]{_gib(one.peak_bytes)}[/]" for one in plan.optimizers])
    table.add_row("peak in", *[one.peak_phase for one in plan.optimizers])
    for phase in PHASES:
        sums = [sum(one.memory[phase].values()) if phase in one.memory else None for one in plan.optimizers]
        table.add_row(f"  peak of {phase}", *["-" if size is None else _gib(size) for size in sums])
    table.add_row("fits", *["[green]yes[/]" if one.fits else "[red]no[/]" for one in plan.optimizers])
    return table


def time_table(plan: Plan) -> Table:
    cluster = plan.cluster
    table = Table(
        title=f"Time at {cluster.utilisation:.0%} of the peak, cost at {cluster.price_per_hour:g} for a GPU's hour",
        caption="communication hides behind forward and backward as far as it fits; evaluation and checkpoints come on top",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for one in plan.optimizers:
        table.add_column(one.optimizer, justify="right")
    rows: list[tuple[str, Callable[[OptimizerPlan], str]]] = [
        ("curvature estimator", lambda one: (one.estimator or "-").replace("_", " ")),
        ("FLOPs a step, curvature's part included", lambda one: f"{one.flops_per_step:.3e}"),
        ("seconds: forward and backward", lambda one: _seconds(one.seconds.compute)),
        ("         communication, not hidden", lambda one: _seconds(one.seconds.exposed)),
        ("         update", lambda one: _seconds(one.seconds.update)),
        ("         curvature pass, each step's part", lambda one: _seconds(one.seconds.curvature)),
        ("         [bold]step[/]", lambda one: f"[bold]{_seconds(one.seconds.total)}[/]"),
        ("hours", lambda one: f"{one.hours:,.1f}"),
        ("cost", lambda one: f"{one.cost:,.0f}"),
    ]
    for name, value in rows:
        table.add_row(name, *[value(one) for one in plan.optimizers])
    return table


def traffic_table(plan: Plan) -> Table:
    table = Table(title="GB that each GPU sends", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for one in plan.optimizers:
        table.add_column(one.optimizer, justify="right")
    for what, of in (
        ("step", lambda one: one.traffic.step),
        ("curvature pass", lambda one: one.traffic.curvature_pass),
    ):
        collectives = dict.fromkeys(name for one in plan.optimizers for name in of(one))
        for name in collectives:
            sizes = [of(one).get(name, 0) for one in plan.optimizers]
            table.add_row(f"{what}: {name}", *[_gigabytes(size) for size in sizes])
    return table


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size else "-"


def _gib(size: int) -> str:
    return "-" if size == 0 else f"{size / GIB:,.2f}"


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value else "-"


def _count(number: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:,}"


def _strategy(config: RunConfig) -> str:
    strategy = config.strategy
    described: str = strategy.name
    if hasattr(strategy, "zero_stage"):
        described += f" ZeRO-{strategy.zero_stage}"
    if getattr(strategy, "activation_checkpointing", False):
        described += " with activation checkpointing"
    return described


def _remedy(remedy: Remedy) -> str:
    return f"{' '.join(remedy.overrides)}  ({remedy.peak_bytes / GIB:.1f} GiB)"


# The table of docs/scaling.md

MODELS = ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_1500m", "gpt2_2700m", "gpt2_6600m")
#: How each is run: one GPU first, then a node, then several.
SETTINGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("strategy=ddp",)),
    (8, ("strategy=ddp",)),
    (8, ("strategy=fsdp",)),
    (64, ("strategy=fsdp", "strategy.activation_checkpointing=true")),
)


def model_table(overrides: Sequence[str], cluster: ClusterConfig) -> str:
    """Markdown: each model under each setting with AdamW, Sophia-G and Lion, on the paper's batch of 512 sequences."""
    lines = [
        f"| model | GPUs ({cluster.gpu}) | strategy | GiB: AdamW, Lion, Sophia-G | fits | hours: AdamW, Lion, Sophia-G | "
        "GB sent a step | in a curvature pass |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    recipe = ("train.global_batch_size=512", "train.micro_batch_size=8", "train.steps=100000")
    for model in MODELS:
        for gpus, strategy in SETTINGS:
            there = cluster.model_copy(update={"gpus": gpus})
            arguments = [f"model={model}", "optimizer=sophiag", *strategy, *recipe, *overrides]
            plan = make_plan(arguments, there, ("adamw", "lion", "sophiag"), search=False)
            by_name = {one.optimizer: one for one in plan.optimizers}
            chosen = [by_name[name] for name in ("adamw", "lion", "sophiag")]
            traffic = by_name["sophiag"].traffic
            lines.append(
                f"| {model} ({_count(plan.parameters)}) | {gpus} | {_strategy(plan.config)} | "
                f"{', '.join(f'{one.peak_bytes / GIB:.1f}' for one in chosen)} | "
                f"{_fits(chosen)} | {', '.join(_hours(one.hours) for one in chosen)} | "
                f"{_gigabytes(sum(traffic.step.values()))} | {_gigabytes(sum(traffic.curvature_pass.values()))} |"
            )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}"


def _fits(plans: Sequence[OptimizerPlan]) -> str:
    fitting = [one.optimizer for one in plans if one.fits]
    return "yes" if len(fitting) == len(plans) else "no" if not fitting else f"{', '.join(fitting)} only"


# The check

CHECK_BASE = ("model=gpt2_mini", "train.sequence_length=256", "train.global_batch_size=16", "train.micro_batch_size=4")
CHECK_SHAPE: dict[str, int] = {"n_layer": 8, "vocab_size": 8192}
#: Ranks, and what is different from the base.
CHECKED: tuple[tuple[int, str], ...] = (
    (1, "train.precision=fp32 optimizer=adamw strategy=ddp"),
    (1, "train.precision=bf16 optimizer=sophiag strategy=ddp"),
    (1, "train.precision=fp32 optimizer=sophiah strategy=ddp"),
    (2, "train.precision=fp32 optimizer=lion strategy=ddp"),
    (2, "train.precision=bf16 optimizer=adamw strategy=ddp"),
    (2, "train.precision=bf16 optimizer=sophiag strategy=ddp"),
    (2, "train.precision=fp32 optimizer=adamw strategy=fsdp"),
    (2, "train.precision=bf16 optimizer=sophiag strategy=fsdp"),
    (2, "train.precision=bf16 optimizer=muon strategy=fsdp"),
    (2, "train.precision=fp32 optimizer=sophiag strategy=fsdp strategy.activation_checkpointing=true"),
    (2, "train.precision=bf16 optimizer=adamw strategy=fsdp strategy.activation_checkpointing=true"),
    (2, "train.precision=fp32 optimizer=adamw strategy=deepspeed strategy.zero_stage=1"),
    (2, "train.precision=bf16 optimizer=sophiag strategy=deepspeed strategy.zero_stage=1"),
    (2, "train.precision=fp32 optimizer=adamw strategy=deepspeed strategy.zero_stage=2"),
    (2, "train.precision=bf16 optimizer=sophiag strategy=deepspeed strategy.zero_stage=2"),
    (2, "train.precision=fp32 optimizer=adamw strategy=deepspeed strategy.zero_stage=3"),
    (2, "train.precision=bf16 optimizer=sophiag strategy=deepspeed strategy.zero_stage=3"),
)
TOLERANCE = 0.15


def check_case(ranks: int, overrides: str) -> dict[str, Any]:
    """One configuration planned and measured on this machine's CPU, in bytes."""
    from training.measured_memory import measured_memory
    from training.planned_zero import reduction_bucket_bytes

    config = compose([*CHECK_BASE, "train.compile=false", *overrides.split()])
    shape = GPT2Config(**{**vars(planned_shape(config)), **CHECK_SHAPE})
    planned = max(sum(memory.values()) for memory in planned_memory(config, shape, ranks, "cpu").values())
    tracked, allocated = measured_memory(config, shape, ranks)
    # The reduction bucket of ZeRO, two gigabytes, would hide any error on a model of this size.
    stage = getattr(config.strategy, "zero_stage", None)
    fixed = 0 if stage is None else reduction_bucket_bytes(config, stage)
    return {
        "ranks": ranks,
        "overrides": overrides,
        "planned": planned,
        "tracked": tracked,
        "allocated": allocated,
        "fixed_bucket": fixed,
        "planned_over_tracked": (planned - fixed) / (tracked - fixed),
        "planned_over_allocated": (planned - fixed) / (allocated - fixed),
    }


def write_check(directory: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Plan and measure every checked configuration; memory.json and memory.md in the directory."""
    cases = []
    for ranks, overrides in CHECKED:
        tell(f"{ranks} ranks, {overrides}")
        cases.append(check_case(ranks, overrides))
    record = {
        "command": "python scripts/plan.py --check",
        "base": [*CHECK_BASE, *[f"{key}={value}" for key, value in CHECK_SHAPE.items()]],
        "versions": hardware.versions(),
        "cases": cases,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("memory.json", json.dumps(record, indent=1) + "\n"), ("memory.md", check_markdown(record))):
        write_atomically(directory / name, text)
    return record


def check_markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Planned and measured memory",
        "",
        f"`{record['command']}`: peak of a training step on rank 0, MB, of real runs on a CPU over gloo. *Tracked* is what",
        "torch's MemTracker sees, *allocated* what the CPU allocator itself has given out. For ZeRO the ratios are without the",
        "engine's fixed reduction bucket (1 or 2 GB), which would hide any error at this size.",
        "",
        f"Base: `{' '.join(record['base'])}`.",
        "",
        "| ranks | configuration | planned | tracked | allocated | planned / tracked | planned / allocated |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in record["cases"]:
        sizes = " | ".join(f"{case[key] / 1e6:,.1f}" for key in ("planned", "tracked", "allocated"))
        ratios = f"{case['planned_over_tracked']:.3f} | {case['planned_over_allocated']:.3f}"
        lines.append(f"| {case['ranks']} | {case['overrides']} | {sizes} | {ratios} |")
    return "\n".join(lines) + "\n"


def check_tables(record: dict[str, Any], console: Console) -> None:
    table = Table(title="Planned and measured memory, MB", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("ranks", "configuration", "planned", "tracked", "allocated", "/ tracked", "/ allocated"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for case in record["cases"]:
        ratios = [case["planned_over_tracked"], case["planned_over_allocated"]]
        table.add_row(
            str(case["ranks"]),
            case["overrides"],
            *[f"{case[key] / 1e6:,.1f}" for key in ("planned", "tracked", "allocated")],
            *[f"[{'green' if abs(ratio - 1) <= TOLERANCE else 'red'}]{ratio:.3f}[/]" for ratio in ratios],
        )
    console.print(table)
