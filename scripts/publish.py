"""Publish a study's tables to Weights & Biases: its trials as runs, and a report page with the paper's panels.

    python scripts/publish.py results/cpu_scale tracker=wandb tracker.project=sophia
    wandb sync results/cpu_scale/wandb/offline-run-*            after publishing without a key

Without a key (or with WANDB_MODE=offline) it leaves run directories in <study>/wandb and the page's specification in
<study>/wandb/report.json. A second call updates what has changed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from training.launching.environment import require_environment

    require_environment()

from training.compose import compose
from training.config import ConfigurationError
from training.exits import refuse
from training.mistakes import key_of
from training.recording.terminal import printable
from training.records import RecordError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study's directory, such as results/cpu_scale")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="tracker=wandb, tracker.project=, .entity=, .group=, .tags="
    )
    options = parser.parse_args(arguments)
    try:
        for override in options.overrides:
            if key_of(override).partition(".")[0] != "tracker":
                raise ConfigurationError(f"{override}: expected tracker=wandb or a key below tracker")
        settings = compose(options.overrides).tracker
        if settings.name != "wandb":
            raise ConfigurationError(f"tracker={settings.name}: only W&B has pages of runs; add tracker=wandb")

        from studies.publication import publish

        published = publish(options.study, settings, lambda line: print(printable(line), file=sys.stderr))
    except (ConfigurationError, OSError, RecordError, ValueError) as error:
        return refuse(error)
    if published.destination is None:
        print(printable(f"{published.runs} runs: wandb sync {options.study}/wandb/offline-run-*"))
    else:
        print(printable(f"{published.runs} runs in {'/'.join(published.destination)}"))
    print(printable(f"report: {published.report}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
