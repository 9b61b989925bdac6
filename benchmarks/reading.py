"""Time and memory of a report of a thousand long runs: records of two arms, read in a fresh process.

    python benchmarks/reading.py                       1,000 runs of 10,000 metrics lines each (needs 2 GB of disk)
    python benchmarks/reading.py --runs 100

Times `scripts/report.py` from the interpreter's start to the last file. Writes seconds and peak memory, with the
hardware, to results/benchmarks/reading.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import provenance, write_results
from benchmarks.scaling import write_record
from training.compose import compose
from training.records import ENVIRONMENT_FILE, METRICS_FILE, write_config, write_environment

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "results" / "benchmarks" / "reading.json"
TARGET_SECONDS = 20.0
#: Number of records written line by line; the others are copies of these with their own names and seeds.
ORIGINALS = 10


def write_runs(directory: Path, runs: int, lines: int) -> int:
    """Write records of AdamW and Sophia-G, paired by seed; return the bytes of their metrics."""
    arms: list[dict[str, Any]] = [
        compose(["model=gpt2_nano", f"optimizer={arm}", f"train.steps={lines}"]).model_dump(mode="json")
        for arm in ("adamw", "sophiag")
    ]
    for number in range(runs):
        config, seed, target = arms[number % 2], number // 2, directory / str(number)
        if number < ORIGINALS:
            write_record(target, config, seed)
            continue
        shutil.copytree(directory / str(number % ORIGINALS), target)
        seeds = {"model": seed, "data": seed, "curvature": seed}
        write_config(target, config | {"name": target.name, "seed": seed, "seeds": seeds})
        environment = json.loads((target / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        write_environment(target, environment | {"initial_weights_sha256": f"{seed:064d}"})
    return sum(path.stat().st_size for path in directory.glob(f"*/{METRICS_FILE}"))


def report(directory: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of `scripts/report.py` on the runs of a directory."""
    command = [sys.executable, "scripts/report.py", str(directory / "runs"), "--output", str(directory / "report")]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--lines", type=int, default=10_000, help="train lines per run (default: 10,000)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-reading-") as root:
        size = write_runs(Path(root) / "runs", arguments.runs, arguments.lines)
        seconds, memory = report(Path(root))
    record = {
        **provenance(torch.device("cpu")),
        "runs": arguments.runs,
        "lines": arguments.lines,
        "metrics_bytes": size,
        "seconds": seconds,
        "target_seconds": TARGET_SECONDS,
        "peak_memory_bytes": memory,
    }
    print(
        f"{arguments.runs:,} runs of {arguments.lines:,} lines ({size / 1e9:.2f} GB): report in {seconds:.1f} s, "
        f"peak memory {memory / 2**20:,.0f} MiB"
    )
    write_results(arguments.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
