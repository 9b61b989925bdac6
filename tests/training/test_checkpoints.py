"""Checkpoints: complete or absent, readable in any partition, never used when damaged."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import checkpoints
from training.checkpoints import Checkpoint, CheckpointError
from training.distributed import Distributed
from training.strategies.base import Piece

ALONE = Distributed(0, 0, 1, torch.device("cpu"))
WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6)


def saved(root: Path, step: int = 5) -> Path:
    halves = [
        Piece("model.w", (4, 6), 0, WEIGHT.reshape(-1)[:10]),
        Piece("model.w", (4, 6), 10, WEIGHT.reshape(-1)[10:]),
        Piece("optimizer.w.step", (), 0, torch.tensor([5.0])),
        Piece("optimizer.w.exp_avg", (4, 6), 0, WEIGHT.reshape(-1).to(torch.bfloat16)),
    ]
    return checkpoints.save(root, step, halves, {"training": {"step": step}}, ALONE)


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
    assert checkpoint.state == {"training": {"step": 5}}


def test_a_missing_part_of_a_tensor_is_found(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, [Piece("model.w", (4, 6), 0, WEIGHT.reshape(-1)[:10])], {}, ALONE)
    with pytest.raises(CheckpointError, match=r"model\.w has 10 elements"):
        Checkpoint(tmp_path / "step-00000001")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "symlink"])
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
        case "symlink":
            elsewhere = tmp_path / "elsewhere"
            elsewhere.write_bytes(content)
            victim.symlink_to(elsewhere)
    newest, rejected = checkpoints.newest_valid(tmp_path)
    assert newest is not None
    assert newest.step == 5
    assert len(rejected) == 1
    assert "step-00000010" in rejected[0]


def test_a_file_outside_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    manifest = json.loads((directory / "manifest.json").read_text())
    entry = manifest["files"].pop("rank-00000.safetensors")
    manifest["files"]["../rank-00000.safetensors"] = entry
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no plain file of this checkpoint"):
        Checkpoint(directory)


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    leftover = tmp_path / ".step-00000006.partial"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints.available(tmp_path)] == ["step-00000005"]
    checkpoints.prune(tmp_path, keep=1)
    assert not leftover.exists()


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 20):
        saved(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2)
    assert [path.name for path in checkpoints.available(tmp_path)] == ["step-00000020", "step-00000003"]


def test_a_failed_write_raises_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch) -> None:
    saved(tmp_path, 5)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoints.newest_valid(tmp_path)[0] is not None
