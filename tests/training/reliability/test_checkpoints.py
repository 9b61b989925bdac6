"""Checkpoints: complete or absent, readable in any partition, never used when damaged."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unreadable import unreadable
from training.distributed import Distributed
from training.reliability import checkpoints
from training.reliability.checkpoints import Checkpoint, CheckpointError, RunState
from training.strategies.base import NumberPiece, Piece

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6)


STATE: dict[str, Any] = {
    "training": {"step": 5},
    "ledger": {"entries": {}, "bytes_communicated": 0},
    "metrics_bytes": 40,
    "config": {},
}


def saved(root: Path, step: int = 5, **state: Any) -> Path:
    halves = [
        Piece("model.w", (4, 6), 0, WEIGHT.reshape(-1)[:10]),
        Piece("model.w", (4, 6), 10, WEIGHT.reshape(-1)[10:]),
        Piece("optimizer.w.step", (), 0, torch.tensor([5.0])),
        Piece("optimizer.w.exp_avg", (4, 6), 0, WEIGHT.reshape(-1).to(torch.bfloat16)),
    ]
    return checkpoints.save(root, step, halves, {**STATE, **state}, ALONE)


@given(bounds=st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted))
@settings(max_examples=30, deadline=None)
def test_any_range_of_a_full_tensor_reads_the_same_whatever_its_pieces(tmp_path_factory, bounds: list[int]) -> None:
    checkpoint = Checkpoint(saved(tmp_path_factory.mktemp("checkpoint")))
    start, stop = bounds
    assert torch.equal(checkpoint.read("model.w", start, stop), WEIGHT.reshape(-1)[start:stop])


def test_shapes_types_and_state_come_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(saved(tmp_path))
    assert torch.equal(checkpoint.tensor("model.w"), WEIGHT)
    assert checkpoint.tensor("optimizer.w.step").shape == ()
    assert checkpoint.tensor("optimizer.w.exp_avg").dtype == torch.bfloat16
    assert checkpoint.state == RunState.model_validate(STATE)


def test_a_missing_part_of_a_tensor_is_found(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, [Piece("model.w", (4, 6), 0, WEIGHT.reshape(-1)[:10])], STATE, ALONE)
    with pytest.raises(CheckpointError, match=r"model\.w has 10 elements"):
        Checkpoint(tmp_path / "step-00000001")


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "empty", "remove", "symlink", "fifo", "device", "directory", "terabyte", "deep"]
)
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(tmp_path: Path, file: str, damage: str) -> None:
    saved(tmp_path, 5)
    victim = saved(tmp_path, 10) / file
    content = victim.read_bytes()
    victim.unlink()
    match damage:
        case "flip":
            middle = len(content) // 2
            victim.write_bytes(content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :])
        case "truncate":
            victim.write_bytes(content[:-3])
        case "empty":
            victim.write_bytes(b"")
        case "fifo":
            os.mkfifo(victim)
        case "device":
            victim.symlink_to("/dev/zero")
        case "directory":
            victim.mkdir()
        case "terabyte":
            victim.touch()
            os.truncate(victim, 1 << 40)
        case "deep":
            victim.write_text("[" * 100_000)
        case "symlink":
            elsewhere = tmp_path / "elsewhere"
            elsewhere.write_bytes(content)
            victim.symlink_to(elsewhere)
    newest, rejected = checkpoints.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert len(rejected) == 1
    assert "step-00000010" in rejected[0]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("place", ["", "rank-00000.safetensors", "manifest.json"])
def test_a_checkpoint_that_cannot_be_read_is_skipped(
    tmp_path: Path, place: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 5)
    victim = saved(tmp_path, 10) / place
    unreadable(monkeypatch, victim, number)
    newest, (reason,) = checkpoints.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert str(victim) in reason
    assert f"cannot be read: {os.strerror(number)}" in reason


def test_a_checkpoint_whose_directory_cannot_be_accessed_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 5)
    victim = saved(tmp_path, 10)
    stat = os.stat

    def broken(path: Any, **named: Any) -> os.stat_result:
        if isinstance(path, (str, Path)) and str(path).startswith(str(victim)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **named)

    monkeypatch.setattr(os, "stat", broken)
    newest, (reason,) = checkpoints.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert "Input/output error" in reason


def test_checkpoints_that_cannot_be_listed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 5)
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match=rf"{tmp_path} cannot be read: Permission denied"):
        checkpoints.newest_valid(tmp_path)


def test_numbers_come_back_exactly_and_with_their_type(tmp_path: Path) -> None:
    numbers = {"a": 5, "b": 5.0, "c": True, "d": None, "e": 0.1 + 0.2, "f": 1 << 80, "g": float("inf")}
    pieces = [NumberPiece(f"optimizer.w.{key}", value) for key, value in numbers.items()]
    checkpoints.save(tmp_path, 1, pieces, STATE, ALONE)
    found = Checkpoint(tmp_path / "step-00000001").numbers()
    assert found == {f"optimizer.w.{key}": value for key, value in numbers.items()}
    assert [type(value) for value in found.values()] == [type(value) for value in numbers.values()]


def forged(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and update its hash, as an attacker would."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    path.write_text(checkpoints.manifest_text(manifest))


def outside(manifest: dict[str, Any]) -> None:
    manifest["files"]["../rank-00000.safetensors"] = manifest["files"].pop("rank-00000.safetensors")


def absolute(manifest: dict[str, Any]) -> None:
    manifest["files"]["/etc/passwd"] = manifest["files"].pop("rank-00000.safetensors")


def piece_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["files"]["rank-00000.safetensors"]["pieces"][0]


def nested(depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(depth):
        values = {"a": values}
    return values


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a file outside": (outside, "not a plain file of this checkpoint"),
    "an absolute path": (absolute, "not a plain file of this checkpoint"),
    "a huge tensor": (lambda m: piece_of(m).update(shape=[1 << 40, 1 << 20], count=1 << 60), "its manifest says"),
    "a huge shape": (lambda m: piece_of(m).update(shape=[1 << 40, 1 << 20]), "two descriptions"),
    "a negative start": (lambda m: piece_of(m).update(start=-4), "pieces.0.start"),
    "another type": (lambda m: piece_of(m).update(dtype="int32"), "its manifest says int32"),
    "no type": (lambda m: piece_of(m).update(dtype="object"), "pieces.0: .*'object' is not a dtype"),
    "a shape that is no list": (lambda m: piece_of(m).update(shape="ab"), "damaged: .*pieces.0.shape"),
    "a count that is no number": (lambda m: piece_of(m).update(count="many"), "damaged"),
    "overlapping pieces": (lambda m: piece_of(m).update(name="optimizer.w.exp_avg"), "holds other tensors"),
    "another step": (lambda m: m.update(step=6), "of step 6, but its directory is named"),
    "no state": (lambda m: m.update(state=None), "damaged: state"),
    "another format": (lambda m: m.update(format="pickle"), "'pickle' is not"),
    "no files": (lambda m: m.pop("files"), "damaged: files"),
    "no size": (lambda m: m["files"]["rank-00000.safetensors"].pop("bytes"), "damaged: files.*bytes"),
    "a number that is a list": (
        lambda m: m["files"]["rank-00000.safetensors"].update(numbers={"optimizer.w.k": [1]}),
        "damaged: files.*numbers",
    ),
    "a negative step": (lambda m: m.update(step=-1), "damaged: step"),
    **{f"no {key}": (lambda m, key=key: m["state"].pop(key), f"damaged: state.{key}") for key in STATE},
    **{f"{key} a text": (lambda m, key=key: m["state"].update({key: "x"}), f"damaged: state.{key}") for key in STATE},
    "good a list": (lambda m: m["state"].update(good=[]), "damaged: state.good"),
    "a ledger of unknown kind": (
        lambda m: m["state"]["ledger"]["entries"].update(coffee={"seconds": 1.0}),
        "damaged: state.ledger.entries.coffee",
    ),
    "spikes without a mean": (lambda m: m["state"]["training"].update(spikes={"seen": 1}), "damaged: state.mean"),
    "an alarm that is empty": (lambda m: m["state"]["training"].update(alarm={}), "damaged: state.zero_since"),
    "deep": (lambda m: m["state"].update(config=nested(400)), "nested more than"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_refused(tmp_path: Path, forgery: str) -> None:
    change, message = FORGERIES[forgery]
    directory = saved(tmp_path)
    forged(directory, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(directory)


def test_an_unfinished_save_is_not_a_checkpoint_and_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    leftover = tmp_path / ".step-00000006.partial"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints.available(tmp_path)] == ["step-00000005"]
    checkpoints.prune(tmp_path, keep=1)
    assert not leftover.exists()


def steps(root: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.available(root)]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 20):
        saved(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [20, 3]


def test_pruning_keeps_multiples_and_the_best(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: 1.5, 30: 1.0, 40: None, 50: 2.0, 60: 2.5}
    for step, loss in losses.items():
        saved(tmp_path, step, val_loss=loss)
        checkpoints.prune(tmp_path, keep=1, keep_every=20, keep_best=True)
    assert steps(tmp_path) == [60, 50, 40, 30, 20]  # 50: the newest that is not kept anyway


@given(
    losses=st.lists(st.none() | st.floats(0, 9), min_size=1, max_size=6),
    good=st.lists(st.booleans(), min_size=6, max_size=6),
    damaged=st.sets(st.integers(1, 6)),
    keep=st.integers(1, 3),
    keep_every=st.none() | st.integers(1, 3),
    keep_best=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_pruning_never_deletes_the_newest_usable_checkpoint(
    tmp_path_factory, losses: list, good: list, damaged: set, keep: int, keep_every: int | None, keep_best: bool
) -> None:
    root = tmp_path_factory.mktemp("pruned")
    for step, loss in enumerate(losses, start=1):
        directory = saved(root, step, val_loss=loss, good=good[step - 1])
        if step in damaged:
            (directory / "rank-00000.safetensors").write_bytes(b"")
    before, _ = checkpoints.newest_valid(root)
    best = [step for step in steps(root) if step not in damaged and good[step - 1]]
    checkpoints.prune(root, keep, keep_every, keep_best=keep_best)
    after, _ = checkpoints.newest_valid(root)
    assert (after and after.step) == (before and before.step)
    assert set(best[:keep]) <= set(steps(root))


@pytest.mark.parametrize("reading", ["read_regular", "open_regular"])  # the manifest, a rank's file
def test_pruning_keeps_what_cannot_be_read_now(reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        saved(tmp_path, step, val_loss=loss)
    read = getattr(checkpoints, reading)

    def too_many_files(path: Path, *arguments: Any) -> Any:
        if "step-00000001" in str(path):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return read(path, *arguments)

    monkeypatch.setattr(checkpoints, reading, too_many_files)
    checkpoints.prune(tmp_path, keep=1, keep_best=True)
    assert 1 in steps(tmp_path)


def test_a_checkpoint_of_skipped_steps_does_not_push_out_the_last_good_one(tmp_path: Path) -> None:
    for step, good in {1: True, 2: False, 3: False}.items():
        saved(tmp_path, step, good=good)
        checkpoints.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [3, 1]


def test_a_deletion_that_was_interrupted_leaves_no_half_of_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        saved(tmp_path, step)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # killed before anything is deleted
    checkpoints.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2]
    monkeypatch.undo()
    checkpoints.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_content_is_flushed_before_the_rename_and_the_directory_after_it(tmp_path: Path, monkeypatch) -> None:
    """The machine may crash at any moment: once a checkpoint has its name, its content must be on disk."""
    done: list[tuple[str, str]] = []
    sync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        done.append(("synced", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def moved(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def move(path: Path, target: Path) -> Path:
            done.append(("named", target.name))
            return original(path, target)

        return move

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved(replace))
    monkeypatch.setattr(Path, "rename", moved(rename))
    saved(tmp_path, 5)
    partial, manifest = ".step-00000005.partial", f".manifest.json.{os.getpid()}.partial"
    assert done == [
        ("synced", "rank-00000.safetensors"),
        ("synced", manifest),
        ("named", "manifest.json"),
        ("synced", partial),
        ("synced", partial),
        ("named", "step-00000005"),
        ("synced", tmp_path.name),
    ]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_checkpoint_has_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        checkpoint = saved(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in checkpoint.iterdir()}
    assert modes == dict.fromkeys(("manifest.json", "rank-00000.safetensors"), 0o666 & ~umask)


def test_a_save_reports_progress_for_each_tensor_and_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_HASHED_BYTES", 100)
    pieces = [Piece(f"model.{name}", (4, 6), 0, WEIGHT.reshape(-1).clone()) for name in "ab"]
    done: list[str] = []
    final = checkpoints.save(tmp_path, 5, pieces, STATE, ALONE, done.append)
    path = tmp_path / ".step-00000005.partial" / "rank-00000.safetensors"
    blocks = -(-(final / path.name).stat().st_size // 100)
    assert done == [
        *("saving model.a", "saving model.b", f"writing {path}", f"flushing {path}"),
        *[f"hashing {path}"] * blocks,
    ]
    Checkpoint(final)  # the hash is the whole file's


def test_saving_a_step_again_leaves_it_without_a_checkpoint_only_between_two_renames(
    tmp_path: Path, monkeypatch
) -> None:
    saved(tmp_path, 5, val_loss=1.0)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)  # killed before anything is deleted
    final = saved(tmp_path, 5, val_loss=2.0)
    assert Checkpoint(final).state.val_loss == 2.0
    monkeypatch.undo()
    checkpoints.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_failed_write_raises_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch) -> None:
    saved(tmp_path, 5)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoints.newest_valid(tmp_path)[0] is not None
