"""Rendezvous: the ranks of one attempt find each other, one process per rank, all with the same facts.

The store at MASTER_ADDR:MASTER_PORT may be older than the attempt (torchrun's agent keeps its store when it restarts
ranks), and a process of an earlier attempt may still be alive. So rank 0 opens an attempt under a random name, the other
ranks claim their places in it, and rank 0 closes it once all are there. A process without a place in the closed attempt
waits for the next one. It is refused if the process that holds its place is alive.
"""

import json
import logging
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from training.config import ConfigurationError, RankRefusedError, RanksNotMetError
from training.reliability.heartbeat import beats_key

log = logging.getLogger(__name__)

LIMIT = 600.0  # seconds within which all ranks must arrive; the same as for torchrun's agents
AGENT_LIMIT = 30.0  # seconds to reach torchrun's store, which exists before its ranks
GRACE = 60.0  # seconds beyond LIMIT that the others wait for rank 0's decision
READING = 10.0  # seconds for the others to read a refusal before rank 0, and perhaps the store, exit
SPEAK = 30.0  # seconds between log lines while waiting
POLL = 0.1
NEWEST = "attempt"  # the key of the newest attempt


class Attempt(NamedTuple):
    """Rank 0's description of an attempt, stored as JSON."""

    name: str
    world_size: int
    state: Literal["open", "closed", "refused", "late"]  # late: refused because ranks were missing
    reason: str = ""

    def claim(self, rank: int) -> str:
        """Return the key that describes the process holding this rank."""
        return f"{self.name}/claim/{rank}"


def meet(rank: int, world_size: int, facts: Mapping[str, Any]) -> tuple[dist.Store, str]:
    """Wait for `world_size` ranks. Returns their store and the name of this attempt.

    Args:
        facts: JSON values on which the ranks must agree before they can communicate.

    Raises:
        ConfigurationError: on all ranks, if one has other facts.
        RanksNotMetError: on all ranks, if one did not arrive in time; also if the store cannot be reached.
        RankRefusedError: another process holds this rank's place or port.
    """
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigurationError(f"WORLD_SIZE={world_size}: {missing[0]} is not set; set it to where rank 0 listens")
    store = _connect(rank)
    me = {"process": this_process(), "id": uuid.uuid4().hex}
    claim = json.dumps(me | {"facts": {"WORLD_SIZE": world_size, **facts}})
    try:
        return store, _lead(store, world_size, claim) if rank == 0 else _follow(store, rank, claim)
    except dist.DistError as error:
        raise RanksNotMetError(
            f"rank {rank} lost the store at {address()} before all ranks were there; start all ranks again"
        ) from error


def this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def difference(by_rank: Sequence[Mapping[str, Any]], processes: Sequence[str]) -> str | None:
    """Describe the first key on which a rank differs from rank 0, with both values and the ranks; None if all agree."""
    reference = by_rank[0]
    for key in sorted({key for values in by_rank for key in values}):
        odd = [rank for rank, values in enumerate(by_rank) if values.get(key) != reference.get(key)]
        if odd:
            value = by_rank[odd[0]].get(key)
            same = [rank for rank in odd if by_rank[rank].get(key) == value]
            others = f" and {len(same) - 1} more" if len(same) > 1 else ""
            where = f"rank {odd[0]} ({processes[odd[0]]}){others}"
            return f"{key}={value} on {where}, {reference.get(key)} on rank 0"
    return None


def address() -> str:
    """Return the store's host:port."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _connect(rank: int) -> dist.TCPStore:
    """Connect to the store, which rank 0 serves unless torchrun's agent does."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not of_agent:
        try:
            return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as error:
            raise RankRefusedError(
                f"MASTER_PORT={port}: rank 0 cannot listen there ({str(error).splitlines()[0]}); choose another port, or "
                "end the process that has it"
            ) from error
    server = "the launcher of rank 0" if of_agent else "rank 0"
    waiting = _Waiting(AGENT_LIMIT if of_agent else LIMIT)
    while True:
        try:  # TCPStore alone would wait silently
            socket.create_connection((host, port), timeout=SPEAK).close()
            return dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        except (OSError, RuntimeError):
            waiting.pause(f"rank {rank} waits for {server} to listen at {address()}")


