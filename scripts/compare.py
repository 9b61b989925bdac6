"""Compare runs of one horizon: `python scripts/compare.py runs/a runs/b [--baseline adamw] [--plot curves.png]`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from analysis.compare import compare_runs
from training.records import RecordError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A table and a plot of a few runs of one horizon and one seed.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, one of the baseline among them")
    parser.add_argument("--baseline", default="adamw", help="the optimizer that the others are held against")
    parser.add_argument("--plot", type=Path, help="write the curves to this file (.png, .svg, .pdf)")
    options = parser.parse_args(arguments)
    try:
        comparison = compare_runs(options.runs, baseline=options.baseline)
    except (OSError, RecordError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    console = Console()
    console.print(comparison.table())
    if options.plot:
        console.print(f"curves: {comparison.plot(options.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
