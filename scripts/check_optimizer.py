"""Check that an optimizer is what it says: schedule, decay, state, curvature, speed (under two minutes on two cores).

    python scripts/check_optimizer.py optimizer=lion
    python scripts/check_optimizer.py optimizer=external optimizer.factory=my_optimizer:Mine optimizer.lr=1e-3
    python scripts/check_optimizer.py optimizer=external optimizer.factory=theirs:SophiaG --reference sophiag
    python scripts/check_optimizer.py --all                    every optimizer= of configs/, to the table of docs/optimizers.md

Takes the overrides of train.py. Exit code 0 if no check fails, 1 if one does, 2 for a mistake in the configuration.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from rich import box
from rich.table import Table
from rich.text import Text

from analysis.pages import write_part
from data.files import write_atomically
from training.compose import CONFIG_DIRECTORY
from training.config import ConfigurationError
from training.exits import refuse
from training.recording.terminal import SafeConsole

if TYPE_CHECKING:
    from training.optimizer_check import Check

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"pass": "green", "note": "yellow", "fail": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of train.py")
    parser.add_argument(
        "--reference",
        choices=("sophiag", "sophiah", "adamw", "lion", "muon", "signum"),
        help="compare with ours, step by step",
    )
    parser.add_argument(
        "--all", action="store_true", help="check every optimizer and write the table `checks` of a page"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "optimizers.md", help="--all: the page")
    parser.add_argument("--json", type=Path, help="also write the checks to this file")
    options = parser.parse_args(arguments)
    console = SafeConsole(width=None if sys.stdout.isatty() else 120)
    try:
        from training.optimizer_check import check

        if options.all:
            arms = sorted(path.stem for path in (CONFIG_DIRECTORY / "optimizer").glob("*.yaml"))
            found: dict[str, list[Check]] = {}
            for arm in arms:
                if arm != "external":  # which has no factory of its own
                    console.print(f"[dim]{arm}[/]")
                    found[arm] = list(check([f"optimizer={arm}", *options.overrides]))
            write_part(options.page, "checks", table_of(found))
            return int(any(one.result == "fail" for checks in found.values() for one in checks))
        done = []
        for one in check(options.overrides, options.reference):
            console.print(f"[dim]{one.name}: {one.result}[/]")
            done.append(one)
    except (ConfigurationError, ValueError) as error:
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


def table_of(found: Mapping[str, Sequence[Check]]) -> str:
    """Return a Markdown table with a row for each optimizer, and a line for each check that has more than "pass" to say.

    Without times, which change with the machine's load.
    """
    rows = [
        "| `optimizer=` | checks passed | bytes per parameter | strategies |",
        "| --- | --- | --: | --- |",
    ]
    remarks = []
    for arm, checks in found.items():
        said = {one.name: one.detail for one in checks}
        told = [one for one in checks if one.name not in ("elementwise", "speed")]
        passed = sum(one.result == "pass" for one in told)
        size = re.match(r"[\d.]+", said["state"])
        cells = [f"{passed} of {len(told)}", size[0] if size else "", said["elementwise"].partition("strategies ")[2]]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
        remarks += [f"- {arm}, {one.name} ({one.result}): {one.detail}" for one in told if one.result != "pass"]
    return "\n".join([*rows, "", *remarks])


if __name__ == "__main__":
    sys.exit(main())
