"""Each guard is triggered by a doctored record, and a sound study triggers none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.compare import compare_runs
from analysis.guards import Finding, differences, inspect, mid_run_crossings
from analysis.results import analyse
from analysis.runs import load_runs
from analysis.trials import load_study
from tests.analysis.synthetic import noise, power_law, write_run, write_tables

SEARCH = {"optimizer.lr": {"values": [5e-4, 1e-3, 2e-3]}}
RATES = (5e-4, 1e-3, 2e-3)


class Doctor:
    """Writes a small sound study, after changes to single trials or to the study file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.study: dict[str, Any] = {
            "name": "small",
            "baseline": "adamw",
            "models": {"tiny": {"seeds": [1, 2, 3]}},
            "tuning": {"method": "grid", "trials": 3},
            "arms": {arm: {"search": SEARCH} for arm in ("adamw", "sophiag")},
        }
        # Keyword arguments of write_run by (arm, phase, horizon, seed or rate).
        self.runs: dict[tuple[Any, ...], dict[str, Any]] = {}
        for arm in ("adamw", "sophiag"):
            for horizon in (100, 200):
                best = power_law(horizon * 1024) + (0.01 if arm == "sophiag" else 0.0)
                for seed in (1, 2, 3):
                    loss = best + noise(seed, horizon, len(arm), scale=0.002)
                    self.runs[arm, "reporting", horizon, seed] = {"final": loss, "config": {"optimizer.lr": 1e-3}}
                for rate, excess in zip(RATES, (0.05, 0.0, 0.05), strict=True):
                    values = {"optimizer.lr": rate}
                    self.runs[arm, "tuning", horizon, rate] = {"final": best + excess, "config": values}

    def run(self, arm: str, phase: str, horizon: int, which: float) -> Path:
        return self.directory.with_name("runs") / f"{arm}-{phase}-{horizon}-{which}"

    def write(self) -> list[Finding]:
        trials: list[tuple[dict[str, Any], Path | None]] = []
        for (arm, phase, horizon, which), arguments in self.runs.items():
            path: Path | None = self.run(arm, phase, horizon, which)
            seed = which if phase == "reporting" else 100
            arguments = {"optimizer": arm, "seed": seed, "steps": horizon, "evaluations": 4, **arguments}
            if not arm.startswith("sophia"):
                arguments.setdefault("train_lines", False)
            if arguments.pop("missing", False):
                path = None
            else:
                write_run(path, **arguments)
            trials.append(({"arm": arm, "phase": phase, "model": "tiny", "horizon": horizon, "seed": seed}, path))
        write_tables(self.directory, self.study, trials)
        return inspect(load_study([self.directory]))


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path / "small")


def test_a_sound_study_triggers_no_guard(doctor: Doctor) -> None:
    assert doctor.write() == []


def change_batch(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 2]["config"]["train.global_batch_size"] = 32


def change_clip(doctor: Doctor) -> None:
    doctor.runs["adamw", "reporting", 100, 1]["config"]["train.grad_clip"] = 0.5


def change_schedule(doctor: Doctor) -> None:
    for seed in (1, 2, 3):
        doctor.runs["sophiag", "reporting", 200, seed]["config"]["schedule.final_ratio"] = 0.0


