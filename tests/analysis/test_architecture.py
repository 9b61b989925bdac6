"""Arrows run one way: the analysis reads run records and nothing else of training, and needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST_PARTY = {"sophia", "models", "data", "training", "planning", "studies", "analysis", "scripts", "tests"}
ALLOWED = {"analysis": {"analysis", "training.records"}, "studies": {"analysis", "studies", "training.compose"}}
# Errors and formats that compose and records raise and write, their wording, and how a trial's process ends.
ALLOWED["studies"] |= {f"training.{name}" for name in ("config", "config_files", "exit_codes", "mistakes", "records")}


def imports(path: Path) -> set[str]:
    """First-party modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] in FIRST_PARTY}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        for name in imports(path):
            assert any(name == one or name.startswith(f"{one}.") for one in ALLOWED[package]), f"{path.name}: {name}"


@pytest.mark.parametrize("package", sorted(FIRST_PARTY - {"planning", "scripts", "tests"}))
def test_nothing_imports_planning_but_scripts_and_benchmarks(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not any(name.split(".")[0] == "planning" for name in imports(path)), path.name


def test_the_analysis_needs_neither_torch_nor_hydra_nor_wandb() -> None:
    code = "import sys, analysis.report, analysis.compare; print({'torch', 'hydra', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
