"""The planner's output: a plan on the terminal, and the table of models in Markdown."""

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planning.cluster import ClusterConfig, compose_for
from planning.memory import KINDS, PHASES, Kind
from planning.plan import OptimizerPlan, Remedy, RunPlan, plan_run
from training.config import RunConfig

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


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print the run, memory by kind, time and cost, traffic, and what fits."""
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


def verdict(plan: RunPlan) -> Iterator[str]:
    """Yield what fits, and the nearest settings that fit if the configured optimizer does not."""
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
            f"nearest settings that fit {chosen}:"
            if plan.remedies
            else f"found no micro-batch, checkpointing, strategy or number of GPUs that fits {chosen}; "
            "choose a smaller model= or a larger cluster.gpu="
        )
    for remedy in plan.remedies:
        yield f"  {_remedy(remedy)}"


def memory_table(plan: RunPlan) -> Table:
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


def time_table(plan: RunPlan) -> Table:
    cluster = plan.cluster
    table = Table(
        title=f"Time at {cluster.utilisation:.0%} of the peak, cost at {cluster.price_per_hour:g} per GPU hour",
        caption="forward and backward hide communication where possible; evaluation and checkpoints not included",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for one in plan.optimizers:
        table.add_column(one.optimizer, justify="right")
    rows: list[tuple[str, Callable[[OptimizerPlan], str]]] = [
        ("curvature estimator", lambda one: (one.estimator or "-").replace("_", " ")),
        ("FLOPs per step, including curvature", lambda one: f"{one.flops_per_step:.3e}"),
        ("seconds: forward and backward", lambda one: _seconds(one.seconds.compute)),
        ("         communication, not hidden", lambda one: _seconds(one.seconds.exposed)),
        ("         update", lambda one: _seconds(one.seconds.update)),
        ("         curvature pass, average per step", lambda one: _seconds(one.seconds.curvature)),
        ("         [bold]step[/]", lambda one: f"[bold]{_seconds(one.seconds.total)}[/]"),
        ("hours", lambda one: f"{one.hours:,.1f}"),
        ("cost", lambda one: f"{one.cost:,.0f}"),
    ]
    for name, value in rows:
        table.add_row(name, *[value(one) for one in plan.optimizers])
    return table


def traffic_table(plan: RunPlan) -> Table:
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
#: The settings of each row: one GPU, then a node, then several.
SETTINGS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ("strategy=ddp",)),
    (8, ("strategy=ddp",)),
    (8, ("strategy=fsdp",)),
    (64, ("strategy=fsdp", "strategy.activation_checkpointing=true")),
)


def model_table(overrides: Sequence[str], cluster: ClusterConfig) -> str:
    """Return Markdown: each model and setting with AdamW, Sophia-G and Lion, at the paper's batch of 512 sequences."""
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
            config, _ = compose_for(arguments, there)
            plan = plan_run(config, there, ("adamw", "lion", "sophiag"))
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
