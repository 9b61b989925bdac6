"""The planted bugs fit the source, and the one-token changes are correct."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.mutations import mutants_of

ROOT = Path(__file__).resolve().parents[2]
PLANTED = json.loads(Path(__file__).with_name("planted.json").read_text())


def test_each_planted_bug_has_one_place_and_tests_that_exist() -> None:
    for bug in PLANTED:
        assert (ROOT / bug["file"]).read_text().count(bug["old"]) == 1, bug["what"]
        assert bug["tests"], bug["what"]
        for test in bug["tests"]:
            file, *_, name = test.partition("[")[0].split("::")
            assert f"def {name}(" in (ROOT / file).read_text(), test


@pytest.mark.slow
def test_each_explained_survivor_is_a_change_that_exists() -> None:
    explained = json.loads(Path(__file__).with_name("survivors.json").read_text())
    made = {(m.file, m.old, m.new) for file in {one["file"] for one in explained} for m in mutants_of(ROOT, file)}
    assert {(one["file"], one["old"], one["new"]) for one in explained} <= made
    assert all(one["reason"] for one in explained)


def test_no_bug_is_planted_twice() -> None:
    assert max(Counter((bug["file"], bug["old"], bug["new"]) for bug in PLANTED).values()) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", {"x = a <= b"}),
        ("x = (a) + 2.0", {"x = (a) - 2.0", "x = (a) + 4.0"}),
        ("if a is not b:\n    f(a, k=0)", {"if a is b:", "f(a)", "f(a, k=1)", "pass"}),
        ("def f(x: int = 1) -> int:\n    '''1 + 1'''\n    return x", {"def f(x: int = 2) -> int:", "return None"}),
        ("raise ValueError(f'{1 + 1}')", {"pass"}),
    ],
)
def test_only_code_that_computes_is_changed(source: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(source + "\n")
    assert {mutant.new for mutant in mutants_of(tmp_path, "source.py")} == expected
