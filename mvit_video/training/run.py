"""A training from its first step to its last checkpoint, by command or from Python."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, EarlyStopping, LambdaCallback
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.errors import ConfigError
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.writing import keep_former, remove_unfinished
from mvit_video.training import callbacks
from mvit_video.training.checkpoints import CHECKPOINTS, LastCheckpoint
from mvit_video.training.fit import fit
from mvit_video.training.metrics import BestCheckpoint, EpochLogger, ResumableMetrics, best_is
from mvit_video.training.module import Training
from mvit_video.training.plots import plot_history
from mvit_video.training.resume import resume
from mvit_video.training.sharding import AveragedWeights

log = logging.getLogger(__name__)


def make_callbacks(
    output: Path,
    monitor: str,
    *,
    checkpoints: bool = True,
    progress: bool = True,
    save_every_n_steps: int | None = 1000,
    ema: float | None = None,
    early_stopping: int | None = None,
) -> list[Callback]:
    """What every training is accompanied by.

    Args:
        monitor: name of the metric that ``best.ckpt`` and early stopping go by.
        save_every_n_steps: how often ``last.ckpt`` is written beside after epochs; None: not.
        ema: decay of averaged weights; None: none are kept.
        early_stopping: validations without a better ``monitor`` that end the training; None: none do.
    """
    # Means are logged before others read them, and Lightning puts checkpoints last.
    used: list[Callback] = [ResumableMetrics(), EpochLogger()]
    used.append(callbacks.BatchPicture(output / "batch.png"))
    if checkpoints:
        folder = output / CHECKPOINTS
        used += [BestCheckpoint(folder, monitor), LastCheckpoint(folder, save_every_n_steps)]
    if progress:
        used.append(callbacks.EpochProgress())
    if ema is not None:
        used.append(AveragedWeights(decay=ema))
    if early_stopping is not None:
        mode = best_is(monitor)
        used.append(
            EarlyStopping(monitor, patience=early_stopping, mode=mode, check_on_train_epoch_end=False)
        )
    return [*used, callbacks.EstimatedTime(), callbacks.Interrupts()]


def run(
    trainer: pl.Trainer,
    training: Training,
    output: Path,
    *,
    monitor: str,
    run_fingerprint: Fingerprint,
    resume_from: Path | None,
    max_bad_videos: float,
) -> float | None:
    """Fit, with the callbacks of ``make_callbacks`` in the Trainer; close the loaders, draw the curves.

    Args:
        run_fingerprint: what a run must share with the checkpoint that it goes on from.
        max_bad_videos: how many may be unreadable, see ``allowed_bad_videos``.

    Returns:
        The best value of ``monitor``; None without a validation.

    Raises:
        ConfigError: ``monitor`` is no metric, or the checkpoint is of another run.
        SystemExit: a signal asked the run to end.
    """
    module, folder, bad_file = training.module, output / CHECKPOINTS, output / "bad_videos.csv"
    names = [f"val/{name}" for name in module.val_metrics]
    if monitor not in names:
        raise ConfigError(f"monitor={monitor} is none of the metrics of a validation: {', '.join(names)}")
    log.info("output directory: %s", output)
    module.run_fingerprint = run_fingerprint = run_fingerprint | {"monitor": monitor}
    if resume_from is not None:
        resume(resume_from, run_fingerprint, training.training, trainer.max_epochs, trainer.max_steps)
    if trainer.is_global_zero:
        remove_unfinished(folder)
        if resume_from is None or resume_from.parent != folder:
            keep_former(folder)
        if resume_from is None:
            keep_former(bad_file)
    bad_videos = BadVideos(
        bad_file,
        allowed=allowed_bad_videos(max_bad_videos, training.num_files),
        total=training.num_files,
        go_on=resume_from is not None,
    )
    accompanying: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    history = next(found for found in accompanying if isinstance(found, EpochLogger))

    def note(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *_: Any) -> None:
        bad_videos.note(batch.bad)  # raises DataError as soon as they are too many

    accompanying.insert(0, LambdaCallback(on_train_batch_start=note, on_validation_batch_start=note))
    try:
        with closing(training.training) as clips, closing(training.validation) as held_out:
            fit(trainer, module, clips, held_out, resume_from)
    except SIGTERMException:
        log.warning("stopped by a signal; ckpt_path=last resumes from the last checkpoint")
        sys.exit(128 + signal.SIGTERM)
    if count := len(bad_videos.found):
        log.warning("%d unreadable video%s, listed in %s", count, "s"[: count > 1], bad_videos.file)
    return _conclude(trainer, history, output / "learning_curve.png", monitor)


def _conclude(trainer: pl.Trainer, history: EpochLogger, curves: Path, monitor: str) -> float | None:
    """Draw the curves and tell of the best checkpoint; the best value of ``monitor``."""
    if history.epochs and trainer.is_global_zero:
        plot_history(history.epochs, curves, monitor=monitor)
        log.info("learning curve: %s", curves)
    best = trainer.checkpoint_callback
    if not isinstance(best, BestCheckpoint) or best.best_model_score is None:
        return history.best(monitor)
    value = float(best.best_model_score)
    log.info("best checkpoint: %s (%s)", best.best_model_path, history.describe(monitor, value))
    return value
