"""uint8 frames -> what the model sees, on whatever device the frames are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.data.sampling import CropBox, SpatialView

RGB = tuple[float, float, float]

_PIXELS_AT_ONCE = 1 << 25  # resized together: as floats the frames of a 4K video would fill the memory


def test_clips(
    frames: Tensor,
    clips: Sequence[Sequence[int]],
    views: Sequence[SpatialView],
    *,
    mean: RGB,
    std: RGB,
    round_pixels: bool = False,  # noqa: PT028 (no test)
    bicubic: bool = False,  # noqa: PT028
) -> Tensor:
    """Cut the views of one video: every clip with every crop, crops varying fastest.

    Args:
        frames: uint8 (N, 3, H, W), the frames that the clips need, each once.
        clips: for each clip, positions in ``frames``.
        views: crops of one resized picture.
        mean, std: of RGB in [0, 1].
        round_pixels: resized pictures have whole levels, as torchvision leaves them.
        bicubic: resized as Pillow does it, antialiased.

    Returns:
        float (clips * views, 3, T, crop, crop)
    """
    view = views[0]
    if bicubic:
        resized = _resize_bicubic(frames, view.resized_height, view.resized_width)
    else:  # bilinear without antialiasing, as in the official code; it commutes with normalisation
        resized = _resize(frames, view.resized_height, view.resized_width)
    resized = normalise(resized.round() if round_pixels else resized, mean, std)
    crops = [resized[:, :, v.top : v.top + v.crop, v.left : v.left + v.crop] for v in views]
    return torch.stack([crop[list(clip)].transpose(0, 1) for clip in clips for crop in crops])


def training_clip(frames: Tensor, view: CropBox | SpatialView, size: int, *, mean: RGB, std: RGB) -> Tensor:
    """Cut one square out of all frames of a clip, mirrored where the view says so.

    Args:
        frames: uint8 (T, 3, H, W).
        view: a box of the frames, which is resized to a square, or a square of the resized frames.
        size: pixels of the square.

    Returns:
        float (3, T, size, size)
    """
    if isinstance(view, CropBox):
        frames = frames[:, :, view.top : view.top + view.height, view.left : view.left + view.width]
        frames = _resize(frames, size, size)
    else:
        frames = _resize(frames, view.resized_height, view.resized_width)
        frames = frames[:, :, view.top : view.top + size, view.left : view.left + size]
    clip = normalise(frames, mean, std)
    return (clip.flip(-1) if view.flip else clip).transpose(0, 1).contiguous()


def normalise(frames: Tensor, mean: RGB, std: RGB) -> Tensor:
    """(T, 3, H, W) in [0, 255] -> float (x / 255 - mean) / std."""
    scale = frames.new_tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    shift = frames.new_tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    return torch.addcmul(shift[:, None, None], frames.float(), scale[:, None, None])


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames.float()
    at_once = max(1, _PIXELS_AT_ONCE // (frames.shape[-2] * frames.shape[-1]))
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
    parts = [F.interpolate(part.float(), (height, width), **options) for part in frames.split(at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _resize_bicubic(frames: Tensor, height: int, width: int) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames.float()
    options: dict[str, Any] = {"mode": "bicubic", "align_corners": False, "antialias": True}
    if frames.device.type == "cpu":  # its kernel for bytes is Pillow's
        return F.interpolate(frames, size=(height, width), **options).float()
    return F.interpolate(frames.float(), size=(height, width), **options).clamp(0, 255)
