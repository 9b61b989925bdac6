"""The provenance that every benchmark records, and how it writes its results."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from training import hardware


def provenance(device: torch.device) -> dict[str, Any]:
    """The machine, its load, the versions and the commit of a measurement."""
    return {
        "hardware": hardware.describe(device),
        "load": list(os.getloadavg()),
        "versions": hardware.versions(),
        "git": hardware.git_state(),
    }


def write_results(output: Path, results: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)
    print(f"written to {os.path.relpath(output)}")
