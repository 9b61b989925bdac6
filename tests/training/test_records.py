"""The run record: lines survive, are cut where a checkpoint says, and are strict JSON."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unreadable import unreadable
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
    with pytest.raises(RecordError, match=r"metrics\.jsonl has 17 bytes, but the checkpoint was saved at 40"):
        MetricsWriter(tmp_path, resume_at=40)


@pytest.mark.parametrize("resume_at", [None, 0, 22])
def test_two_writers_never_write_one_record_and_the_first_learns_of_it(resume_at: int | None, tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    first.write({"kind": "a", "step": 1})
    first.write({"kind": "a", "step": 2})
    second = MetricsWriter(tmp_path, resume_at)
    first.write({"kind": "a", "step": 3})
    second.write({"kind": "b", "step": 4})
    second.write({"kind": "b", "step": 5})
    second.sync()
    with pytest.raises(OSError, match=r"metrics\.jsonl was replaced"):
        first.sync()
    lines = [(line["kind"], line["step"]) for line in RunRecord(tmp_path, {}, {}, None).metrics()]
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


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


#: Each done to a file of a record, and a part of the error.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (fifo, "a FIFO or a device"),
    "a device": (device, "a FIFO or a device"),
    "a directory": (directory, "a directory"),
    "a terabyte": (lambda path: os.truncate(path, 1 << 40), "the limit is"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"kind": "\xff\xfe", "step": 1}\n'), "."),
    "nothing but depth": (lambda path: path.write_text("[" * 100_000 + "\n"), "."),
    "deep and whole": (lambda path: path.write_text('{"a":' * 999 + "1" + "}" * 999 + "\n"), "."),
    "a list": (lambda path: path.write_text("[1, 2]\n"), "."),
    "a number": (lambda path: path.write_text("5\n"), "."),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "summary.json", "metrics.jsonl"])
def test_a_file_of_a_record_that_is_no_such_file_is_named_at_once(tmp_path: Path, name: str, damage: str) -> None:
    records.write_config(tmp_path, {"name": "a"})
    records.write_environment(tmp_path, {"world_size": 1})
    records.write_summary(tmp_path, {"status": "completed"})
    (tmp_path / "metrics.jsonl").write_text('{"kind":"eval","step":0}\n')
    act, message = DAMAGES[damage]
    act(tmp_path / name)
    with pytest.raises(RecordError, match=message) as caught:
        list(RunRecord.open(tmp_path).metrics())
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


# Each a list of the one before, nine times.
ALIASES = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))])


@pytest.mark.parametrize(
    "content",
    [
        *("", "- a\n", "a: &x [*x]\n", "[" * 5000, "!!timestamp now", "!!int ''", "!!bool maybe", "{[a]: 1}", "\0"),
        ALIASES,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_configuration_that_is_no_plain_mapping_is_named_at_once(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RecordError, match=rf"{tmp_path}/config.yaml cannot be read: ") as caught:
        RunRecord.open(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "key"),
    [
        ("summary.json", {}, "status"),
        ("summary.json", {"status": "fine"}, "status"),
        ("summary.json", {"status": ["completed"]}, "status"),
        ("summary.json", {"status": "completed", "final_val_loss": "3.1"}, "final_val_loss"),
        ("summary.json", {"status": "failed", "ledger": []}, "ledger"),
        ("summary.json", {"status": "failed", "ledger": {"data": {"seconds": 1.0}}}, "ledger.data"),
        ("environment.json", {"data_manifest_sha256": 5}, "data_manifest_sha256"),
        ("environment.json", {"world_size": "two"}, "world_size"),
        ("environment.json", {"git": None}, "git"),
    ],
)
def test_a_value_that_is_missing_or_of_another_type_is_named(tmp_path: Path, name: str, values: dict, key: str) -> None:
    records.write_config(tmp_path, {"name": "a"})
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(RecordError, match=rf"{tmp_path}/{name} is damaged: {key}"):
        RunRecord.open(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "summary.json"])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write_config(tmp_path, {"name": "a"})
    for other in ("environment.json", "summary.json"):
        (tmp_path / other).write_text('{"status": "completed"}')
    unreadable(monkeypatch, tmp_path / name, number)
    with pytest.raises(RecordError, match=rf"{tmp_path}/{name} cannot be read: {os.strerror(number)}"):
        RunRecord.open(tmp_path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    records.write_config(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text('{"kind":"eval","step":0}\nnonsense\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl:2 is not JSON"):
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
