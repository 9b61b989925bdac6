"""The demonstration of `make demo`: AdamW, Lion and Sophia-G from the same initial weights on the same batches.

    python scripts/demo.py               three runs, a table, and the curves in runs/demo/curves.png
    python scripts/demo.py --search      search the learning rates; appends to results/demo/search.jsonl

With one horizon and one seed, it shows the tools at work and tests no claim. Finished runs are not rerun.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from rich.console import Console

from analysis.compare import compare_runs
from training.compose import compose
from training.config import RunConfig
from training.records import RunRecord, json_line
from training.run import execute

ARMS = ("adamw", "lion", "sophiag")
RUNS = Path("runs/demo")
SEARCH_RECORD = Path("results/demo/search.jsonl")
# Four trials per arm, learning rates a factor of two apart, at one momentum, with another seed than the demonstration.
SEARCH_SEED = 1000
SEARCH_RATES = {
    "adamw": [1e-3, 2e-3, 4e-3, 8e-3],
    "lion": [2e-4, 4e-4, 8e-4, 1.6e-3],
    "sophiag": [4e-4, 8e-4, 1.6e-3, 3.2e-3],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="search learning rates instead of demonstrating")
    return search() if parser.parse_args().search else demonstrate()


def demonstrate() -> int:
    """Train the three arms, print the table, draw the curves."""
    console = Console()
    directories = []
    for arm in ARMS:
        arguments = [f"experiment=demo/{arm}", f"output_dir={RUNS}", f"name={arm}"]
        console.print(f"\n[bold]python train.py {' '.join(arguments)}[/bold]", highlight=False)
        outcome = execute(compose(arguments))
        if outcome.status != "completed":
            console.print(f"{arm}: {outcome.status}; its record is in {outcome.directory}")
            return outcome.exit_code
        directories.append(outcome.directory)
    comparison = compare_runs(directories, baseline="adamw")
    console.print()
    console.print(comparison.table())
    picture = RUNS / "curves.png"
    comparison.plot(picture)
    console.print(
        f"curves: {picture}\nrecords: {', '.join(str(directory) for directory in directories)}", highlight=False
    )
    return 0


def trials() -> Iterator[tuple[str, RunConfig]]:
    for arm in ARMS:
        for rate in SEARCH_RATES[arm]:
            overrides = [
                f"experiment=demo/{arm}",
                f"seed={SEARCH_SEED}",
                f"optimizer.lr={rate}",
                "eval.interval=150",
                "output_dir=runs/demo/search",
            ]
            yield arm, compose(overrides)


def search() -> int:
    """Run every trial that is not on record; print each arm's best."""
    SEARCH_RECORD.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in SEARCH_RECORD.read_text().splitlines()] if SEARCH_RECORD.exists() else []
    for arm, config in trials():
        optimizer = config.optimizer.model_dump(mode="json")
        if any(entry["optimizer"] == optimizer for entry in known):
            continue
        outcome = execute(config)
        if outcome.status not in ("completed", "diverged"):
            return outcome.exit_code  # interrupted; the same command resumes
        environment = RunRecord.open(outcome.directory).environment
        entry = {
            "arm": arm,
            "optimizer": optimizer,
            "seed": config.seed,
            "steps": config.train.steps,
            "status": outcome.status,
            "final_val_loss": outcome.final_val_loss,
            "commit": environment["git"]["commit"],
            "cpu": environment["hardware"]["cpu"],
        }
        with SEARCH_RECORD.open("a") as file:
            file.write(json_line(entry) + "\n")
        known.append(entry)
    for arm in ARMS:
        finished = [entry for entry in known if entry["arm"] == arm and entry["status"] == "completed"]
        best = min(finished, key=lambda entry: entry["final_val_loss"])
        chosen = best["optimizer"]
        print(f"{arm}: {best['final_val_loss']:.4f} at lr {chosen['lr']} ({len(finished)} trials)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
