"""One complete synthetic study, which no test changes; a report of it may be written beside its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.results import Results, analyse
from analysis.trials import load_study
from tests.analysis.synthetic import write_study


@pytest.fixture(scope="session")
def study_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "synthetic")


@pytest.fixture(scope="session")
def results(study_directory: Path) -> Results:
    return analyse(load_study([study_directory]))
