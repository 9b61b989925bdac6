"""A pytest plugin that records which test executes which line (`pytest -p tests.mutants.coverage_map`).

Each worker writes a file to the directory MUTANTS_MAP: {"lines": {file: {line: [tests]}}, "seconds": {test: CPU seconds}}. A
line that a fixture executes belongs to every test of the test's file, a line that an import executes to "".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[2]


class CoverageMap:
    def __init__(self, directory: Path, files: list[str], worker: str) -> None:
        self.path = directory / f"{worker}.json"
        self.files = files
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(data_file=None, include=[str(ROOT / f) for f in files], config_file=False)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._noted(item, item.nodeid.partition("::")[0]))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._noted(item, item.nodeid))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        return (yield from self._noted(item, item.nodeid.partition("::")[0]))

    def _noted(self, item: pytest.Item, context: str) -> Iterator[None]:
        self.coverage.switch_context(context)
        begun = sum(os.times()[:4])
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = self.seconds.get(item.nodeid, 0.0) + sum(os.times()[:4]) - begun

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {file: data.contexts_by_lineno(str(ROOT / file)) for file in self.files}
        self.path.write_text(json.dumps({"lines": lines, "seconds": self.seconds}))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the workers execute the tests
    worker = getattr(config, "workerinput", {}).get("workerid", "alone")
    files = os.environ["MUTANTS_FILES"].split(os.pathsep)
    config.pluginmanager.register(CoverageMap(Path(os.environ["MUTANTS_MAP"]), files, worker))
