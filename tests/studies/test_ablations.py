"""The ablations of configs/study/cpu_scale.yaml appear in figures and tables."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.figures import FIGURES
from analysis.results import Results, analyse
from analysis.runs import flatten
from analysis.tables import TABLES
from analysis.trials import load_study
from studies.runner import run_study
from studies.spec import STUDY_DIRECTORY, StudySpec, validate_spec
from studies.store import Places
from tests.analysis.synthetic import noise, power_law, write_run
from training.compose import compose


def cut_down() -> StudySpec:
    """The study's own ablations, horizons and seeds with the arms that they vary and a search of one trial."""
    values: dict[str, Any] = yaml.safe_load((STUDY_DIRECTORY / "cpu_scale.yaml").read_text())
    models = {ablation["model"] for ablation in values["ablations"].values()}
    values["models"] = {name: model for name, model in values["models"].items() if name in models}
    varied = {ablation["of"] for ablation in values["ablations"].values()}
    values["arms"] = {name: arm for name, arm in values["arms"].items() if name in {values["baseline"], *varied}}
    for model in values["models"].values():
        model.pop("arms", None)
    values["tuning"] |= {"seeds": [1000], "trials": 1, "retune": {"keys": ["optimizer.lr"], "trials": 1}}
    return validate_spec(values, "cpu_scale.yaml")


#: What tells runs of one setting apart.
LABELS = ("name", "output_dir", "seed", "train.steps", "tracker.group", "tracker.tags")


@functools.cache
def configuration(*overrides: str) -> dict[str, Any]:
    """The real one, flat."""
    return flatten(compose(list(overrides)).model_dump(mode="json"))


def record(jobs: Sequence[Sequence[str]]) -> list[int]:
    """What a run would leave behind, its configuration the real one of its setting."""
    for overrides in jobs:
        given = dict(override.partition("=")[::2] for override in overrides)
        config = configuration(*(f"{key}={value}" for key, value in given.items() if key not in LABELS))
        steps, seed = int(given["train.steps"]), int(given["seed"])
        write_run(
            Path(given["output_dir"]) / given["name"],
            optimizer=config["optimizer.name"],
            seed=seed,
            steps=steps,
            final=power_law(steps * 1024) + noise(seed, steps, scale=0.002),
            evaluations=4,
            config=config | {"train.steps": steps, "seed": seed},
        )
    return [0] * len(jobs)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    places = Places.of("cpu_scale", *(tmp_path_factory.mktemp(name) for name in ("runs", "results")))
    assert run_study(cut_down(), places, record, at_once=None, log=lambda _: None).finished
    return analyse(load_study([places.records]))


def test_every_ablation_is_a_row_with_its_setting_and_its_paired_difference(results: Results) -> None:
    rows = {(one.arm, one.horizon): one for one in results.ablations}
    assert {arm for arm, _ in rows} == set(cut_down().ablations)
    settings = {one.arm: one.setting for one in results.ablations}
    assert settings["sophiag_k1"] == "hessian_interval=1"
    assert settings["sophiag_k100"] == "hessian_interval=100"
    assert settings["sophiag_hutchinson"] == "estimator=hutchinson"
    assert settings["sophiag_fisher"] == "estimator=empirical_fisher"
    assert settings["sophiag_no_clip"] == "clip=false"
    for one in results.ablations:
        assert one.differences == pytest.approx([0.0] * one.runs, abs=1e-9), "the noise of a seed cancels"
    settings_shown = TABLES["ablations"](results).frame["with"].tolist()
    assert {"estimator=empirical_fisher", "hessian_interval=100"} <= {*settings_shown}


def test_the_grid_of_gamma_and_beta2_is_filled(results: Results) -> None:
    assert results.grid is not None
    named = {
        (ablation.values["optimizer.gamma"], ablation.values["optimizer.betas[1]"])
        for ablation in cut_down().ablations.values()
        if "optimizer.gamma" in ablation.values
    }
    assert len(named) >= 9
    filled = {
        (gamma, beta)
        for gamma, losses in zip(results.grid.gammas, results.grid.losses, strict=True)
        for beta, loss in zip(results.grid.betas, losses, strict=True)
        if loss == loss
    }
    assert named <= filled
    assert TABLES["grid"](results).frame["γ"].tolist().count("0.05") == 1


def test_the_figure_of_the_interval_has_every_k(results: Results) -> None:
    ks = {int(text.get_text()) for text in FIGURES["interval"](results).axes[0].get_xticklabels()}
    assert ks == {1, 10, 100}
