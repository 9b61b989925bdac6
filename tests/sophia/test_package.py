"""The library needs only torch."""

import ast
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import sophia

PACKAGE = Path(sophia.__file__).parent


@pytest.mark.parametrize(
    ("directory", "besides"),
    [(PACKAGE, set()), (Path(__file__).parent, {"pytest", "hypothesis", "tests.sophia"})],
    ids=["the library", "its tests"],
)
def test_torch_and_the_standard_library_are_all_that_is_imported(directory: Path, besides: set[str]) -> None:
    allowed = {"torch", "sophia", *sys.stdlib_module_names, *besides}
    paths = list(directory.rglob("*.py"))
    assert len(paths) > 10
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [node.module or ""]
            for name in names:
                assert any(f"{name}.".startswith(f"{one}.") for one in allowed), f"{path.name} imports {name}"


def test_the_public_names_are_there_typed_and_documented() -> None:
    assert (PACKAGE / "py.typed").exists()
    for name in sophia.__all__:
        assert getattr(sophia, name).__doc__, name
    assert {"Sophia", "SophiaG", "SophiaH", "Lion"} <= set(sophia.__all__)


def test_a_wheel_trains_in_an_environment_that_has_torch_alone(tmp_path: Path) -> None:
    """The wheel has the library and nothing else; what it needs is torch and what torch needs."""
    root = PACKAGE.parent
    pytest.importorskip("hatchling", reason="the wheel is built in the project's environment")
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(built, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("torch_sophia-*.whl")
    venv.create(tmp_path / "bare", with_pip=False)
    (packages,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"sophia", "torch_sophia"}
        archive.extractall(packages)
    (described,) = packages.glob("torch_sophia-*.dist-info")
    required = [one for one in metadata.PathDistribution(described).requires or () if "extra ==" not in one]
    assert required == ["torch<3,>=2.6"]
    for name in needed_by("torch"):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    python = tmp_path / "bare" / "bin" / "python"
    ran = [python, "-I", root / "examples" / "plain_loop.py", "--steps", "3"]
    subprocess.run(ran, check=True, capture_output=True, cwd=tmp_path)
    version = [python, "-I", "-c", "import sophia; print(sophia.__version__, sophia.__file__)"]
    told = subprocess.run(version, check=True, capture_output=True, text=True).stdout.split()
    assert told[0] == sophia.__version__
    assert Path(told[1]).is_relative_to(packages)


def needed_by(name: str, known: frozenset[str] = frozenset()) -> set[str]:
    """The installed distributions that a distribution needs, and itself."""
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return set()
    found = {name}
    for line in requires:
        other = re.split(r"[ ;<>=!~\[(]", line)[0]
        if "extra ==" not in line and other not in known | found:
            found |= needed_by(other, known | found)
    return found
