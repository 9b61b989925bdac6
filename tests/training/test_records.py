"""The run record: lines survive, are cut where a checkpoint says, and are strict JSON."""

import json
import resource
from pathlib import Path

import pytest

from training import records
from training.records import MetricsWriter, RecordError, RunRecord


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_resuming_cuts_at_the_checkpoint_and_keeps_the_rest_aside(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"kind": "train", "step": 1})
    size = writer.sync()
    writer.write({"kind": "train", "step": 2})
    writer.close()
    resumed = MetricsWriter(tmp_path, resume_at=size)
    resumed.write({"kind": "train", "step": 2, "again": True})
    resumed.close()
    assert lines(tmp_path) == [{"kind": "train", "step": 1}, {"kind": "train", "step": 2, "again": True}]
    assert json.loads((tmp_path / "metrics.cut-1.jsonl").read_text()) == {"kind": "train", "step": 2}


def test_a_record_shorter_than_its_checkpoint_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind":"train"}\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl has 17 bytes, the checkpoint was saved at 40"):
        MetricsWriter(tmp_path, resume_at=40)


@pytest.mark.parametrize("resume_at", [None, 0, 19])
def test_two_writers_never_write_one_record_and_the_first_learns_of_it(resume_at: int | None, tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    first.write({"kind": "a", "n": 1})
    first.write({"kind": "a", "n": 2})
    second = MetricsWriter(tmp_path, resume_at)
    first.write({"kind": "a", "n": 3})
    second.write({"kind": "b", "n": 4})
    second.write({"kind": "b", "n": 5})
    second.sync()
    with pytest.raises(OSError, match=r"metrics\.jsonl was replaced"):
        first.sync()
    lines = [(line["kind"], line["n"]) for line in RunRecord(tmp_path, {}, {}, None).metrics()]
    assert lines == [("a", 1)] * bool(resume_at) + [("b", 4), ("b", 5)]


def test_numbers_that_json_lacks_become_null() -> None:
    line = records.json_line({"loss": float("nan"), "nested": {"norm": float("inf")}, "list": [1.0, float("-inf")]})
    assert json.loads(line) == {"loss": None, "nested": {"norm": None}, "list": [1.0, None]}


def test_a_record_reads_back_and_leaves_out_an_unfinished_last_line(tmp_path: Path) -> None:
    records.write_config(tmp_path, {"name": "a", "seed": 1})
    (tmp_path / "metrics.jsonl").write_text('{"kind":"eval","step":0}\n{"kind":"train","step":1}\n{"kind":"tra')
    record = RunRecord.open(tmp_path)
    assert record.config == {"name": "a", "seed": 1}
    assert record.summary is None
    assert [line["step"] for line in record.metrics()] == [0, 1]
    assert [line["step"] for line in record.metrics("eval")] == [0]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    records.write_config(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text('{"kind":"eval"}\nnonsense\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl:2 is no JSON"):
        list(RunRecord.open(tmp_path).metrics())


def test_a_directory_without_a_record_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"config\.yaml is missing; give a run directory"):
        RunRecord.open(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    records.write_summary(tmp_path, {"status": "preempted"})
    monkeypatch.setattr(records.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        records.write_summary(tmp_path, {"status": "completed"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "preempted"}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("room", [0, 1, 10])
def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, room: int) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"kind": "train", "step": 1})
    size = writer.sync()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, hard))  # as a quota: a part of the line still fits
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: File too large"):
            writer.write({"kind": "train", "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines(tmp_path) == [{"kind": "train", "step": 1}]
    writer.write({"kind": "train", "step": 2})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert writer.sync() == writer.path.stat().st_size
