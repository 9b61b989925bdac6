"""Records and checkpoints that parse but are wrong: a key is missing, has another type, or is nested too deeply.

A run started on such a record is refused in one line or has the curve of an undisturbed run. Readers for comparisons raise
only RecordError.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.faults.directories import Unfinished
from tests.training.runs import curve
from training.launching.command import main
from training.records import RecordError, RunRecord
from training.reliability import checkpoints
from training.reliability.checkpoints import manifest_text

VALUES: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "", "text", [], [1], {}, {"a": 1}, float("nan"), [[[]]])
DEEP = 100_000
#: The size of a sparse file larger than any memory, and this process's memory limit, so that reading it fails.
HUGE_BYTES = 1 << 40
MEMORY_BYTES = 8 << 30

Generator = np.random.Generator


def change(values: Any, generator: Generator) -> str:
    """Remove or replace one member anywhere in the tree. Returns a description."""
    path, place = "", values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing"
        key = keys[int(generator.integers(len(keys)))]
        path += f"/{key}"
        child = place[key]
        if isinstance(child, (dict, list)) and child and generator.random() < 0.7:
            place = child
            continue
        if generator.random() < 0.4:
            del place[key]
            return f"{path} removed"
        place[key] = VALUES[int(generator.integers(len(VALUES)))]
        return f"{path} = {place[key]!r}"


def changed_json(path: Path, generator: Generator) -> str:
    values = json.loads(path.read_text())
    what = change(values, generator)
    path.write_text(json.dumps(values))
    return what


def changed_yaml(path: Path, generator: Generator) -> str:
    values = yaml.safe_load(path.read_text())
    what = change(values, generator)
    path.write_text(yaml.safe_dump(values))
    return what


def changed_manifest(path: Path, generator: Generator) -> str:
    """Change the manifest and update its own hash."""
    values = json.loads(path.read_text())
    del values["sha256"]
    what = change(values, generator)
    path.write_text(manifest_text(values))
    return what


def changed_line(path: Path, generator: Generator) -> str:
    *kept, last = path.read_text().splitlines()
    values = json.loads(last)
    what = change(values, generator)
    path.write_text("".join(f"{line}\n" for line in (*kept, json.dumps(values))))
    return what


def replaced(path: Path, generator: Generator) -> str:
    """Replace the file with something entirely different."""
    contents: dict[str, bytes] = {
        "empty": b"",
        "null": b"null",
        "a number": b"7",
        "a list": b"[1, 2]",
        "nested without end": b"[" * DEEP + b"]" * DEEP,
        "nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        "not UTF-8": b'{"status": "\xff\xfe"}',
        "NUL": b"\0" * 64,
        "a long number": b'{"status": ' + b"9" * 10_000 + b"}",
    }
    what = [*contents, "a terabyte"][int(generator.integers(len(contents) + 1))]
    if what == "a terabyte":
        os.truncate(path, HUGE_BYTES)
    else:
        path.write_bytes(contents[what])
    return what


DAMAGES: dict[str, Callable[[Path, Generator], str]] = {
    "config.yaml": changed_yaml,
    "environment.json": changed_json,
    "summary.json": changed_json,
    "metrics.jsonl": changed_line,
    "manifest.json": changed_manifest,
}


def spoil_records(corpus: Sequence[str], scratch: Path, cases: int, seed: int) -> dict[str, Any]:
    """Change one file of an unfinished run at a time, read the record, and start the run again."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    run = Unfinished(corpus, scratch)
    generator = np.random.default_rng(seed)
    counts, faults = Counter[str](), list[str]()
    names = list(DAMAGES)
    for number in range(cases):
        directory = run.copy()
        (directory / "summary.json").write_text(json.dumps(SUMMARY))
        name = names[number % len(names)]
        path = directory / name
        if name == "manifest.json":
            path = checkpoints.available(directory / "checkpoints")[0] / name
        damage = replaced if generator.random() < 0.3 else DAMAGES[name]
        what = f"{name}, {damage(path, generator)}"
        counts["tried"] += 1
        faults += [f"{what}: {fault}" for fault in _faults_of_reading(directory)]
        code, found = _start(run)
        counts["ran" if code == 0 else "refused"] += not found
        faults += [f"{what}: {fault}" for fault in found]
    return {**counts, "faults": faults}


SUMMARY = {"status": "preempted", "reason": None, "final_val_loss": 5.0, "steps": 20, "ledger": {}, "seconds": 1.0}


def _faults_of_reading(directory: Path) -> list[str]:
    try:
        list(RunRecord.open(directory).metrics())
    except RecordError as error:
        return [] if str(directory) in str(error) and "\n" not in str(error) else [f"no file named in a line: {error}"]
    except Exception as error:
        return [f"reading: {type(error).__name__}: {str(error)[:300]}"]
    return []


def _start(run: Unfinished) -> tuple[int | None, list[str]]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(run.command())
    except Exception as error:
        return None, [f"starting: {type(error).__name__}: {str(error)[:300]}"]
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code == 0:
        try:
            same = curve(run.scratch / "run") == run.curve
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return code, [f"recorded as complete, and unreadable: {type(error).__name__}"]
        return code, [] if same else ["another curve, recorded as complete"]
    return code, [] if code in (1, 2) and len(errors) <= 1 else [f"exit code {code}: {said.getvalue()[-300:]}"]
