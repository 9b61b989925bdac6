"""Ranks started by train.py form one run and stop together; a rank that dies is named and replaced."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.training.dying import begin_as, dying_rank, rank_under_a_terminal_that_closes, signalled_rank
from tests.training.runs import curve, lines, run, run_in_child, summary
from training.compose import compose
from training.exits import EXIT_CONFIGURATION, EXIT_FAILED, EXIT_PREEMPTED, EXIT_RANK_LOST
from training.launching import ranks
from training.launching.ranks import NOT_STARTED, address_towards, code_of_stopped_ranks, describe_failure, start_ranks
from training.reliability import heartbeat
from training.reliability.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parents[3]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in lines(directory, "train")]


def test_dead_ranks_are_restarted_and_finally_named(tiny: list[str], tmp_path: Path) -> None:
    """Rank 1 is killed at step 10, restarted from step 8, and killed again; then a single process resumes.

    The first start replaces an older run; the second does not replace the first.
    """
    overrides = [*tiny, f"output_dir={tmp_path}", "name=run", "checkpoint.interval=4"]
    assert run([*overrides, "train.steps=2"]) == 0
    launched = ["launcher.nproc_per_node=2", "launcher.max_restarts=1", "overwrite=true"]
    assert run_in_child([*overrides, *launched], begin_as, dying_rank, errors=tmp_path / "errors") == EXIT_FAILED
    said = (tmp_path / "errors").read_text()
    assert "error: rank 1 failed (killed by SIGKILL)" in said
    assert run(overrides) == 0
    directory = tmp_path / "run"
    assert [line["step"] for line in lines(directory, "train")] == list(range(1, 13))
    resumed = [line for line in lines(directory, "event") if line["event"] == "resumed"]
    assert [(line["step"], line["world_size"]) for line in resumed][-1] == (8, 1)
    assert "resuming from" in said
    assert run([*tiny, f"output_dir={tmp_path}", "name=single"]) == 0
    assert losses(directory) == pytest.approx(losses(tmp_path / "single"), abs=1e-5)


def test_signals_to_the_parent_let_all_ranks_save_and_one_process_resumes(tiny: list[str], tmp_path: Path) -> None:
    """SIGHUP twice, as from a terminal that closes."""
    overrides = [*tiny, f"output_dir={tmp_path}", "checkpoint.interval=null"]
    launched = [*overrides, "name=run", "launcher.nproc_per_node=2"]
    errors = tmp_path / "errors"
    code = run_in_child(launched, begin_as, rank_under_a_terminal_that_closes, errors=errors)
    assert code == EXIT_PREEMPTED, errors.read_text()[-3000:]
    saved = summary(tmp_path / "run")["steps"]
    assert 5 <= saved < 12
    assert (tmp_path / "run" / "checkpoints" / f"step-{saved:08d}").is_dir()
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert run([*overrides, "name=run"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(range(1, 13))
    assert run([*overrides, "name=single"]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "single"), abs=1e-5)
    assert len(curve(tmp_path / "run")) == len(curve(tmp_path / "single"))


def test_a_signal_to_one_rank_stops_all_and_restarts_none(tiny: list[str], tmp_path: Path) -> None:
    launched = [*tiny, f"output_dir={tmp_path}", "name=run", "launcher.nproc_per_node=2", "launcher.max_restarts=1"]
    code = run_in_child(launched, begin_as, signalled_rank, errors=tmp_path / "errors")
    assert code == EXIT_PREEMPTED, (tmp_path / "errors").read_text()[-3000:]
    assert summary(tmp_path / "run")["status"] == "preempted"


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        ([EXIT_PREEMPTED, EXIT_PREEMPTED], EXIT_PREEMPTED, ""),
        ([0, 0], 0, ""),
        ([NOT_STARTED, NOT_STARTED], EXIT_PREEMPTED, "nothing to save"),
        ([EXIT_PREEMPTED, EXIT_FAILED], EXIT_FAILED, "rank 1 ended before the run was saved"),
        ([NOT_STARTED, EXIT_FAILED], EXIT_FAILED, "rank 1 ended before the run was saved"),
    ],
)
def test_ranks_that_are_stopped_count_as_preempted_only_if_all_have_saved(
    codes: list[int], expected: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of_stopped_ranks(signal.SIGTERM, codes) == expected
    assert said in capsys.readouterr().err


def failure(exitcode: int, timestamp: float, message: object = "To enable traceback see: https://…") -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp, message=message)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ({0: failure(EXIT_RANK_LOST, 1.0), 3: failure(-9, 2.0)}, "rank 3 failed (killed by SIGKILL)"),
        ({0: failure(1, 1.0, {"message": "OSError: full\nOSError: no space"})}, "rank 0 failed (OSError: no space)"),
        ({2: failure(5, 1.0), 1: failure(7, 2.0)}, "rank 2 failed (exit code 5)"),
        ({1: failure(EXIT_RANK_LOST, 1.0)}, "rank 1 failed (exit code 76)"),
    ],
)
def test_the_rank_that_failed_is_named_and_not_one_that_lost_it(failures: dict, expected: str) -> None:
    assert expected in describe_failure(SimpleNamespace(failures=failures))


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def test_torchruns_traceback_ends_with_the_line_of_a_refusal() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "train.py", "-m", "seed=0,1"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == EXIT_FAILED  # torchrun has no other
    _, _, summary_of_torchrun = done.stderr.partition("ChildFailedError")
    assert "error: -m under torchrun: every rank would run the whole sweep; use launcher" in summary_of_torchrun


def test_nothing_follows_the_line_of_a_rank_that_is_refused_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher import api

    def end_with(failures: dict[int, ProcessFailure]) -> None:
        raise ChildFailedError("train.py", failures)

    failures = {1: ProcessFailure(1, 100, EXIT_CONFIGURATION, ""), 0: ProcessFailure(0, 99, -signal.SIGTERM, "")}
    monkeypatch.setattr(api, "elastic_launch", lambda config, entry: lambda *arguments: end_with(failures))
    assert start_ranks(compose(["launcher.nproc_per_node=2"])) == EXIT_CONFIGURATION
    assert capfd.readouterr().err == ""


def test_ranks_share_the_cores_that_this_job_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.launcher import api

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # restored afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(api, "elastic_launch", lambda config, entry: lambda *arguments: {0: 0, 1: 0})
    assert start_ranks(compose(["launcher.nproc_per_node=2"])) == 0
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("head", "own", "hostname", "told"),
    [
        ("10.0.0.1", "10.0.0.1", "127.0.1.1", True),  # Debian's entry for the hostname hides the address from torch
        ("10.0.0.1", "10.0.0.1", "10.0.0.1", None),
        ("10.0.0.1", "10.0.0.2", "127.0.1.1", None),
        ("10.0.0.1", None, "127.0.1.1", None),
    ],
)
def test_the_node_that_is_the_head_is_told_where_its_hostname_does_not_say(
    head: str, own: str | None, hostname: str, told: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "address_towards", lambda head: own)
    found = {head: head, socket.gethostname(): hostname}
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [(2, 1, 6, "", (found[name], 0))])
    assert ranks.meeting_of_nodes(f"{head}:30007").get("is_host") is told


def test_a_rank_has_something_to_save_only_when_its_run_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    from training import run as running

    codes, seen = [EXIT_FAILED, False], []

    def execute(config: object, begun: Callable[[], None]) -> SimpleNamespace:
        seen.append(codes[0])
        begun()
        seen.append(codes[0])
        return SimpleNamespace(exit_code=0)

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(running, "execute", execute)
    monkeypatch.setattr(ranks, "die_with_launcher", lambda: None)
    monkeypatch.setattr(os, "setpgrp", lambda: None)
    assert ranks.run_rank(compose().model_dump(mode="json"), codes) == 0
    assert (seen, codes) == ([NOT_STARTED, EXIT_FAILED], [0, False])


def test_a_rank_that_stops_beating_is_found_and_no_other(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    ranks = [Heartbeat(store, rank, 3) for rank in range(3)]
    for rank in (0, 1):
        ranks[rank].start()
    assert ranks[0].gone(seconds=1.5) == "rank 2 is gone"
    assert ranks[1].gone(seconds=1.5) == "rank 2 is gone"
    ranks[2].start()
    assert ranks[0].gone(seconds=1.5) is None
    for rank in ranks:
        rank.stop()


def test_a_silent_rank_ends_the_others_after_the_limit(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "LIMIT", 0.4)
    monkeypatch.setattr(heartbeat, "leave", lambda rank, reason: left.append(reason))
    watching, dead = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    watching.start()
    until = time.monotonic() + 30
    while not left and time.monotonic() < until:
        time.sleep(0.05)
    watching.stop()
    assert re.fullmatch(r"rank 1 is gone: no sign of life for \d+ s", left[0])
    assert dead is not None


def test_a_lost_store_is_not_reported_as_a_silent_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "leave", lambda rank, reason: left.append(reason))
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    beating = Heartbeat(client, 1, 2)
    Heartbeat(server, 0, 2)
    beating.start()
    del server
    gc.collect()
    beating._thread.join(30)
    assert re.fullmatch(r"the ranks' store is gone, and with it rank 0 or its launcher: no answer for [01] s", left[0])


def test_a_rank_that_left_in_good_order_is_not_reported(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.05)
    monkeypatch.setattr(heartbeat, "LIMIT", 0.3)
    monkeypatch.setattr(heartbeat, "leave", lambda *arguments: left.append(arguments))
    slow, quick = Heartbeat(store, 0, 2), Heartbeat(store, 1, 2)
    for rank in (slow, quick):
        rank.start()
    quick.stop()
    time.sleep(0.8)
    slow.stop()
    assert left == []


def test_a_machine_announces_the_address_from_which_it_reaches_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe(socket.socket):
        def connect(self, where: object) -> None:
            assert where == ("10.0.0.1", 29500)

        def getsockname(self) -> tuple[str, int]:
            return "10.0.0.7", 40001

    monkeypatch.setattr(socket, "socket", Probe)
    assert address_towards("10.0.0.1:77") == address_towards("10.0.0.1") == "10.0.0.7"


@pytest.mark.parametrize("head", ["localhost", "127.0.0.1:29501", "no-such-host.invalid"])
def test_a_loopback_address_is_not_announced(head: str) -> None:
    assert address_towards(head) is None
