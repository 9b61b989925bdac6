"""A small real study from one command to the report, killed once and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from scripts.study import main
from studies.expansion import expected_trials
from studies.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]


def tiny(directory: Path) -> Path:
    """Two arms, two horizons, two seeds; seconds in all."""
    study: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "study" / "smoke.yaml").read_text())
    study["name"] = "tiny"
    study["base"] = [one for one in study["base"] if not one.startswith("eval.")]
    study["base"] += ["eval.tokens=2048", "eval.interval=4", f"data.directory={directory / 'tokens'}"]
    study["models"]["gpt2_nano"] |= {"horizons": [8, 16], "tune_at": 8, "seeds": [1, 2]}
    study["tuning"] |= {"trials": 1, "follow": "at_once", "retune": None}
    study["ablations"]["sophiag_k1"] |= {"horizons": [16], "seeds": 1}
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


@pytest.mark.timeout(600)
def test_a_killed_study_resumes_and_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tiny(tmp_path)
    command = [sys.executable, "scripts/study.py", "run", f"study={study}"]
    command += ["--work", str(tmp_path / "runs"), "--records", str(tmp_path / "results")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = "runs/tiny/*/summary.json"

    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while len(list(tmp_path.glob(ended))) < 4:
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(ended)}
    assert len(before) < sum(expected_trials(load_spec(study)).values())

    assert main(command[2:]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not done again"
    trials = pd.read_csv(tmp_path / "results" / "tiny" / "trials.csv")
    assert {path.parent.name for path in before} <= {*trials[trials.status == "completed"].trial}
    results = json.loads((tmp_path / "results" / "tiny" / "report.json").read_text())
    assert [(one["arm"], one["paper_claim"]) for one in results["verdicts"]] == [("sophiag", "not tested")]
    assert {(one["arm"], one["horizon"]) for one in results["final_losses"]} == {
        ("adamw", 8),
        ("adamw", 16),
        ("sophiag", 8),
        ("sophiag", 16),
        ("sophiag_k1", 16),
    }
    assert all(len(one["seeds"]) == (1 if one["arm"] == "sophiag_k1" else 2) for one in results["final_losses"])
    assert (tmp_path / "results" / "tiny" / "report.html").stat().st_size > 1e6

    capsys.readouterr()
    assert main(["verify", *command[3:]]) == 0
    assert "2 runs match their records" in capsys.readouterr().err
    (lines,) = [json.loads((tmp_path / "results" / "tiny" / "verification.json").read_text())]
    assert {(one["arm"], one["steps"]) for one in lines} == {("adamw", 8), ("sophiag", 8)}
    assert all(one["lines"] >= 4 and one["difference"] < 1e-3 for one in lines)
