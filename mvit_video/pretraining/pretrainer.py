"""Training without labels: predict what is masked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from mvit_video.pretraining.data import MaskedClips
from mvit_video.pretraining.hog import BINS, CELL
from mvit_video.pretraining.maskfeat import MaskFeat, resize_masks
from mvit_video.pretraining.picture import plot_masked
from mvit_video.training.module import Losses, TrainingModule
from mvit_video.weights import model_metadata

PICTURE = "predictions.png"
_SHOWN = 3  # clips


class Pretrainer(TrainingModule):
    """Trains a ``MaskFeat`` on masked clips, and draws what it predicts for held-out ones.

    Args:
        model: gives predictions and targets.
        recipe: as of ``TrainingModule``.
    """

    model: MaskFeat

    def __init__(self, model: MaskFeat, **recipe: Any) -> None:
        super().__init__(model, **recipe)
        # Clips, masks and predictions of the first batch of a validation.
        self._first: tuple[Tensor, Tensor, Tensor] | None = None

    def training_losses(self, batch: MaskedClips, batch_index: int) -> Losses:
        loss = self.model.loss_of(self(batch.clips, batch.masks))
        saved = {"clips": batch.clips, "masks": batch.masks, "paths": list(batch.paths)}
        return Losses({"loss": loss}, count=len(batch.clips), to_save=saved)

    def validation_losses(self, batch: MaskedClips) -> Losses | None:
        if not len(batch.clips):
            return None
        pairs = self(batch.clips, batch.masks)
        if self._first is None:
            self._first = batch.clips[:_SHOWN], batch.masks[:_SHOWN], pairs[-1][0].float()
        return Losses({"loss": self.model.loss_of(pairs)}, count=len(batch.clips), to_save={})

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self._first is not None and self.trainer.is_global_zero:
            clips, masks, predictions = self._first
            true, predicted = self._with_predictions(clips, masks, predictions)
            path = Path(self.trainer.default_root_dir) / PICTURE
            plot_masked(
                clips, masks, path, self.model.protocol, features=(self.model.features, true, predicted)
            )
        self._first = None

    def _with_predictions(self, clips: Tensor, masks: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Features of all tokens (B, T', H', W', length): the true ones, and the predicted where masked."""
        length, crop = predictions.shape[-1], clips.shape[-1]
        is_hog = self.model.features == "hog"
        stride = CELL * math.isqrt(length // (3 * BINS)) if is_hog else math.isqrt(length // 3)
        grid = (masks.shape[1], crop // stride, crop // stride)
        true = self.model.targets(clips, grid)
        masked = resize_masks(masks, grid).bool()
        predicted = true.clone()
        predicted[masked] = predictions[: int(masked.sum())]  # those of the first clips come first
        return true.unflatten(1, grid), predicted.unflatten(1, grid)

    def metadata(self) -> dict[str, Any]:
        about = {"depths": list(self.model.depths), "features": self.model.features}
        return {**model_metadata(self.model), "pretraining": about}

    def draw_batch(self, batch: MaskedClips, batch_index: int, path: Path) -> None:
        plot_masked(batch.clips[:_SHOWN], batch.masks[:_SHOWN], path, self.model.protocol)
