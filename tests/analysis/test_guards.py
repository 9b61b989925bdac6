"""Each guard is triggered by a doctored record, and a sound study triggers none."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import tables
from analysis.guards import Finding, differences, inspect
from analysis.results import analyse
from analysis.runs import load_run, load_runs
from analysis.trial_tables import read_curves
from analysis.trials import load_study
from analysis.tuning import edges, predicted_gain, tunings
from analysis.wallclock import ReferenceTimes
from tests.analysis.synthetic import noise, power_law, write_run, write_tables
from training.records import json_line

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
        self.configure("sophiag", optimizer__betas=[0.9, 0.99])  # β1 as AdamW's

    def configure(self, arm: str, **config: Any) -> None:
        """Set keys, with __ for dots, in all runs of an arm."""
        for (of, *_), arguments in self.runs.items():
            if of == arm:
                arguments["config"] |= {key.replace("__", "."): value for key, value in config.items()}

    def declare(self, key: str, *arms: str) -> None:
        for arm in arms:
            self.study["arms"][arm] = {"search": self.study["arms"][arm]["search"] | {key: {"values": [1, 2]}}}

    def search(self, key: str, value: float, *arms: str) -> None:
        """Report a value of a key, and try half and twice of it at each horizon."""
        self.declare(key, *arms)
        for arm in arms:
            self.configure(arm, **{key: value})
            for horizon, factor in ((100, 0.5), (100, 2), (200, 0.5), (200, 2)):
                final = power_law(horizon * 1024) + 0.05
                config = self.runs[arm, "tuning", horizon, 1e-3]["config"] | {key: type(value)(factor * value)}
                self.runs[arm, "tuning", horizon, f"{key}={factor}"] = {"final": final, "config": config}

    def run(self, arm: str, phase: str, horizon: int, which: Any) -> Path:
        return self.directory.with_name("runs") / f"{arm}-{phase}-{horizon}-{which}"

    def write(self) -> list[Finding]:
        trials: list[tuple[dict[str, Any], Path | None]] = []
        for (arm, phase, horizon, which), arguments in self.runs.items():
            path: Path | None = self.run(arm, phase, horizon, which)
            seed = arguments.get("seed", which if phase == "reporting" else 100)
            arguments = {"optimizer": arm, "seed": seed, "steps": horizon, "evaluations": 4, **arguments}
            if not arm.startswith("sophia"):
                arguments.setdefault("train_lines", "clipped_every" in arguments)
            if arguments.pop("missing", False):
                path = None
            else:
                write_run(self.run(arm, phase, horizon, which), **arguments)
            trials.append(({"arm": arm, "phase": phase, "model": "tiny", "horizon": horizon, "seed": seed}, path))
        write_tables(self.directory, self.study, trials)
        return inspect(load_study([self.directory]))


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path / "small")


def test_a_sound_study_triggers_no_guard(doctor: Doctor) -> None:
    assert doctor.write() == []


@pytest.mark.parametrize(("apart", "found"), [(1e-4, []), (0.1, ["machine"]), (None, ["machine"])])
def test_a_rerun_that_ends_farther_from_its_record_than_seeds_differ_is_serious(
    doctor: Doctor, apart: float | None, found: list[str]
) -> None:
    doctor.write()
    (trial,) = (
        one
        for one in load_study([doctor.directory]).reporting
        if one.arm == "adamw" and (one.horizon, one.seed) == (100, 1)
    )
    rerun = {"trial": trial.origin.name, "difference": None, "final_difference": apart}
    (doctor.directory / "verification.json").write_text(json.dumps([rerun]))
    findings = inspect(load_study([doctor.directory]))
    assert [one.guard for one in findings if one.severity == "serious"] == found


def in_one_run(part: str, key: str, value: Any) -> Callable[[Doctor], None]:
    """Change a value in the configuration or the environment of one reported run."""

    def change(doctor: Doctor) -> None:
        doctor.runs["adamw", "reporting", 200, 1].setdefault(part, {})[key] = value

    return change


def change_schedule(doctor: Doctor) -> None:
    for seed in (1, 2, 3):
        doctor.runs["sophiag", "reporting", 200, seed]["config"]["schedule.final_ratio"] = 0.0


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
    for horizon in (100, 200):
        doctor.runs["sophiag", "reporting", horizon, 3]["missing"] = True


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


def tune_less(doctor: Doctor, arm: str) -> None:
    del doctor.runs[arm, "tuning", 200, 2e-3]


def tune_the_arm_beyond_its_budget(doctor: Doctor) -> None:
    doctor.runs["sophiag", "tuning", 200, 3e-3] = {"final": 9.0, "config": {"optimizer.lr": 3e-3}}


def report_other_than_the_best(doctor: Doctor, arm: str) -> None:
    for seed in (1, 2, 3):
        doctor.runs[arm, "reporting", 200, seed]["final"] += 0.03


def leave_a_gap_in_the_learning_rates(doctor: Doctor, arm: str) -> None:
    doctor.runs[arm, "tuning", 200, 5e-4]["final"] -= 0.049  # almost as good: the optimum lies between
    doctor.runs[arm, "tuning", 200, 2e-3]["final"] += 0.2


def report_another_than_the_lowest(doctor: Doctor) -> None:
    """The search's threshold kept the lowest loss from being chosen."""
    report(doctor, "adamw", 5e-4)


