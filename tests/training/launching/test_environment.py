"""The first second of a command: the message in another Python, and what a refusal or --help does not import."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.launching.environment import PACKAGES

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ["train.py", *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]
#: Importing any of these takes longer than refusing a mistake may take.
SLOW = {"torch", "transformers", "datasets", "deepspeed", "pandas", "scipy", "matplotlib", "plotly", "wandb", "pyarrow"}
SLOW |= {"joblib", "submitit", "lm_eval", "tensorboard", "tokenizers"}
#: A mistake for each command.
MISTAKES = {
    "train.py": ["train.stepps=3"],
    "train.py -m": ["-m", "seed=0,1", "optimizer=lionn"],
    "scripts/study.py": ["run", "study=smokee"],
    "scripts/plan.py": ["optimizer.lrr=3"],
    "scripts/compare.py": ["nowhere"],
    "scripts/report.py": ["nowhere"],
    "scripts/prepare_data.py": ["data=owt"],
    "scripts/sample.py": ["nowhere"],
    "scripts/export.py": ["nowhere", "exported"],
    "scripts/evaluate.py": ["nowhere", "--tasks", "superglue"],
}


def imported(arguments: list[str]) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Return the finished command and the top-level packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done, set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_refused_before_anything_slow_is_imported(command: str) -> None:
    done, names = imported([command.removesuffix(" -m"), *MISTAKES[command]])
    assert done.returncode == 2
    assert "pydantic" in names
    assert not names & SLOW
    assert "numpy" not in names or command != "train.py"
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert line.startswith("error: ")


@pytest.mark.parametrize("command", dict.fromkeys(command.removesuffix(" -m") for command in MISTAKES))
def test_help_imports_nothing_slow(command: str) -> None:
    done, names = imported([command, "--help"])
    assert done.returncode == 0
    assert Path(command).name in done.stdout
    assert not names & SLOW


def in_other_environment(command: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run the command outside the project, in a Python without the project's packages."""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [python, "-S", str(ROOT / command), "--help"],
        cwd=ROOT / "scripts",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_packages_a_command_names_the_environment_in_one_line(command: str) -> None:
    done = in_other_environment(command)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {PACKAGES[0]} is not installed in {sys.executable}; activate the project's environment: "
        f". ../.venv/bin/activate (make setup creates it)\n"
    )


@pytest.mark.parametrize("command", ["train.py", "scripts/study.py"])
def test_an_old_python_names_the_environment_in_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(
        "import runpy, sys\n"
        "sys.version_info = (3, 9, 1, 'final', 0)\n"
        "sys.path[0] = sys.argv[1].rpartition('/')[0]\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "old.py"), str(ROOT / command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: \S+ is Python 3\.9, but 3\.11 to 3\.13 is needed; activate .*: \. \.venv/bin/activate .*\n",
        done.stderr,
    )


@pytest.mark.parametrize("command", [*COMMANDS, "training/launching/environment.py"])
def test_an_old_python_can_parse_the_files_that_report_it(command: str) -> None:
    source = (ROOT / command).read_text()
    ast.parse(source, feature_version=(3, 7))
    if command.startswith("scripts/"):
        first = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
        before = [node for node in ast.parse(source).body if node.lineno < first.lineno]
        imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in before[1:]}
        assert "require_environment()" in ast.unparse(first)
        assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names
