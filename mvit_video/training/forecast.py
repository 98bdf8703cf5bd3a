"""What a user wants to know before hours are spent."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
import torch

log = logging.getLogger(__name__)


class Forecast(pl.Callback):
    """Says once, after the first steps, how long an epoch and the rest of the training will take."""

    WARMUP, MEASURED = 5, 20  # steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps, self.start = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        in_epoch = int(trainer.num_training_batches)
        warmup = min(self.WARMUP, in_epoch - 1)
        measured = min(self.MEASURED, in_epoch - warmup)
        if self.steps == warmup:
            self.start = time.perf_counter()
        if self.steps == warmup + measured:
            epoch = (time.perf_counter() - self.start) / measured * in_epoch
            left = (trainer.max_epochs or 1) - trainer.current_epoch
            log.info(
                "one epoch will take about %s, the training %s (%d epochs, validation not counted)",
                duration(epoch),
                duration(epoch * left),
                left,
            )


def duration(seconds: float) -> str:
    """For people: "3 d 4 h", "2 h 5 min", "12 min", "40 s"."""
    minutes = round(seconds / 60)
    if minutes >= 24 * 60:
        hours = round(seconds / 3600)
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 2 else f"{max(round(seconds), 1)} s"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
