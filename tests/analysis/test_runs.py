"""Loading run records: complete, robust to a kill, fast and lean at scale."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from analysis.runs import RecordedRun, last_line, load_each, load_run, load_runs
from tests.analysis.synthetic import write_run
from training.records import RecordError, find_runs


def append(run: Path, *lines: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(lines)


def test_every_evaluation_is_kept_and_train_lines_become_bin_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("analysis.runs._TRAIN_POINTS", 20)
    run = load_run(write_run(tmp_path / "r", steps=200, evaluations=10))
    assert run.evaluations.steps.tolist() == [float(step) for step in range(0, 201, 20)]
    assert len(run.training) == 20
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    train = [line["loss"] for line in lines if line["kind"] == "train"]
    assert run.training["loss"][0] == pytest.approx(np.mean(train[:10]))
    assert run.training.steps[0] == 10
    assert run.clipped_norm_share == 0.1


def test_a_period_of_ten_does_not_bias_the_sample_of_train_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step after a curvature pass, one in ten, is told apart by its loss."""
    path = write_run(tmp_path / "r", steps=9000, evaluations=3)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["loss"] = 1.0 if line["step"] % 10 == 1 else 0.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("analysis.runs._TRAIN_POINTS", 10)
    run = load_run(path)
    assert float(run.training["loss"].mean()) == pytest.approx(0.1, abs=0.005)
    assert run.evaluations.steps.tolist() == [0, 3000, 6000, 9000]


def test_lines_that_begin_in_another_order_are_read_all_the_same(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", steps=20, evaluations=2)
    whole = load_run(path)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    reordered = [dict(reversed(line.items())) for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in reordered))
    again = load_run(path)
    np.testing.assert_array_equal(again.evaluations["val_loss"], whole.evaluations["val_loss"])
    np.testing.assert_array_equal(again.training["loss"], whole.training["loss"])


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=20)
    whole = load_run(run).evaluations
    append(run, '{"kind": "eval", "step": 21, "val_lo')
    np.testing.assert_array_equal(load_run(run).evaluations["val_loss"], whole["val_loss"])


def test_the_later_line_of_a_step_written_twice_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=20, evaluations=2)
    append(run, json.dumps({"kind": "eval", "step": 10, "tokens": 1, "flops": 1, "seconds": 1, "val_loss": 9.0}) + "\n")
    evaluations = load_run(run).evaluations
    assert evaluations.steps.tolist() == [0, 10, 20]
    assert evaluations["val_loss"][1] == 9.0


def test_losses_that_are_not_finite_are_read_as_nan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=20, evaluations=2)
    append(run, '{"kind": "eval", "step": 30, "tokens": 1, "flops": 1, "seconds": 1, "val_loss": NaN}\n')
    append(run, '{"kind": "eval", "step": 40, "tokens": 1, "flops": 1, "seconds": 1, "val_loss": null}\n')
    assert np.isnan(load_run(run).evaluations["val_loss"]).tolist() == [False, False, False, True, True]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=2, evaluations=1)
    count = len((run / "metrics.jsonl").read_text().splitlines())
    append(run, "garbage\n", '{"kind": "event", "step": 3}\n')
    with pytest.raises(RecordError, match=rf"metrics.jsonl:{count + 1} is not JSON"):
        load_run(run)


