"""Rebuild the reports of committed studies, README's section of results and the table of studies (make results).

python scripts/results.py                                             results/claim and the other studies; README.md
python scripts/results.py results/smoke --page some/page.md --arm lion
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
from analysis.standing import overview, section
from analysis.trials import load_study
from training.exits import refuse
from training.recording.terminal import SafeConsole
from training.records import RecordError

ROOT = Path(__file__).resolve().parent.parent
STUDIES = [
    ROOT / "results" / name for name in ("claim", "cpu_embeddings", "cpu_scale", "challenge")
]  # the longest first


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies", nargs="*", type=Path, default=STUDIES, help="their directories; the first is the page's"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "README.md", help="the page with the part `results`")
    parser.add_argument("--table", type=Path, help="the page with the part `studies` (default: results/README.md)")
    parser.add_argument("--arm", default="sophiag", help="the arm whose verdict is the page's first sentence")
    options = parser.parse_args(arguments)
    console = SafeConsole()
    table = options.table or (ROOT / "results" / "README.md" if options.studies == STUDIES else None)
    analysed = []
    try:
        for directory in options.studies:
            results = analyse(load_study([directory]))
            analysed.append((results, directory))
            written = write_report(results, directory)
            if directory == options.studies[0]:
                write_part(options.page, "results", section(results, directory, options.page, options.arm))
            print_summary(results, console)
            console.print(f"report: {written.html}", highlight=False)
        if table is not None:
            write_part(table, "studies", overview(analysed, table, options.arm))
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    console.print(f"page: {options.page}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
