"""The library stands alone."""

import ast
import sys
from pathlib import Path

import sophia

PACKAGE = Path(sophia.__file__).parent


def test_sophia_imports_torch_and_the_standard_library_alone() -> None:
    allowed = {"torch", "sophia", *sys.stdlib_module_names}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name} imports relatively"
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_the_librarys_tests_need_torch_pytest_and_hypothesis_alone() -> None:
    """And what may be there to compare with, which `pytest.importorskip` asks for."""
    own = Path(__file__).parent
    files = [*own.rglob("*.py"), own.parent / "conftest.py", own.parent / "permissions.py"]
    allowed = {"torch", "sophia", "pytest", "hypothesis", *sys.stdlib_module_names}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                ours = name in ("tests.permissions", "tests.sophia.conftest")
                assert ours or name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_the_public_names_are_there_typed_and_documented() -> None:
    assert (PACKAGE / "py.typed").exists()
    for name in sophia.__all__:
        assert getattr(sophia, name).__doc__, name
    assert {"Sophia", "SophiaG", "SophiaH", "Lion"} <= set(sophia.__all__)


def test_the_step_has_no_host_synchronisation() -> None:
    """No .item(), .tolist() or .cpu() in the modules that a step goes through."""
    for module in ("rules", "kernels", "elementwise", "optimizer", "lion", "adahessian", "reference"):
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        attributes = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not attributes & {"item", "tolist", "cpu", "numpy", "nonzero"}, module
