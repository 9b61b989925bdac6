"""Compare runs of one horizon, single runs or a sweep: a table and a plot.

    python scripts/compare.py runs/*
    python scripts/compare.py runs/<adamw> runs/<sophiag> --baseline adamw --plot curves.png

For a sweep, shows each optimizer's best setting, averaged over its seeds. The plot is comparison.png beside the runs.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from training.exits import refuse
from training.recording.terminal import SafeConsole, printable
from training.records import RecordError, find_run_directories


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, including the baseline's")
    parser.add_argument("--baseline", default="adamw", help="the optimizer to compare the others with (adamw)")
    parser.add_argument(
        "--plot", type=Path, help="the plot (.png, .svg, .pdf; default: comparison.png beside the runs)"
    )
    options = parser.parse_args(arguments)
    try:
        directories, others = find_run_directories(options.runs)

        from analysis.compare import compare_runs

        comparison = compare_runs(directories, baseline=options.baseline)
        picture = comparison.plot(options.plot or directories[0].absolute().parent / "comparison.png")
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    for what, which in (("not a run", map(str, others)), ("not finished", comparison.left_out)):
        named = "; ".join(which)
        if named:
            print(printable(f"skipped, {what}: {named}"), file=sys.stderr)
    console = SafeConsole()
    console.print(comparison.table())
    if comparison.is_sweep:
        console.print(comparison.tried())
    console.print(f"curves: {picture}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
