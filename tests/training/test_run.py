"""Whole runs on a tiny corpus: what they record, what they refuse, and what must not change their curve."""

import errno
import gc
import signal
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import signal_self
from training import loop
from training import run as run_module
from training.compose import compose
from training.config import RunConfig
from training.distributed import Distributed
from training.exports import Exports
from training.recording.recorder import Recorder
from training.records import MetricsWriter, RunRecord
from training.reliability.signals import StopSignals
from training.reliability.watchdog import Watchdog
from training.run import Outcome, _collective_timeout, execute

Train = Callable[..., RunRecord]


def losses(record: RunRecord) -> list[float]:
    return [line["loss"] for line in record.metrics("train")]


def validation(record: RunRecord) -> list[float]:
    return [line["val_loss"] for line in record.metrics("eval")]


RATES = {
    "lion": 1e-3,
    "muon": 3e-3,
    "signum": 1e-3,
    "adahessian": 1e-3,
}


@pytest.mark.parametrize("arm", RATES)
def test_every_optimizer_trains(train: Train, arm: str) -> None:
    record = train(arm, f"optimizer={arm}", f"optimizer.lr={RATES[arm]}")
    assert not any("unclipped_fraction" in line for line in record.metrics("train"))
    assert record.summary is not None
    assert record.summary["status"] == "completed"
    assert validation(record)[-1] < validation(record)[0] - 0.1


AXES = {"kind", "step", "tokens", "flops", "seconds"}
TRAIN = AXES | {"loss", "lr", "grad_norm", "clipped_norm", "tokens_per_second"}


