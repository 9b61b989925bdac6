"""W&B sweep files ask for the same search as the study does."""

from pathlib import Path
from typing import Any

import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from studies.spec import validate_spec
from studies.sweeps import sweep, write_sweeps
from tests.studies.small import small
from training.compose import compose


def first_arguments(written: dict[str, Any]) -> list[str]:
    """What `wandb agent` starts for the first value of every parameter, written by its own functions."""
    chosen = {"args": {key: {"value": space["values"][0]} for key, space in written["parameters"].items()}}
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
    assert written["metric"] == {"name": "val/loss", "goal": "minimize"}
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
        arm["search"] = {"optimizer.lr": {"low": 1e-4, "high": 1e-2}}
    written = sweep(validate_spec(values, "small.yaml"), "adamw", "gpt2_nano")
    assert written["method"] == "random"
    assert written["parameters"]["optimizer.lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
