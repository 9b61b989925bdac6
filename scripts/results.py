"""Rebuild a study's report, figures and README section from its committed records (make results).

python scripts/results.py                         results/cpu_scale and README.md
python scripts/results.py results/smoke --page some/page.md --arm lion
python scripts/results.py results/cpu_embeddings --part embeddings --brief   only the verdict, in another part of README.md
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from analysis.pages import write_part
from analysis.report import print_summary, write_report
from analysis.results import analyse
from analysis.standing import section, verdict
from analysis.trials import load_study
from training.launching.command import refuse
from training.recording.terminal import SafeConsole
from training.records import RecordError

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, default=ROOT / "results" / "cpu_scale", help="study directory")
    parser.add_argument("--page", type=Path, default=ROOT / "README.md", help="the page to update")
    parser.add_argument(
        "--part", default="results", help="replace what is between <!-- PART:begin --> and <!-- PART:end -->"
    )
    parser.add_argument("--brief", action="store_true", help="only the verdict, without figure, limits and table")
    parser.add_argument("--arm", default="sophiag", help="the arm whose verdict is shown")
    options = parser.parse_args(arguments)
    try:
        results = analyse(load_study([options.study]))
        written = write_report(results, options.study)
        told = verdict if options.brief else section
        write_part(options.page, options.part, told(results, options.study, options.page, options.arm))
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    console = SafeConsole()
    print_summary(results, console)
    console.print(f"report: {written.html}\npage: {options.page}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
