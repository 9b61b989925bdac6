"""A few runs side by side: the table says what was reached, when, and what the comparison is worth."""

from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from analysis.compare import Comparison, compare_runs
from scripts.compare import main as compare
from tests.analysis.synthetic import write_run


def text_of(comparison: Comparison) -> str:
    console = Console(width=160, record=True, file=None)
    with console.capture() as capture:
        console.print(comparison.table())
    return capture.get()


@pytest.fixture
def three_runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "s", optimizer="sophiag", final=4.5, curvature_share=0.05, train_lines=False),
        write_run(tmp_path / "l", optimizer="lion", final=4.7, train_lines=False),
        write_run(tmp_path / "a", optimizer="adamw", final=4.6, train_lines=False),
    ]


def test_an_arm_that_never_reaches_the_baselines_loss_is_reported_as_not_reached(three_runs: list[Path]) -> None:
    comparison = compare_runs(three_runs)
    lion = next(one for one in comparison.others if one.arm == "lion")
    assert not lion.to_target["steps"].reached
    assert text_of(comparison).count("not reached") == 3


def test_curvature_passes_are_on_the_bill_in_flops_and_seconds(three_runs: list[Path]) -> None:
    comparison = compare_runs(three_runs)
    sophia = next(one for one in comparison.others if one.arm == "sophiag")
    share = {
        currency: sophia.to_target[currency].spent / comparison.baseline.to_target[currency].spent
        for currency in ("steps", "flops", "seconds")
    }
    assert share["steps"] < 1
    assert share["flops"] == pytest.approx(1.05 * share["steps"])
    assert share["seconds"] == pytest.approx(1.05 * share["steps"])


def test_the_table_says_that_one_horizon_and_one_seed_are_no_test(three_runs: list[Path]) -> None:
    text = text_of(compare_runs(three_runs))
    assert "one horizon, one seed: a demonstration, not a test" in text
    assert "no speed-up" in " ".join(text.split())


def test_a_difference_beside_the_optimizer_is_labelled(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", train_lines=False),
        write_run(tmp_path / "l", optimizer="lion", config={"train.grad_clip": 2.0}, train_lines=False),
    ]
    assert "NOT COMPARABLE (loss): train.grad_clip: 1.0 in a; 2.0 in l" in text_of(compare_runs(runs))


def test_the_plot_is_a_picture_and_leaves_no_partial_file(three_runs: list[Path], tmp_path: Path) -> None:
    path = compare_runs(three_runs).plot(tmp_path / "figures" / "curves.png")
    with Image.open(path) as image:
        assert image.width > 1000
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_a_diverged_arm_stands_in_the_table(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", train_lines=False),
        write_run(tmp_path / "l", optimizer="lion", status="diverged", final=20.0, train_lines=False),
    ]
    comparison = compare_runs(runs)
    assert "diverged" in text_of(comparison)
    comparison.plot(tmp_path / "curves.png")


def test_a_missing_baseline_is_an_error_that_says_which_optimizers_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 of the 1 runs are of the baseline 'adamw' \(the optimizers are lion\)"):
        compare_runs([write_run(tmp_path / "l", optimizer="lion", train_lines=False)])


def test_a_damaged_record_is_an_error_of_one_line(three_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (three_runs[1] / "summary.json").write_text("[]")
    assert compare([str(path) for path in three_runs]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{three_runs[1] / 'summary.json'} is damaged" in line
