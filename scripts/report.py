"""Report a study or any runs: `python scripts/report.py results/cpu_scale` or `... runs --output report`."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from training.exits import refuse
from training.recording.terminal import SafeConsole
from training.records import RecordError, refuse_no_directory


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write HTML, Markdown and JSON from run records, and print a summary.")
    parser.add_argument("paths", nargs="+", type=Path, help="a study directory, or directories that hold runs")
    parser.add_argument("--output", type=Path, help="directory to write to (default: the study directory, or ./report)")
    parser.add_argument(
        "--baseline", default="adamw", help="for runs without a study: the arm to compare the others with (adamw)"
    )
    options = parser.parse_args(arguments)
    try:
        refuse_no_directory(options.paths)

        from analysis.report import print_summary, write_report
        from analysis.results import analyse
        from analysis.trials import is_study, load_study

        study_directory = options.paths[0] if is_study(options.paths[0]) else None
        results = analyse(load_study(options.paths, baseline=options.baseline))
        written = write_report(results, options.output or study_directory or Path("report"))
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    console = SafeConsole()
    print_summary(results, console)
    console.print(f"report: {written.html}  {written.markdown}  {written.json}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
