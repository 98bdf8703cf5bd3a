"""Pictures of masked clips, and of the features that are true and predicted."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from mvit_video.data.pixels import denormalise
from mvit_video.io.writing import replacing
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.pretraining.hog import BINS, cells_of
from mvit_video.pretraining.maskfeat import Features

_TILE, _MARGIN, _FRAMES = 112, 64, 8  # pixels of a frame and of the names beside; frames of a row
_GLYPH = 9  # pixels along the side of a cell


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
    cells = (
        cells_of(features.flatten(1, 3), (t, h, w)).mean(2).clamp(0, 1)
    )  # (B, T', bins, H, W), of the colours
    strokes = torch.einsum("btohw,oyx->bthywx", cells, _glyphs()).flatten(2, 3).flatten(3, 4)
    return strokes.clamp(0, 1).unsqueeze(2).expand(-1, -1, 3, -1, -1)


def _glyphs() -> Tensor:
    """For each bin, a stroke along the edge that gives such gradients, (bins, _GLYPH, _GLYPH)."""
    y, x = torch.meshgrid(*[torch.arange(_GLYPH) - _GLYPH // 2] * 2, indexing="ij")
    angle = (torch.arange(BINS) + 0.5) / BINS * math.pi  # of the gradient, from the y axis
    along_gradient = x * angle.sin()[:, None, None] + y * angle.cos()[:, None, None]
    return (along_gradient.abs() < 0.7).float() * (x**2 + y**2 <= (_GLYPH // 2) ** 2)
