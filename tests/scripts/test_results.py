"""`make results`: a page's section is made from the records, and from nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.pages import read_part
from analysis.results import analyse
from analysis.trials import load_study
from scripts.results import main as rebuild
from tests.analysis.synthetic import write_study

PAGE = "# Title\n\n<!-- results:begin -->\nwhat stood here before\n<!-- results:end -->\n\nThe end.\n"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "results" / "synthetic", models={"tiny": 1e6})


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study, and a page whose section has been made from it."""
    directory = tmp_path_factory.mktemp("rebuilt")
    study = write_study(directory / "results" / "synthetic", models={"tiny": 1e6})
    page = directory / "README.md"
    page.write_text(PAGE)
    assert rebuild([str(study), "--page", str(page)]) == 0
    return study, page


def test_the_section_says_what_the_records_say(rebuilt: tuple[Path, Path]) -> None:
    study, page = rebuilt
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- results:begin -->\n")
    assert text.endswith("<!-- results:end -->\n\nThe end.\n")
    assert "what stood here before" not in text
    results = analyse(load_study([study]))
    for sentence in results.sentences("sophiag", "tiny"):
        assert f"- {sentence}" in text
    (ours,) = [row for row in text.splitlines() if row.startswith("| **synthetic** |") and "400 steps" in row]
    final = next(one for one in results.finals if (one.endpoints.arm, one.endpoints.horizon) == ("sophiag", 400))
    assert final.difference is not None
    assert f"Sophia-G {final.mean:.3f} | {final.difference.estimate:+.3f} [{final.difference.low:+.3f}" in ours
    assert "1.0M parameters, 400 steps, 0.4M tokens, 0.4 tokens per parameter" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / link).is_file(), link


def test_published_pairs_stand_beside_with_their_differences(rebuilt: tuple[Path, Path]) -> None:
    _, page = rebuilt
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    for expected in (
        "| the paper | 125M | 100,000 steps | 2.921 | Sophia-G 2.895 | -0.026 | 2 (claimed) |",
        "| issue 31 | 125M | equal | 2.869 | Sophia-G 2.876 | +0.007 | – |",
        "| issue 46 | 125M | 200,000 steps, Sophia 100,000 | 2.863 | Sophia-G 2.897 | +0.034 | – |",
        "| wen 2025 | 130M | 8× Chinchilla | 3.261 | Sophia 3.259 | -0.002 | – |",
    ):
        assert expected in rows


def test_a_second_call_changes_nothing(rebuilt: tuple[Path, Path]) -> None:
    study, page = rebuilt
    first = page.read_bytes(), (study / "report.html").read_bytes()
    rebuild([str(study), "--page", str(page)])
    assert (page.read_bytes(), (study / "report.html").read_bytes()) == first


def test_a_brief_part_has_the_verdict_alone(study: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"{PAGE}<!-- more:begin -->\n<!-- more:end -->\n")
    assert rebuild([str(study), "--page", str(page), "--part", "more", "--brief"]) == 0
    assert page.read_text().startswith(PAGE)
    told = read_part(page, "more").splitlines()
    assert told[0].startswith("**Sophia-G against a tuned AdamW** ([report](results/synthetic/report.md)")
    assert told[2:] == [f"- {one}" for one in analyse(load_study([study])).sentences("sophiag", "tiny")]


def test_a_page_without_the_part_is_refused_and_left_alone(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Title\n")
    assert rebuild([str(study), "--page", str(page)]) == 2
    assert "<!-- results:begin -->" in capsys.readouterr().err
    assert page.read_text() == "# Title\n"
