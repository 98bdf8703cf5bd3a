"""What a person sees of a training, and what ends it early."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.profilers import Profiler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mvit_video.data.timing import clock
from mvit_video.io.console import end_by_signal, end_if_asked
from mvit_video.model.inference import is_faster_compiled
from mvit_video.training.sharding import FullySharded

log = logging.getLogger(__name__)


class CompileIfFaster(pl.Callback):
    """Compiles the model where steps on the device are faster for it; sharded ones aren't tried."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, FullySharded):
            return
        with trainer.precision_plugin.forward_context():
            is_faster = is_faster_compiled(pl_module.model, pl_module.batch_size)
        if trainer.strategy.broadcast(is_faster):
            pl_module.model.compile()


class EstimatedTime(pl.Callback):
    """Says once, after the first steps, how long an epoch and the rest of the training will take."""

    WARMUP, MEASURED = 5, 20  # steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps, self.start = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps += 1
        in_epoch = int(trainer.num_training_batches)
        warmup = min(self.WARMUP, in_epoch - 1)
        measured = min(self.MEASURED, in_epoch - warmup)
        if self.steps == warmup:
            self.start = time.perf_counter()
        if self.steps == warmup + measured:
            batch = (time.perf_counter() - self.start) / measured
            left = trainer.estimated_stepping_batches - trainer.global_step  # of the optimizer
            log.info(
                "one epoch will take about %s, the rest of the training %s (validation not counted)",
                duration(batch * in_epoch),
                duration(batch * left * trainer.accumulate_grad_batches),
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


class BatchPicture(pl.Callback):
    """Draws the first batch as the model sees it, augmented and mixed: ``batch.png``."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.path is None or not trainer.is_global_zero:
            return
        pl_module.draw_batch(batch, batch_idx, self.path)
        if self.path.exists():
            log.info("the first batch as the model sees it: %s", self.path)
        self.path = None


class Interrupts(pl.Callback):
    """Ctrl-C ends a run even where Python drops its exception, as in a destructor: with the next batch.

    It does so too where what closes down waits for ever, such as for a logger's thread that was interrupted.
    """

    END_AFTER_S = 60.0

    def __init__(self) -> None:
        self._interrupted = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        end_if_asked()
        self._before = signal.getsignal(signal.SIGINT)  # which may ignore it, as in a background job
        if self._before in (signal.default_int_handler, end_by_signal):
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        self._interrupted = True
        last = threading.Timer(self.END_AFTER_S, os._exit, (128 + signal.SIGINT,))
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    on_validation_batch_start = on_train_batch_start

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._before)


class EpochProgress(pl.Callback):
    """A bar for the epoch or its validation, below the log; only on terminals.

    Lightning's own reads the metrics after every step, which waits for the GPU.
    """

    def __init__(self) -> None:
        text, metrics = TextColumn("{task.description}"), TextColumn("{task.fields[metrics]}")
        bar = (text, BarColumn(10), MofNCompleteColumn(), TimeRemainingColumn(), metrics)
        self._progress = Progress(*bar, transient=True)
        self._task = self._progress.add_task("", metrics="", visible=False)
        self._open = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or not self._progress.console.is_terminal:
            return
        stdout, stderr = sys.stdout, sys.stderr
        self._open.enter_context(self._progress)  # what is printed from here on comes above the bar
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (stdout, stderr):
                self._open.callback(handler.setStream, handler.stream)
                handler.setStream(sys.stdout if handler.stream is stdout else sys.stderr)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", trainer.num_training_batches)

    on_train_start = on_train_epoch_start  # which isn't called where a run is resumed in an epoch
    on_validation_end = on_train_epoch_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._progress.update(self._task, completed=batch_idx + 1)
        every = cast(Any, trainer).log_every_n_steps or 1
        if self._progress.live.is_started and trainer.global_step % every == 0:
            found = trainer.callback_metrics  # reading them waits for the GPU
            names = [name for name in pl_module.train_metrics[:2] if f"train/{name}_step" in found]
            shown = [f"{name} {found[f'train/{name}_step'].item():.3f}" for name in names]
            if "clips/s_step" in found:
                shown.append(f"{found['clips/s_step'].item():.1f} clips/s")
            self._progress.update(self._task, metrics="  ".join(shown))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._show("validation", sum(sizes))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._progress.update(self._task, completed=batch_idx + 1)

    def teardown(self, *_: Any, **__: Any) -> None:
        self._open.close()

    on_exception = teardown

    def _show(self, description: str, total: float) -> None:
        self._progress.reset(self._task, total=total, description=description, visible=True)


class StageProfiler(Profiler):
    """Takes the stages "transfer" and "model" from what the Trainer says it does."""

    def __init__(self) -> None:
        super().__init__()
        self._outer: list[str] = []

    def start(self, action_name: str) -> None:
        if (current := clock()) and (name := _stage_of(action_name)):
            self._outer.append(current.switch(name))

    def stop(self, action_name: str) -> None:
        if (current := clock()) and _stage_of(action_name):
            current.switch(self._outer.pop())


def _stage_of(action: str) -> str | None:
    if action.endswith(".batch_to_device"):
        return "transfer"
    return "model" if action == "run_training_batch" or action.endswith("Strategy.validation_step") else None
