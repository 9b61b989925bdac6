"""W&B sweep files describe the same search as the study."""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb import wandb_agent
from wandb.apis.public import sweeps as wandb_server
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from studies.spec import load_spec, validate_spec
from studies.sweeps import sweep, write_sweeps
from tests.studies.small import small
from tests.training.runs import prepare_corpus
from tests.training.wandb_files import wandb_records, wandb_values
from training.compose import compose

ROOT = Path(__file__).resolve().parents[2]
READY = ROOT / "scripts" / "sweeps"


def test_the_ready_sweep_files_are_those_of_the_papers_study(tmp_path: Path) -> None:
    """After a change: python scripts/study.py sweep study=paper_125m --sweeps scripts/sweeps"""
    written = write_sweeps(load_spec("paper_125m"), tmp_path)
    assert written
    assert sorted(path.name for path in READY.iterdir()) == sorted(path.name for path in written)
    for path in written:
        assert (READY / path.name).read_text() == path.read_text()


def first_arguments(written: dict[str, Any]) -> list[str]:
    """What `wandb agent` starts for the first value of every parameter, written by its own functions."""
    first = {
        key: space["values"][0] if "values" in space else space["min"] for key, space in written["parameters"].items()
    }
    chosen = {"args": {key: {"value": value} for key, value in first.items()}}
    arguments = create_sweep_command_args(chosen)["args_no_hyphens"]
    interpreter = ["${env}", "${interpreter}", "${program}"]
    command = create_sweep_command(written["command"])
    assert command[:3] == interpreter
    assert command[-1] == "${args_no_hyphens}"
    return [*command[3:-1], *arguments]


def test_a_sweep_has_the_studys_spaces_budget_and_metric(tmp_path: Path) -> None:
    spec = validate_spec(small(), "small.yaml")
    written = sweep(spec, "sophiag", "gpt2_nano")
    assert written["parameters"]["optimizer.lr"] == {"values": [5e-4, 1e-3, 2e-3]}
    assert written["parameters"]["optimizer.betas"] == {"values": ["[0.8,0.99]", "[0.9,0.99]", "[0.96,0.99]"]}
    assert written["run_cap"] == 6
    assert written["metric"] == {"name": "final_val_loss", "goal": "minimize"}
    assert written["method"] == "bayes"


def test_what_an_agent_starts_is_a_valid_run_at_the_tuning_horizon_and_seed(tmp_path: Path) -> None:
    spec = validate_spec(small(), "small.yaml")
    paths = write_sweeps(spec, tmp_path)
    assert [path.name for path in paths] == ["adamw-gpt2_nano.yaml", "sophiag-gpt2_nano.yaml"]
    for path in paths:
        config = compose(first_arguments(yaml.safe_load(path.read_text())))
        assert config.train.steps == 50
        assert config.seed == 100
        assert config.tracker.name == "wandb"


def test_ranges_become_distributions() -> None:
    values = small()
    values["tuning"]["method"] = "halton"
    for arm in values["arms"].values():
        arm["search"] = {
            "optimizer.lr": {"low": 1e-4, "high": 1e-2},
            "optimizer.betas[0]": {"low": 0.9, "high": 0.98, "scale": "linear"},
        }
    written = sweep(validate_spec(values, "small.yaml"), "adamw", "gpt2_nano")
    assert written["method"] == "random"
    assert written["parameters"]["optimizer.lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    betas = [f"[{first},0.95]" for first in (0.9, 0.92, 0.94, 0.96, 0.98)]
    assert written["parameters"]["optimizer.betas"] == {"values": betas}, "an element cannot be overridden by itself"


@pytest.mark.parametrize("study", ["smoke", "paper_125m"])  # values, ranges
def test_the_sweeps_of_a_study_are_what_wandb_takes(study: str, tmp_path: Path) -> None:
    """Keys and values of W&B's schema of sweeps, read by its own reader; and each first point is a valid run."""
    paths = write_sweeps(load_spec(study), tmp_path)
    assert paths
    for path in paths:
        written = load_sweep_config(str(path))
        assert written is not None
        assert set(written) == {"name", "program", "method", "metric", "run_cap", "parameters", "command"}
        assert written["method"] in ("grid", "random", "bayes")
        spaces = [set(space) for space in written["parameters"].values()]
        assert all(space in ({"values"}, {"distribution", "min", "max"}) for space in spaces)
        assert wandb_server._validate_config_and_fill_distribution(written) == written
        assert compose(first_arguments(written)).tracker.name == "wandb"


def test_an_agent_runs_a_sweeps_points_and_the_runs_have_its_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own agent with its server alone replaced: two points from the file, run by `python train.py`."""
    values = small()
    values["base"] = [*prepare_corpus(tmp_path), f"output_dir={tmp_path / 'runs'}"]
    values["base"] += ["train.global_batch_size=2", "train.sequence_length=16", "eval.interval=2", "eval.tokens=64"]
    values["base"] += ["train.compile=false"]
    values["models"] = {"gpt2_nano": {"horizons": [4], "tune_at": 4, "seeds": [1, 2, 3]}}
    values["ablations"] = {}
    written = load_sweep_config(str(write_sweeps(validate_spec(values, "small.yaml"), tmp_path / "sweeps")[0]))
    assert written is not None

    rates = written["parameters"]["optimizer.lr"]["values"][:2]
    betas = written["parameters"]["optimizer.betas"]["values"][0]
    points = [{"optimizer.lr": {"value": rate}, "optimizer.betas": {"value": betas}} for rate in rates]
    commands: list[dict[str, Any]] = [
        {"type": "run", "run_id": f"given{number}", "program": written["program"], "args": point}
        for number, point in enumerate(points)
    ]
    commands.append({"type": "exit"})

    def next_command(api: object, agent: str, metrics: object, running: dict[str, bool]) -> list[dict[str, Any]]:
        return [] if running else [commands.pop(0)]

    monkeypatch.setattr(wandb_server, "_sweep_with_runs", lambda *_: {"config": yaml.safe_dump(written)})
    monkeypatch.setattr(wandb_server, "_register_agent", lambda *_, **__: {"id": "agent"})
    monkeypatch.setattr(wandb_server, "_agent_heartbeat", next_command)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb, "teardown", lambda *_: None)
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.1)
    surroundings = {"WANDB_SWEEP_ID": "sweep1", "WANDB_PROJECT": "of-the-sweep", "WANDB_MODE": "offline"}
    surroundings |= {"WANDB_DIR": str(tmp_path), "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}
    surroundings |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    agent = wandb_agent.Agent(None, multiprocessing.Queue(), sweep_id="sweep1")
    agent.run()

    assert [response.get("exception") for _, response in agent._log] == [None] * 3
    assert (agent._finished, agent._failed) == (2, 0)
    found = {}
    for directory in (tmp_path / "runs").iterdir():
        (begun,) = [record.run for record in wandb_records(directory) if record.HasField("run")]
        assert (begun.sweep_id, begun.project) == ("sweep1", "of-the-sweep")
        config, shown = wandb_values(directory)
        recorded = json.loads((directory / "summary.json").read_text())
        assert shown[written["metric"]["name"]] == recorded["final_val_loss"]
        found[begun.run_id] = config["optimizer"]["lr"]
    assert found == {"given0": rates[0], "given1": rates[1]}
