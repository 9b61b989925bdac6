"""scripts/plan.py as a user calls it."""

import json
from pathlib import Path

import pytest

from planning.plan import planned_shape
from scripts.plan import main
from training.compose import compose

ROOT = Path(__file__).resolve().parents[2]


def test_the_plan_of_a_sharded_run_stands_in_tables_and_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = [
        "model=gpt2_small",
        "strategy=fsdp",
        "cluster.gpus=64",
        "cluster.gpu=h100",
        "train.compile=false",
        "--optimizers=adamw,sophiag",
        "--json",
        str(path),
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("fsdp, bf16, 64 x h100", "curvature state (h)", "reduce-scatter of gradients", "hours", "fits"):
        assert words in shown
    written = json.loads(path.read_text())
    assert [one["optimizer"] for one in written["optimizers"]] == ["adamw", "sophiag"]
    assert written["config"]["train"]["global_batch_size"] == 512
    assert "cluster" not in written["config"]
    shape = planned_shape(compose(["model=gpt2_small"]))
    assert written["training_flops_per_step"] == shape.flops(1024).forward_backward(512 * 1024)
