"""A run starts in, resumes, or leaves alone the directory it finds, and never takes what is not its own."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.training.reliability.test_resume import kill_before_recording
from tests.training.runs import lines, run, run_in_child, summary, tiny
from training import records
from training.compose import compose
from training.config import ConfigurationError
from training.exits import EXIT_HELD
from training.records import write_config
from training.reliability.run_directory import RunDirectory


def message(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("overrides", [[], ["overwrite=true"], ["resume=never"]])
def test_a_directory_that_is_no_run_is_left_alone(
    overrides: list[str], corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "run" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    assert run(tiny(corpus, tmp_path, *overrides)) == 2
    assert "holds thesis.tex and no config.yaml" in message(capfd)
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("config", ["theme: dark\n", None], ids=["another program's", "a run's"])
def test_overwriting_deletes_only_what_a_run_wrote(
    config: str | None, corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "run"
    (home / ".git").mkdir(parents=True)
    (home / "thesis.tex").write_text("years of work")
    (home / "config.yaml").write_text(config or yaml.safe_dump(compose(tiny(corpus, tmp_path)).model_dump(mode="json")))
    assert run(tiny(corpus, tmp_path, "overwrite=true")) == 2
    assert ("not the configuration of a run" if config else "holds .git, thesis.tex, which no run") in message(capfd)
    assert {path.name for path in home.iterdir()} - {".lock"} == {".git", "config.yaml", "thesis.tex"}


def test_a_run_stays_in_its_output_directory(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "elsewhere")
    assert run(tiny(corpus, tmp_path / "runs")) == 2
    assert f"is a link to {tmp_path / 'elsewhere'}, outside output_dir=" in message(capfd)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.fixture(scope="module")
def finished(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    assert run(tiny(corpus, root, "train.steps=3")) == 0
    return root


@pytest.mark.parametrize(
    ("path", "mode", "overrides"),
    [
        ("", 0, []),
        ("", 0, ["name=new"]),
        ("", 0o555, ["name=new"]),
        ("run", 0, []),
        ("run", 0o333, []),
        ("run", 0o333, ["overwrite=true"]),
        ("run", 0o555, ["overwrite=true"]),
        ("run/checkpoints", 0, ["overwrite=true"]),
        ("run/config.yaml", 0, []),
        ("run/config.yaml", 0, ["overwrite=true"]),
        ("run/summary.json", 0, []),
        ("run/environment.json", 0, []),
        ("run/.lock", 0, []),
        ("run", 0, ["name=new", "train.steps=9", "resume={}/run"]),
        ("run/checkpoints", 0, ["name=new", "train.steps=9", "resume={}/run"]),
        ("run/checkpoints/step-00000003", 0, ["name=new", "train.steps=9", "resume={}/run/checkpoints/step-00000003"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value if isinstance(value, str) else oct(value),
)
def test_what_may_not_be_read_or_written_is_named_in_one_line(
    path: str,
    mode: int,
    overrides: list[str],
    finished: Path,
    corpus: list[str],
    tmp_path: Path,
    permissions_bind: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(finished, root)
    before = {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}
    normal = (root / path).stat().st_mode
    (root / path).chmod(mode)
    capfd.readouterr()
    command = tiny(corpus, root, "train.steps=3")
    command = [one for one in command if one.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    code = run([*command, *(override.format(root) for override in overrides)])
    (root / path).chmod(normal)
    assert code == 2
    assert f"{root / path}" in message(capfd)
    assert {file: file.read_bytes() for file in root.rglob("*") if file.is_file() and file.name != ".lock"} == {
        file: content for file, content in before.items() if file.name != ".lock"
    }


def test_an_empty_directory_is_taken(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert run(tiny(corpus, tmp_path, "train.steps=3")) == 0


def test_a_file_in_place_of_the_directory_is_named(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file")
    assert run(tiny(corpus, tmp_path)) == 2
    assert f"{tmp_path / 'run'} cannot be a run directory" in message(capfd)


def test_an_output_directory_that_cannot_be_written_is_named(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(tiny(corpus, tmp_path / "file" / "runs")) == 2
    assert "choose another output_dir=" in message(capfd)


def test_a_file_system_that_refuses_files_is_not_reported_as_full(
    corpus: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(corpus, Path("/proc/runs"))) == 2
    assert message(capfd) == (
        "error: output_dir=/proc/runs: /proc/runs cannot be written: /proc takes no new files; choose another output_dir="
    )


@pytest.mark.parametrize("content", ["[1, 2", "name: 5\n"])
def test_a_damaged_configuration_is_refused_and_kept(
    content: str, corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    config.write_text(content)
    assert run(tiny(corpus, tmp_path)) == 2
    assert f"{config} cannot be read" in message(capfd)
    assert config.read_text() == content


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_summary_is_named(
    content: str, finished: Path, corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "summary.json").write_text(content)
    assert run(tiny(corpus, tmp_path, "train.steps=3")) == 2
    assert "summary.json" in message(capfd)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "summary.json", "metrics.jsonl"])
def test_anything_but_a_file_in_place_of_a_record_is_named_without_hanging(
    name: str, make: Callable[[Path], object], corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny(corpus, tmp_path, "train.steps=3")
    config = compose(overrides)
    directory = tmp_path / "run"
    directory.mkdir()
    write_config(directory, config.model_dump(mode="json"))
    (directory / name).unlink(missing_ok=True)
    make(directory / name)
    assert run(overrides) == 2
    said = message(capfd)
    assert str(directory / name) in said


def test_a_run_does_not_start_over_if_its_checkpoints_cannot_be_listed(
    corpus: list[str], tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, kill_before_recording, 15) < 0
    record = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    listed = os.listdir

    def refusing(path):
        if str(path).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", refusing)
    assert run(overrides) == 2
    assert f"{tmp_path / 'run' / 'checkpoints'} cannot be used: Permission denied" in message(capfd)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == record


def test_a_record_that_was_changed_below_a_checkpoint_is_not_continued(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, kill_before_recording, 15) < 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    record = metrics.read_bytes()
    metrics.write_bytes(record.replace(b'"step":3', b'"step":7', 1))
    capfd.readouterr()
    assert run(overrides) == 2
    assert f"{metrics} has changed since this checkpoint" in message(capfd)
    metrics.write_bytes(record)
    assert run(overrides) == 0


def test_overwriting_removes_all_of_the_previous_run(corpus: list[str], tmp_path: Path) -> None:
    assert run(tiny(corpus, tmp_path, "tracker=tensorboard")) == 0
    assert run(tiny(corpus, tmp_path, "overwrite=true", "train.steps=3", "optimizer=adamw")) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
    }
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def kill_when_the_metrics_are_created() -> None:
    from training import records

    records.MetricsWriter = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_whose_replacement_was_killed_is_restored(
    finished: Path,
    corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before, after = tiny(corpus, tmp_path, "train.steps=3"), tiny(corpus, tmp_path, "train.steps=4", "overwrite=true")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    record = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run_in_child(after, kill_when_the_metrics_are_created) == -signal.SIGKILL
    capfd.readouterr()
    assert run(before) == 0
    assert "is already completed" in capfd.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == record
    assert run_in_child(after, kill_when_the_metrics_are_created) == -signal.SIGKILL
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun starts the killed one again
    assert run(after) == 0
    assert summary(tmp_path / "run")["steps"] == 4


def test_a_restart_before_the_first_checkpoint_starts_where_resume_says(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny(corpus, tmp_path, name="base")) == 0
    longer = ["train.steps=40", f"resume={tmp_path}/base", "checkpoint.interval=1000"]
    assert run_in_child(tiny(corpus, tmp_path, *longer), kill_before_recording, 30) < 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(tiny(corpus, tmp_path, *longer)) == 0
    assert f"resuming from {tmp_path}/base/checkpoints/step-00000024 at step 24" in capfd.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(25, 41))

    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert run(tiny(corpus, tmp_path, "train.steps=40")) == 0
    assert f"already completed for this configuration (it began with resume={tmp_path}/base)" in capfd.readouterr().out


def test_overwrite_counts_until_the_slurm_job_has_reached_the_run(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = tiny(corpus, tmp_path, "train.steps=4", "overwrite=true")
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert run(overrides) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the first start failed before it reached the run
    capfd.readouterr()
    assert run(overrides) == 0
    assert "already completed" not in capfd.readouterr().out
    assert run(overrides) == 0
    assert "already completed" in capfd.readouterr().out


def kill_of_job_7(step: int) -> None:
    os.environ["SLURM_JOB_ID"] = "7"  # a child has the environment of its fork server
    kill_before_recording(step)


def test_a_resumption_is_the_jobs_own_from_then_on(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job that was told to rewind rewinds once."""
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    assert run(tiny(corpus, tmp_path, "checkpoint.keep=9")) == 0
    (tmp_path / "run" / "summary.json").unlink()
    rewind = tiny(corpus, tmp_path, f"resume={tmp_path}/run/checkpoints/step-00000010", "checkpoint.keep=9")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_in_child(rewind, kill_of_job_7, 22) < 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(rewind) == 0
    assert [line["step"] for line in lines(tmp_path / "run", "event") if line["event"] == "resumed"] == [10, 20]


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2)])
def test_a_fault_at_the_start_that_may_pass_is_no_refusal(
    number: int, code: int, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(records, "write_config", fail)
    assert run(tiny(corpus, tmp_path)) == code


def test_a_run_that_began_with_anothers_checkpoint_begins_there_again_also_without_naming_it(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when a restart replaces a process that was told to rewind."""
    assert run(tiny(corpus, tmp_path, name="base")) == 0
    longer = ["train.steps=40", "checkpoint.interval=1000"]
    began = tiny(corpus, tmp_path, *longer, f"resume={tmp_path}/base")
    assert run_in_child(began, kill_before_recording, 30) < 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(tiny(corpus, tmp_path, *longer, f"resume={tmp_path}/run/checkpoints/step-00000030")) == 0
    assert f"resuming from {tmp_path}/base/checkpoints/step-00000024 at step 24" in capfd.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(25, 41))


def test_a_run_that_replaced_the_one_whose_checkpoint_it_started_from_starts_there_again(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Or says that the checkpoint is gone; never from the initial weights."""
    assert run(tiny(corpus, tmp_path)) == 0
    again = ["train.steps=40", "overwrite=true", f"resume={tmp_path}/run", "checkpoint.interval=1000"]
    assert run_in_child(tiny(corpus, tmp_path, *again), kill_before_recording, 30) < 0
    assert run(tiny(corpus, tmp_path, "train.steps=40", "checkpoint.interval=1000")) == 2
    assert f"resume={tmp_path}/run: no valid checkpoint" in capfd.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_keeps_its_lines_in_another_file(
    corpus: list[str], tmp_path: Path
) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, kill_before_recording, 7) < 0
    assert run(overrides) == 0
    aside = (tmp_path / "run" / "metrics.cut-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside if '"train"' in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 25))


@pytest.mark.parametrize("cut", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_a_run_killed_during_start_up_starts_again(cut: str, corpus: list[str], tmp_path: Path) -> None:
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, kill_before_recording, 1) < 0
    files = ["config.yaml", "environment.json", "metrics.jsonl"]
    for name in files[files.index(cut) :]:
        (tmp_path / "run" / name).unlink()
    if cut == "config.yaml":
        shutil.rmtree(tmp_path / "run" / "checkpoints")  # made after it
    assert run(overrides) == 0
    assert summary(tmp_path / "run")["status"] == "completed"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 1


# Two processes on one directory.


def wait_in_step(step: int, arrived: str, until: str | None = None, locks: bool = True) -> None:
    """Block in a step until a file exists, or forever."""
    from training import loop

    if not locks:
        fcntl.flock = no_locks

    original = loop.forward_backward

    def waiting(run, batch, *rest):
        if run.state.step == step - 1:
            Path(arrived).touch()
            wait_for(Path(until) if until else None)
        return original(run, batch, *rest)

    loop.forward_backward = waiting


def wait_for(path: Path | None) -> None:
    end = time.monotonic() + 60
    while not (path and path.exists()) and time.monotonic() < end:
        time.sleep(0.02)


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("locks", [True, False], ids=["lock deleted", "no locks"])
def test_of_two_processes_in_one_directory_the_first_ends_and_the_second_has_its_own_record(
    locks: bool, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.runs import _SERVER, _child

    overrides = tiny(corpus, tmp_path)
    arrived, done, errors = tmp_path / "arrived", tmp_path / "done", tmp_path / "errors"
    arguments = (13, str(arrived), str(done), locks)
    first = _SERVER.Process(target=_child, args=(overrides, wait_in_step, arguments, errors))
    first.start()
    try:
        wait_for(arrived)
        if locks:
            (tmp_path / "run" / ".lock").unlink()
        else:
            monkeypatch.setattr(fcntl, "flock", no_locks)
        assert run(overrides) == 0
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        done.touch()
        first.join(60)
        assert first.exitcode == 1
    finally:
        first.kill()
        first.join()
    said = errors.read_text()
    assert f"is being run by process {os.getpid()} on " in said
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 25))
    assert summary(tmp_path / "run")["status"] == "completed"


def test_a_directory_that_is_being_run_is_refused_and_not_touched(
    corpus: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.training.runs import _SERVER, _child

    overrides = tiny(corpus, tmp_path)
    arrived = tmp_path / "arrived"
    holder = _SERVER.Process(target=_child, args=(overrides, wait_in_step, (13, str(arrived)), None))
    holder.start()
    try:
        wait_for(arrived)
        record = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        for more in ([], ["overwrite=true"], [f"resume={tmp_path}/run/checkpoints/step-00000010"]):
            capfd.readouterr()
            assert run([*overrides, *more]) == EXIT_HELD
            assert f"is being run by process {holder.pid} on " in message(capfd)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == record
    finally:
        holder.kill()
        holder.join()
    assert run(overrides) == 0  # the lock went with the process


def test_the_lock_is_released_at_the_end_of_the_run_or_of_its_process(tmp_path: Path) -> None:
    lock = RunDirectory(tmp_path)
    lock.take()
    with pytest.raises(ConfigurationError, match=f"process {os.getpid()} on"):
        RunDirectory(tmp_path).take()
    lock.close()
    second = RunDirectory(tmp_path)
    second.take()
    second.close()


def _race(overrides: list[str], barrier, codes) -> None:
    from training.launching import command

    barrier.wait()
    codes.append(command.main(overrides))


def test_of_two_that_start_together_one_runs(corpus: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager:
        codes, barrier = manager.list(), manager.Barrier(2)
        overrides = tiny(corpus, tmp_path, "train.steps=60", "eval.interval=60")
        racers = [context.Process(target=_race, args=(overrides, barrier, codes)) for _ in range(2)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(120)
        assert sorted(codes) == [0, EXIT_HELD]
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 61))
    assert summary(tmp_path / "run")["status"] == "completed"
