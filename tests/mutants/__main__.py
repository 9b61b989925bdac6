"""Mutation testing: plant one bug at a time and run the tests that execute its lines.

    python -m tests.mutants                    the planted bugs, and one in ten of all one-token changes (make test-mutants)
    python -m tests.mutants --one-in 1         every change: hours
    python -m tests.mutants sophia/lion.py     only these files
    python -m tests.mutants --again FILE       the survivors of a run with --output FILE

`planted.json` has typical bugs, each with the tests that must fail. `survivors.json` has changes that no test can notice,
each with the reason; they are skipped. Exit code 1: a change survives.

Each change is written to a copy of the tree. Its tests run in a fork of this process, which has imported the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import hydra  # noqa: F401  (what follows is imported once, for all forks)
import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pydantic  # noqa: F401
import pytest
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

from tests.mutants.mutations import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FILES = [
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "sophia").glob("*.py")),
    "models/head.py",
    *(f"training/{name}.py" for name in ("loop", "curvature", "run", "schedule", "evaluation", "optimizers")),
    "training/recording/ledger.py",
    "data/batches.py",
    "data/splits.py",
]
# The tests closest to these files, without launches of several processes.
TESTS = ["tests/sophia", "tests/models/test_gpt2.py", "tests/models/test_head.py"]
TESTS += [f"tests/data/test_{name}.py" for name in ("batches", "dataset", "permutation", "splits")]
TESTS += [
    f"tests/training/test_{name}.py"
    for name in (
        *("curvature", "evaluation", "hardware", "loop", "optimizer_keys", "optimizers", "records", "run", "schedule"),
    )
]
TESTS += [f"tests/training/recording/test_{name}.py" for name in ("diagnostics", "ledger", "trackers", "profiling")]
TESTS += [f"tests/training/reliability/test_{name}.py" for name in ("guards", "resume", "resumption")]
ENOUGH = 60.0  # CPU seconds of tests for one change
LIMIT = 180  # CPU seconds, after which a change counts as a hang, which a user would notice
WAIT = 1800.0  # seconds, after which a change counts as waiting forever
# pytest's exit codes if no test fails. Any other: a test fails, or an import does.
OUTCOMES = {0: "survived", 3: "pytest failed", 5: "no test", -signal.SIGXCPU: "hung"}
FIRST_TIME = 1_600_000_000  # modification time of a mutated file, plus a second per change: no stale bytecode is used


class Planned(NamedTuple):
    mutant: Mutant
    source: bytes  # the unchanged file
    tests: list[str]
    planted: str = ""  # description of a planted bug


class Result(NamedTuple):
    planned: Planned
    outcome: str  # killed, hung, survived, uncovered, or an error of this tool
    seconds: float


class CoverageMap:
    """Which tests execute a line, and how many CPU seconds each takes."""

    def __init__(self, directory: Path) -> None:
        self.lines: dict[str, dict[int, set[str]]] = {}
        self.seconds: dict[str, float] = {}
        for part in directory.glob("*.json"):
            values = json.loads(part.read_text())
            self.seconds |= values["seconds"]
            for file, lines in values["lines"].items():
                known = self.lines.setdefault(file, {})
                for line, tests in lines.items():
                    known.setdefault(int(line), set()).update(tests)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that execute the lines: all in the test file of the same name, then the quickest of each other file,
        up to `ENOUGH` seconds. For lines that only an import, a compiler or another process executes, return the tests that
        execute any line of the file."""
        lines = self.lines.get(mutant.file, {})
        contexts = set().union(*(lines.get(n, set()) for n in range(mutant.line, mutant.last_line + 1)))
        if contexts <= {""}:
            contexts = set().union(*lines.values())
        tests = {c for c in contexts if "::" in c}
        shared = {c for c in contexts if c and "::" not in c}
        tests |= {test for test in self.seconds if test.partition("::")[0] in shared}
        chosen: list[str] = []
        total, turns = 0.0, dict[str, int]()
        quickest: Counter[str] = Counter()  # rank within each file, so that files with slow tests are included
        namesake = f"test_{Path(mutant.file).stem}.py"
        for test in sorted(tests & self.seconds.keys(), key=lambda test: (self.seconds[test], test)):
            file = test.partition("::")[0]
            turns[test] = quickest[file]
            quickest[file] += Path(file).name != namesake
        for test in sorted(turns, key=lambda test: (namesake not in test, turns[test], self.seconds[test], test)):
            total += self.seconds[test]
            if chosen and total > ENOUGH:
                break
            chosen.append(test)
        return chosen