def change_precision(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["config"]["train.precision"] = "bf16"


def change_validation_set(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["config"]["eval.tokens"] = 1024


def change_data(doctor: Doctor) -> None:
    doctor.runs["adamw", "reporting", 200, 3]["environment"] = {"data_manifest_sha256": "e" * 64}


def change_initial_weights(doctor: Doctor) -> None:
    doctor.runs["adamw", "reporting", 200, 3]["environment"] = {"initial_weights_sha256": "e" * 64}


def change_data_seed(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["config"]["seeds.data"] = 77


def change_model(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["config"]["model.n_layer"] = 3


def change_hardware(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["environment"] = {"hardware.cores": 64}


def change_the_number_of_ranks(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["environment"] = {"world_size": 8}


def make_a_forward_for_each_curvature_pass(doctor: Doctor) -> None:
    for (arm, phase, _, seed), arguments in doctor.runs.items():
        if (arm, phase) == ("sophiag", "reporting"):
            shared = 0 if seed == 1 else arguments.get("steps", 200) // 10
            arguments |= {"curvature_share": 0.05, "shared_forwards": shared}
            arguments["config"]["optimizer.estimator"] = "gnb"


def stop_decaying(doctor: Doctor) -> None:
    for key, arguments in doctor.runs.items():
        if key[1] == "reporting":
            arguments["config"].update({"schedule.name": "constant", "schedule.final_ratio": 1.0})


def report_a_tuning_seed(doctor: Doctor) -> None:
    doctor.runs["adamw", "reporting", 200, 100] = {"final": 3.0, "config": {"optimizer.lr": 1e-3}}


def lose_a_seed(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 3]["missing"] = True


def diverge_a_reported_run(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 3]["status"] = "diverged"


def diverge_a_tuning_run(doctor: Doctor) -> None:
    doctor.runs["sophiag", "tuning", 200, 2e-3]["status"] = "diverged"


def report(doctor: Doctor, arm: str, rate: float) -> None:
    for (of, phase, *_), arguments in doctor.runs.items():
        if (of, phase) == (arm, "reporting"):
            arguments["config"]["optimizer.lr"] = rate


def move_the_baselines_optimum_to_an_edge(doctor: Doctor) -> None:
    for horizon in (100, 200):
        doctor.runs["adamw", "tuning", horizon, 2e-3]["final"] -= 0.06
    report(doctor, "adamw", 2e-3)


def move_the_arms_optimum_to_an_edge(doctor: Doctor) -> None:
    doctor.runs["sophiag", "tuning", 200, 5e-4]["final"] -= 0.06
    report(doctor, "sophiag", 5e-4)


def tune_the_baseline_less(doctor: Doctor) -> None:
    del doctor.runs["adamw", "tuning", 200, 2e-3]


def tune_the_arm_beyond_its_budget(doctor: Doctor) -> None:
    doctor.runs["sophiag", "tuning", 200, 3e-3] = {"final": 9.0, "config": {"optimizer.lr": 3e-3}}


def report_the_baseline_with_other_than_its_best(doctor: Doctor) -> None:
    for seed in (1, 2, 3):
        doctor.runs["adamw", "reporting", 200, seed]["final"] += 0.03


def leave_a_gap_in_the_baselines_learning_rates(doctor: Doctor) -> None:
    doctor.runs["adamw", "tuning", 200, 5e-4]["final"] -= 0.049  # almost as good: the optimum lies between
    doctor.runs["adamw", "tuning", 200, 2e-3]["final"] += 0.2


def report_another_than_the_lowest(doctor: Doctor) -> None:
    """The search's threshold kept the lowest loss from being chosen."""
    report(doctor, "adamw", 5e-4)


def clip_every_coordinate(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["unclipped"] = 0.0


def change_the_commit(doctor: Doctor) -> None:
    doctor.runs["adamw", "reporting", 200, 1]["environment"] = {"git.commit": "f" * 40}


def leave_changes_uncommitted(doctor: Doctor) -> None:
    doctor.runs["adamw", "reporting", 200, 1]["environment"] = {"git.dirty": True}


@pytest.mark.parametrize(
    ("change", "guard", "severity", "words"),
    [
        (change_batch, "fairness", "serious", "train.global_batch_size"),
        (change_clip, "fairness", "serious", "train.grad_clip"),
        (change_schedule, "fairness", "serious", "schedule.final_ratio"),
        (change_precision, "fairness", "serious", "train.precision"),
        (change_validation_set, "fairness", "serious", "eval.tokens"),
        (change_data, "fairness", "serious", "environment.data_manifest_sha256"),
        (change_initial_weights, "fairness", "serious", "environment.initial_weights_sha256"),
        (change_data_seed, "fairness", "serious", "seeds.data"),
        (change_model, "fairness", "serious", "model.n_layer"),
        (change_hardware, "fairness", "note", "environment.hardware.cores"),
        (change_the_number_of_ranks, "fairness", "note", "environment.world_size"),
        (make_a_forward_for_each_curvature_pass, "fairness", "note", "the price of a curvature pass"),
        (stop_decaying, "schedule", "serious", "does not decay"),
        (report_a_tuning_seed, "seeds", "serious", "Seeds used for tuning are reported: 100"),
        (lose_a_seed, "seeds", "serious", "Sophia-G, tiny, 200 steps: 2 of 3 seeds have ended"),
        (diverge_a_reported_run, "diverged", "serious", "Sophia-G: 1 of 6 reporting runs diverged"),
        (diverge_a_tuning_run, "diverged", "note", "Sophia-G: 1 of 6 tuning runs diverged"),
        (move_the_baselines_optimum_to_an_edge, "edge", "serious", "the best optimizer.lr is the highest"),
        (move_the_arms_optimum_to_an_edge, "edge", "note", "the best optimizer.lr is the lowest"),
        (report_another_than_the_lowest, "edge", "serious", "the best optimizer.lr is the lowest"),
        (tune_the_baseline_less, "budget", "serious", "not tuned with the same number of trials"),
        (tune_the_arm_beyond_its_budget, "budget", "serious", "more tuning trials than granted for Sophia-G"),
        (report_the_baseline_with_other_than_its_best, "tuning", "serious", "a tuning trial ended lower"),
        (leave_a_gap_in_the_baselines_learning_rates, "tuning", "serious", "looks under-tuned"),
        (clip_every_coordinate, "degenerate", "serious", "no unclipped coordinate"),
        (change_the_commit, "code", "note", "different commits"),
        (leave_changes_uncommitted, "code", "note", "uncommitted"),
    ],
)
def test_a_doctored_record_triggers_its_guard(
    doctor: Doctor, change: Callable[[Doctor], None], guard: str, severity: str, words: str
) -> None:
    change(doctor)
    findings = doctor.write()
    assert any(
        finding.guard == guard and finding.severity == severity and words in finding.title for finding in findings
    ), [finding.title for finding in findings]


def test_a_baseline_off_the_power_law_is_reported(doctor: Doctor) -> None:
    for horizon, wave in ((50, 0.4), (100, -0.4), (200, 0.4), (400, -0.4)):
        for seed in (1, 2, 3):
            loss = power_law(horizon * 1024) + wave + noise(seed, horizon, scale=0.002)
            doctor.runs["adamw", "reporting", horizon, seed] = {"final": loss, "config": {"optimizer.lr": 1e-3}}
    doctor.write()
    findings = analyse(load_study([doctor.directory])).findings
    assert any(
        finding.guard == "curve" and finding.severity == "serious" and "do not follow the power law" in finding.title
        for finding in findings
    ), [finding.title for finding in findings]


def test_a_baseline_that_always_diverged_gives_no_verdict_and_is_the_first_finding(doctor: Doctor) -> None:
    for horizon in (100, 200):
        doctor.runs["adamw", "reporting", horizon, 2]["status"] = "diverged"
    doctor.write()
    results = analyse(load_study([doctor.directory]))
    assert list(results.headlines) == []
    assert results.findings[0].guard == "baseline"
    assert "diverged at every horizon" in results.findings[0].detail


def test_bare_runs_with_unequal_numbers_of_seeds_are_noted(tmp_path: Path) -> None:
    for arm, seed in (("adamw", 1), ("adamw", 2), ("lion", 1)):
        write_run(tmp_path / f"{arm}{seed}", optimizer=arm, seed=seed, steps=4, train_lines=False)
    titles = [finding.title for finding in inspect(load_study([tmp_path]))]
    assert "Cells have different numbers of seeds" in titles


def test_serious_findings_come_first(doctor: Doctor) -> None:
    change_the_commit(doctor)
    change_batch(doctor)
    severities = [finding.severity for finding in doctor.write()]
    assert severities == sorted(severities, key=lambda severity: severity != "serious")


def test_what_changes_nothing_that_is_measured_is_no_difference(tmp_path: Path) -> None:
    incidental = {
        "output_dir": "elsewhere",
        "tracker.name": "wandb",
        "launcher.nproc_per_node": 4,
        "checkpoint.interval": 7,
        "data.directory": "/scratch",
    }
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="lion", config=incidental)]
    assert differences(load_runs(paths)) == []


def test_a_difference_names_the_key_and_the_value_of_each_run(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="lion", config={"train.grad_clip": 2.0})]
    (difference,) = differences(load_runs(paths))
    assert difference.affects == "loss"
    assert str(difference) == "train.grad_clip: 1.0 in a; 2.0 in b"


def test_a_different_strategy_affects_only_timing(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="lion", config={"strategy.name": "fsdp"})]
    (difference,) = differences(load_runs(paths))
    assert difference.affects == "seconds"


def gnb_run(directory: Path, shared: int | None, **config: Any) -> Path:
    """200 steps with twenty curvature passes of Gauss-Newton-Bartlett, of which so many took the training forward."""
    values = {"optimizer.estimator": "gnb", **config}
    return write_run(directory, optimizer="sophiag", curvature_share=0.05, shared_forwards=shared, config=values)


def test_different_costs_of_a_curvature_pass_affect_only_flops_and_seconds(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "adamw"), gnb_run(tmp_path / "shared", 20), gnb_run(tmp_path / "own", 0)]
    (difference,) = differences(load_runs(paths))
    assert difference.affects == "FLOPs and seconds"
    assert difference.values == {"shared": "training's", "own": "their own"}
    (difference,) = differences(load_runs([paths[1], gnb_run(tmp_path / "resumed under FSDP", 12)]))
    assert difference.values["resumed under FSDP"] == "both"


def test_the_cost_of_a_curvature_pass_is_compared_as_recorded(tmp_path: Path) -> None:
    asked = {"train.shared_forward": False}
    same = [gnb_run(tmp_path / "shared", 20), gnb_run(tmp_path / "warm", 19, **{"optimizer.warm_start": 2})]
    assert differences(load_runs([*same, gnb_run(tmp_path / "not on record", None)])) == []
    assert differences(load_runs([same[0], write_run(tmp_path / "lion", optimizer="lion", config=asked)])) == []
    (difference,) = differences(load_runs([same[0], gnb_run(tmp_path / "older", None, **asked)]))
    assert difference.values["older"] == "their own"


def test_a_crossing_in_the_middle_of_a_schedule_is_shown_and_called_no_speed_up(doctor: Doctor, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        doctor.runs["sophiag", "reporting", 200, seed]["final"] -= 0.5
    doctor.write()
    crossings = [one for one in mid_run_crossings(load_study([doctor.directory])) if one.horizon == 200]
    assert len(crossings) == 3
    assert all(one.share is not None and one.share < 1 for one in crossings)
    runs = [doctor.run(arm, "reporting", 200, 1) for arm in ("adamw", "sophiag")]
    assert "A crossing in the middle of a schedule is not a speed-up" in " ".join(
        str(compare_runs(runs).table().caption).split()
    )
