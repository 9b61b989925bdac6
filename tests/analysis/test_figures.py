"""One command draws each of the paper's figures from records, or says what is missing."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from analysis.comparison import Contrast, Interval
from analysis.figures import FIGURES, NothingToShow, curves_at, loss_limits, save
from analysis.reference import load_reference
from analysis.report import draw_figures
from analysis.results import Results, analyse
from analysis.trial_tables import read_trials, write_trials
from analysis.trials import load_study
from scripts.plot import main as plot
from tests.analysis.synthetic import write_run, write_study


@pytest.mark.parametrize("name", FIGURES)
def test_a_complete_study_gives_every_figure(results: Results, name: str, tmp_path: Path) -> None:
    path = save(FIGURES[name](results), tmp_path / f"{name}.png")
    with Image.open(path) as image:
        extremes = image.convert("L").getextrema()
    assert extremes[0] < 100 < 250 < extremes[1], "something dark on something light"


def test_the_same_records_give_the_same_bytes(results: Results, tmp_path: Path) -> None:
    first, second = (save(FIGURES["tokens"](results), tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert first == second


def test_each_panel_of_curves_reaches_down_to_the_ends_of_its_own_runs(results: Results) -> None:
    panels = FIGURES["curves"](results).axes
    assert len(panels) == 2
    for axis in panels:
        bottom, top = axis.get_ylim()
        lowest = min(np.asarray(line.get_ydata(), dtype=float).min() for line in axis.lines)
        assert 0 < lowest - bottom < 0.1 * (top - bottom)


def test_a_figure_without_its_records_says_what_it_needs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=4, train_lines=False)
    results = analyse(load_study([tmp_path]))
    needs = {
        "differences": "common steps and seeds",
        "grid": "two β2 and two γ",
        "interval": "two hessian_interval",
        "unclipped": "unclipped_fraction",
        "hessian": "histogram",
        "stability": "three learning rates",
    }
    for name, words in needs.items():
        with pytest.raises(NothingToShow, match=words):
            FIGURES[name](results)


def test_the_command_draws_a_figure_and_prints_a_table(
    study_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot(["grid", str(study_directory), "--output", str(tmp_path / "grid.svg")]) == 0
    assert (tmp_path / "grid.svg").read_text().startswith("<?xml")
    assert plot(["times", str(study_directory), "--table"]) == 0
    assert re.search(r"\| +curvature +\|", capsys.readouterr().out)


@pytest.mark.parametrize(("final", "shown"), [(2.9, True), (5.5, False)])
def test_published_losses_outside_the_axis_take_no_room(final: float, shown: bool, tmp_path: Path) -> None:
    """A short run of a published size ends far above them; their notes then squeezed the curves out of the picture."""
    run = write_run(tmp_path / "a", final=final, config={"model.name": "gpt2_small"}, train_lines=False)
    figure = FIGURES["curves"](analyse(load_study([run])))
    assert bool(figure.axes[0].texts) is shown


def test_published_numbers_are_those_of_the_paper() -> None:
    reference = load_reference()
    paper = {(one.model, one.arm): one.loss for one in reference.losses if one.source == "paper"}
    assert paper["gpt2_small", "adamw"] == 2.921
    assert paper["gpt2_small", "sophiag"] == 2.895
    assert paper["gpt2_medium", "sophiah"] == 2.645
    assert len(paper) == 9
    told = {one.source for one in (*reference.losses, *reference.others)}
    assert told <= set(reference.sources)
    assert told == set(reference.flaws), "every source has its flaws beside it"
    wen = {one.chinchilla: one.loss for one in reference.losses if one.source == "wen 2025" and one.arm == "adamw"}
    assert wen == {1: 3.529, 2: 3.408, 4: 3.322, 8: 3.261}


def test_stability_is_read_off_bare_runs_of_a_sweep_with_and_without_the_attention_trick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train.py -m optimizer.lr=… model.attention_layer_scaling=false,true`: no arm of it is a baseline."""
    for trick in (False, True):
        for rate in (1e-3, 3e-3, 1e-2):
            config = {"optimizer.lr": rate, "model.attention_layer_scaling": trick}
            status = "diverged" if rate == 1e-2 and not trick else "completed"
            write_run(tmp_path / f"{trick}{rate}", steps=4, train_lines=False, config=config, status=status)
    assert plot(["stability", str(tmp_path), "--output", str(tmp_path / "stability.png")]) == 0
    figure = FIGURES["stability"](analyse(load_study([tmp_path]), against_baseline=False))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == {"AdamW", "AdamW, attention trick"}
    assert np.isnan(lines["AdamW"].get_ydata()).tolist() == [False, False, True]
    assert np.isfinite(lines["AdamW, attention trick"].get_ydata()).all()


