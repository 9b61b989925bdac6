"""Simulate studies with a known truth and write the coverage of the intervals into docs/report.md (three minutes).

python scripts/coverage.py
python scripts/coverage.py --studies 200 --page other.md
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from analysis.pages import write_part
from analysis.simulation import coverage, power_by_seeds
from training.exits import refuse

PAGE = Path(__file__).resolve().parent.parent / "docs" / "report.md"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies for each row")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the parts `coverage` and `power`")
    options = parser.parse_args(arguments)
    try:
        for part, table in (("coverage", coverage(options.studies)), ("power", power_by_seeds())):
            text = table.to_markdown(index=False, disable_numparse=True)
            print(text)
            write_part(options.page, part, text)
    except (OSError, ValueError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
