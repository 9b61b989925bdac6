"""A damaged checkpoint is never loaded silently, whichever of its bytes is damaged and however."""

from __future__ import annotations

from pathlib import Path

from tests.faults.corruptions import DAMAGES, STEPS, corrupt, write_checkpoints
from training.records import checkpoint_name
from training.reliability.checkpoints import Checkpoint, CheckpointError


def test_no_random_damage_is_loaded_silently_and_the_newest_whole_checkpoint_is_used(tmp_path: Path) -> None:
    found = corrupt(tmp_path, 25 * len(DAMAGES), seed=0)
    assert found["faults"] == []
    assert found["detected"] == found["corruptions"]
    assert all(not counted.startswith("0 ") for kind, counted in found["by_kind"].items() if kind != "extra")


def test_every_single_byte_of_a_checkpoint_is_guarded(tmp_path: Path) -> None:
    write_checkpoints(tmp_path)
    directory = tmp_path / checkpoint_name(STEPS[-1])
    loaded = []
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            try:
                Checkpoint(directory)
            except CheckpointError:
                continue
            loaded.append((path.name, place))
        path.write_bytes(content)
    assert loaded == []
    assert Checkpoint(directory).step == STEPS[-1]
