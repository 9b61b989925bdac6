"""The small prepared corpus that the runs of these tests read."""

from __future__ import annotations

import pytest

from tests.training.runs import prepare_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that choose the corpus."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))
