"""Evaluate a trained model on downstream tasks with EleutherAI's lm-evaluation-harness (the extra `evaluate`).

    python scripts/evaluate.py runs/<name> --tasks hellaswag,lambada_openai,superglue
    python scripts/evaluate.py exported --tasks superglue --num-fewshot 2 --limit 100
    python scripts/evaluate.py runs/<name> --tasks my_task --include-path my_tasks      (YAML files and their data)

`superglue` is SuperGLUE with two examples in the prompt, as in the paper. Prints the results and adds them to
downstream.json in the run's or exported directory.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from training.config import ConfigurationError
from training.exits import refuse
from training.recording.terminal import SafeConsole, printable
from training.reliability.run_directory import refuse_absent

if TYPE_CHECKING:
    from rich.table import Table

    from downstream.evaluation import Metric, TaskResult


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run directory, one of its checkpoints, or a Hugging Face directory")
    parser.add_argument("--tasks", required=True, help="comma-separated: superglue, or any of the harness's tasks")
    parser.add_argument("--num-fewshot", type=int, help="examples in each prompt (2 for superglue, else the task's)")
    parser.add_argument("--limit", type=int, help="the most examples of each task, for a trial")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per forward pass (16)")
    parser.add_argument("--seed", type=int, default=1234, help="chooses the prompts' examples (1234)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--include-path", type=Path, help="a directory of additional task files")
    parser.add_argument("--output", type=Path, help="the file to add the results to")
    parser.add_argument("--token-directory", type=Path, help="the run's prepared tokens, if they have moved")
    options = parser.parse_args(arguments)
    try:
        check(options)
    except ConfigurationError as error:
        return refuse(error)

    from downstream.export import ExportError
    from downstream.inference import OPENING_ERRORS

    try:
        return evaluate(options)
    except (*OPENING_ERRORS, ExportError) as error:
        return refuse(error)


def check(options: argparse.Namespace) -> None:
    """Refuse bad options before torch is imported.

    Raises:
        ConfigurationError: there is no such directory, or a number is out of range.
    """
    refuse_absent(options.model)
    for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigurationError(f"--{name.replace('_', '-')} {value}: expected a number of at least {least}")


def evaluate(options: argparse.Namespace) -> int:
    """Export (a run), evaluate, print and record; return the exit code."""
    from downstream import evaluation as downstream

    downstream.require_harness()

    from downstream.export import export, quiet_transformers
    from downstream.inference import choose_device, open_trained

    device = choose_device(options.device)
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="sophia-export-") as temporary:
        directory, home = options.model, options.model
        if not (options.model / "config.json").is_file():
            trained = open_trained(options.model, tokens=options.token_directory)
            for line in trained.passed_over:
                print(printable(f"checkpoint skipped: {line}"), file=sys.stderr)
            directory = Path(temporary) / "export"
            export(trained, directory)
            home = options.model if trained.run is None else trained.run.directory
        output = options.output or home / downstream.RESULTS_FILE
        downstream.read_results(output)  # fail before the evaluation, not after it
        results = downstream.evaluate(
            directory,
            [name.strip() for name in options.tasks.split(",") if name.strip()],
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            seed=options.seed,
            device=device.type,
            precision=options.precision,
            include_path=options.include_path,
        )
    console = SafeConsole(markup=False)
    console.print(table(str(options.model), results))
    if results and results[0].prompts_cut:
        said = f"{results[0].prompts_cut:,} prompts are longer than the model's context and were cut from the left"
        console.print(f"{said}: the examples in them are incomplete; give a smaller --num-fewshot", soft_wrap=True)
    downstream.write_results(output, results)
    console.print(f"results: {output}", highlight=False, soft_wrap=True)
    return 0


def table(title: str, results: Sequence["TaskResult"]) -> "Table":
    """One row per metric of each task, and one per suite with the mean over its tasks."""
    from rich.table import Table
    from rich.text import Text

    from downstream.evaluation import suite_mean

    step = results[0].step if results else None
    shown = Table(title=Text(title if step is None else f"{title}, step {step:,}"), title_justify="left")
    for heading in ("task", "shots", "examples"):
        shown.add_column(heading, justify="left" if heading == "task" else "right")
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    for result in results:
        first = [result.task, str(result.num_fewshot), f"{result.examples:,}"]
        for name, metric in result.metrics.items():
            shown.add_row(*first, f"{name}{arrow(metric)}", number(metric))
            first = ["", "", ""]
    for suite in dict.fromkeys(result.suite for result in results if result.suite):
        members = [result for result in results if result.suite == suite]
        mean = suite_mean(members)
        if mean is not None:
            shown.add_section()
            examples = sum(member.examples for member in members)
            shown.add_row(f"{suite}, mean of {len(members)}", "", f"{examples:,}", "acc or f1 ↑", number(mean))
    return shown


def arrow(metric: "Metric") -> str:
    return {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]


def number(metric: "Metric") -> str:
    value = "-" if metric.value is None else f"{metric.value:.4g}"
    return value if metric.stderr is None else f"{value} ± {metric.stderr:.2g}"


if __name__ == "__main__":
    sys.exit(main())