def give_the_embeddings_of_one_arm_a_rate_of_their_own(doctor: Doctor) -> None:
    doctor.configure("sophiag", optimizer__embedding_lr_ratio=32.0)


def search_the_embeddings_rate_in_one_arm(doctor: Doctor) -> None:
    doctor.search("optimizer.embedding_lr_ratio", 1.0, "sophiag")


def declare_a_search_that_never_tries_a_second_value(doctor: Doctor) -> None:
    doctor.search("optimizer.embedding_lr_ratio", 1.0, "sophiag")
    doctor.declare("optimizer.embedding_lr_ratio", "adamw")


def spare_the_embeddings_of_one_arm_weight_decay(doctor: Doctor) -> None:
    doctor.configure("sophiag", optimizer__decay_embeddings=False)


def search_the_warm_up_in_one_arm(doctor: Doctor) -> None:
    doctor.search("schedule.warmup_steps", 40, "adamw")


def search_no_rate(doctor: Doctor) -> None:
    doctor.study["arms"] = {
        arm: {"search": {"optimizer.betas[1]": {"values": [0.9, 0.99]}}} for arm in doctor.study["arms"]
    }


def fix_another_weight_decay(doctor: Doctor) -> None:
    doctor.configure("sophiag", optimizer__weight_decay=0.3)


def fix_another_momentum(doctor: Doctor) -> None:
    doctor.configure("sophiag", optimizer__betas=[0.95, 0.99])


def replace_sophia_by_muon(doctor: Doctor) -> None:
    doctor.study["arms"]["muon"] = doctor.study["arms"].pop("sophiag")
    doctor.runs = {("muon" if arm == "sophiag" else arm, *rest): run for (arm, *rest), run in doctor.runs.items()}


def leave_the_arm_untuned_at_a_horizon(doctor: Doctor) -> None:
    for rate in RATES:
        del doctor.runs["sophiag", "tuning", 200, rate]


def throw_a_search_away(doctor: Doctor) -> None:
    for rate in RATES:
        doctor.runs["sophiag", "set aside", 100, rate] = {"config": {"optimizer.lr": rate}}


def throw_the_same_number_of_trials_away(doctor: Doctor) -> None:
    for arm in ("adamw", "sophiag"):
        doctor.runs[arm, "set aside", 100, 1e-3] = {"seed": 100, "config": {"optimizer.lr": 1e-3}}


def change_the_settings_of_reported_seeds(doctor: Doctor) -> None:
    for arm in ("adamw", "sophiag"):
        doctor.runs[arm, "set aside", 200, 2] = {"seed": 2, "config": {"optimizer.lr": 5e-4}}


def clip_the_gradient_in_half_of_the_steps(doctor: Doctor, arm: str) -> None:
    for seed, horizon in itertools.product((1, 2, 3), (100, 200)):
        doctor.runs[arm, "reporting", horizon, seed]["clipped_every"] = 2


def clip_an_external_optimizer_without_curvature(doctor: Doctor) -> None:
    clip_the_gradient_in_half_of_the_steps(doctor, "adamw")
    doctor.configure("adamw", optimizer__hessian_interval=10, optimizer__estimator=None)


def slow_the_machine_for_one_arm(doctor: Doctor) -> None:
    for seed in (1, 2, 3):
        doctor.runs["sophiag", "reporting", 200, seed]["seconds_per_step"] = 0.054


def build_on_a_study_with_the_same_seeds(doctor: Doctor) -> None:
    doctor.study["builds_on"] = ["other"]
    other = Doctor(doctor.directory.with_name("x") / "other")
    other.runs = {key: run for key, run in other.runs.items() if key[1] == "tuning" or key[3] == 3}
    other.write()
    other.directory.rename(doctor.directory.with_name("other"))


def build_on_a_study_without_tables(doctor: Doctor) -> None:
    doctor.study["builds_on"] = ["other"]


def clip_every_coordinate(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 1]["unclipped"] = 0.0