def test_at_each_learning_rate_stability_shows_a_mean_over_seeds_and_not_the_luckiest(tmp_path: Path) -> None:
    for rate in (1e-3, 3e-3, 1e-2):
        for seed, loss in ((1, 3.0), (2, 4.0)):
            config = {"optimizer.lr": rate}
            write_run(tmp_path / f"{rate}{seed}", steps=4, seed=seed, final=loss, train_lines=False, config=config)
    figure = FIGURES["stability"](analyse(load_study([tmp_path]), against_baseline=False))
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [3.5, 3.5, 3.5]


def test_one_wide_interval_does_not_stretch_the_axis_and_is_marked(results: Results) -> None:
    verdict = results.verdict("lion", "tiny")
    assert verdict.at is not None
    assert isinstance(verdict.at.same, Contrast)
    wild = replace(
        verdict.at.same, horizon=300, differences=np.array([-20, 0, 21]), interval=Interval(0.3, -21, 22, 0.975)
    )
    wider = replace(results, compared=[*results.compared, replace(verdict.at, same=wild)])
    before, after = (FIGURES["differences"](one).axes[0] for one in (results, wider))
    assert after.get_xlim() == before.get_xlim()
    assert "off the scale: +0.300 [-21.000, +22.000]" in [text.get_text() for text in after.texts]
    assert [line.get_marker() for line in after.lines].count("<") == 1


def test_a_diverging_arm_does_not_set_the_scale_of_the_curves(results: Results) -> None:
    found = curves_at(results.study, "tiny", 400)
    limits = loss_limits(found, "adamw")
    far = {arm: curve.columns["val_loss"] + 20 for arm, (curve, *_) in found.items()}
    (curve, *_) = found["lion"]
    assert (
        loss_limits(found | {"wild": [replace(curve, columns=curve.columns | {"val_loss": far["lion"]})]}, "adamw")
        == limits
    )


def test_sophias_relatives_without_gamma_or_k_are_left_out_of_its_grids(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=4, train_lines=False)
    write_run(tmp_path / "s", steps=4, optimizer="sophiax", train_lines=False)
    results = analyse(load_study([tmp_path]))
    assert results.grid is None
    with pytest.raises(NothingToShow):
        FIGURES["interval"](results)


@pytest.mark.slow
def test_names_with_dollar_signs_are_drawn_as_they_are_written(tmp_path: Path) -> None:
    study = write_study(tmp_path / "synthetic", models={"tiny": 1e6})
    odd = {"tiny": "t$\\frac$", "lion": "l$\\frac$"}
    spec = yaml.safe_load((study / "study.yaml").read_text())
    spec["arms"] = {odd.get(arm, arm): search for arm, search in spec["arms"].items()}
    (study / "study.yaml").write_text(yaml.safe_dump(spec))
    rows = read_trials(study)
    for row in rows:
        for section in ("model", "optimizer"):
            row.config[section]["name"] = odd.get(row.config[section]["name"], row.config[section]["name"])
    write_trials(study, [replace(row, arm=odd.get(row.arm, row.arm), model=odd[row.model]) for row in rows])
    pictures, failed = draw_figures(analyse(load_study([study])), tmp_path / "figures")
    assert not failed
    assert len(pictures) > 8


def test_a_single_run_has_a_curve_without_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the last line of a run says; a baseline that is named must be there."""
    write_run(tmp_path / "runs" / "one", optimizer="sophiag")
    picture = tmp_path / "curves.png"
    assert plot(["curves", str(tmp_path / "runs" / "one"), "--output", str(picture)]) == 0
    assert picture.stat().st_size > 1000
    assert plot(["curves", str(tmp_path / "runs" / "one"), "--baseline", "adamw"]) != 0
    assert "no reported runs of the baseline" in capsys.readouterr().err
