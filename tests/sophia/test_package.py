"""The library needs only torch."""

import ast
import sys
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


def test_the_step_has_no_host_synchronisation() -> None:
    """No .item(), .tolist() or .cpu() in the modules that a step goes through."""
    for module in ("kernels", "elementwise", "sophia", "lion", "adahessian", "reference"):
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        attributes = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not attributes & {"item", "tolist", "cpu", "numpy", "nonzero"}, module
