"""Killed and resumed: one curve, bit for bit, with every number of it written once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import before, curve, kill_self, lines, run, run_in_child, signal_self, summary, tiny
from tests.unreadable import unreadable
from training.reliability.checkpoints import Checkpoint, available

OPTIMIZERS = ["sophiag", "sophiah", "adamw", "lion", "muon", "signum", "adahessian"]


def kill_before_refresh(step: int) -> None:
    from training.curvature import CurvaturePass

    before(CurvaturePass, "run_within_training", kill_self, lambda *arguments: arguments[3] == step)


def kill_before_recording(step: int) -> None:
    from training.loop import Reporter

    before(Reporter, "step", kill_self, lambda _, at, *rest: at == step)


def kill_in_evaluation(step: int) -> None:
    from training import loop

    before(loop, "evaluate", kill_self, lambda run: run.state.step == step)


def kill_in_save(step: int, at: str) -> None:
    from training.reliability import checkpoints

    before(checkpoints, at, kill_self, lambda *arguments: f"step-{step:08d}" in str(arguments[0]))


def kill_after_save(step: int) -> None:
    from training.reliability import checkpoints

    before(checkpoints, "prune", kill_self, lambda root, *_, **__: (root / f"step-{step:08d}").exists())


KILLS: dict[
    str, tuple[Callable[..., None], tuple[Any, ...], int]
] = {  # and the step after which the next sitting starts
    "right before a refresh, which is the first thing after the resume": (kill_before_refresh, (11,), 10),
    "right before a refresh, steps after the checkpoint": (kill_before_refresh, (16,), 10),
    "between an update and its line": (kill_before_recording, (19,), 10),
    "in an evaluation": (kill_in_evaluation, (16,), 10),
    "in a save, before a file": (kill_in_save, (20, "_write_rank_file"), 10),
    "in a save, before the manifest": (kill_in_save, (20, "write_atomically"), 10),
    "in a save, before the rename": (kill_in_save, (20, "sync_directory"), 10),
    "after a save, before older checkpoints are deleted": (kill_after_save, (20,), 20),
    "before the first checkpoint": (kill_before_recording, (7,), 0),
}


@pytest.fixture(scope="module")
def finished(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of Sophia-G, to be read."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(tiny(corpus, directory)) == 0
    return directory / "run"


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> list[dict[str, Any]]:
    return curve(finished)


@pytest.fixture
def killed(corpus: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[str]]:
    """Makes tmp_path/run a run that was killed before it recorded this step, and returns its command line."""

    def of(step: int) -> list[str]:
        once = tmp_path_factory.getbasetemp() / f"killed-at-{step}"
        if not once.exists():
            assert run_in_child(tiny(corpus, once), kill_before_recording, step) == -signal.SIGKILL
        shutil.copytree(once / "run", tmp_path / "run")
        return tiny(corpus, tmp_path)

    return of


@pytest.mark.parametrize("kill", KILLS)
def test_a_run_killed_by_sigkill_has_the_same_curve_bit_for_bit(
    kill: str, corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    act, arguments, resumed_at = KILLS[kill]
    overrides = tiny(corpus, tmp_path)
    assert run_in_child(overrides, act, *arguments) == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed
    resumptions = [line["step"] for line in lines(tmp_path / "run", "event") if line["event"] == "resumed"]
    assert resumptions == ([resumed_at] if resumed_at else [])
    assert summary(tmp_path / "run")["status"] == "completed"


def cut(shard: Path) -> None:
    os.truncate(shard, 200)


def overwrite(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:128] + b"\xff" * (shard.stat().st_size - 128))


@pytest.mark.parametrize(
    ("shard", "damage", "said"),
    [
        ("train-00000.npy", cut, "cannot be read: the file ends before it"),
        ("train-00000.npy", overwrite, "is 65535, but the vocabulary has 300"),
        ("validation-00000.npy", cut, "cannot be read: the file ends before it"),
    ],
)
def test_a_shard_damaged_during_a_run_costs_no_step(
    shard: str,
    damage: Callable[[Path], None],
    said: str,
    corpus: list[str],
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from training import loop

    (directory,) = (Path(given.split("=")[1]) for given in corpus if given.startswith("data.directory="))
    shutil.copytree(directory, tmp_path / "tokens")
    overrides = tiny([*corpus, f"data.directory={tmp_path / 'tokens'}"], tmp_path)
    (path,) = (tmp_path / "tokens").rglob(shard)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", loop.forward_backward)
        before(loop, "forward_backward", lambda: damage(path), lambda run, *rest: run.state.step == 12)
        assert run(overrides) == 1
    ended = summary(tmp_path / "run")
    assert ended["status"] == "failed"
    assert ended["steps"] >= 13  # batches that were read ahead are used
    assert f"{shard}" in ended["reason"]
    assert said in ended["reason"]
    assert f"step-{ended['steps']:08d}" in capsys.readouterr().err.splitlines()[-1]
    path.write_bytes(whole)
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed
    assert [line["step"] for line in lines(tmp_path / "run", "event")] == [ended["steps"]]


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS if o != "sophiag"])
def test_every_optimizer_resumes_bit_for_bit(optimizer: str, corpus: list[str], tmp_path: Path) -> None:
    """Resumed after step 10, right before a refresh."""
    short = [f"optimizer={optimizer}", "train.steps=13", "eval.interval=13"]
    assert run(tiny(corpus, tmp_path, *short, name="undisturbed")) == 0
    overrides = tiny(corpus, tmp_path, *short)
    assert run_in_child(overrides, kill_before_recording, 12) == -signal.SIGKILL
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")


def test_a_run_with_dropout_resumes_with_the_same_masks(corpus: list[str], tmp_path: Path) -> None:
    overrides = ["model.dropout=0.2", "optimizer=adamw"]
    assert run(tiny(corpus, tmp_path, *overrides, name="undisturbed")) == 0
    killed = tiny(corpus, tmp_path, *overrides)
    assert run_in_child(killed, kill_before_recording, 16) == -signal.SIGKILL
    assert run(killed) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")


def test_totals_continue_after_an_interruption(
    killed: Callable[[int], list[str]], tmp_path: Path, finished: Path
) -> None:
    assert run(killed(16)) == 0
    got, expected = summary(tmp_path / "run"), summary(finished)
    for key in (
        "steps",
        "tokens",
        "flops",
        "final_val_loss",
        "best_val_loss",
        "bytes_communicated",
        "shared_forwards",
        "parameters",
    ):
        assert got[key] == expected[key], key
    of_run, of_undisturbed = (
        Checkpoint(available(one / "checkpoints")[0]).state.training for one in (tmp_path / "run", finished)
    )
    assert of_run == of_undisturbed
    assert of_run.spikes is not None
    assert of_run.alarm is not None
    for kind, entry in expected["ledger"].items():
        for key in ("tokens", "flops", "count"):
            # A save is counted when it is done, so a checkpoint does not count itself.
            if (kind, key) != ("checkpoint", "count"):
                assert got["ledger"][kind][key] == entry[key], (kind, key)
    seconds = [line["seconds"] for line in lines(tmp_path / "run", "train")]
    assert seconds == sorted(seconds)


def test_lines_after_the_checkpoint_are_moved_to_another_file(
    killed: Callable[[int], list[str]], tmp_path: Path
) -> None:
    overrides = killed(16)
    before_resume = lines(tmp_path / "run")
    assert run(overrides) == 0
    aside = [json.loads(line) for line in (tmp_path / "run" / "metrics.cut-1.jsonl").read_text().splitlines()]
    assert [line["step"] for line in aside if line["kind"] == "train"] == list(range(11, 16))
    assert before_resume == lines(tmp_path / "run")[: len(before_resume) - len(aside)] + aside


@pytest.mark.parametrize("damage", ["flip", "unreadable"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    damage: str,
    killed: Callable[[int], list[str]],
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = killed(23)
    victim = tmp_path / "run" / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    if damage == "flip":
        content = victim.read_bytes()
        victim.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        unreadable(monkeypatch, victim, errno.EIO)
    assert run(overrides) == 0
    assert f"checkpoint skipped: {victim}" in capfd.readouterr().err
    assert curve(tmp_path / "run") == undisturbed
    assert (tmp_path / "run" / "checkpoints" / "superseded-step-00000020").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_start_over(
    killed: Callable[[int], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = killed(16)
    manifest = tmp_path / "run" / "checkpoints" / "step-00000010" / "manifest.json"
    manifest.write_text("{}")
    record = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run(overrides) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert str(manifest) in message
    assert "overwrite=true" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == record


def test_a_record_that_lost_lines_falls_back_to_a_checkpoint_that_it_still_covers(
    killed: Callable[[int], list[str]], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    overrides = killed(23)
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 12]
    metrics.write_text("".join(kept))
    assert run(overrides) == 0
    assert curve(tmp_path / "run") == undisturbed


def test_a_run_resumes_with_another_micro_batch_tracker_and_checkpoint_interval(
    killed: Callable[[int], list[str]], tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    others = ["train.micro_batch_size=2", "tracker=tensorboard", "checkpoint.interval=7", "strategy=single"]
    given = {other.partition("=")[0] for other in others}
    assert run([*(one for one in killed(16) if one.partition("=")[0] not in given), *others]) == 0
    got = [line["loss"] for line in curve(tmp_path / "run") if line["kind"] == "train"]
    expected = [line["loss"] for line in undisturbed if line["kind"] == "train"]
    assert got[:10] == expected[:10]
    assert got == pytest.approx(expected, abs=1e-5)


def test_other_tokens_under_the_same_configuration_are_refused_on_resume(
    killed: Callable[[int], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = killed(16)
    environment = tmp_path / "run" / "environment.json"
    values = json.loads(environment.read_text())
    values["data_manifest_sha256"] = "0" * 64
    environment.write_text(json.dumps(values))
    assert run(overrides) == 2
    assert "other tokens" in capfd.readouterr().err.splitlines()[-1]


def test_resume_from_another_run_starts_a_new_record(
    corpus: list[str], tmp_path: Path, undisturbed: list[dict[str, Any]], finished: Path
) -> None:
    source = finished / "checkpoints" / "step-00000020"
    overrides = tiny(corpus, tmp_path, f"resume={source}", "checkpoint.interval=2", name="second")
    assert run_in_child(overrides, kill_before_recording, 24) == -signal.SIGKILL
    assert run(overrides) == 0  # rerunning the command resumes from the run's own checkpoints
    events = [(line["event"], line["step"]) for line in lines(tmp_path / "second", "event")]
    assert events == [("resumed", 20), ("resumed", 22)]
    later = [line for line in undisturbed if line["step"] > 20]
    assert curve(tmp_path / "second") == later
    assert curve(finished) == undisturbed


def test_a_resumption_records_the_code_and_the_processor_that_have_changed(
    killed: Callable[[int], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = killed(16)
    stop_before(18, monkeypatch, overrides)
    (event,) = lines(tmp_path / "run", "event")
    assert event.keys() == {"kind", "event", "step", "world_size"}
    path = tmp_path / "run" / "environment.json"
    environment = json.loads(path.read_text())
    monkeypatch.setattr("training.hardware.git_state", lambda: {"commit": "c0ffee", "dirty": True})
    described = {**environment["hardware"], "cpu": "another", "threads": 64}
    monkeypatch.setattr("training.hardware.describe", lambda device: described)
    assert run(overrides) == 0
    event = lines(tmp_path / "run", "event")[-1]
    assert (event["step"], event["git"]) == (17, {"commit": "c0ffee", "dirty": True})
    assert event["hardware"] == {"cpu": "another", "gpu": None}
    assert json.loads(path.read_text()) == environment


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """Run the command; a signal stops it before this step."""
    from training import loop

    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", loop.forward_backward)
        before(
            loop, "forward_backward", lambda: signal_self(signal.SIGTERM), lambda run, *_: run.state.step == step - 2
        )
        assert run(overrides) == 75


def resumed(directory: Path) -> list[int]:
    return [line["step"] for line in lines(directory, "event") if line["event"] == "resumed"]


@pytest.mark.parametrize(
    ("order", "how", "instead"),
    [
        ("overwrite=true", "rerun the command without overwrite=true", "overwrite=false"),
        ("resume=never", "rerun the command with resume=auto", "resume=auto"),
    ],
)
def test_a_run_names_the_command_that_resumes_it(
    order: str,
    how: str,
    instead: str,
    corpus: list[str],
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The same command would start over, or be refused."""
    overrides = tiny(corpus, tmp_path, order, "optimizer=sophiag")
    stop_before(18, monkeypatch, overrides)
    said = capfd.readouterr().err
    assert f"to resume this run, {how}" in said
    assert f"{how} to resume" in said
    assert run([*overrides, instead]) == 0
    assert resumed(tmp_path / "run") == [17]
    assert curve(tmp_path / "run") == undisturbed
    assert "to resume this run" not in capfd.readouterr().err