def map_coverage(directory: Path) -> CoverageMap:
    """Run the closest tests once, recording which executes which line."""
    directory.mkdir(parents=True)
    environment = os.environ | {"MUTANTS_MAP": str(directory), "MUTANTS_FILES": os.pathsep.join(FILES)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(os.cpu_count()), "--dist", "worksteal"]
    command += ["-p", "tests.mutants.coverage_map", *TESTS]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        sys.exit("error: the tests fail without any change; fix them first")
    return CoverageMap(directory)


def planned_changes(files: Sequence[str], one_in: int, coverage: CoverageMap) -> list[Planned]:
    explained = changes(json.loads((HERE / "survivors.json").read_text()))
    planned = []
    for file in files:
        source = (ROOT / file).read_bytes()
        for mutant in mutants_of(ROOT, file):
            if int(mutant.identity, 16) % one_in == 0 and key(mutant) not in explained:
                planned.append(Planned(mutant, source, coverage.tests_of(mutant)))
    planted = []
    for bug in json.loads((HERE / "planted.json").read_text()):
        if bug["file"] not in files and files != FILES:
            continue
        source = (ROOT / bug["file"]).read_bytes()
        old = bug["old"].encode()
        if source.count(old) != 1:
            sys.exit(f"error: planted.json: {bug['what']}: its old text is in {bug['file']} {source.count(old)} times")
        start = source.index(old)
        line = source[:start].count(b"\n") + 1
        last = line + old.count(b"\n")
        mutant = Mutant(bug["file"], line, last, start, start + len(old), bug["new"], bug["old"], bug["new"])
        planted.append(Planned(mutant, source, bug["tests"], bug["what"]))
    refuse_absent_tests({test for one in planted for test in one.tests})
    return planned + planted


