"""The processes of one evaluation: what one knows, all know."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from mvit_video.errors import MVitVideoError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are. Nothing here computes: values are small objects."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def share(self, make: Callable[[], T]) -> T:
        """What ``make`` gives the first process, in all of them; its error is raised in all of them."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = make()
            except MVitVideoError as error:
                answer[1] = error
        self._together(lambda: dist.broadcast_object_list(answer, 0, self.group))
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their numbers, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(values, value, self.group))
        return values

    def _together(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RuntimeError as error:  # its text is about sockets
            raise MVitVideoError(
                f"process {self.rank} can't go on: another one of the {self.size} has ended early, "
                "and its own message says why"
            ) from error


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torchrun or Slurm has started; alone without them."""
    rank, size = rank_and_size()
    if size == 1:
        yield Ranks()
        return
    address = "env://"
    if "MASTER_ADDR" not in os.environ:
        slurm = SLURMEnvironment()
        address = f"tcp://{slurm.main_address}:{slurm.main_port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    try:
        # One process may have far more to do than another; one that dies is noticed at once all the same.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield Ranks(rank, size, group)
    finally:
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Number of this process and how many there are, as torchrun or Slurm say; (0, 1) without them."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if in_slurm():
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    return 0, 1


def in_slurm() -> bool:
    """Whether this is a Slurm job (and not an interactive one)."""
    return SLURMEnvironment.detect()


def use_own_gpu() -> None:
    """Make this process's GPU the one that "cuda" means."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if local is not None and rank_and_size()[1] > 1 and int(local) < torch.cuda.device_count():
        torch.cuda.set_device(int(local))
