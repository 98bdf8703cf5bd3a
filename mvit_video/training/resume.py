"""A run that was stopped, killed at any time even, goes on with the very batch that was due.

What a step does depends on the weights, on the batch (a state of the loader) and on random numbers, whose
generators are seeded anew for every step, so that nothing about them needs to be kept.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torchmetrics import Metric

from mvit_video.data.loader import ClipLoader
from mvit_video.data.ranks import in_slurm
from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.training import processes

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_AVERAGES, _MEANS = "epoch_averages", "epoch_means"
_ASK_EVERY = 10  # steps, where several processes have to agree


class StepSeeds(pl.Callback):
    """Seeds all generators before each training step, by seed, epoch, batch and process alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = f"{self.seed} {trainer.current_epoch} {batch_idx} {trainer.global_rank}"
        number = random.Random(key).getrandbits(32)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (libraries draw from it)
        torch.manual_seed(number)


class EpochAverages(pl.Callback):
    """Losses and accuracies of an epoch count all its batches, where it was stopped in between too."""

    def __init__(self) -> None:
        self._before: dict[str, dict[str, Tensor]] = {}
        self._means: dict[str, float] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches:
            checkpoint[_AVERAGES] = self._before | {
                key: {
                    name: trainer.strategy.reduce(getattr(metric, name).clone(), reduce_op="sum")
                    for name in metric._defaults
                }
                for key, metric in _running_averages(trainer)
            }
        elif trainer.validating:  # all that is left of the epoch
            checkpoint[_MEANS] = self._means | {
                result.meta.forked_name(on_step=False): float(
                    result.compute() if result.is_tensor else result.value.compute()
                )
                for result in trainer.fit_loop.epoch_loop._results.values()
                if result.meta.on_epoch and not result.has_reset
            }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._means = checkpoint.get(_MEANS, {})
        if trainer.is_global_zero:
            self._before = checkpoint.get(_AVERAGES, {})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, mean in self._means.items():
            pl_module.log(name, mean)
        self._means = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Lightning knows what is averaged once it was logged: after the first batch."""
        if self._before:
            for key, metric in _running_averages(trainer):
                for name, value in self._before.get(key, {}).items():
                    setattr(metric, name, getattr(metric, name) + value.to(getattr(metric, name).device))
            self._before = {}


def _running_averages(trainer: pl.Trainer) -> Iterator[tuple[str, Metric]]:
    """What training steps have logged, summed over the epoch so far."""
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        metric = result if result.is_tensor else result.value
        summed = not result.is_tensor or result.meta.is_mean_reduction
        if summed and all(isinstance(getattr(metric, name), Tensor) for name in metric._defaults):
            yield key, metric


class AtomicCheckpoints(TorchCheckpointIO):
    """A file is there wholly and safely on the disk, or as it was before; the last but one is kept too.

    (Lightning's own writing goes through a temporary folder, from where a file may be copied bit by bit.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if target.name == LAST and target.exists():
            target.replace(target.with_name(PREVIOUS))
        unfinished.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in a folder: after every epoch, every so many steps, and when asked to end.

    SIGTERM asks, and in a Slurm job SIGUSR1 too, upon which the job is queued again.

    A checkpoint of a step that validation follows is written in the validation, and leads to it.

    Args:
        every_n_steps: None: after epochs alone.
    """

    def __init__(self, folder: Path, every_n_steps: int | None) -> None:
        self.path, self.every_n_steps = folder / LAST, every_n_steps
        self._step = 0  # of the optimizer, after the batch before
        self._gathering = False  # gradients of several batches, which aren't saved
        self._terminated = self._requeues = False  # asked to end by SIGTERM, by SIGUSR1
        self._leads_to_validation = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        # In the place of Lightning's handlers, which save in the middle of a step, and after which processes
        # may wait for one another in vain.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)
            if in_slurm():
                signal.signal(signal.SIGUSR1, self._requeue)

    def _terminate(self, number: int, frame: Any) -> None:
        """After this batch; asked a second time, at once."""
        if self._terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._terminated = True

    def _requeue(self, number: int, frame: Any) -> None:
        self._requeues = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._gathering = step == self._step
        self._step = step
        loop = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(cast(Any, loop._data_fetcher))
        if self._gathering or validates or batch_idx + 1 == trainer.num_training_batches:
            return
        end = (trainer.world_size == 1 or step % _ASK_EVERY == 0) and self._ends(trainer)
        if end or self._is_due():
            self._save(trainer)
        if end:
            self._end(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:  # there is nothing to save yet
            return
        end = self._ends(trainer)
        in_epoch = trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches
        if end or (in_epoch and self._is_due()):
            self._save_in_validation(trainer)
        if end:
            self._end(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking and self._ends(trainer):
            self._save_in_validation(trainer)
            self._end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        if self._ends(trainer):
            self._end(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._leads_to_validation:
            # What Lightning takes for a validation that was left in its first batch.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = progress

    def _is_due(self) -> bool:
        return self.every_n_steps is not None and self._step % self.every_n_steps == 0

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Whether any process was asked to end."""
        return trainer.strategy.reduce_boolean_decision(self._terminated or self._requeues, all=False)

    def _end(self, trainer: pl.Trainer) -> None:
        if self._requeues and trainer.is_global_zero:
            processes.requeue()
        raise SIGTERMException

    def _save_in_validation(self, trainer: pl.Trainer) -> None:
        if self._gathering or trainer.global_step == trainer.max_steps:
            return  # nothing would lead to it; the checkpoint before does
        self._leads_to_validation = True
        self._save(trainer)
        self._leads_to_validation = False

    def _save(self, trainer: pl.Trainer) -> None:
        if not cast(Any, trainer).fast_dev_run:
            trainer.save_checkpoint(self.path)


def find_checkpoint(ckpt_path: str | None, output: Path, *, own_only: bool) -> Path | None:
    """The checkpoint that ``ckpt_path`` means for a run in the folder ``output``; None: start at the front.

    "last" is what this run has left in its folder; where there is nothing, what the newest run beside it has
    left or, if ``own_only``, nothing. A damaged last checkpoint is reported, and the previous one taken.

    Raises CheckpointError for a file that isn't there, is damaged or holds weights alone, ConfigError where
    there is nothing to resume.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        found = [Path(ckpt_path)]
    else:
        found = _left_in(output)
        if not found and own_only:
            log.info("nothing to resume in %s yet: starting at the front", output)
            return None
        runs = output.parents[1]
        if not found:
            left = [files for run in runs.glob("*/*") if (files := _left_in(run))]
            found = max(left, key=lambda files: files[0].stat().st_mtime, default=[])
        if not found:
            raise ConfigError(f"ckpt_path=last: no run below {runs} has left a checkpoint")
    problems = []
    for path in found:
        problem = _problem(path)
        if problem is None:
            log.info("resuming from %s", path)
            return path
        problems.append(f"{path}: {problem}")
        log.warning("%s", problems[-1])
    raise CheckpointError("; ".join(problems))


def restore_loader(loader: ClipLoader[Any], path: Path) -> None:
    """Make the loader go on where it was when a checkpoint was saved.

    Lightning would do so itself, had it not set the loader up before, to count the steps of the schedule.
    """
    progress = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["loops"]["fit_loop"]
    if not progress["epoch_loop.batch_progress"]["is_last_batch"]:  # else the next epoch is due
        for state in progress["state_dict"].get("combined_loader", []):
            loader.load_state_dict(state)


def _left_in(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    return [file for file in (folder / LAST, folder / PREVIOUS) if file.is_file()]


def _problem(path: Path) -> str | None:
    """Why nothing can be resumed from a checkpoint; None if it can."""
    if not path.is_file():
        return "no such file; ckpt_path takes a checkpoint or 'last'"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # by the checksums of what it holds
        if damaged is None:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # whatever reading it raises
        return "the checkpoint is cut off or damaged"
    if damaged is not None:
        return "the checkpoint is damaged"
    if not isinstance(checkpoint, dict) or not {"loops", "optimizer_states"} <= checkpoint.keys():
        return "no checkpoint of a run but weights alone; weights=FILE starts from them"
    return None
