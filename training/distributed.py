"""This process's rank, and the few collectives that the loop needs."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import DataError
from training.config import ConfigurationError
from training.reliability.heartbeat import Heartbeat, leave
from training.reliability.rendezvous import difference, meet, this_process

T = TypeVar("T")
#: How long rank 0 may take to finish its exports and uploads; longer than both have.
MAIN_ENDS = datetime.timedelta(minutes=80)


@dataclass(frozen=True)
class Distributed:
    """Rank, world size and device; collectives are no-ops in a world of one."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    joined: bool = False  # the process group existed before: `stop` does not destroy it
    heartbeat: Heartbeat | None = None
    attempt: str = "0"  # the ranks' common start (rendezvous.py); the store may outlive it
    store: dist.Store | None = None  # of this start or, under torchrun, of all starts of the job

    @classmethod
    def start(cls, device: str, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> "Distributed":
        """Join the process group described by torchrun's environment variables, or start a world of one without them.

        Args:
            device: "auto" (CUDA if available), "cpu" or "cuda".
            timeout: how long a collective may wait for the other ranks before it raises.

        Raises:
            ConfigurationError: CUDA is requested but not available, or the ranks do not find each other, or they differ
                in device or torch version.
        """
        missing = device == "cuda" and not torch.cuda.is_available()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        on_cuda = device != "cpu" and torch.cuda.is_available()
        # A launcher may show each rank only its own GPU, whatever its local rank.
        place = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(place)
        joined, heartbeat, attempt, store = dist.is_initialized(), None, "0", None
        if world_size > 1 and not joined:
            facts = {"device": "no CUDA device" if missing else place.type, "torch": torch.__version__}
            store, attempt = meet(rank, world_size, facts)  # if one rank has no GPU, all are refused here
            store.set_timeout(timeout)
        if missing:
            raise ConfigurationError("train.device=cuda: no CUDA device is visible; choose train.device=cpu or auto")
        if store is not None:
            heartbeat = Heartbeat.of_attempt(attempt, rank, world_size)
            heartbeat.start()
            try:
                dist.init_process_group(
                    _backend(place),
                    store=dist.PrefixStore(f"{attempt}/group", store),
                    rank=rank,
                    world_size=world_size,
                    timeout=timeout,
                    device_id=place if on_cuda else None,
                )
            except Exception as error:
                _leave_if_one_is_gone(heartbeat, rank, error)
                heartbeat.stop()
                raise
        return cls(rank, local_rank, world_size, place, joined, heartbeat, attempt, store)

    def mark(self, what: str) -> None:
        """Leave a mark for ranks that torchrun starts after this one."""
        if self.store is not None:
            self.store.set(f"mark/{what}", "1")

    def is_marked(self, what: str) -> bool | None:
        """Return whether an earlier start of this torchrun job left the mark; None if no store survives restarts."""
        if self.store is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        return bool(self.store.check([f"mark/{what}"]))

    def ensure_group(self) -> None:
        """Create a process group even in a world of one, for engines that need it.

        The group remains for the process's next run, since DeepSpeed caches the groups it has seen.
        """
        if not dist.is_initialized():
            store = dist.HashStore()
            dist.init_process_group(_backend(self.device), store=store, rank=0, world_size=1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce the tensor over the ranks in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def highest(self, value: int) -> int:
        """Return the highest value of any rank, so that all ranks act together. On the CPU: no device waits."""
        if self.world_size == 1:
            return value
        return int(self.all_reduce(torch.tensor(value), dist.ReduceOp.MAX).item())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0. Returns its result there, None elsewhere; its exception is raised on every rank."""
        result: T | None = None
        raised: Exception | None = None
        if self.is_main:
            try:
                result = action()
            except Exception as error:
                raised = error
        if (raised := self.broadcast_object(raised)) is not None:
            raise raised
        return result

    def on_all(self, action: Callable[[], T]) -> T:
        """Run `action`, which uses no collectives, on every rank. If one rank is refused, all raise its error, with the
        rank."""
        refused: ConfigurationError | DataError | None = None
        try:
            result = action()
        except (ConfigurationError, DataError) as error:
            refused = error
        for rank, refusal in enumerate(self.gather_objects(refused)):
            if refusal is not None:
                raise type(refusal)(f"rank {rank}: {refusal}" if rank > 0 else str(refusal)) from refused
        return result

    def agree(self, values: Mapping[str, Any], remedy: str) -> None:
        """Check that small values are the same on all ranks.

        Raises:
            ConfigurationError: on every rank, if one differs; the message has key, rank, both values and the remedy.
        """
        by_rank = self.gather_objects((values, this_process()))
        if found := difference([values for values, _ in by_rank], [process for _, process in by_rank]):
            raise ConfigurationError(f"{found}; {remedy}")

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def failed(self, error: Exception) -> None:
        """Handle an error that other ranks may not share: end the process if a rank is gone.

        The error may be a collective's that missed that rank; the message then names the rank.
        """
        if self.heartbeat is not None and not self.heartbeat.stopped:  # ranks that have left do not beat
            _leave_if_one_is_gone(self.heartbeat, self.rank, error)

    def stop(self) -> None:
        """Leave the ranks in good order. Every rank calls it; a second call does nothing."""
        if self.heartbeat is not None and self.heartbeat.stopped:
            return
        if self.heartbeat is not None:
            self.barrier()  # no rank exits, perhaps with the store, while another still watches
            self.heartbeat.stop()
        if self.world_size > 1 and not self.joined:
            destroy_process_groups()
        else:  # the group stays, perhaps until the process ends
            let_gloo_finish()

    def end_after_main(self) -> None:
        """Wait until rank 0 calls this too, in a run of several machines that train.py or torchrun started.

        A launcher whose ranks have ended leaves after five minutes, perhaps with the store, and then the others fail. Rank 0
        may have exports to wait for, and files to upload.
        """
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        if self.store is None or one_machine or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        key = f"{self.attempt}/ended"
        with contextlib.suppress(dist.DistError):  # rank 0 is gone, or too slow
            if self.is_main:
                self.store.set(key, "1")
            else:
                self.store.wait([key], MAIN_ENDS)


def destroy_process_groups() -> None:
    """Destroy all process groups; the process may exit afterwards.

    DDP, device meshes and DeepSpeed hold groups longer, which keeps gloo's threads alive.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    let_gloo_finish()


def let_gloo_finish(seconds: float = 10.0) -> None:
    """Wait, with the interpreter's lock released, until gloo's threads hold no tensors, at most `seconds`.

    A gloo thread reports its collective as done and only then releases the tensors, for which it takes the interpreter's
    lock. If the interpreter is already shutting down, std::terminate aborts the process with SIGABRT after everything is
    saved (torch 2.13 with Python below 3.14, pytorch/pytorch#190489). Without /proc, this is a short sleep.
    """
    until = time.monotonic() + seconds
    asleep = 0
    # A thread that waits for the lock also sleeps. While this one sleeps the lock is free, so the next look finds that
    # thread awake.
    while asleep < 2 and time.monotonic() < until:
        time.sleep(0.002)
        asleep = asleep + 1 if all(state == "S" for state in _gloo_threads()) else 0


def _gloo_threads() -> list[str]:
    """Return the states of this process's gloo threads, as in proc(5): S sleeps, R runs."""
    states = []
    for thread in Path("/proc/self/task").glob("*"):
        try:
            name, fields = (thread / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:  # it has ended
            continue
        if name.startswith("pt_gloo"):
            states.append(fields.split()[0])
    return states


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _leave_if_one_is_gone(heartbeat: Heartbeat, rank: int, error: Exception) -> None:
    if gone := heartbeat.gone():
        first_line = "".join(str(error).strip().splitlines()[:1])
        leave(rank, f"{gone} ({type(error).__name__}: {first_line})")
