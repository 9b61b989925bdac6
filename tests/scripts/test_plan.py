"""scripts/plan.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planning.plan import planned_shape
from scripts.plan import main
from training.compose import compose

ROOT = Path(__file__).resolve().parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "plan.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_plan_of_a_sharded_run_stands_in_tables_and_in_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = plan(
        "model=gpt2_small",
        "strategy=fsdp",
        "cluster.gpus=64",
        "cluster.gpu=h100",
        "train.compile=false",
        "--optimizers=adamw,sophiag",
        "--json",
        str(path),
    )
    assert done.returncode == 0, done.stderr
    for words in ("fsdp, bf16, 64 x h100", "curvature state (h)", "reduce-scatter of gradients", "hours", "fits"):
        assert words in done.stdout
    written = json.loads(path.read_text())
    assert [one["optimizer"] for one in written["optimizers"]] == ["adamw", "sophiag"]
    assert written["config"]["train"]["global_batch_size"] == 512
    assert "cluster" not in written["config"]
    shape = planned_shape(compose(["model=gpt2_small"]))
    assert written["training_flops_per_step"] == shape.flops(1024).forward_backward(512 * 1024)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("model=gpt2_hugh",), "unknown choice"),
        (("cluster.gpu=abacus",), "cluster.gpu=abacus"),
        (("train.stepz=3",), "did you mean train.steps"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
