"""Fit, and end in words that a person can act on."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LambdaCallback

from mvit_video.errors import ConfigError, MVitVideoError, TrainingError

# Warnings that a user can do nothing about, or that are errors of our own.
_REMARKS = (
    "does not have many workers|Checkpoint directory .* exists|isinstance.treespec, LeafSpec."
    "|module.s. in eval mode at the start of training|AMP with fp16 is not supported on CPU"
    "|number of training batches .* is smaller than the logging interval"
    "|could not find the monitored key"  # where no validation was due
    "|It is recommended to use .self.log"  # of what all processes agree on
)


def fit(
    trainer: pl.Trainer, module: pl.LightningModule, training: Any, validation: Any, ckpt_path: Path | None
) -> None:
    """``trainer.fit``.

    Raises:
        KeyboardInterrupt: on Ctrl-C, for which Lightning ends the process without a word.
        SIGTERMException: a signal asked to end.
        TrainingError: memory isn't enough.
        ConfigError: Lightning refuses a setting, or the checkpoint doesn't fit.
        MVitVideoError: another process has ended.
    """
    done: set[bool] = set()  # whether a step was made
    trainer.callbacks.append(LambdaCallback(on_train_batch_end=lambda *_: done.add(True)))  # type: ignore[attr-defined]
    try:
        with tame_lightning():
            trainer.fit(module, training, validation, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as end:
        if trainer.interrupted and end.code == 1:
            raise KeyboardInterrupt from None
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise TrainingError(
                "out of memory: lower batch_size (trainer.accumulate_grad_batches makes up for that), or set "
                "model.checkpoint_blocks=true or trainer.precision=bf16-mixed"
            ) from None
        if trainer.world_size > 1 and "gloo" in str(error):  # whose text is about sockets
            failed = f"rank {trainer.global_rank} of {trainer.world_size}: another rank failed"
            raise MVitVideoError(f"{failed}; see its error above") from None
        if ckpt_path is None or done or isinstance(error, MVitVideoError):
            raise
        raise ConfigError(
            f"{ckpt_path} can't be resumed with these settings ({_first_line(error)}); give those that it "
            f"was started with, or start a new run with weights={ckpt_path}"
        ) from None


@contextmanager
def tame_lightning() -> Iterator[None]:
    """Raise Lightning's own complaints about settings as ConfigError, and leave out its remarks."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f".*({_REMARKS})")
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
    except (MisconfigurationException, ValueError, ZeroDivisionError) as error:
        origin = traceback.extract_tb(error.__traceback__)[-1].filename
        of_lightning = {"pytorch_lightning", "lightning_fabric"} & set(Path(origin).parts)
        if not isinstance(error, MisconfigurationException) and not of_lightning:
            raise
        raise ConfigError(f"trainer: {_first_line(error)}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
