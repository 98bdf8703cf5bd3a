"""When and how checkpoints are written: after epochs, every so many steps, and when a run is asked to end."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mvit_video.data.ranks import in_slurm
from mvit_video.io.writing import interrupts_deferred, replacing
from mvit_video.training import processes
from mvit_video.training.metrics import is_cut

CHECKPOINTS, LAST, PREVIOUS = "checkpoints", "last.ckpt", "previous.ckpt"  # a run's folder, files in it
_ASK_EVERY = 10  # steps, where several processes have to agree


class AtomicCheckpoints(TorchCheckpointIO):
    """A file is there wholly and safely on the disk, or as it was before; the last but one is kept too.

    (Lightning's own writing goes through a temporary folder, from where a file may be copied bit by bit.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target = Path(path)
        with interrupts_deferred(), replacing(target) as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            if target.name == LAST and target.exists():
                target.replace(target.with_name(PREVIOUS))


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` in a folder: after every epoch, every so many steps, and when asked to end.

    SIGTERM and SIGHUP ask, and in a Slurm job SIGUSR1 too, upon which the job is queued again.

    A checkpoint of a step that validation follows is written in the validation, and leads to it.

    Args:
        every_n_steps: None: after epochs alone.
    """

    def __init__(self, folder: Path, every_n_steps: int | None) -> None:
        self.path, self.every_n_steps = folder / LAST, every_n_steps
        self._terminated = self._requeues = False  # asked to end by SIGTERM, by SIGUSR1
        self._leads_to_validation = self._ends_cut_epoch = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In the place of Lightning's handlers, which save in the middle of a step, and after which processes
        # may wait for one another in vain.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):  # the latter where a terminal is closed
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._terminate)
            if in_slurm():
                signal.signal(signal.SIGUSR1, self._requeue)

    def _terminate(self, number: int, frame: Any) -> None:
        """After this batch; asked a second time, at once."""
        if self._terminated:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._terminated = True

    def _requeue(self, number: int, frame: Any) -> None:
        self._requeues = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(cast(Any, loop._data_fetcher))
        if _is_gathering(trainer) or validates or batch_idx + 1 == trainer.num_training_batches:
            return
        is_due = self._is_due(trainer)
        if is_due or trainer.world_size == 1 or trainer.global_step % _ASK_EVERY == 0:
            self._write(trainer, is_due)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:  # else there is nothing to save yet
            self._write(trainer, is_cut(trainer) and self._is_due(trainer), validating=True)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, False, validating=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._ends_cut_epoch = is_cut(trainer)
        self._write(trainer, True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._ends_cut_epoch:
            _uncount_epoch(trainer, checkpoint["loops"]["fit_loop"])
        if self._leads_to_validation:
            # What Lightning takes for a validation that was left in its first batch.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress = {"total": begun, "current": dict.fromkeys(begun, 0), "is_last_batch": False}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = progress

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0

    def _write(self, trainer: pl.Trainer, is_due: bool, *, validating: bool = False) -> None:
        """Where a checkpoint is due, or any process was asked to end; raises SIGTERMException then."""
        ends = trainer.strategy.reduce_boolean_decision(self._terminated or self._requeues, all=False)
        # To such a validation nothing would lead; the checkpoint before does.
        left_out = validating and (_is_gathering(trainer) or trainer.global_step == trainer.max_steps)
        if (ends or is_due) and not left_out and not cast(Any, trainer).fast_dev_run:
            self._leads_to_validation = validating
            trainer.save_checkpoint(self.path)
            self._leads_to_validation = False
        if ends:
            if self._requeues and trainer.is_global_zero:
                processes.requeue()
            raise SIGTERMException


def _is_gathering(trainer: pl.Trainer) -> bool:
    """Gradients of several batches, which aren't saved."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def _uncount_epoch(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    """Make of the state that ends a cut epoch, which Lightning counts as done, that of one which goes on."""
    for progress in ("total", "current"):
        loops["epoch_progress"][progress]["processed"] = loops["epoch_progress"][progress]["completed"]
    loop = trainer.fit_loop
    validates = (loop.batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0
    if validates and loop.epoch_loop._should_check_val_epoch():
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # it steps again past this validation
