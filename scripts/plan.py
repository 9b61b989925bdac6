"""What a run would need on a cluster: memory, hours, cost, traffic, and what to change where it does not fit.

    python scripts/plan.py model=gpt2_xl strategy=fsdp cluster.gpus=64 cluster.gpu=h100
    python scripts/plan.py experiment=paper/770m_sophiag cluster.gpus=8 cluster.price_per_hour=2 --json plan.json
    python scripts/plan.py --models        the table of docs/scaling.md: 125M to 6.6B

Overrides are those of train.py; besides, cluster.gpu=h100|h200|a100_80gb|… and cluster.gpus=, cluster.utilisation=,
cluster.price_per_hour= and the other keys of configs/cluster. Needs no GPU.
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="those of train.py, and cluster.…")
    parser.add_argument("--json", type=Path, help="write the plan there too, for machines")
    parser.add_argument(
        "--optimizers", default=",".join(OPTIMIZERS), help=f"side by side (default: {','.join(OPTIMIZERS)})"
    )
    parser.add_argument("--models", action="store_true", help="plan the models from 125M to 6.6B, a table in Markdown")
    options = parser.parse_args(arguments)
    console = SafeConsole(width=None if sys.stdout.isatty() else 120)
    try:
        cluster, overrides = split_cluster(options.overrides)
        if options.models:
            from planning.tables import model_table

            print(model_table(overrides, cluster))
            return 0
        config, notes = compose_for(overrides, cluster)  # a mistake is refused before torch is imported

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