def test_the_record_is_what_the_contract_says(train: Train) -> None:
    record = train("contract", "optimizer=sophiag", "optimizer.hessian_interval=5")
    lines = list(record.metrics())
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    curvature = [line for line in lines if line["kind"] == "hessian"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert [line["step"] for line in evaluated] == [0, 4, 8, 12]
    assert [line["step"] for line in curvature] == [1, 6, 11]
    for line in trained:
        assert set(line) == TRAIN | {"unclipped_fraction"}
        assert line["tokens"] == line["step"] * 8 * 32
        assert isinstance(line["clipped_norm"], bool)
    for line in evaluated:
        assert set(line) >= AXES | {"val_loss"}
        assert line["tokens"] == line["step"] * 8 * 32
    for line in curvature:
        assert {"hessian_norm", "momentum_norm", "positive_fraction", "histogram", "by_kind"} <= set(line)
        assert line["positive_fraction"] > 0.5
    for axis in ("tokens", "flops", "seconds"):
        values = [line[axis] for line in lines if axis in line]
        assert values == sorted(values)
    assert record.summary is not None
    ledger = record.summary["ledger"]
    assert record.summary["steps"] == 12
    assert record.summary["tokens"] == ledger["forward_backward"]["tokens"] == 12 * 8 * 32
    assert ledger["curvature"] == ledger["curvature"] | {"tokens": 3 * 4 * 32, "count": 3}
    assert record.summary["shared_forwards"] == 3
    assert record.summary["flops"] == ledger["forward_backward"]["flops"] + ledger["curvature"]["flops"]
    assert record.summary["final_val_loss"] == evaluated[-1]["val_loss"]
    assert record.summary["best_val_loss"] == min(line["val_loss"] for line in evaluated)
    assert record.summary["seconds"] == pytest.approx(
        sum(ledger[kind]["seconds"] for kind in ("forward_backward", "curvature", "optimizer", "data"))
    )
    assert record.config["train"]["precision"] == "fp32"
    assert {"versions", "git", "hardware", "data_manifest_sha256", "initial_weights_sha256"} <= set(record.environment)


def test_the_optimizer_alone_changed_leaves_weights_and_batches_the_same(train: Train) -> None:
    records = [train(arm, f"optimizer={arm}", "train.steps=2") for arm in ("adamw", "sophiag")]
    for key in ("initial_weights_sha256", "data_manifest_sha256"):
        assert len({record.environment[key] for record in records}) == 1
    # The loss before the first update depends on the weights and the batch alone.
    assert len({losses(record)[0] for record in records}) == 1
    assert len({validation(record)[0] for record in records}) == 1


def test_another_seed_changes_weights_and_batches(train: Train) -> None:
    first, second = (train(f"seed{seed}", f"seed={seed}", "train.steps=2") for seed in (0, 1))
    assert first.environment["initial_weights_sha256"] != second.environment["initial_weights_sha256"]
    same_weights = train("data", "seed=0", "seeds.data=1", "train.steps=2")
    assert first.environment["initial_weights_sha256"] == same_weights.environment["initial_weights_sha256"]
    assert losses(first)[0] != losses(same_weights)[0]


def test_the_wait_for_a_late_rank_is_booked(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(distributed: Distributed, value: int) -> int:
        time.sleep(0.05)
        return value

    monkeypatch.setattr(Distributed, "highest", late)
    record = train("late", "train.steps=4")
    assert record.summary is not None
    assert record.summary["ledger"]["data"]["seconds"] >= 4 * 0.05
    assert record.summary["seconds"] >= 4 * 0.05


def test_a_run_leaves_neither_determinism_nor_memory_to_the_next_of_its_process(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, earlier = run_module.build_strategy, []
    alive: list[int] = []

    def remembered(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in earlier))
        strategy = build(*arguments)
        earlier.append(weakref.ref(strategy))
        return strategy

    monkeypatch.setattr(run_module, "build_strategy", remembered)
    gc.disable()  # as when Python happens not to collect in between
    try:
        train("first", "train.steps=2", "train.deterministic=true")
        train("second", "train.steps=2")
    finally:
        gc.enable()
    assert alive == [0, 0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_on_the_cpu_creates_no_context_on_a_gpu(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a call that initialises CUDA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("reset_peak_memory_stats", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refused)
    train("cpu", "train.steps=2", "train.device=cpu")


def test_a_finished_run_is_not_run_again(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    before = train("once", "train.steps=2").metrics_path.stat().st_mtime_ns
    assert train("once", "train.steps=2").metrics_path.stat().st_mtime_ns == before
    assert "already completed" in capsys.readouterr().out
    train("once", "train.steps=2", "resume=never", expect=2)


def test_another_configuration_under_the_same_name_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    first = train("taken", "train.steps=2", "optimizer.lr=1e-3")
    train("taken", "train.steps=2", "optimizer.lr=2e-3", expect=2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "optimizer.lr=0.001 there and 0.002 here" in message
    assert "overwrite=true" in message
    assert list(RunRecord.open(first.directory).metrics()) == list(first.metrics())


@pytest.mark.parametrize("minutes", [None, 30.0])
def test_a_hang_is_told_after_the_minutes_of_its_key_and_before_a_collective_gives_up(
    train: Train, monkeypatch: pytest.MonkeyPatch, minutes: float | None
) -> None:
    waited: list[float | None] = []

    def watchdog(seconds: float | None, *arguments: Any) -> Watchdog:
        waited.append(seconds)
        return Watchdog(seconds, *arguments)

    monkeypatch.setattr("training.run.Watchdog", watchdog)
    key = f"guards.hang_minutes={'null' if minutes is None else minutes}"
    record = train("run", "optimizer=adamw", "train.steps=2", key)
    collective = _collective_timeout(RunConfig.model_validate(record.config))
    assert waited == [None if minutes is None else 60 * minutes]
    assert collective.total_seconds() > (60 * minutes if minutes is not None else 3600)


def test_a_signal_is_told_and_the_step_is_finished_and_saved(
    train: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = loop.forward_backward

    def struck(run: loop.Run, *rest: Any) -> Any:
        if run.state.step == 2:
            signal_self(signal.SIGTERM)
        return original(run, *rest)

    monkeypatch.setattr(loop, "forward_backward", struck)
    record = train("run", "optimizer=adamw", expect=75)
    assert record.summary is not None
    assert (record.summary["status"], record.summary["steps"]) == ("preempted", 3)
    assert [path.name for path in (record.directory / "checkpoints").iterdir()] == ["step-00000003"]
    assert "SIGTERM: finishing the step and saving" in capfd.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_with_others_ends_in_the_loop_alone(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that is asked to stop before there is something to save ends at once."""
    begun: list[bool] = []

    def executed(config: RunConfig, distributed: Distributed, stop: StopSignals, held: Any) -> Outcome:
        begun.append(stop._started)
        return Outcome("preempted", Path(), None)

    alone = Distributed(0, 0, world_size, torch.device("cpu"))
    monkeypatch.setattr(Distributed, "start", lambda *arguments: alone)
    monkeypatch.setattr("training.run._execute", executed)
    execute(compose(["train.device=cpu"]))
    assert begun == [world_size > 1]


def test_ranks_agree_on_code_configuration_and_tokens(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    agreed: dict[str, Any] = {}
    monkeypatch.setattr(Distributed, "agree", lambda self, values, remedy: agreed.update(values))
    record = train("run", "optimizer=adamw", "train.steps=2", "optimizer.lr=3e-3")
    assert agreed["tokens"] == record.environment["data_manifest_sha256"][:12]
    assert agreed["optimizer.lr"] == 3e-3
    assert agreed["code"]


def test_a_record_that_cannot_be_written_ends_the_run_at_the_next_step(
    train: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = MetricsWriter.write

    def full(self: MetricsWriter, line: Any) -> None:
        if line["kind"] == "train" and line["step"] >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, line)

    monkeypatch.setattr(MetricsWriter, "write", full)
    record = train("run", "optimizer=adamw", expect=1)
    assert record.summary is not None
    assert record.summary["status"] == "failed"
    assert record.summary["steps"] < 6
    assert "No space left on device" in capfd.readouterr().err


def test_a_save_fails_if_a_line_could_not_be_written(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation after step 4, where a save is due too: a resumed run repeats it."""
    original = MetricsWriter.write

    def damaged(self: MetricsWriter, line: Any) -> None:
        if (line["kind"], line["step"]) == ("eval", 4):
            raise OSError(errno.EIO, "Input/output error")
        original(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", damaged)
        failed = train("run", "optimizer=adamw", "checkpoint.interval=2", expect=1)
    assert failed.summary is not None
    assert failed.summary["reason"] == "Input/output error"
    assert [path.name for path in (failed.directory / "checkpoints").iterdir()] == ["step-00000002"]
    record = train("run", "optimizer=adamw", "checkpoint.interval=2")
    assert [line["step"] for line in record.metrics("eval")] == [0, 4, 8, 12]


@pytest.mark.parametrize("arm", ["adamw", "diverges"])
def test_a_run_whose_summary_cannot_be_written_has_failed_and_a_rerun_writes_it(
    arm: str, train: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(directory: Path, summary: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    chosen = ["optimizer=adamw"]
    if arm == "diverges":
        chosen += ["optimizer.lr=1e18", "train.grad_clip=null", "train.max_skipped_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr("training.records.write_summary", full)
        record = train("run", *chosen, expect=1)
    said = capfd.readouterr().err.splitlines()
    assert any(line.startswith("failed at step ") for line in said)
    assert f"{record.directory / 'summary.json'} could not be written: No space left on device" in said
    assert said[-1].startswith("fix the cause, then rerun the same command to ")
    trained = list(record.metrics("train"))
    again = train("run", *chosen, expect=3 if arm == "diverges" else 0)
    assert again.summary is not None
    assert again.summary["status"] == ("diverged" if arm == "diverges" else "completed")
    assert len(list(again.metrics("train"))) == len(trained)


def test_an_export_that_cannot_be_started_is_an_event_and_stays_due(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_processes(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("training.exports.subprocess.Popen", no_processes)
    record = train("run", "optimizer=adamw", "train.steps=4", "checkpoint.export_at=[2]", "checkpoint.interval=null")
    (first, *_) = [line for line in record.metrics("event") if line["event"] == "export"]
    checkpoint, export = (record.directory / place / "step-00000002" for place in ("checkpoints", "exports"))
    assert first["step"] == 2
    assert first["reason"] == (
        f"{export} could not be started: Resource temporarily unavailable; tried again after the next save, or: "
        f"python scripts/export.py {checkpoint} {export}"
    )
    assert checkpoint.is_dir()
    exports = Exports(record.directory, [2], tmp_path, lambda line, step: None)
    exports.start()
    assert exports.unfinished == {2}
    exports.finish(lambda: False, resumable=True)


def test_the_other_ranks_do_not_wait_for_the_exports_and_the_tracker_of_a_completed_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for owner, name in ((Distributed, "stop"), (Exports, "finish"), (Recorder, "finish")):
        before(owner, name, partial(order.append, f"{owner.__name__}.{name}"), monkeypatch)
    train("completed", "optimizer=adamw", "train.steps=2")
    assert order == ["Distributed.stop", "Exports.finish", "Recorder.finish", "Distributed.stop"]
    order.clear()
    # Elsewhere a rank that has ended ends the others, perhaps before the record is finished.
    train(
        "diverged",
        "optimizer=adamw",
        "optimizer.lr=1e18",
        "train.grad_clip=null",
        "train.max_skipped_steps=1",
        expect=3,
    )
    assert order == ["Exports.finish", "Recorder.finish", "Distributed.stop"]


def before(owner: type, name: str, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    original = getattr(owner, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        act()
        return original(*arguments, **named)

    patch.setattr(owner, name, replaced)


def test_a_rank_lost_while_the_ranks_leave_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Exception] = []

    def broken(self: Distributed) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Distributed, "start", lambda *arguments: Distributed(0, 0, 1, torch.device("cpu")))
    monkeypatch.setattr(Distributed, "stop", broken)
    monkeypatch.setattr(Distributed, "failed", lambda self, error: lost.append(error))
    monkeypatch.setattr("training.run._execute", lambda *arguments: Outcome("preempted", Path(), None))
    with pytest.raises(RuntimeError, match="Connection closed"):
        execute(compose(["train.device=cpu"]))
    assert [str(error) for error in lost] == ["Connection closed by peer"]
