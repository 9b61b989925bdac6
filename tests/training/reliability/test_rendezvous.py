"""Rendezvous: one process per rank, with equal facts, in an attempt that all ranks joined."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from training.config import ConfigurationError, RankRefusedError, RanksNotMetError
from training.exits import EXIT_CONFIGURATION, EXIT_FAILED, refuse
from training.reliability import rendezvous
from training.reliability.heartbeat import beats_key
from training.reliability.rendezvous import difference, meet

Join = Callable[..., "Future[str]"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of torchrun's agent, which outlives its ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(rendezvous, "POLL", 0.01)
    monkeypatch.setattr(rendezvous, "LIMIT", 60.0)
    return store


@pytest.fixture
def join(server: dist.TCPStore) -> Iterator[Join]:
    """Join as a rank, in a thread that stands for its process. The result is the attempt's name."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda rank, world_size=2, **facts: pool.submit(lambda: meet(rank, world_size, facts)[1])


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def beating(server: dist.TCPStore, attempt: str) -> Iterator[None]:
    """Beat as the process that holds rank 1."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            dist.PrefixStore(attempt, server).add(beats_key(1), 1)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()


def attempt_of(server: dist.TCPStore) -> rendezvous.Attempt:
    return rendezvous.Attempt(*json.loads(server.get(rendezvous.NEWEST)))


def test_all_ranks_join_one_attempt_whoever_is_first(join: Join) -> None:
    others = [join(rank, 3) for rank in (2, 1)]
    assert {future.result() for future in [*others, join(0, 3)]} == {others[0].result()}


def test_restarted_ranks_join_a_new_attempt(join: Join) -> None:
    """The store still holds the claims of the dead ranks."""
    names = set()
    for _ in range(3):
        one, other = join(1), join(0)
        assert one.result() == other.result()
        names.add(one.result())
    assert len(names) == 3


def test_ranks_of_a_crashed_start_do_not_fill_places(join: Join, server: dist.TCPStore) -> None:
    """An old rank 1 claimed a place in an attempt whose rank 0 was killed before it closed."""
    stale = rendezvous.Attempt("stale", 2, "open")
    server.set(stale.claim(1), json.dumps({"process": "process 1 on here", "facts": {}}))
    server.set(rendezvous.NEWEST, json.dumps(stale))
    one, other = join(1), join(0)
    assert one.result() == other.result() != "stale"


def test_a_second_process_for_a_living_rank_is_refused_and_the_holder_is_named(
    join: Join, server: dist.TCPStore
) -> None:
    first, leader = join(1), join(0)
    name = first.result()
    assert leader.result() == name
    second = join(1)
    with beating(server, name), pytest.raises(RankRefusedError, match=r"rank 1 is process \d+ on .* already; end it"):
        second.result()


def test_only_one_of_two_processes_gets_a_rank(join: Join, server: dist.TCPStore) -> None:
    leader, rivals = join(0), [join(1), join(1)]
    with beating(server, leader.result()):
        errors = [future.exception() for future in rivals]
    assert sorted(map(type, errors), key=str) == [type(None), RankRefusedError]


def test_a_second_rank_0_ends_the_first_and_the_others_follow_it(join: Join, server: dist.TCPStore) -> None:
    first = join(0)
    wait_for(lambda: server.check([rendezvous.NEWEST]))
    before = attempt_of(server).name
    second = join(0)
    wait_for(lambda: attempt_of(server).name != before)
    assert join(1).result() == second.result()
    with pytest.raises(ConfigurationError, match=r"rank 0 is process \d+ on .* as well"):
        first.result()


def test_ranks_with_different_facts_are_refused_on_all(join: Join) -> None:
    futures = [join(0, device="cpu"), join(1, device="cuda")]
    for future in futures:
        with pytest.raises(ConfigurationError, match=r"device=cuda on rank 1 \(process .*\), cpu on rank 0"):
            future.result()


def test_world_sizes_that_differ_are_refused_on_all(join: Join) -> None:
    for future in [join(0, 2), join(1, 3)]:
        with pytest.raises(ConfigurationError, match=r"WORLD_SIZE=3 on rank 1 \(.*\), 2 on rank 0"):
            future.result()


def test_a_missing_rank_is_named_on_all_after_the_limit(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rendezvous, "LIMIT", 3.0)
    monkeypatch.setattr(rendezvous, "SPEAK", 0.1)
    for future in [join(0, 4), join(2, 4)]:
        with pytest.raises(RanksNotMetError, match=r"rank 0 waits for rank 1, 3 of 4: gave up after \d+ s"):
            future.result()
    assert "rank 0 waits for rank 1, 3 of 4" in caplog.text


@pytest.mark.parametrize(("limit", "listener"), [("LIMIT", "rank 0"), ("AGENT_LIMIT", "the launcher of rank 0")])
def test_a_rank_without_a_store_reports_it(
    limit: str, listener: str, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, limit, 0.2)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(limit == "AGENT_LIMIT"))
    with pytest.raises(RanksNotMetError, match=rf"rank 1 waits for {listener} to listen at 127\.0\.0\.1:1: gave up"):
        join(1).result()


def test_a_store_that_ends_before_all_are_there_is_one_line(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    served = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    monkeypatch.setenv("MASTER_PORT", str(served[0].port))
    waiting = join(1)
    served[0].set(rendezvous.NEWEST, json.dumps(rendezvous.Attempt("begun", 2, "open")))
    wait_for(lambda: served[0].check(["begun/claim/1"]))
    served.clear()
    gc.collect()
    with pytest.raises(RanksNotMetError, match="rank 1 lost the store at"):
        waiting.result()


def test_ranks_that_did_not_meet_are_a_failure_and_a_mistake_is_not() -> None:
    """An engine restarts the first and ends the second."""
    assert refuse(RanksNotMetError("rank 0 waits for rank 1")) == EXIT_FAILED
    assert refuse(RankRefusedError("rank 1 is process 7 already")) == EXIT_CONFIGURATION


def test_a_port_that_is_taken_is_a_configuration_error(
    join: Join, server: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    with pytest.raises(ConfigurationError, match=f"MASTER_PORT={server.port}: rank 0 cannot listen there"):
        join(0).result()


def test_the_first_key_that_differs_is_named_with_its_ranks() -> None:
    processes = [f"process {10 + rank} on node" for rank in range(4)]
    ranks = [{"a": 1, "b": rank // 2, "c": rank} for rank in range(4)]
    assert difference(ranks, processes) == "b=1 on rank 2 (process 12 on node) and 1 more, 0 on rank 0"
    assert difference([{"a": 1}, {"a": 1}], processes) is None
    assert difference([{"a": 1}, {}], processes) == "a=None on rank 1 (process 11 on node), 1 on rank 0"
