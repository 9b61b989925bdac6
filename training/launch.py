"""Ranks started from here: torch's elastic launch, with the configuration composed once in the parent."""

import os
import sys
from typing import Any

from training.config import RunConfig

EXIT_FAILED = 1


def start_ranks(config: RunConfig) -> int:
    """Start `launcher.nproc_per_node` ranks of the run on this machine and wait. Returns the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.launcher.nproc_per_node)))
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.launcher.nproc_per_node,
        run_id=config.run_name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=config.launcher.max_restarts,
        monitor_interval=0.5,
        start_method="spawn",
    )
    try:
        results: dict[int, int] = elastic_launch(launch, run_rank)(config.model_dump(mode="json"))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} failed with exit code {failure.exitcode}: {failure.message}", file=sys.stderr)
        return EXIT_FAILED
    return max(results.values(), default=0)


def run_rank(values: dict[str, Any]) -> int:
    """One rank's work: validate again (cheap), run, and return the exit code."""
    import logging

    from data.errors import DataError
    from training.command import refuse
    from training.compose import validate
    from training.config import ConfigurationError
    from training.run import execute

    logging.basicConfig(level=logging.INFO if os.environ.get("RANK") == "0" else logging.WARNING, format="%(message)s")
    try:
        return execute(validate(values)).exit_code
    except (ConfigurationError, DataError) as error:
        return refuse(error)
