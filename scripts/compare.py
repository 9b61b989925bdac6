"""Compare runs of one horizon, single ones or a sweep: a table and a picture.

    python scripts/compare.py runs/*
    python scripts/compare.py runs/<adamw> runs/<sophiag> --baseline adamw --plot curves.png

Of a sweep each optimizer's best setting is shown, a mean over its seeds. The picture is comparison.png beside the runs.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from training.launching.command import refuse
from training.recording.terminal import SafeConsole, printable
from training.records import RecordError, find_run_directories


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, some of the baseline among them")
    parser.add_argument("--baseline", default="adamw", help="the optimizer that the others are held against")
    parser.add_argument(
        "--plot", type=Path, help="the picture (.png, .svg, .pdf; default: comparison.png beside the runs)"
    )
    options = parser.parse_args(arguments)
    try:
        directories, others = find_run_directories(options.runs)

        from analysis.compare import compare_runs

        comparison = compare_runs(directories, baseline=options.baseline)
        picture = comparison.plot(options.plot or directories[0].absolute().parent / "comparison.png")
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    for what, which in (("no run record", map(str, others)), ("not ended", comparison.left_out)):
        named = "; ".join(which)
        if named:
            print(printable(f"passed over, {what}: {named}"), file=sys.stderr)
    console = SafeConsole()
    console.print(comparison.table())
    if comparison.is_sweep:
        console.print(comparison.tried())
    console.print(f"curves: {picture}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
