"""Training by several processes, which torchrun or Slurm starts: never a script that starts itself again.

(Hydra would compose the configuration, and make a folder, in each of the processes that Lightning starts.)
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ParallelStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from mvit_video.data.ranks import in_slurm, processes_per_node, rank_and_size, whole_number
from mvit_video.errors import ConfigError

log = logging.getLogger(__name__)


def requeue() -> None:
    """Have Slurm queue this job again, under its number; it ends this one."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # a bare number may mean the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        log.warning("the job isn't queued again: scontrol can't be run (%s)", error.strerror)
        return
    if done.returncode:
        log.warning("the job isn't queued again: %s", done.stderr.strip() or f"scontrol: {done.returncode}")
    else:
        log.info("job %s is queued again", job)


def overrides(arguments: Sequence[str]) -> list[str]:
    """What to add to the arguments of this process, so that all use one folder and the first alone fills it.

    It is the time of the first process, or with Slurm the job's number, which stays when a job is requeued.
    """
    rank, size = rank_and_size()
    added: list[str] = []
    shared = size > 1 or ("RANK" not in os.environ and in_slurm() and "--multirun" not in arguments)
    if shared and not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        added.append(f"hydra.run.dir={_common_folder(rank)}")
    if rank > 0:
        added += [
            "hydra.output_subdir=null",
            "hydra/job_logging=stdout",
            "hydra.job_logging.root.level=WARNING",
        ]
    return added


def _common_folder(rank: int) -> str:
    if "RANK" not in os.environ and os.environ.get("SLURM_JOB_ID"):
        return f"outputs/train/slurm/{os.environ['SLURM_JOB_ID']}"
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, for its processes
    if not (has_store and {"RANK", "MASTER_ADDR"} <= os.environ.keys()):
        raise ConfigError("several processes need a common folder: give each the same hydra.run.dir=FOLDER")
    host, port = os.environ["MASTER_ADDR"], whole_number("MASTER_PORT", 1)
    store = TCPStore(host, port, is_master=False, timeout=timedelta(minutes=5))
    if rank == 0:
        store.set("mvit_video/folder", f"outputs/train/{datetime.now():%Y-%m-%d/%H-%M-%S}")
    return store.get("mvit_video/folder").decode()


def choose_devices(devices: Any, num_nodes: int) -> tuple[Any, int]:
    """Resolve ``trainer.devices=auto``: one for each process that was started, and one without a launcher."""
    if devices != "auto":
        return devices, num_nodes
    if (size := rank_and_size()[1]) > 1:
        here = processes_per_node()
        if size % here:
            raise ConfigError(
                f"{size} processes, {here} on one node and fewer on another; each node needs as many: "
                "use --ntasks-per-node=N"
            )
        return here, size // here
    if (count := torch.cuda.device_count()) > 1:
        torchrun = f"torchrun --nproc_per_node={count} -m mvit_video.train"
        log.info("using one of %d GPUs; for all: %s", count, torchrun)
    return 1, num_nodes


def check_processes(trainer: pl.Trainer, arguments: Sequence[str]) -> None:
    """ConfigError where Lightning would start processes itself, or expects other than were started."""
    _, size = rank_and_size()
    if trainer.world_size == size:
        return
    if size == 1 and isinstance(trainer.strategy, ParallelStrategy):
        here = trainer.world_size // trainer.num_nodes
        nodes = f" --nnodes={trainer.num_nodes}" if trainer.num_nodes > 1 else ""
        raise ConfigError(
            f"{trainer.world_size} processes are started by torchrun or Slurm: "
            f"torchrun{nodes} --nproc_per_node={here} -m mvit_video.train {shlex.join(arguments)}"
        )
    raise ConfigError(
        f"{size} processes were started, but trainer.devices x trainer.num_nodes is {trainer.world_size}; "
        "leave them out or make them equal"
    )
