"""scripts/compare.py: final losses, time to the baseline's loss, and the caveats of a comparison of a few runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from analysis.compare import Comparison, compare_runs, first_crossing
from scripts.compare import main
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
    assert text_of(compare_runs(three_runs)).count("not reached") == 3


def test_curvature_passes_count_in_flops_and_seconds(three_runs: list[Path]) -> None:
    comparison = compare_runs(three_runs)
    sophia = next(one for one in comparison.arms if one.arm == "sophiag")
    share = {}
    for currency in ("steps", "flops", "seconds"):
        spent, own = (one.crossing(comparison.target, currency) for one in (sophia, comparison.baseline))
        assert spent is not None
        assert own is not None
        share[currency] = spent / own
    assert share["steps"] < 1
    assert share["flops"] == pytest.approx(1.05 * share["steps"])
    assert share["seconds"] == pytest.approx(1.05 * share["steps"])


@pytest.mark.parametrize(
    ("spent", "loss", "target", "found"),
    [
        ([1, 100, 400], [9, 5, 4], 4.5, 200),  # linear in the logarithm
        ([0, 10], [10, 0], 7.5, 2.5),  # linear before the first step
        ([1, 2, 3, 4], [5, 4, 4.5, 3], 4.0, 2),  # the first crossing counts, even if the loss rises again
        ([1, 2, 3], [5, math.nan, 3], 4.0, 3),  # no interpolation from a loss that is not finite
        ([0, 10], [3, 2], 4.0, 0),
        ([0, 10], [9, 5], 4.0, None),
    ],
)
def test_a_crossing_is_the_first_and_interpolated_in_log_cost(
    spent: list[float], loss: list[float], target: float, found: float | None
) -> None:
    crossing = first_crossing(np.array(spent, float), np.array(loss, float), target)
    assert crossing == (None if found is None else pytest.approx(found))


def test_the_table_says_that_one_horizon_and_one_seed_are_no_test(three_runs: list[Path]) -> None:
    text = text_of(compare_runs(three_runs))
    assert "one horizon, one seed: a demonstration, not a test" in text
    assert "not a speed-up" in " ".join(text.split())


def test_a_difference_beside_the_optimizer_is_labelled(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", train_lines=False),
        write_run(tmp_path / "l", optimizer="lion", config={"train.grad_clip": 2.0}, train_lines=False),
    ]
    assert "NOT COMPARABLE (loss): train.grad_clip: 1.0 in a; 2.0 in l" in text_of(compare_runs(runs))


def test_runs_of_one_name_or_of_different_seeds_are_no_fair_comparison(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a" / "run", train_lines=False),
        write_run(tmp_path / "b" / "run", optimizer="lion", config={"train.grad_clip": 2.0}, train_lines=False),
        write_run(tmp_path / "c" / "run", optimizer="sophiag", seed=2, train_lines=False),
    ]
    text = " ".join(text_of(compare_runs(runs)).split())
    assert f"train.grad_clip: 1.0 in {runs[0]}, {runs[2]}; 2.0 in {runs[1]}" in text
    assert f"seed: 1 in {runs[0]}, {runs[1]}; 2 in {runs[2]}" in text


def test_runs_that_began_with_different_checkpoints_are_no_fair_comparison(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", config={"resume": "runs/x"}, train_lines=False),
        write_run(tmp_path / "l", optimizer="lion", config={"resume": "runs/y"}, train_lines=False),
    ]
    assert "NOT COMPARABLE (loss): resume: 'runs/x' in a; 'runs/y' in l" in text_of(compare_runs(runs))


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
    with pytest.raises(ValueError, match=r"baseline 'adamw' \(optimizers: lion\)"):
        compare_runs([write_run(tmp_path / "l", optimizer="lion", train_lines=False)])


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """What `-m optimizer=adamw,lion optimizer.lr=1e-3,3e-3 seed=0,1,2` leaves: the higher rate is better by 0.1 nats."""
    finals = {"adamw": 4.6, "lion": 4.5}
    return [
        write_run(
            tmp_path / "runs" / f"{optimizer}-{rate:g}-s{seed}",
            optimizer=optimizer,
            seed=seed,
            final=final + 0.1 * (rate < 3e-3) + 0.001 * seed * (1 + (optimizer == "lion")),
            config={"optimizer.lr": rate},
            train_lines=False,
        )
        for optimizer, final in finals.items()
        for rate in (1e-3, 3e-3)
        for seed in (0, 1, 2)
    ]


def test_each_optimizers_best_setting_of_a_sweep_is_compared_over_its_seeds(sweep: list[Path]) -> None:
    comparison = compare_runs(sweep)
    assert [one.arm for one in comparison.arms] == ["adamw", "lion"]
    assert all(one.values == "lr=0.003" and len(one.runs) == 3 for one in comparison.arms)
    assert comparison.target == pytest.approx(4.601)
    adamw, lion = comparison.arms
    assert lion.differences(adamw) == pytest.approx([-0.1, -0.099, -0.098])
    assert lion.difference(adamw) == "-0.0990 ± 0.0025"  # t(97.5 %, 2) = 4.303, times 0.001 / √3
    assert lion.crossing(comparison.target, "steps") is not None
    assert not comparison.warnings
    assert "chosen on the seeds shown" in text_of(comparison)


def test_the_command_compares_all_that_a_sweep_leaves_and_draws_it(
    sweep: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep[0].parent
    (runs / "multirun.yaml").write_text("hydra: {}\n")
    assert main(list(map(str, runs.iterdir()))) == 0
    out, err = capsys.readouterr()
    assert "All settings" in out
    assert str(runs / "comparison.png") in out
    assert err == f"skipped, not a run: {runs / 'multirun.yaml'}\n"
    with Image.open(runs / "comparison.png") as image:
        assert image.width > 1000


def test_a_setting_with_fewer_seeds_or_a_diverged_run_does_not_win(tmp_path: Path) -> None:
    def run(rate: float, seed: int, final: float, **options: Any) -> Path:
        config = {"optimizer.lr": rate}
        return write_run(
            tmp_path / f"{rate}-{seed}", seed=seed, final=final, config=config, train_lines=False, **options
        )

    runs = [
        run(1e-3, 0, 4.6),
        run(1e-3, 1, 4.6),
        run(2e-3, 0, 4.0),
        run(4e-3, 0, 4.0),
        run(4e-3, 1, 9.0, status="diverged"),
    ]
    comparison = compare_runs(runs)
    assert comparison.baseline.values == "lr=0.001"
    assert [one.outcome for one in comparison.settings] == ["4.6000", "4.0000", "1 of 2 diverged"]


def test_a_run_that_has_not_ended_is_named_and_left_out(sweep: list[Path]) -> None:
    summary = sweep[0] / "summary.json"
    summary.write_text(summary.read_text().replace('"completed"', '"preempted"'))
    assert compare_runs(sweep).left_out == [f"{sweep[0]}: adamw, preempted"]
    with pytest.raises(ValueError, match=r"preempted; rerun a run.s command to resume"):
        compare_runs(sweep[:1])


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lion = write_run(tmp_path / "l", optimizer="lion", train_lines=False)
    for arguments, word in (
        ([tmp_path / "nowhere"], "nowhere"),
        ([tmp_path], str(tmp_path)),
        ([lion], "baseline 'adamw'"),
        ([lion, "--baseline=lion", f"--plot={lion}/summary.json/x.png"], "summary.json"),
    ):
        assert main(list(map(str, arguments))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert word in line


def test_names_out_of_records_reach_no_terminal_and_no_mathematics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b]0;owned\x07[/bold] $\\frac$"
    runs = [
        write_run(tmp_path / "a", train_lines=False),
        write_run(tmp_path / "l", config={"optimizer.name": hostile}, train_lines=False),
    ]
    assert main([*map(str, runs), "--plot", str(tmp_path / "curves.png")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\u241b]0;o" in out


def test_a_damaged_record_is_an_error_of_one_line(three_runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (three_runs[1] / "summary.json").write_text("[]")
    assert main([str(path) for path in three_runs]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{three_runs[1] / 'summary.json'} is damaged" in line
