"""The processes that torchrun or Slurm has started: their ranks, and what one knows told to all.

This is the only place that reads ranks from the environment. torch is loaded where processes communicate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mvit_video.errors import ConfigError, MVitVideoError, brief

T = TypeVar("T")

_PER_NODE = "SLURM_NTASKS_PER_NODE"


@dataclass(frozen=True)
class Ranks:
    """This process's rank and how many processes there are. What they exchange are small objects."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in rank 0, in every rank; its error is raised in every rank."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = make()
            except MVitVideoError as error:
                answer[1] = error
        with self._together():
            dist.broadcast_object_list(answer, 0, self.group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, in every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value, self.group)
        return values

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # its text is about sockets
            failed = f"rank {self.rank} of {self.size}: another rank failed; see its error above"
            raise MVitVideoError(failed) from error


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torchrun or Slurm has started; alone without them.

    Raises:
        ConfigError: they can't find each other.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    address = "env://"
    if "MASTER_ADDR" not in os.environ:
        processes_per_node()
        slurm = _slurm()()
        address = f"tcp://{slurm.main_address}:{slurm.main_port}"
    try:
        dist.init_process_group(
            "gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(minutes=10)
        )
    except (RuntimeError, ValueError) as error:  # a port in use, a variable that lacks
        problem = f"the processes can't find each other: {brief(error)}"
        raise ConfigError(f"rank {rank} of {size}: {problem}") from None
    try:
        # One process may have far more to do than another; one that dies is noticed at once all the same.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield Ranks(rank, size, group)
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many processes there are, as torchrun or Slurm say; (0, 1) without them.

    Raises:
        ConfigError: a variable is no number, or the rank isn't below the size.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = whole_number("RANK"), whole_number("WORLD_SIZE")
    elif in_slurm():
        rank, size = whole_number("SLURM_PROCID"), whole_number("SLURM_NTASKS")
    else:
        return 0, 1
    if rank >= size:
        raise ConfigError(f"the environment says rank {rank} of {size} processes; ranks count from 0")
    return rank, size


def processes_per_node() -> int:
    """How many of the processes run on a machine; the most, where Slurm has given them different numbers.

    Lightning insists on Slurm's ``--ntasks-per-node``: this sets the variable that it looks for where the job
    was given ``--ntasks`` and ``--nodes``.
    """
    _, size = rank_and_size()
    if "RANK" in os.environ or not in_slurm():
        return whole_number("LOCAL_WORLD_SIZE", 1) if os.environ.get("LOCAL_WORLD_SIZE") else size
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    found = [int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", counts)]  # such as "4(x2),3"
    if any(found):
        os.environ[_PER_NODE] = str(max(found))
    elif not os.environ.get(_PER_NODE):
        nodes = next((n for n in ("SLURM_NNODES", "SLURM_JOB_NUM_NODES") if os.environ.get(n)), None)
        os.environ[_PER_NODE] = str(-(-size // (whole_number(nodes, 1) if nodes else 1)))
    return whole_number(_PER_NODE, 1)


def in_slurm() -> bool:
    """Whether this is a Slurm job (and not an interactive one)."""
    return "SLURM_NTASKS" in os.environ and _slurm().detect()


def use_own_gpu() -> None:
    """Make this process's GPU the one that "cuda" means."""
    name = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if os.environ.get(name)), None)
    if name is not None and rank_and_size()[1] > 1:
        import torch

        if (local := whole_number(name)) < torch.cuda.device_count():
            torch.cuda.set_device(local)


def _slurm() -> Any:
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment


def whole_number(name: str, least: int = 0) -> int:
    """The value of an environment variable. Raises ConfigError."""
    value = os.environ.get(name, "")
    if not value.isdecimal() or int(value) < least:
        expected = f"a whole number from {least} on"
        raise ConfigError(f"the environment variable {name} is {value!r}; expected {expected}")
    return int(value)
