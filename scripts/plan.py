"""Plan a run on a cluster: memory, hours, cost, traffic, and what to change if it does not fit.

    python scripts/plan.py model=gpt2_xl strategy=fsdp cluster.gpus=64 cluster.gpu=h100
    python scripts/plan.py experiment=paper/770m_sophiag cluster.gpus=8 cluster.price_per_hour=2 --json plan.json
    python scripts/plan.py --models        the table of docs/scaling.md: 125M to 6.6B

Takes the overrides of train.py, and cluster.gpu=h100|h200|a100_80gb|…, cluster.gpus=, cluster.utilisation=,
cluster.price_per_hour= and the other keys of configs/cluster. Runs without a GPU.
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

from data.files import write_atomically
from planning.cluster import OPTIMIZERS, compose_for, split_cluster
from training.config import ConfigurationError
from training.exits import refuse
from training.recording.terminal import SafeConsole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of train.py, and cluster.…")
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    parser.add_argument(
        "--optimizers", default=",".join(OPTIMIZERS), help=f"to compare (default: {','.join(OPTIMIZERS)})"
    )
    parser.add_argument("--models", action="store_true", help="print a Markdown table of the models from 125M to 6.6B")
    options = parser.parse_args(arguments)
    console = SafeConsole(width=None if sys.stdout.isatty() else 120)
    try:
        cluster, overrides = split_cluster(options.overrides)
        if options.models:
            from planning.tables import model_table

            print(model_table(overrides, cluster))
            return 0
        config, notes = compose_for(overrides, cluster)  # refuse mistakes before importing torch

        from planning.plan import plan_run
        from planning.tables import print_plan

        plan = plan_run(config, cluster, [name for name in options.optimizers.split(",") if name], notes)
    except ConfigurationError as error:
        return refuse(error)
    print_plan(plan, console)
    if options.json is not None:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(options.json, json.dumps(plan.as_dictionary(), indent=1) + "\n")
        except OSError as error:
            reason = f"--json {options.json} cannot be written: {error.strerror}; name another file"
            return refuse(ConfigurationError(reason))
        console.print(f"written: {options.json}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
