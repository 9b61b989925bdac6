"""What explains Sophia-G's distance from AdamW in study=claim: contrasts of five studies, chosen before their first run.

    python scripts/suspects.py                results/claim/why.md and a figure for each suspect
    python scripts/suspects.py kinds eps      these suspects alone, while the other studies are under way

The rows of a suspect are one family: their intervals are corrected for their number.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from analysis.contrasts import Combination, differences, draw, read_losses, table
from analysis.figures import save
from data.files import write_atomically
from training.exits import refuse
from training.records import RecordError

EPS, KINDS, POWER = "claim_eps", "claim_kinds", "claim_power"
SMALL, LARGE = "claim_batch_1k", "claim_batch_16k"


def _row(text: str, study: str, arm: str, other: str) -> Combination:
    return Combination(text, ((study, arm),), ((study, other),))


SUSPECTS: dict[str, tuple[Combination, ...]] = {
    "eps": (
        _row("ε 1.9e-6 − ε 1e-12", EPS, "sophiag_eps6", "sophiag_eps12"),
        _row("ε 2e-5 − ε 1.9e-6", EPS, "sophiag_eps5", "sophiag_eps6"),
        _row("ε 1e-12 without stale rows − with", EPS, "sophiag_fresh_rows", "sophiag_eps12"),
    ),
    "noise": (
        _row("Sophia-G − AdamW, 1,024 tokens a step", SMALL, "sophiag", "adamw"),
        _row("Sophia-G − AdamW, 4,096 tokens", KINDS, "sophiag", "adamw"),
        _row("Sophia-G − AdamW, 16,384 tokens", LARGE, "sophiag", "adamw"),
        Combination("last − first", ((LARGE, "sophiag"), (SMALL, "adamw")), ((LARGE, "adamw"), (SMALL, "sophiag"))),
    ),
    "power": (
        _row("power 1 − AdamW", POWER, "sophiag", "adamw"),
        _row("power 0.75 − power 1", POWER, "sophiag_power75", "sophiag"),
        _row("power 0.5 − power 1", POWER, "sophiag_power50", "sophiag"),
        _row("power 0.5: training labels − sampled", POWER, "fisher_power50", "sophiag_power50"),
    ),
    "kinds": (
        _row("Sophia-G − AdamW", KINDS, "sophiag", "adamw"),
        _row("Sophia-G on embeddings − AdamW, same rate", KINDS, "on_embedding", "adamw_fixed"),
        _row("Sophia-G on attention − AdamW, same rate", KINDS, "on_attention", "adamw_fixed"),
        _row("Sophia-G on MLP − AdamW, same rate", KINDS, "on_mlp", "adamw_fixed"),
        _row("momentum-sign (h = 0) − Sophia-G", KINDS, "signum", "sophiag"),
    ),
}


NOTES = {
    "noise": "The studies have the same tokens. They differ in batch, number of steps, clip (2, 1 and 0.5), k (40, 10 and 3), "
    "weight decay (∝ √batch) and what each search chose: the rates and, with 1,024 and 16,384 tokens, β2.\n",
    "eps": "γ, β and weight decay are those that claim found together with ε = 1.9e-6, which favours it.\n",
    "power": "β, ε and weight decay are those that claim found with power 1, which favours it; γ is tuned for each power.\n",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suspects", nargs="*", help=f"of {', '.join(SUSPECTS)} (default: all)")
    parser.add_argument("--records", type=Path, default=Path("results"), help="directory of the studies' tables")
    parser.add_argument("--output", type=Path, default=Path("results/claim"), help="directory of the page and figures")
    options = parser.parse_args(arguments)
    families = {name: family for name, family in SUSPECTS.items() if name in options.suspects or not options.suspects}
    unknown = {*options.suspects} - {*SUSPECTS}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not a suspect; choose from {', '.join(SUSPECTS)}")
    studies = {study for family in families.values() for row in family for study, _ in (*row.plus, *row.minus)}
    try:
        losses = read_losses(options.records, sorted(studies))
        parts = []
        for suspect, family in families.items():
            found = differences(losses, family)
            place = save(draw(found), options.output / f"why_{suspect}.png")
            picture = f"![Differences of final loss: dots for seeds, mean and interval]({place.name})\n"
            parts += [picture, table(found), *([NOTES[suspect]] if suspect in NOTES else [])]
        luck = "Intervals do not include the luck of the searches, whose settings ran once each.\n"
        text = "\n".join(["# Why: the contrasts\n", luck, *parts])
        write_atomically(options.output / "why.md", text)
    except (OSError, RecordError, ValueError) as error:
        return refuse(error)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