def refuse_absent_tests(tests: set[str]) -> None:
    """A missing test would fail whatever is planted."""
    files = sorted({test.partition("::")[0] for test in tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    there = {name for line in collected for name in (line, line.partition("[")[0])}
    if files and (absent := sorted(tests - there)):
        sys.exit(f"error: planted.json: no such test: {', '.join(absent)}")


class Slot:
    """A copy of the tree to test one change at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for name in listed.decode().split("\0"):
            if name and (ROOT / name).is_file() and not name.startswith("results/"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        self.planned: Planned | None = None
        self.written = 0

    def begin(self, planned: Planned) -> None:
        self.planned = planned
        self._write(planned.mutant.file, planned.mutant.applied(planned.source))
        self.started = time.monotonic()
        self.child = os.fork()
        if self.child == 0:
            self._test(planned.tests)

    def _write(self, file: str, source: bytes) -> None:
        self.written += 1
        path = self.directory / file
        path.write_bytes(source)
        os.utime(path, (FIRST_TIME + self.written,) * 2)

    def _test(self, tests: list[str]) -> None:
        """Run the tests in the fork; the exit code is their outcome."""
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 10))
        with (self.directory / ".output").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(self.directory)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        sys.path = [str(self.directory), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        os.environ["PYTHONPATH"] = str(self.directory)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"--basetemp={self.directory}/.tmp"]
        options += [f"--rootdir={self.directory}", "-c", "pyproject.toml"]
        first = tests[0].partition("::")[0]  # most changes are caught before other files are imported
        stages = [[test for test in tests if (test.partition("::")[0] == first) == now] for now in (True, False)]
        code: int = 1
        try:
            for stage in filter(None, stages):
                if code := pytest.main([*options, *stage]):
                    break
        finally:
            sys.stdout.flush()
            os._exit(code)

    def ended(self) -> Result | None:
        """Return the result when the tests have ended, else None."""
        assert self.planned is not None
        seconds = time.monotonic() - self.started
        process, status = os.waitpid(self.child, os.WNOHANG)
        if process == 0 and seconds < WAIT:
            return None
        os.killpg(self.child, signal.SIGKILL) if _group_lives(self.child) else None
        if process == 0:
            os.waitpid(self.child, 0)
            outcome = "hung"
        else:
            outcome = OUTCOMES.get(os.waitstatus_to_exitcode(status), "killed")
        planned, self.planned = self.planned, None
        self._write(planned.mutant.file, planned.source)
        shutil.rmtree(self.directory / ".tmp", ignore_errors=True)
        return Result(planned, outcome, seconds)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run(planned: list[Planned], slots: list[Slot]) -> Iterator[Result]:
    """Test the changes, `len(slots)` at a time; yields results as they come."""
    waiting = []
    for one in planned:
        if one.tests:
            waiting.append(one)
        else:
            yield Result(one, "uncovered", 0.0)
    waiting.reverse()
    while waiting or any(slot.planned for slot in slots):
        for slot in slots:
            if slot.planned is not None:
                if (result := slot.ended()) is not None:
                    yield result
            elif waiting:
                slot.begin(waiting.pop())
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "files", nargs="*", metavar="file", help="source files (default: those that a curve depends on)"
    )
    parser.add_argument(
        "--one-in", type=int, default=10, metavar="N", help="test one in N of the changes (default: 10)"
    )
    parser.add_argument("--map", type=Path, help="directory of the coverage map, created if missing")
    parser.add_argument("--again", type=Path, metavar="JSON", help="test only the survivors in this --output file")
    parser.add_argument("--output", type=Path, help="JSON file for the scores and the survivors")
    asked = parser.parse_args()
    files = asked.files or FILES
    if foreign := sorted({*files} - {*FILES}):
        parser.error(f"{foreign[0]}: choose from {', '.join(FILES)}")

    again = None if asked.again is None else changes(json.loads(asked.again.read_text())["survivors"])
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        directory = asked.map or Path(scratch) / "map"
        coverage = CoverageMap(directory) if directory.is_dir() else map_coverage(directory)
        planned = planned_changes(files, asked.one_in, coverage)
        planned = [one for one in planned if again is None or key(one.mutant) in again]
        count = (os.cpu_count() or 1) + 1  # tests wait, too
        slots = [Slot(Path(scratch) / f"slot{number}") for number in range(count)]
        results = []
        for result in run(planned, slots):
            results.append(result)
            tell(result, len(results), len(planned))
    return report(results, asked.output)


def key(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.file, mutant.old, mutant.new


def changes(listed: list[dict[str, str]]) -> set[tuple[str, str, str]]:
    return {(one["file"], one["old"], one["new"]) for one in listed}


def tell(result: Result, number: int, total: int) -> None:
    mutant = result.planned.mutant
    what = result.planned.planted or f"{mutant.old}  →  {mutant.new}"
    place = f"{mutant.file}:{mutant.line}"
    print(f"[{number:4d}/{total}] {result.outcome:9} {result.seconds:5.1f} s  {place:32} {what[:200]}", flush=True)


def report(results: list[Result], output: Path | None) -> int:
    """Print the scores by file and the survivors; return the exit code."""
    noticed: Counter[str] = Counter()
    made: Counter[str] = Counter()
    survivors = []
    for result in results:
        mutant = result.planned.mutant
        kind = "planted" if result.planned.planted else mutant.file
        made[kind] += 1
        if result.outcome in ("killed", "hung"):
            noticed[kind] += 1
        else:
            survivors.append(result)
    print("\nnoticed  of     file")
    for kind in made:
        print(f"{noticed[kind]:7d}  {made[kind]:4d}   {kind}")
    print(f"{noticed.total():7d}  {made.total():4d}   all ({noticed.total() / max(1, made.total()):.1%})")
    if survivors:
        print(f"\n{len(survivors)} changes that no test notices and tests/mutants/survivors.json does not explain:")
    for result in survivors:
        mutant = result.planned.mutant
        print(
            f"{mutant.file}:{mutant.line}: {result.planned.planted} ({result.outcome})\n  - {mutant.old}\n  + {mutant.new}"
        )
    if output is not None:
        names = ("file", "old", "new", "reason")
        listed = [dict(zip(names, (*key(r.planned.mutant), r.outcome), strict=True)) for r in survivors]
        scores = {kind: [noticed[kind], made[kind]] for kind in made}
        output.write_text(json.dumps({"scores": scores, "survivors": listed}, indent=1, ensure_ascii=False) + "\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
