"""What an offline run of W&B has on disk, read without W&B's own reader."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(run_directory: Path, run_id: str = "*") -> list[Any]:
    """The records of a finished offline run, once W&B's service has written the last of them, `exit`."""
    (path,) = run_directory.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    deadline = time.monotonic() + 60
    records = _parsed(path)
    while not any(record.HasField("exit") for record in records):
        assert time.monotonic() < deadline, f"{path}: {len(records)} records, none of them `exit`"
        time.sleep(0.05)
        records = _parsed(path)
    return records


def _parsed(path: Path) -> list[Any]:
    """A file of W&B's: a LevelDB log, 32 KiB blocks of records with 7-byte headers."""
    from wandb.proto import wandb_internal_pb2

    parsed = []
    for payload in _records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        parsed.append(record)
    return parsed


def wandb_rows(run_directory: Path, run_id: str = "*") -> list[dict[str, Any]]:
    """The history rows of an offline run."""
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(run_directory, run_id)
        if record.HasField("history")
    ]


def wandb_values(run_directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and summary of an offline run, nested keys joined by slashes: what the runs' table shows."""
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for record in wandb_records(run_directory):
        for field, items in (("run", record.run.config.update), ("config", record.config.update)):
            if record.HasField(field):
                config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        if record.HasField("summary"):
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return config, summary


def _records(content: bytes) -> Iterator[bytes]:
    whole, offset, block = b"", 0, 32768
    while offset + 7 <= len(content):
        left = block - (offset + 7) % block
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        if offset + 7 + length > len(content):  # still being written
            return
        whole += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""
