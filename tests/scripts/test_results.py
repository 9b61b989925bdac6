"""`make results`: a page's section is made from the records, and from nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.comparison import Contrast
from analysis.results import analyse
from analysis.trial_tables import read_trials, write_trials
from analysis.trials import load_study
from scripts.results import main as rebuild
from tests.analysis.synthetic import write_study

PAGE = "# Title\n\n<!-- results:begin -->\nwhat stood here before\n<!-- results:end -->\n\nThe end.\n"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study, and a page whose section has been made from it."""
    directory = tmp_path_factory.mktemp("rebuilt")
    study = write_study(directory / "results" / "synthetic", models={"tiny": 1e6})
    page, table = directory / "README.md", directory / "results" / "README.md"
    page.write_text(PAGE)
    table.write_text(PAGE.replace("results:", "studies:"))
    assert rebuild([str(study), "--page", str(page), "--table", str(table)]) == 0
    return study, page


def test_the_section_says_what_the_records_say(rebuilt: tuple[Path, Path]) -> None:
    study, page = rebuilt
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- results:begin -->\n")
    assert text.endswith("<!-- results:end -->\n\nThe end.\n")
    assert "what stood here before" not in text
    results = analyse(load_study([study]))
    one = results.verdict("sophiag", "tiny")
    assert f"**{one.sentence('adamw')}**" in text
    assert one.at is not None
    assert isinstance(one.at.same, Contrast)
    assert one.at.same.interval is not None
    (row,) = [row for row in text.splitlines() if row.startswith("| tiny | Sophia-G")]
    assert one.at.same.interval.text in row
    assert "Scale: 1.0M parameters, 400 steps of 1,024 tokens, 0.41 tokens per parameter" in text
    ends = {arm: results.study.endpoints(arm, "tiny")[-1] for arm in ("adamw", "sophiag")}
    ours, theirs = ((end.flops / end.tokens).mean() for end in (ends["sophiag"], ends["adamw"]))
    assert f"A token costs Sophia-G on tiny {ours / theirs:.3f} times AdamW's FLOPs" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / link).is_file() or link.endswith("README.md"), link


def test_the_table_of_studies_has_scale_answer_and_doubts(rebuilt: tuple[Path, Path]) -> None:
    study, _ = rebuilt
    results = analyse(load_study([study]))
    serious = sum(one.severity == "serious" for one in results.findings)
    (row,) = [
        line for line in (study.parent / "README.md").read_text().splitlines() if line.startswith("| [synthetic]")
    ]
    assert row.startswith("| [synthetic](synthetic/README.md) |")
    assert "1.0M parameters, 400 steps" in row
    assert results.verdict("sophiag", "tiny").sentence("adamw") in row
    assert row.endswith(f"seeds; serious doubts of the report: {serious or 'none'} |")


def test_published_results_stand_beside_with_their_flaws(rebuilt: tuple[Path, Path]) -> None:
    _, page = rebuilt
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    (one,) = [row for row in rows if "| issue 46 |" in row]
    assert "AdamW 2.863, Sophia-G 2.897" in one
    assert "it tests the claim of 2×" in one


def test_the_strongest_doubts_stand_in_the_section(tmp_path: Path) -> None:
    study = write_study(tmp_path / "results" / "synthetic", models={"tiny": 1e6})
    missing = {"config": {}, "environment": {}, "summary": None}
    write_trials(
        study,
        [
            replace(row, **missing) if (row.arm, row.horizon, row.seed) == ("adamw", 400, 3) else row
            for row in read_trials(study)
        ],
    )
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert rebuild([str(study), "--page", str(page)]) == 0
    first = analyse(load_study([study])).findings[0]
    assert f"- {first.text}" in page.read_text()


def test_a_study_without_the_arm_is_refused(
    rebuilt: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = rebuilt
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert rebuild([str(study), "--page", str(page), "--arm", "muon"]) == 2
    assert "no verdict on 'muon'" in capsys.readouterr().err
    assert page.read_text() == PAGE


def test_a_second_call_changes_nothing(rebuilt: tuple[Path, Path]) -> None:
    study, page = rebuilt
    first = page.read_bytes(), (study / "report.html").read_bytes()
    rebuild([str(study), "--page", str(page)])
    assert (page.read_bytes(), (study / "report.html").read_bytes()) == first


def test_a_page_without_the_part_is_refused_and_left_alone(
    rebuilt: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = rebuilt
    page = tmp_path / "README.md"
    page.write_text("# Title\n")
    assert rebuild([str(study), "--page", str(page)]) == 2
    assert "<!-- results:begin -->" in capsys.readouterr().err
    assert page.read_text() == "# Title\n"
