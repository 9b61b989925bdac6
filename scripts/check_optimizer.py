"""Check that an optimizer is what it says: schedule, decay, state, curvature, speed (under two minutes on two cores).

    python scripts/check_optimizer.py optimizer=lion
    python scripts/check_optimizer.py optimizer=external optimizer.factory=my_optimizer:Mine optimizer.lr=1e-3
    python scripts/check_optimizer.py optimizer=external optimizer.factory=theirs:SophiaG --reference sophiag

Takes the overrides of train.py. Exit code 0 if no check fails, 1 if one does, 2 for a mistake in the configuration.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from rich import box
from rich.table import Table
from rich.text import Text

from data.files import write_atomically
from training.config import ConfigurationError
from training.exits import refuse
from training.recording.terminal import SafeConsole

COLOURS = {"pass": "green", "note": "yellow", "fail": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of train.py")
    parser.add_argument(
        "--reference",
        choices=("sophiag", "sophiah", "adamw", "lion", "muon", "signum"),
        help="compare with ours, step by step",
    )
    parser.add_argument("--json", type=Path, help="also write the checks to this file")
    options = parser.parse_args(arguments)
    console = SafeConsole(width=None if sys.stdout.isatty() else 120)
    try:
        from training.optimizer_check import check

        done = []
        for one in check(options.overrides, options.reference):
            console.print(f"[dim]{one.name}: {one.result}[/]")
            done.append(one)
    except ConfigurationError as error:
        return refuse(error)
    table = Table(
        box=box.SIMPLE_HEAD, title=Text(f"check_optimizer {' '.join(options.overrides)}"), title_justify="left"
    )
    for column in ("check", "result", "found"):
        table.add_column(column)
    for one in done:
        table.add_row(Text(one.name), Text(one.result, style=COLOURS[one.result]), Text(one.detail))
    console.print(table)
    if options.json is not None:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"check": one.name, "result": one.result, "found": one.detail} for one in done]
            write_atomically(
                options.json, json.dumps({"overrides": options.overrides, "checks": lines}, indent=1) + "\n"
            )
        except OSError as error:
            return refuse(error)
    return int(any(one.result == "fail" for one in done))


if __name__ == "__main__":
    sys.exit(main())