@pytest.mark.parametrize(
    ("change", "guard", "severity", "words"),
    [
        (in_one_run("config", "train.global_batch_size", 32), "fairness", "serious", "train.global_batch_size"),
        (in_one_run("config", "train.grad_clip", 0.5), "fairness", "serious", "train.grad_clip"),
        (change_schedule, "fairness", "serious", "schedule.final_ratio"),
        (in_one_run("config", "resume", "runs/other"), "fairness", "serious", "resume"),
        (in_one_run("config", "train.precision", "bf16"), "fairness", "serious", "train.precision"),
        (in_one_run("config", "eval.tokens", 1024), "fairness", "serious", "eval.tokens"),
        (
            in_one_run("environment", "data_manifest_sha256", "e"),
            "fairness",
            "serious",
            "environment.data_manifest_sha256",
        ),
        (
            in_one_run("environment", "initial_weights_sha256", "e"),
            "fairness",
            "serious",
            "environment.initial_weights_sha256",
        ),
        (in_one_run("config", "seeds.data", 77), "fairness", "serious", "seeds.data"),
        (in_one_run("config", "model.n_layer", 3), "fairness", "serious", "model.n_layer"),
        (in_one_run("environment", "hardware.cores", 64), "fairness", "note", "environment.hardware.cores"),
        (in_one_run("environment", "world_size", 8), "fairness", "note", "environment.world_size"),
        (make_a_forward_for_each_curvature_pass, "fairness", "note", "the price of a curvature pass"),
        (stop_decaying, "schedule", "serious", "does not decay"),
        (report_a_tuning_seed, "seeds", "serious", "Seeds used for tuning are reported: 100"),
        (diverge_a_reported_run, "diverged", "serious", "Reported runs diverged: Sophia-G 1 of 6"),
        (diverge_a_tuning_run, "diverged", "note", "Tuning runs diverged: Sophia-G 1 of 6"),
        (
            move_the_baselines_optimum_to_an_edge,
            "edge",
            "serious",
            "2 settings are at the edge of what was tried, 2 of them the baseline's",
        ),
        (
            move_the_arms_optimum_to_an_edge,
            "edge",
            "note",
            "2 settings are at the edge of what was tried",
        ),
        (
            report_another_than_the_lowest,
            "edge",
            "serious",
            "2 settings are at the edge of what was tried, 2 of them the baseline's",
        ),
        (partial(tune_less, arm="adamw"), "budget", "serious", "Fewer tuning trials than other arms: AdamW"),
        (leave_the_arm_untuned_at_a_horizon, "budget", "serious", "Fewer tuning trials than other arms: Sophia-G"),
        (tune_the_arm_beyond_its_budget, "budget", "serious", "More tuning trials than granted: Sophia-G"),
        (partial(report_other_than_the_best, arm="adamw"), "tuning", "serious", "lower than the reported runs: AdamW"),
        (partial(leave_a_gap_in_the_learning_rates, arm="adamw"), "tuning", "serious", "looks under-tuned: AdamW"),
        (partial(leave_a_gap_in_the_learning_rates, arm="sophiag"), "tuning", "serious", "looks under-tuned: Sophia-G"),
        (give_the_embeddings_of_one_arm_a_rate_of_their_own, "shared", "serious", "optimizer.embedding_lr_ratio"),
        (search_the_embeddings_rate_in_one_arm, "shared", "serious", "optimizer.embedding_lr_ratio"),
        (declare_a_search_that_never_tries_a_second_value, "shared", "serious", "optimizer.embedding_lr_ratio"),
        (spare_the_embeddings_of_one_arm_weight_decay, "shared", "serious", "optimizer.decay_embeddings"),
        (search_the_warm_up_in_one_arm, "shared", "serious", "schedule.warmup_steps"),
        (search_no_rate, "shared", "serious", "optimizer.lr"),
        (fix_another_weight_decay, "shared", "serious", "optimizer.weight_decay"),
        (fix_another_momentum, "shared", "note", "optimizer.betas[0]"),
        (replace_sophia_by_muon, "shared", "serious", "Muon trains the embeddings by AdamW"),
        (throw_a_search_away, "set aside", "serious", "Recorded trials were set aside: Sophia-G 3"),
        (
            throw_the_same_number_of_trials_away,
            "set aside",
            "note",
            "Recorded trials were set aside: AdamW 1, Sophia-G 1",
        ),
        (change_the_settings_of_reported_seeds, "set aside", "serious", "set aside: AdamW 1, Sophia-G 1"),
        (
            partial(clip_the_gradient_in_half_of_the_steps, arm="adamw"),
            "clipping",
            "note",
            "more than 30% of the steps",
        ),
        (
            partial(clip_the_gradient_in_half_of_the_steps, arm="sophiag"),
            "clipping",
            "serious",
            "more than 30% of the steps",
        ),
        (clip_an_external_optimizer_without_curvature, "clipping", "note", "more than 30% of the steps"),
        (build_on_a_study_with_the_same_seeds, "seeds", "serious", "Reported seeds were used to choose settings: 3"),
        (build_on_a_study_without_tables, "seeds", "note", "other, on which this study builds, has no tables"),
        (clip_every_coordinate, "degenerate", "serious", "no unclipped coordinate"),
        (in_one_run("environment", "git.commit", "f"), "code", "note", "different commits"),
        (in_one_run("environment", "git.dirty", True), "code", "note", "uncommitted"),
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


@pytest.mark.parametrize(
    "change", [lambda doctor: doctor.configure("sophiag", optimizer__betas=[0.9, 0.8], optimizer__gamma=0.5), None]
)
def test_an_arms_own_knobs_and_keys_searched_in_all_arms_may_differ(
    doctor: Doctor, change: Callable[[Doctor], None] | None
) -> None:
    if change is None:
        for arm, factor in (("adamw", 1), ("sophiag", 2)):
            doctor.search("optimizer.embedding_lr_ratio", 1.0 * factor, arm)
            doctor.search("optimizer.weight_decay", 0.1 * factor, arm)
            doctor.search("schedule.warmup_steps", 10 * factor, arm)
        doctor.study["tuning"]["trials"] = 9
    else:
        change(doctor)
    assert doctor.write() == []


def test_the_alarm_of_a_run_counts_where_the_tables_keep_too_few_lines_to_see_it(doctor: Doctor) -> None:
    """As when every coordinate was clipped for a while between two lines that are kept."""
    assert doctor.write() == []
    run = doctor.run("sophiag", "reporting", 200, 1)
    alarm = {"kind": "event", "event": "all_clipped", "step": 120, "reason": "no coordinate is unclipped"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json_line(alarm) + "\n")
    assert load_run(run).alarms == 1
    row = {"arm": "sophiag", "phase": "reporting", "model": "tiny", "horizon": 200, "seed": 1}
    write_tables(doctor.directory, doctor.study, [(row, run)])
    study = load_study([doctor.directory])
    assert [one.guard for one in inspect(study) if one.severity == "serious" and one.guard == "degenerate"] == [
        "degenerate"
    ]
    (event,) = [line for line in read_curves(doctor.directory).to_pylist() if line["kind"] == "event"]
    assert event["reason"] == "no coordinate is unclipped"


def test_bare_runs_without_a_tuned_rate_are_in_serious_doubt_and_their_weight_decay_is_a_note(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config={"optimizer.weight_decay": 0.2}, train_lines=False)
    write_run(tmp_path / "b", optimizer="lion", train_lines=False)
    serious, note = inspect(load_study([tmp_path]))
    assert (serious.severity, serious.title) == ("serious", "Not tuned in every arm: optimizer.lr")
    assert "0.001 for AdamW; 0.0002 for Lion" in serious.detail
    assert (note.severity, note.title) == ("note", "Not tuned in every arm: optimizer.weight_decay")


def test_settings_of_one_optimizer_are_the_comparison_itself(tmp_path: Path) -> None:
    for rate in (1e-3, 2e-3):
        write_run(tmp_path / f"{rate}", config={"optimizer.lr": rate}, train_lines=False)
    assert inspect(load_study([tmp_path])) == []


def test_an_edge_is_inherited_where_its_key_is_not_searched_again(doctor: Doctor) -> None:
    """Weight decay is searched at 100 steps, and its highest value is best; at 200 the rate alone is tuned again."""
    for arm in ("adamw", "sophiag"):
        doctor.declare("optimizer.weight_decay", arm)
        doctor.configure(arm, optimizer__weight_decay=0.4)
        for decay, excess in ((0.1, 0.04), (0.2, 0.02)):
            values = {"optimizer.lr": 1e-3, "optimizer.weight_decay": decay}
            doctor.runs[arm, "tuning", 100, decay] = {"final": power_law(100 * 1024) + excess, "config": values}
    doctor.study["tuning"]["trials"] = 5
    (finding,) = doctor.write()
    assert finding.title == "2 settings are at the edge of what was tried, 1 of them the baseline's"
    study = load_study([doctor.directory])
    rows = edges(study, tunings(study))
    assert [(row.arm, row.horizon, row.inherited_from) for row in rows] == [
        ("adamw", 100, ""),
        ("adamw", 200, "100 steps"),
        ("sophiag", 100, ""),
        ("sophiag", 200, "100 steps"),
    ]
    assert {(row.key, row.value, row.side) for row in rows} == {("optimizer.weight_decay", 0.4, "highest")}


@pytest.mark.parametrize(
    ("decay", "apart", "severity", "title"),
    [
        (
            0.8,
            0.02,
            "note",
            "4 settings are at the edge of what was tried; runs beyond it of 200 steps exclude a gain of 0.02 nats",
        ),
        (0.8, -0.02, "serious", "2 settings are at the edge of what was tried, 2 of them the baseline's"),
        (0.8, -0.018, "serious", "2 settings are at the edge of what was tried, 2 of them the baseline's"),
        (0.3, 0.02, "serious", "2 settings are at the edge of what was tried, 2 of them the baseline's"),
        (40.0, 0.02, "serious", "2 settings are at the edge of what was tried, 2 of them the baseline's"),
        (None, 0.02, "serious", "2 settings are at the edge of what was tried, 2 of them the baseline's"),
    ],
)
def test_an_edge_is_answered_by_an_ablation_a_step_beyond_it_that_ends_no_lower(
    doctor: Doctor, decay: float | None, apart: float, severity: str, title: str
) -> None:
    """Weight decay and eps are the highest of those tried at both horizons; eps is answered."""
    doctor.configure("adamw", optimizer__weight_decay=0.4, optimizer__eps=1e-6)
    for key, value in (("optimizer.weight_decay", 0.4), ("optimizer.eps", 1e-6)):
        doctor.declare(key, "adamw")
        for horizon in (100, 200):
            config = doctor.runs["adamw", "tuning", horizon, 1e-3]["config"] | {key: 0.5 * value}
            final = power_law(horizon * 1024) + 0.02
            doctor.runs["adamw", "tuning", horizon, key] = {"final": final, "config": config}
    doctor.study["tuning"]["trials"] = 5
    ablations = doctor.study["ablations"] = {}
    for name, values in (
        ("adamw_decay", {"optimizer.weight_decay": decay}),
        ("adamw_eps", {"optimizer.eps": 2e-6}),
        ("adamw_both", {"optimizer.weight_decay": 0.8, "optimizer.eps": 2e-6}),
    ):
        ablations[name] = {"of": "adamw", "values": values}
        for seed in (1, 2, 3):
            base = doctor.runs["adamw", "reporting", 200, seed]
            final = base["final"] + (apart if name == "adamw_decay" else 0.03) + 0.001 * seed
            config = base["config"] | values
            doctor.runs[name, "reporting", 200, seed] = {"optimizer": "adamw", "final": final, "config": config}
    found = [finding for finding in doctor.write() if finding.guard == "edge"]
    assert [(finding.severity, finding.title) for finding in found] == [(severity, title)]
    shown = tables.edges(analyse(load_study([doctor.directory]))).frame.set_index(["key", "steps"])
    said = shown["beyond it, minus at it [95% interval]"]["optimizer.weight_decay", "200"]
    text = f"{decay}, 200 steps: {apart + 0.002:+.3f} [{apart:+.3f}, {apart + 0.004:+.3f}]"
    assert said == (text if decay == 0.8 else "")


def test_where_both_arms_ran_beyond_their_edges_their_difference_there_is_told(doctor: Doctor) -> None:
    doctor.study["tuning"]["trials"] = 5
    ablations = doctor.study["ablations"] = {}
    for arm, gain in (("adamw", 0.03), ("sophiag", 0.05)):
        doctor.declare("optimizer.weight_decay", arm)
        doctor.configure(arm, optimizer__weight_decay=0.4)
        for horizon in (100, 200):
            config = doctor.runs[arm, "tuning", horizon, 1e-3]["config"] | {"optimizer.weight_decay": 0.2}
            doctor.runs[arm, "tuning", horizon, "decay"] = {"final": power_law(horizon * 1024) + 0.02, "config": config}
        ablations[f"{arm}_decay"] = {"of": arm, "values": {"optimizer.weight_decay": 0.8}}
        for seed in (1, 2, 3):
            base = doctor.runs[arm, "reporting", 200, seed]
            config = base["config"] | {"optimizer.weight_decay": 0.8}
            final = base["final"] - gain + 0.001 * seed * (arm == "sophiag")
            doctor.runs[f"{arm}_decay", "reporting", 200, seed] = {"optimizer": arm, "final": final, "config": config}
    (finding,) = (one for one in doctor.write() if one.guard == "edge")
    ends = {key: values["final"] for key, values in doctor.runs.items() if key[1:3] == ("reporting", 200)}
    apart = [
        sum(ends[f"sophiag{end}", "reporting", 200, s] - ends[f"adamw{end}", "reporting", 200, s] for s in (1, 2, 3))
        / 3
        for end in ("_decay", "")
    ]
    assert apart[0] == pytest.approx(apart[1] - 0.018)
    change = (
        " With optimizer.weight_decay=0.8 in both arms, minus AdamW after 200 steps (95% intervals): "  # of one arm
    )
    assert finding.figures.startswith("What a value beyond it changes, in nats: optimizer.weight_decay=0.8 after 200 ")
    assert f"{change}Sophia-G {apart[0]:+.3f} [" in finding.detail
    assert f"] instead of {apart[1]:+.3f} [" in finding.detail


@pytest.mark.parametrize(
    ("gains", "severity", "lower"),
    [
        ({"adamw": 0.02, "sophiag": 0.03}, "serious", "AdamW, Sophia-G"),
        ({"adamw": 0.02, "sophiag": -0.03}, "serious", "AdamW"),
        ({"adamw": -0.02, "sophiag": 0.03}, "note", "Sophia-G"),
        ({"adamw": 0.02}, "serious", "AdamW"),
        ({"adamw": -0.02, "sophiag": -0.03}, None, ""),
    ],
)
def test_an_ablation_of_a_searched_value_that_ends_lower_than_its_arm_is_found(
    doctor: Doctor, gains: dict[str, float], severity: str | None, lower: str
) -> None:
    doctor.search("optimizer.weight_decay", 0.4, "adamw", "sophiag")
    doctor.study["tuning"]["trials"] = 5
    ablations = doctor.study["ablations"] = {}
    key = "optimizer.weight_decay"
    for arm, gain in gains.items():
        ablations[f"{arm}_decay"] = {"of": arm, "values": {key: 0.5}}
        ablations[f"{arm}_clip"] = {"of": arm, "overrides": ["train.grad_clip=2.0"]}  # not searched: never a finding
        for seed in (1, 2, 3):
            base = doctor.runs[arm, "reporting", 200, seed]
            final = base["final"] - gain + 1e-4 * seed
            config = base["config"] | {key: 0.5}
            doctor.runs[f"{arm}_decay", "reporting", 200, seed] = {"optimizer": arm, "final": final, "config": config}
            config = base["config"] | {"train.grad_clip": 2.0}
            doctor.runs[f"{arm}_clip", "reporting", 200, seed] = {
                "optimizer": arm,
                "final": final - 1,
                "config": config,
            }
        # A seed that has not run yet.
        doctor.runs[f"{arm}_decay", "reporting", 200, 4] = {"missing": True}
    found = [one for one in doctor.write() if one.title.startswith("Better settings")]
    assert [(one.severity, one.title) for one in found] == (
        [(severity, f"Better settings than the reported ones are known: {lower}")] if severity else []
    )
    for one in found:
        for arm, name in (("adamw", "AdamW"), ("sophiag", "Sophia-G")):
            told = f"{name} {2e-4 - gains.get(arm, 0):+.3f} ["
            assert (told in one.detail) == (name in lower)
        assert f"{key}=0.5 after 200 steps: " in one.detail
        both = f"With {key}=0.5 in both arms, minus AdamW after 200 steps"
        assert (both in one.detail) == ("sophiag" in gains)


def test_a_rate_tuned_again_is_at_an_edge_if_it_is_the_lowest_tried_there(doctor: Doctor) -> None:
    """Between the ends of the range of the full search, which a re-tuning does not explore."""
    doctor.study["tuning"] = {"method": "halton", "trials": 6}
    doctor.study["arms"]["adamw"]["search"] = {
        "optimizer.lr": {"low": 1e-5, "high": 1e-1},
        "optimizer.weight_decay": {"low": 0.01, "high": 1.0},
    }
    doctor.configure("adamw", optimizer__lr=1e-3, optimizer__weight_decay=0.1)
    for key in [key for key in doctor.runs if key[:2] == ("adamw", "tuning")]:
        del doctor.runs[key]
    for horizon, points in {100: [(1e-3, 0.1), (3e-3, 0.2), (3e-4, 0.05)], 200: [(1e-3, 0.1), (2e-3, 0.1)]}.items():
        for rate, decay in points:
            values = {"optimizer.lr": rate, "optimizer.weight_decay": decay}
            final = power_law(horizon * 1024) + (0.0 if rate == 1e-3 else 0.05)
            doctor.runs["adamw", "tuning", horizon, rate] = {"final": final, "config": values}
    doctor.write()
    study = load_study([doctor.directory])
    found = [(row.horizon, row.key, row.side) for row in edges(study, tunings(study)) if row.arm == "adamw"]
    assert found == [(200, "optimizer.lr", "lowest")]


def test_the_finalists_seeds_decide_and_the_searchs_do_not(doctor: Doctor) -> None:
    trials = [
        (1e-3, 100, 3.00), (1e-3, 101, 3.20), (1e-3, 102, 3.22),
        (2e-3, 100, 3.02), (2e-3, 101, 3.10), (2e-3, 102, 3.12),
        (4e-3, 100, 3.05),
    ]  # fmt: skip
    for key in [key for key in doctor.runs if key[0] == "adamw"]:
        del doctor.runs[key]
    for rate, seed, final in trials:
        run = {"seed": seed, "final": final, "config": {"optimizer.lr": rate}}
        doctor.runs["adamw", "tuning", 100, (rate, seed)] = run
    doctor.study["tuning"]["finalists"] = {"settings": 2, "seeds": [101, 102]}
    doctor.write()
    search = next(one for one in tunings(load_study([doctor.directory])) if one.arm == "adamw")
    assert [one.values["optimizer.lr"] for one in search.candidates] == [2e-3, 1e-3, 4e-3]
    assert [round(one.loss, 6) for one in search.candidates] == [3.11, 3.21, 3.05]
    assert search.best is search.candidates[0]
    # The lowest of three draws with replacement from 3.00, 3.02, 3.05 has these chances: 19/27, 7/27, 1/27.
    chance, losses = np.array([19, 7, 1]) / 27, np.array([3.00, 3.02, 3.05])
    assert search.noise == pytest.approx(math.sqrt(chance @ losses**2 - (chance @ losses) ** 2))


def test_the_finalists_seeds_decide_also_where_every_setting_is_a_finalist(doctor: Doctor) -> None:
    for key in [key for key in doctor.runs if key[0] == "adamw"]:
        del doctor.runs[key]
    for rate, losses in ((1e-3, (3.00, 3.10, 3.10)), (2e-3, (3.20, 3.05, 3.05))):
        for seed, final in zip((100, 101, 102), losses, strict=True):
            run = {"seed": seed, "final": final, "config": {"optimizer.lr": rate}}
            doctor.runs["adamw", "tuning", 100, (rate, seed)] = run
    doctor.study["tuning"]["finalists"] = {"settings": 2, "seeds": [101, 102]}
    doctor.write()
    search = next(one for one in tunings(load_study([doctor.directory])) if one.arm == "adamw")
    found = [(one.values["optimizer.lr"], round(one.loss, 6)) for one in search.candidates]
    assert found == [(2e-3, 3.05), (1e-3, 3.1)]


@pytest.mark.parametrize(("difference", "severity"), [(0.01, "serious"), (0.0, "note"), (0.2, None)])
def test_a_verdict_within_the_luck_of_the_searches_is_in_serious_doubt(
    doctor: Doctor, difference: float, severity: str | None
) -> None:
    """The lowest of three draws from 0, 0.05 and 0.05 has a standard deviation of 0.0228; of two arms, 0.0323."""
    doctor.study["tuning"]["method"] = "halton"
    for (arm, phase, *_), arguments in doctor.runs.items():
        if (arm, phase) == ("sophiag", "reporting"):
            arguments["final"] += difference - 0.01
    doctor.write()
    findings = analyse(load_study([doctor.directory])).findings
    found = [one for one in findings if one.title == "Differences within twice the noise of the searches"]
    assert [one.severity for one in found] == ([severity] if severity else [])
    assert all("against 0.032)" in one.detail for one in found)


def test_a_choice_between_single_runs_within_the_noise_is_noted_unless_further_seeds_decided(doctor: Doctor) -> None:
    doctor.runs["adamw", "tuning", 200, 2e-3]["final"] -= 0.049  # 0.001 above the best, where seeds differ by 0.002
    (finding,) = [one for one in doctor.write() if "single runs" in one.title]
    assert finding.severity == "note"
    assert finding.title.startswith("1 of 4 searches chose between single runs")
    for rate in RATES:
        first = doctor.runs["adamw", "tuning", 200, rate]
        doctor.runs["adamw", "tuning", 200, f"again {rate}"] = {**first, "seed": 101}
    shutil.rmtree(doctor.directory.with_name("runs"))
    assert not [one for one in doctor.write() if "single runs" in one.title]


def test_a_parabola_compares_rates_on_the_seeds_that_they_share(doctor: Doctor) -> None:
    """The best setting ran again on a further seed, which is an easier one; its neighbours did not."""
    leave_a_gap_in_the_learning_rates(doctor, "adamw")
    gains = []
    for further in ({}, {("adamw", "tuning", 200, 101): {"seed": 101, "final": 2.0, "config": {"optimizer.lr": 1e-3}}}):
        doctor.runs |= further
        shutil.rmtree(doctor.directory.with_name("runs"), ignore_errors=True)
        doctor.write()
        search = next(one for one in tunings(load_study([doctor.directory])) if one.horizon == 200)
        gains.append(predicted_gain(search, "optimizer.lr"))
    assert gains[0] == gains[1]
    assert gains[0]


def test_a_clock_finding_says_where_reference_times_come_from(doctor: Doctor) -> None:
    slow_the_machine_for_one_arm(doctor)
    (finding,) = doctor.write()
    assert finding.severity == "note"
    assert "took up to 8% longer" in finding.title
    assert "0.045 s (AdamW, tiny, 100 steps) to 0.0486 s (Sophia-G, tiny, 200 steps)" in finding.detail
    assert "`python scripts/study.py times` for this study" in finding.detail
    ReferenceTimes(source="idle", seconds={}).save(doctor.directory / "reference_times.json")
    (finding,) = inspect(load_study([doctor.directory]))
    assert "study.py times" not in finding.detail


def test_a_finding_counts_once_however_many_cells_it_concerns(doctor: Doctor) -> None:
    for horizon in (100, 200):
        doctor.runs["sophiag", "reporting", horizon, 3]["missing"] = True
        doctor.runs["adamw", "reporting", horizon, 3]["missing"] = True
    (finding,) = doctor.write()
    assert finding.title == "Planned seeds have not ended: AdamW 2, Sophia-G 2"
    assert "Sophia-G, tiny, 200 steps: seed 3 missing" in finding.detail


def test_a_cell_under_way_puts_no_verdict_in_doubt_that_does_not_use_it(doctor: Doctor) -> None:
    doctor.runs["sophiag", "reporting", 200, 3]["missing"] = True
    assert [one for one in doctor.write() if one.guard == "seeds"] == []
    verdict = analyse(load_study([doctor.directory])).verdict("sophiag", "tiny")
    assert verdict.at is not None
    assert verdict.at.endpoints.horizon == 100


def test_an_ablation_under_way_puts_no_verdict_in_doubt(doctor: Doctor) -> None:
    doctor.study["ablations"] = {"sophiag_k1": {"of": "sophiag", "overrides": ["optimizer.hessian_interval=1"]}}
    for seed in (1, 2):
        doctor.runs["sophiag_k1", "reporting", 200, seed] = {
            "optimizer": "sophiag",
            "config": {"optimizer.lr": 1e-3, "optimizer.hessian_interval": 1},
            "missing": seed == 2,
        }
    assert [one for one in doctor.write() if one.guard == "seeds"] == []


def test_a_diverged_ablation_does_not_put_a_verdict_in_doubt(doctor: Doctor) -> None:
    doctor.study["ablations"] = {"sophiag_k1": {"of": "sophiag", "overrides": ["optimizer.hessian_interval=1"]}}
    doctor.runs["sophiag_k1", "reporting", 200, 1] = {
        "status": "diverged",
        "optimizer": "sophiag",
        "config": {"optimizer.lr": 1e-3, "optimizer.hessian_interval": 1},
    }
    (finding,) = doctor.write()
    assert (finding.severity, finding.title) == ("note", "Runs of ablations diverged: sophiag_k1 1 of 1")


def test_a_baseline_off_the_power_law_is_reported(doctor: Doctor) -> None:
    for horizon, wave in ((50, 0.4), (100, -0.4), (200, 0.4), (400, -0.4)):
        for seed in (1, 2, 3):
            loss = power_law(horizon * 1024) + wave + noise(seed, horizon, scale=0.002)
            doctor.runs["adamw", "reporting", horizon, seed] = {"final": loss, "config": {"optimizer.lr": 1e-3}}
    doctor.write()
    (finding,) = [one for one in analyse(load_study([doctor.directory])).findings if one.guard == "curve"]
    assert finding.title == "tiny: no ratios, only differences of loss"
    assert finding.detail.startswith("The curve does not recognise the baseline: it finds it ")


def test_a_baseline_that_always_diverged_gives_no_verdict_and_is_the_first_finding(doctor: Doctor) -> None:
    for horizon in (100, 200):
        doctor.runs["adamw", "reporting", horizon, 2]["status"] = "diverged"
    doctor.write()
    results = analyse(load_study([doctor.directory]))
    assert list(results.verdicts) == []
    assert results.findings[0].guard == "baseline"
    assert "diverged at every horizon" in results.findings[0].detail


def test_bare_runs_that_failed_are_told(tmp_path: Path) -> None:
    for arm, seed, status in (
        ("adamw", 1, "completed"),
        ("adamw", 2, "completed"),
        ("lion", 1, "completed"),
        ("lion", 2, "failed"),
    ):
        write_run(tmp_path / f"{arm}{seed}", optimizer=arm, seed=seed, steps=4, status=status, train_lines=False)
    found = [finding for finding in inspect(load_study([tmp_path])) if finding.guard == "seeds"]
    assert [(one.severity, one.title) for one in found] == [
        ("serious", "Runs have not ended: Lion 1"),
        ("note", "Cells have different numbers of seeds"),
    ]
    assert "seed 2 failed" in found[0].detail


def test_bare_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run", train_lines=False)
    write_run(tmp_path / "b" / "run", optimizer="lion", config={"train.global_batch_size": 7}, train_lines=False)
    (found,) = [finding for finding in inspect(load_study([tmp_path])) if finding.guard == "fairness"]
    assert f"7 in {tmp_path / 'b' / 'run'}" in found.detail


def test_an_arm_whose_search_is_under_way_was_not_tuned_less(doctor: Doctor) -> None:
    doctor.runs["sophiag", "tuning", 200, RATES[0]]["missing"] = True
    assert [finding.guard for finding in doctor.write() if finding.guard == "budget"] == []


def test_serious_findings_about_the_baseline_come_first_and_notes_last(doctor: Doctor) -> None:
    in_one_run("environment", "git.commit", "f")(doctor)
    lose_a_seed(doctor)
    report_other_than_the_best(doctor, "sophiag")
    move_the_baselines_optimum_to_an_edge(doctor)
    clip_the_gradient_in_half_of_the_steps(doctor, "adamw")
    findings = doctor.write()
    assert [finding.guard for finding in findings] == ["edge", "seeds", "tuning", "clipping", "code"]
    weights = [finding.weight for finding in findings]
    assert weights == sorted(weights, reverse=True)


def test_what_changes_nothing_that_is_measured_is_no_difference(tmp_path: Path) -> None:
    incidental = {
        "output_dir": "elsewhere",
        "tracker.name": "wandb",
        "launcher.nproc_per_node": 4,
        "checkpoint.interval": 7,
        "data.directory": "/scratch",
        "data.local": "/disk",
    }
    paths = [write_run(tmp_path / "a"), write_run(tmp_path / "b", optimizer="lion", config=incidental)]
    assert differences(load_runs(paths)) == []


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