#: Done to a record of an AdamW run: the file that is damaged, and how.
DAMAGES = {
    "no JSON": ("metrics.jsonl", lambda path: append(path.parent, "garbage\n")),
    "a loss that is a text": (
        "metrics.jsonl",
        lambda path: append(path.parent, '{"kind": "eval", "step": 99, "val_loss": "low"}\n'),
    ),
    "a step that is a text": ("metrics.jsonl", lambda path: append(path.parent, '{"kind": "eval", "step": "1"}\n')),
    "no clock": (
        "metrics.jsonl",
        lambda path: append(path.parent, '{"kind": "eval", "step": 99, "tokens": 1, "flops": 1, "val_loss": 1.0}\n'),
    ),
    "an enormous step": (
        "metrics.jsonl",
        lambda path: append(path.parent, '{"kind": "eval", "step": 1%s}\n' % ("0" * 30)),
    ),
    "a list for a line": ("metrics.jsonl", lambda path: append(path.parent, "[1]\n")),
    "a FIFO of metrics": ("metrics.jsonl", lambda path: (path.unlink(), os.mkfifo(path))),
    "a terabyte of metrics": ("metrics.jsonl", lambda path: os.truncate(path, 1 << 40)),
    "an empty configuration": ("config.yaml", lambda path: path.write_text("")),
    "a configuration that is a list": ("config.yaml", lambda path: path.write_text("- a\n")),
    "a FIFO of a configuration": ("config.yaml", lambda path: (path.unlink(), os.mkfifo(path))),
    "a configuration without optimizer": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("optimizer:", "optimiser:")),
    ),
    "a horizon that is a text": (
        "config.yaml",
        lambda path: path.write_text(path.read_text().replace("  steps: 200", "  steps: many")),
    ),
    "a summary without status": ("summary.json", lambda path: path.write_text("{}")),
    "a hash that is a number": ("environment.json", lambda path: path.write_text('{"data_manifest_sha256": 5}')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_the_others_are_loaded(tmp_path: Path, damage: str) -> None:
    good, bad = (write_run(tmp_path / name, train_lines=False) for name in ("good", "bad"))
    name, act = DAMAGES[damage]
    act(bad / name)
    assert find_runs([tmp_path]) == [bad, good]
    error, run = load_each([bad, good])
    assert isinstance(run, RecordedRun)
    assert run.completed
    assert isinstance(error, RecordError)
    assert str(bad / name) in str(error)
    assert "\n" not in str(error)
    with pytest.raises(RecordError, match=str(bad / name)):
        load_runs([good, bad])


def test_a_run_that_has_not_ended_has_no_final_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    (run / "summary.json").unlink()
    loaded = load_run(run)
    assert loaded.status == "unfinished"
    assert np.isnan(loaded.final_val_loss)
    assert len(loaded.evaluations) > 0


def test_runs_are_found_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b" / "one", steps=2)
    write_run(tmp_path / "two", steps=2)
    (tmp_path / "three").mkdir()
    write_run(tmp_path / "two" / ".replaced", steps=2)  # overwrite=true was killed before its run began
    assert [path.name for path in find_runs([tmp_path])] == ["one", "two"]
    assert [path.name for path in find_runs([tmp_path / "two" / ".replaced"])] == [".replaced"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])


@pytest.mark.slow
def test_a_hundred_runs_of_ten_thousand_lines_load_at_the_rate_of_a_thousand_in_twenty_seconds(tmp_path: Path) -> None:
    first = write_run(tmp_path / "run0", optimizer="sophiag", steps=9_700, evaluations=100)
    assert len((first / "metrics.jsonl").read_text().splitlines()) >= 9_900
    for index in range(1, 100):
        copy = tmp_path / f"run{index}"
        copy.mkdir()
        for file in ("config.yaml", "environment.json", "summary.json"):
            shutil.copy(first / file, copy / file)
        (copy / "metrics.jsonl").hardlink_to(first / "metrics.jsonl")
    load_runs([first])  # imports and thread start-up are paid once, whatever the number of runs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    runs = load_runs(find_runs([tmp_path]))
    # On a machine that others use too the processor time is the steadier witness: two cores' worth in 20 s.
    assert min(time.perf_counter() - started, (time.process_time() - cpu) / 2) < 2.0
    assert len(runs) == 100
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 150e6, "all the metrics files together hold more than that"


def test_the_last_whole_line_of_a_kind_is_found_without_the_others() -> None:
    path = Path("metrics.jsonl")
    assert last_line(b"", path, "hessian") is None
    content = (
        b'{"kind": "hessian", "step": 1}\n{"kind":"hessian","step":2}\n{"kind": "train", "step": 3}\n{"kind":"hess'
    )
    assert last_line(content, path, "hessian") == {"kind": "hessian", "step": 2}
    assert last_line(content, path, "train") == {"kind": "train", "step": 3}
    assert last_line(content, path, "eval") is None
    with pytest.raises(RecordError, match=r"metrics.jsonl:2 is not JSON"):
        last_line(b'{"kind": "hessian", "step": 1}\n{"kind": "hessian", nothing\n', path, "hessian")
