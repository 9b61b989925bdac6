"""Draw one of the paper's figures or tables from records: `python scripts/plot.py curves results/cpu_scale`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from analysis.figures import FIGURES, NothingToShow, save
from analysis.results import analyse
from analysis.tables import TABLES, markdown
from analysis.trials import load_study
from training.exits import refuse
from training.recording.terminal import printable
from training.records import RecordError


def main(arguments: list[str] | None = None) -> int:
    named = "\n".join(f"  {name:<10} {(draw.__doc__ or '').splitlines()[0]}" for name, draw in FIGURES.items())
    parser = argparse.ArgumentParser(
        description=f"figures:\n{named}\ntables (--table): {', '.join(TABLES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="a figure, or with --table a table; `all` draws every figure that has data")
    parser.add_argument("paths", nargs="+", type=Path, help="a study directory, or directories that hold runs")
    parser.add_argument("--output", type=Path, help="a file (.png, .svg, .pdf), or a directory for `all`")
    parser.add_argument("--table", action="store_true", help="print the table of this name as Markdown")
    parser.add_argument(
        "--baseline",
        help="for runs without a study: the arm to compare the others with (adamw; without one, the first arm)",
    )
    options = parser.parse_args(arguments)
    known = TABLES if options.table else {**FIGURES, "all": None}
    if options.name not in known:
        parser.error(
            f"{options.name}: no such {'table' if options.table else 'figure'}; choose one of {', '.join(known)}"
        )
    try:
        study = load_study(options.paths, baseline=options.baseline or "adamw")
        if options.baseline is None and not study.planned and study.baseline not in study.arms:
            study = replace(study, baseline=next(iter(study.arms)))
        results = analyse(study, against_baseline=False)
        if options.table:
            print(printable(markdown(TABLES[options.name](results))), end="")
            return 0
        for name in FIGURES if options.name == "all" else [options.name]:
            output = options.output or Path(f"{name}.png")
            if options.name == "all":
                output = (options.output or Path("figures")) / f"{name}.png"
            try:
                print(save(FIGURES[name](results), output))
            except NothingToShow as reason:
                if options.name != "all":
                    raise
                print(printable(f"{name}: {reason}"), file=sys.stderr)
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
