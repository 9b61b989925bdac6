"""What a run's directory may hold, which process holds it, and what an interrupted replacement leaves."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from training.compose import compose
from training.config import ConfigurationError, RunHeldError
from training.reliability.run_directory import RunDirectory, is_run, refuse_links, refuse_to_replace

NEW = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints"}
CONFIG = compose(["model=gpt2_nano"]).model_dump(mode="json")


def make_run(directory: Path, marker: str = "old") -> Path:
    """Write a run's files, with a marker that identifies it."""
    (directory / "checkpoints" / "step-00000005").mkdir(parents=True)
    (directory / "checkpoints" / "superseded-step-00000009").mkdir()
    (directory / "checkpoints" / ".step-00000010.partial").mkdir()
    for folder, file in (
        ("stacks", "rank-00000.txt"),
        ("profile", "trace.json"),
        ("profile", ".trace.json.partial"),
        ("wandb/run-1", "run.wandb"),
    ):
        (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / folder / file).write_text(marker)
    (directory / "wandb" / "latest-run").symlink_to("run-1")
    for name in ("environment.json", "metrics.jsonl", "metrics.cut-1.jsonl", "summary.json", ".config.yaml.7.partial"):
        (directory / name).write_text(marker)
    (directory / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "name": marker}))
    (directory / ".lock").write_text("")
    return directory


def files(directory: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        if path.name != ".lock"
    }


def test_what_a_run_writes_may_be_replaced(tmp_path: Path) -> None:
    refuse_to_replace(make_run(tmp_path))


@pytest.mark.parametrize(
    "foreign",
    ["thesis.tex", ".git", "data/corpus.txt", "checkpoints/best.ckpt", "stacks/notes.txt", "profile/mine"],
)
def test_a_run_with_anything_else_in_it_is_not_replaced(foreign: str, tmp_path: Path) -> None:
    path = make_run(tmp_path) / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(ConfigurationError, match=f"overwrite=true: .* holds {foreign.removesuffix('/corpus.txt')}"):
        RunDirectory(tmp_path).set_aside()
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "content", ["theme: dark\n", "", "- model\n", "model: [", "{model: 1, data: 2, optimizer: 3, train: 4}", "\x00"]
)
def test_a_directory_whose_config_yaml_is_another_programs_is_not_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert not is_run(tmp_path)
    with pytest.raises(ConfigurationError, match=r"config\.yaml is not the configuration of a run"):
        RunDirectory(tmp_path).set_aside()
    assert files(tmp_path) == {"config.yaml": content.encode()}


class _Crash(BaseException):
    pass


def _replace(place: RunDirectory) -> None:
    """Replace a run up to the new one's first step, with the calls of training/run.py."""
    place.set_aside()
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        content = yaml.safe_dump({**CONFIG, "name": "new"}) if name == "config.yaml" else "new"
        (place.path / name).write_text(content)
    (place.path / "checkpoints").mkdir()
    place.delete_replaced()


@pytest.mark.slow
def test_a_replacement_killed_at_any_moment_leaves_the_old_run_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed at each change of the directory in turn, and again at each change of the recovery."""
    pristine = make_run(tmp_path / "pristine")
    old = files(pristine)
    left = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def change(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise _Crash
            return original(*arguments, **named)

        return change

    for owner, name in ((Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (Path, "rmdir"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    removed = shutil.rmtree

    def attempt(action: Callable[[], object], changes: int) -> bool:
        nonlocal left
        left = changes
        try:
            action()
        except _Crash:
            return False
        finally:
            left = 1 << 30
        return True

    ended, first = False, 0
    while not ended:
        for second in range(0, 40, 3):
            run = tmp_path / "run"
            removed(run, ignore_errors=True)
            left = 1 << 30
            shutil.copytree(pristine, run, symlinks=True)
            place = RunDirectory(run)
            ended = attempt(lambda place=place: _replace(place), first)
            while not attempt(place.restore, second):
                second += 1
            place.delete_replaced()
            found = files(run)
            assert (set(found) == NEW and found["metrics.jsonl"] == b"new") if ended else found == old
        first += 1
    assert first > 15


@pytest.mark.parametrize(
    "name",
    [".lock", "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "checkpoints/step-00000005", "stacks"],
)
def test_a_link_in_place_of_a_runs_file_is_refused_and_its_target_kept(name: str, tmp_path: Path) -> None:
    run, target = make_run(tmp_path / "run"), make_run(tmp_path / "target")
    before = files(target)
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target / name)
    with pytest.raises(ConfigurationError, match=f"{path} is a link to {target / name}"):
        refuse_links(run)
    if name == ".lock":
        with pytest.raises(OSError, match="symbolic link"):
            RunDirectory(run).take()
    assert files(target) == before


@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl"])
def test_a_pipe_in_place_of_a_runs_file_is_refused_without_opening_it(name: str, tmp_path: Path) -> None:
    (make_run(tmp_path) / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigurationError, match="neither a file nor a directory"):
        refuse_links(tmp_path)
    assert is_run(tmp_path) == (name != "config.yaml")


def test_a_users_own_links_next_to_a_run_are_ignored(tmp_path: Path) -> None:
    (make_run(tmp_path) / "notes").symlink_to(tmp_path)
    (tmp_path / "checkpoints" / "latest").symlink_to("step-00000005")
    refuse_links(tmp_path)


def test_a_deleted_lock_file_is_recreated_while_no_other_process_holds_the_directory(tmp_path: Path) -> None:
    with closing(RunDirectory(tmp_path)) as holder:
        holder.take()
        (tmp_path / ".lock").unlink()
        holder.confirm()
        with pytest.raises(RunHeldError, match=f"process {os.getpid()} on"):
            RunDirectory(tmp_path).take()


@pytest.mark.parametrize("locks", [True, False], ids=["lock deleted", "no locks"])
def test_of_two_processes_in_one_directory_the_first_learns_of_the_second(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with closing(RunDirectory(tmp_path)) as first, closing(RunDirectory(tmp_path)) as second:
        first.take()
        if locks:
            (tmp_path / ".lock").unlink()
        second.take()
        second.confirm()
        with pytest.raises(OSError, match=f"is being run by process {os.getpid()} on"):
            first.confirm()
        second.confirm()
