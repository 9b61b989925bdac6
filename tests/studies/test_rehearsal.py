"""A rehearsal has every part of the study at a fraction of its cost."""

import json
from pathlib import Path

import pandas as pd
import pytest

from scripts.study import main
from studies.expansion import expand, expected_trials
from studies.rehearsal import STEPS, rehearsal
from studies.spec import STUDY_DIRECTORY, load_spec, validate_spec
from tests.studies.small import small as small_study
from training.compose import compose

STUDIES = sorted(path.stem for path in STUDY_DIRECTORY.glob("*.yaml"))
HERE = ("data=sample", "tokenizer=bpe", "tokenizer.vocab_size=512")


@pytest.mark.parametrize("study", STUDIES)
def test_every_cell_of_the_study_is_rehearsed(study: str) -> None:
    spec = load_spec(study)
    small = rehearsal(spec, HERE)
    steps = {
        (name, horizon): STEPS * 2**rank
        for name, model in spec.models.items()
        for rank, horizon in enumerate(sorted(model.horizons))
    }
    cells, own = expected_trials(spec), expected_trials(small)
    assert {(arm, model, steps[model, horizon], phase) for arm, model, horizon, phase in cells} == own.keys()
    assert {count for cell, count in own.items() if cell[3] == "reporting"} == {1}
    assert sum(own.values()) <= sum(cells.values())
    assert max(horizon for _, _, horizon, _ in own) <= 8 * STEPS


@pytest.mark.parametrize("space", [{"values": [50, 100, 200, 400, 800]}, {"low": 50, "high": 800}])
def test_a_searched_warm_up_fits_into_the_few_steps(space: dict[str, object]) -> None:
    values = small_study()
    values["tuning"] |= {"method": "halton" if "low" in space else "coordinate", "follow": "at_once"}
    for arm in values["arms"].values():
        arm["search"] = {"schedule.warmup_steps": space}
    values["tuning"].pop("retune")
    values["models"].pop("gpt2_micro")
    values["ablations"]["sophiag_k1"] |= {"overrides": [], "values": {"schedule.warmup_steps": 300}}
    small = rehearsal(validate_spec(values, "small.yaml"), HERE)
    for trial in expand(small, {}).trials:
        assert compose(trial.overrides).schedule.warmup_steps < STEPS
    assert small.ablations["sophiag_k1"].values["schedule.warmup_steps"] == 1


@pytest.mark.parametrize("arm", ["adamw", "lion", "sophiag", "sophiah"])
def test_the_papers_recipes_become_small_and_keep_their_optimizer(arm: str) -> None:
    spec = load_spec("paper_355m")
    small = rehearsal(spec, [*HERE, "train.global_batch_size=8"])

    def config(study: object) -> object:
        return compose([*study.base, *study.models["gpt2_medium"].overrides, *study.arms[arm].overrides, "name=x"])  # type: ignore[attr-defined]

    before, after = config(spec), config(small)
    assert after.optimizer == before.optimizer  # type: ignore[attr-defined]
    assert after.schedule == before.schedule  # type: ignore[attr-defined]
    assert (after.model.n_layer, after.model.n_embd, after.data.name) == (2, 64, "sample")  # type: ignore[attr-defined]
    assert (after.train.global_batch_size, after.train.sequence_length) == (8, 64)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_papers_study_is_rehearsed_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One arm: its search, finalists, re-tunings and reported runs."""
    study = (STUDY_DIRECTORY / "paper_125m.yaml").read_text()
    alone = tmp_path / "alone.yaml"
    alone.write_text(study[: study.index("  lion:\n")])
    arguments = ["rehearse", f"study={alone}", *HERE, f"data.directory={tmp_path / 'tokens'}"]
    assert main([*arguments, "--work", str(tmp_path / "runs")]) == 0, capsys.readouterr().err
    records = tmp_path / "runs" / "rehearsals" / "paper_125m_rehearsal"
    trials = pd.read_csv(records / "trials.csv")
    assert {*trials.status} == {"completed"}
    assert trials.groupby("phase").size().to_dict() == {"reporting": 4, "tuning": 2 + 2 + 3 * 3}
    report = json.loads((records / "report.json").read_text())
    assert report["study"] == "paper_125m_rehearsal"
    assert (records / "report.html").stat().st_size > 10_000
