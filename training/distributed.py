"""This process's place among the ranks, and the few collectives that the loop needs."""

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


@dataclass(frozen=True)
class Distributed:
    """Rank, world size and device; collectives are no-ops in a world of one."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    joined: bool = False  # the process group was there before: `stop` leaves it to whoever started it
    heartbeat: Heartbeat | None = None
    attempt: str = "0"  # the name of what the ranks began together: a store may outlive it
    store: dist.Store | None = None  # of this start or, under torchrun, of all starts of the job

    @classmethod
    def start(cls, device: str, timeout: datetime.timedelta = datetime.timedelta(minutes=10)) -> "Distributed":
        """Join the process group that torchrun's environment describes; a world of one without it.

        Args:
            device: "auto" (CUDA where there is one), "cpu" or "cuda".
            timeout: how long a collective may wait for the other ranks before it raises.

        Raises:
            ConfigurationError: CUDA is asked for and not there; or the ranks do not find each other, or are of two kinds.
        """
        missing = device == "cuda" and not torch.cuda.is_available()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        on_cuda = device != "cpu" and torch.cuda.is_available()
        # A launcher may show each rank its own GPU alone, whatever its local rank.
        place = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(place)
        joined, heartbeat, attempt, store = dist.is_initialized(), None, "0", None
        if world_size > 1 and not joined:
            facts = {"device": "no CUDA device" if missing else place.type, "torch": torch.__version__}
            store, attempt = meet(rank, world_size, facts)  # where one rank has no GPU, all learn it here
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
        """Whether an earlier start of this torchrun job has left the mark; None where no store is older than this start."""
        if self.store is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        return bool(self.store.check([f"mark/{what}"]))

    def ensure_group(self) -> None:
        """A process group also in a world of one, for engines that cannot do without.

        It stays for the process's next run: DeepSpeed remembers the groups that it has met.
        """
        if not dist.is_initialized():
            store = dist.HashStore()
            dist.init_process_group(_backend(self.device), store=store, rank=0, world_size=1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """The tensor reduced over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on any rank: how ranks agree before anyone acts. On the CPU: no device waits."""
        return bool(self.highest(int(flag)))

    def highest(self, value: int) -> int:
        """The highest value of any rank. On the CPU, like `any`."""
        if self.world_size == 1:
            return value
        return int(self.all_reduce(torch.tensor(value), dist.ReduceOp.MAX).item())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Have rank 0 alone do something: its result there, None elsewhere. What it raises is raised on every rank."""
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
        """Have every rank do something that needs no other. A refusal of one rank is raised on all, and names it."""
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
        """Compare small values by key over the ranks.

        Raises:
            ConfigurationError: on every rank, where one differs; it names key, rank, both values, and the remedy.
        """
        by_rank = self.gather_objects((values, this_process()))
        if found := difference([values for values, _ in by_rank], [process for _, process in by_rank]):
            raise ConfigurationError(f"{found}; {remedy}")

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def failed(self, error: Exception) -> None:
        """To be told of an error that this rank does not share with all others. Ends the process if a rank is gone.

        The error may be that loss, met in a collective; the message then names the rank.
        """
        if self.heartbeat is not None:
            _leave_if_one_is_gone(self.heartbeat, self.rank, error)

    def stop(self) -> None:
        """Leave the ranks in good order. Every rank calls it."""
        if self.heartbeat is not None:
            self.barrier()  # no rank ends, and with it perhaps the store, while another still watches
            self.heartbeat.stop()
        if self.world_size > 1 and not self.joined:
            destroy_process_groups()
        else:  # the group stays, perhaps until the process ends
            let_gloo_finish()


def destroy_process_groups() -> None:
    """`torch.distributed.destroy_process_group` of all groups, where there are any; the process may end after it.

    DDP, device meshes and DeepSpeed hold groups longer, and gloo's threads live on with them.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    let_gloo_finish()


def let_gloo_finish(seconds: float = 10.0) -> None:
    """Wait, with the interpreter's lock released, until gloo's threads hold no tensor any more, at most `seconds`.

    A thread says that its collective is done, and only then lets go of the tensors, for which it takes the interpreter's
    lock. If the interpreter has begun to end by then, std::terminate ends the process: SIGABRT after all is done and
    saved (torch 2.13 with Python below 3.14, pytorch/pytorch#190489). Where there is no /proc, there is nothing to see,
    and the wait is a short sleep.
    """
    until = time.monotonic() + seconds
    asleep = 0
    # A thread that waits for the lock sleeps, too; while this one sleeps, the lock is free, and the next look finds it
    # awake.
    while asleep < 2 and time.monotonic() < until:
        time.sleep(0.002)
        asleep = asleep + 1 if all(state == "S" for state in _gloo_threads()) else 0


def _gloo_threads() -> list[str]:
    """The states of the threads of this process that carry out gloo's collectives, as in proc(5): S sleeps, R runs."""
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