def _lead(store: dist.Store, world_size: int, claim: str) -> str:
    """Rank 0: open an attempt, wait for the others, and close or refuse it."""
    attempt = Attempt(uuid.uuid4().hex, world_size, "open")
    opened = json.dumps(attempt)
    store.set(attempt.claim(0), claim)
    store.set(NEWEST, opened)
    try:
        _wait_for_claims(store, attempt)
        claims = [json.loads(c) for c in store.multi_get([attempt.claim(rank) for rank in range(world_size)])]
        if found := difference([c["facts"] for c in claims], [c["process"] for c in claims]):
            raise ConfigurationError(f"{found}; start all ranks alike")
    except ConfigurationError as error:
        state: Literal["late", "refused"] = "late" if isinstance(error, RanksNotMetError) else "refused"
        decided = json.dumps(attempt._replace(state=state, reason=str(error)))
        if store.compare_set(NEWEST, opened, decided).decode() == decided:
            _wait_for_readers(store, attempt)
        raise
    for rank in range(world_size):  # from here on, a rank that dies is noticed
        dist.PrefixStore(attempt.name, store).add(beats_key(rank), 0)
    decided = json.dumps(attempt._replace(state="closed"))
    if (newest := store.compare_set(NEWEST, opened, decided).decode()) != decided:
        raise _second_leader(store, newest)
    return attempt.name


def _wait_for_claims(store: dist.Store, attempt: Attempt) -> None:
    waiting, missing = _Waiting(LIMIT), list(range(1, attempt.world_size))
    while missing := [rank for rank in missing if not store.check([attempt.claim(rank)])]:
        newest = store.get(NEWEST).decode()
        if newest != json.dumps(attempt):
            raise _second_leader(store, newest)
        waiting.pause(f"rank 0 waits for rank {_listed(missing)} of {attempt.world_size}")


def _second_leader(store: dist.Store, newest: str) -> RankRefusedError:
    return RankRefusedError(f"rank 0 is {_holder(store, Attempt(*json.loads(newest)), 0)} as well; end one of the two")


def _wait_for_readers(store: dist.Store, attempt: Attempt) -> None:
    claimed = sum(store.check([attempt.claim(rank)]) for rank in range(1, attempt.world_size))
    until = time.monotonic() + READING
    while store.add(f"{attempt.name}/read", 0) < claimed and time.monotonic() < until:
        time.sleep(POLL)


def _follow(store: dist.Store, rank: int, claim: str) -> str:
    """Any other rank: claim a place in the newest attempt until an attempt closes with this process in it."""
    waiting, seen, beats = _Waiting(LIMIT + GRACE), None, 0
    while True:
        attempt = Attempt(*json.loads(store.get(NEWEST))) if store.check([NEWEST]) else None
        if attempt is not None and rank < attempt.world_size:
            if attempt.state == "open":
                store.compare_set(attempt.claim(rank), "", claim)
            mine = store.check([attempt.claim(rank)]) and store.get(attempt.claim(rank)).decode() == claim
            if mine and attempt.state == "closed":
                return attempt.name
            if mine and attempt.state in ("refused", "late"):
                store.add(f"{attempt.name}/read", 1)
                raise (RanksNotMetError if attempt.state == "late" else ConfigurationError)(attempt.reason)
            count = dist.PrefixStore(attempt.name, store).add(beats_key(rank), 0)
            if attempt == seen and not mine and count > beats:
                raise RankRefusedError(
                    f"rank {rank} is {_holder(store, attempt, rank)} already; end it, or choose another MASTER_PORT"
                )
            beats = count
        if attempt != seen:
            waiting, seen = _Waiting(LIMIT + GRACE), attempt
        waiting.pause(f"rank {rank} waits for rank 0 to start at {address()}")


def _holder(store: dist.Store, attempt: Attempt, rank: int) -> str:
    process: str = json.loads(store.get(attempt.claim(rank)))["process"]
    return process


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


class _Waiting:
    """A polling pause that logs what it waits for every `SPEAK` seconds.

    Raises:
        RanksNotMetError: after `seconds`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began = self._spoke = time.monotonic()

    def pause(self, what: str) -> None:
        now = time.monotonic()
        if now - self._began > self._seconds:
            raise RanksNotMetError(
                f"{what}: gave up after {now - self._began:.0f} s; start the same command for all ranks"
            )
        if now - self._spoke > SPEAK:
            self._spoke = now
            log.warning("%s", what)
        time.sleep(POLL)
