from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from scripts.study import main, split
from tests.studies.small import small


@pytest.mark.parametrize("path", ["small.yaml", "work", "work/small", "records", "records/small/trials.csv"])
@pytest.mark.parametrize("command", ["status", "run"])
def test_what_a_study_may_not_read_is_named_in_one_line(
    command: str, path: str, tmp_path: Path, permissions_bind: None, refused: Callable[[int], str]
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**small(), "name": "small"}, sort_keys=False))
    (tmp_path / "work" / "small").mkdir(parents=True)
    (tmp_path / "records" / "small").mkdir(parents=True)
    (tmp_path / "records" / "small" / "trials.csv").write_text("trial,arm,phase,model,horizon,seed,status\n")
    (tmp_path / path).chmod(0)
    code = main([command, f"study={tmp_path}/small.yaml", f"--work={tmp_path}/work", f"--records={tmp_path}/records"])
    (tmp_path / path).chmod(0o755)
    assert str(tmp_path / path) in refused(code)


def test_a_key_that_is_of_how_the_runs_are_run_may_be_removed() -> None:
    assert split(["study=smoke", "~tracker.tags"]) == ("smoke", [], ["~tracker.tags"])
