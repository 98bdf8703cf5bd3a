"""Bad videos while a model is trained."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from mvit_video.data.bad_videos import BadVideos
from mvit_video.data.datasets import Batch


class BadVideoPolicy(pl.Callback):
    """Notes the bad videos of every batch. Raises DataError when they are too many.

    Attributes:
        bad_videos: where to; it is set before training, when the number of videos is known.
    """

    bad_videos: BadVideos

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._note(batch)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._note(batch)

    def _note(self, batch: Any) -> None:
        self.bad_videos.note(batch.bad)
        self.bad_videos.check()
