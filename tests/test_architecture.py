"""Who may import whom, and whether docs/architecture.md still shows it."""

import subprocess
import sys
from graphlib import CycleError
from pathlib import Path

import pytest

from scripts import architecture

ROOT = Path(__file__).resolve().parents[1]


def test_imports_run_downwards_only_and_each_library_has_its_place() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_pictures_show_the_code() -> None:
    page = architecture.PAGE.read_text()
    for name, picture in architecture.drawings().items():
        assert picture in page, f"the picture of {name} is out of date: python scripts/architecture.py"


def test_a_picture_leaves_out_arrows_that_follow_from_others() -> None:
    assert architecture.without_shortcuts({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {
        "a": {"b"},
        "b": {"c"},
        "c": set(),
    }


def test_a_circle_is_an_error() -> None:
    with pytest.raises(CycleError):
        architecture.without_shortcuts({"a": {"b"}, "b": {"a"}})


@pytest.mark.slow
def test_the_analysis_needs_neither_torch_nor_hydra_nor_wandb() -> None:
    code = "import sys, analysis.report, analysis.compare; print({'torch', 'hydra', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
