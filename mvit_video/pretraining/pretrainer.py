"""Training without labels: predict what is masked, and draw it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from mvit_video.data.pixels import denormalise
from mvit_video.io.writing import replacing
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.pretraining.data import MaskedClips
from mvit_video.pretraining.hog import BINS, cells_of
from mvit_video.pretraining.maskfeat import Features, MaskFeat, resize_masks
from mvit_video.training.module import Losses, TrainingModule
from mvit_video.weights import model_metadata

PICTURE = "predictions.png"
_SHOWN = 3  # clips
_TILE, _MARGIN, _FRAMES = 112, 64, 8  # pixels of a frame and of the names beside; frames of a row
_GLYPH = 9  # pixels along the side of a cell


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
        return Losses({"loss": self.model.loss_of(pairs)}, count=len(batch.clips))

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
        side = clips.shape[-1] // self.model.token_side
        grid = (masks.shape[1], side, side)
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


def plot_masked(
    clips: Tensor,
    masks: Tensor,
    path: Path,
    spec: ClipSpec,
    *,
    features: tuple[Features, Tensor, Tensor] | None = None,
) -> None:
    """Rows for each clip: its frames, what is left of them and, if given, true and predicted features.

    Args:
        clips: normalised float (B, 3, T, H, W).
        masks: (B, T', h, w), nonzero where masked.
        features: their kind, the true and the predicted ones of all tokens, (B, T', H', W', length).
    """
    stride = clips.shape[2] // masks.shape[1]
    times = torch.linspace(0, masks.shape[1] - 1, min(_FRAMES, masks.shape[1])).round().long().tolist()
    frames = denormalise(clips.detach().float().movedim(1, 2)[:, ::stride], spec.mean, spec.std) / 255
    hidden = F.interpolate(masks.float(), size=frames.shape[3:], mode="nearest").bool().unsqueeze(2)
    rows = {"clip": frames, "seen": frames.masked_fill(hidden, 0.5)}  # (B, T', 3, H, W) in 0..1
    if features is not None:
        kind, true, predicted = features
        rows |= {"true": render(true, kind), "predicted": render(predicted, kind)}
    height, width = _TILE * len(rows) * len(clips), _MARGIN + _TILE * len(times)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (clip, name) in enumerate((clip, name) for clip in range(len(clips)) for name in rows):
        tiles = F.interpolate(rows[name][clip, times].float().cpu(), size=(_TILE, _TILE), mode="nearest")
        strip = (tiles * 255).byte().permute(2, 0, 3, 1).flatten(1, 2)  # (tile, frames * tile, 3)
        picture.paste(Image.fromarray(strip.numpy()), (_MARGIN, number * _TILE))
        draw.text((4, number * _TILE + 4), name, fill="black")
    with replacing(path) as file:
        picture.save(file, format="png")


def render(features: Tensor, kind: Features) -> Tensor:
    """Features (B, T', H', W', length) as pictures (B, T', 3, H, W), in 0..1."""
    b, t, h, w, length = features.shape
    features = features.detach().float().cpu()
    if kind == "pixels":
        side = math.isqrt(length // 3)
        patches = features.reshape(b, t, h, w, side, side, 3).permute(0, 1, 6, 2, 4, 3, 5)
        return (patches.reshape(b, t, 3, h * side, w * side) / 6 + 0.5).clamp(0, 1)
    # The mean of the colours, (B, T', bins, H, W).
    cells = cells_of(features.flatten(1, 3), (t, h, w)).mean(2).clamp(0, 1)
    strokes = torch.einsum("btohw,oyx->bthywx", cells, _glyphs()).flatten(2, 3).flatten(3, 4)
    return strokes.clamp(0, 1).unsqueeze(2).expand(-1, -1, 3, -1, -1)


def _glyphs() -> Tensor:
    """For each bin, a stroke along the edge that gives such gradients, (bins, _GLYPH, _GLYPH)."""
    y, x = torch.meshgrid(*[torch.arange(_GLYPH) - _GLYPH // 2] * 2, indexing="ij")
    angle = (torch.arange(BINS) + 0.5) / BINS * math.pi  # of the gradient, from the y axis
    along_gradient = x * angle.sin()[:, None, None] + y * angle.cos()[:, None, None]
    return (along_gradient.abs() < 0.7).float() * (x**2 + y**2 <= (_GLYPH // 2) ** 2)