def test_a_run_that_goes_back_to_its_own_checkpoint_is_resumed_by_auto(
    corpus: list[str],
    tmp_path: Path,
    finished: Path,
    undisturbed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000020"
    overrides = tiny(corpus, tmp_path, f"resume={checkpoint}", "checkpoint.keep=9")
    stop_before(23, monkeypatch, overrides)
    assert "rerun the command with resume=auto to resume" in capfd.readouterr().err
    assert run([*overrides, "resume=auto"]) == 0
    assert resumed(tmp_path / "run") == [20, 22]
    assert curve(tmp_path / "run") == undisturbed


def test_resume_names_a_run_directory_or_a_checkpoint(corpus: list[str], tmp_path: Path, finished: Path) -> None:
    assert run(tiny(corpus, tmp_path, f"resume={finished}", "train.steps=26", name="second")) == 0
    assert [line["step"] for line in lines(tmp_path / "second", "train")] == [25, 26]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=20"], "train.steps=20"),
        (["optimizer=adamw"], "optimizer"),
        (["model.n_layer=1", "model.n_embd=16", "train.steps=30"], "shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    overrides: list[str],
    expected: str,
    corpus: list[str],
    tmp_path: Path,
    finished: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    source = finished / "checkpoints" / "step-00000024"
    assert run(tiny(corpus, tmp_path, f"resume={source}", *overrides, name="second")) == 2
    message = capfd.readouterr().err.strip()
    assert message.startswith("error: ")
    assert expected in message
    assert "\n" not in message
    assert not (tmp_path / "second").exists()


def test_a_restarted_worker_resumes_whatever_the_command_said(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict[str, Any]]
) -> None:
    for override in ("overwrite=true", "resume=never"):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        overrides = tiny(corpus, tmp_path, override)
        assert run_in_child(overrides, kill_before_recording, 16) == -signal.SIGKILL
        monkeypatch.setitem(os.environ, "TORCHELASTIC_RESTART_COUNT", "1")  # what torchrun --max-restarts sets
        assert run(overrides) == 0
        monkeypatch.delitem(os.environ, "TORCHELASTIC_RESTART_COUNT")
        assert [line["step"] for line in lines(tmp_path / "run", "event")] == [10]
        assert curve(tmp_path / "run") == undisturbed
