"""uint8 frames -> what the model sees, on whatever device the frames are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.data.sampling import CropBox, SpatialView, spatial_views, torchvision_spatial_view
from mvit_video.model.clip_spec import ClipSpec

RGB = tuple[float, float, float]

_PIXELS_AT_ONCE = 1 << 25  # resized together: as floats the frames of a 4K video would fill the memory


class PendingClips(NamedTuple):
    """Clips as bytes, where these are fewer than their floats: they are finished where the model is.

    Attributes:
        frames: uint8 (N, 3, h, w), what is needed of them.
        finish: makes of these, on any device, float clips (V, 3, T, H, W).
    """

    frames: Tensor
    finish: Callable[[Tensor], Tensor]


Clips = Tensor | list[PendingClips | Tensor]  # float, or some that are pending


def finish_clips(clips: Clips, device: str | torch.device | None = None) -> Tensor:
    """Float clips (B, 3, T, H, W) on a device, where they are taken first; None: where they lie."""
    if isinstance(clips, Tensor):
        return clips.to(device, non_blocking=True)
    parts = [(part, None) if isinstance(part, Tensor) else part for part in clips]
    there = [(part.to(device, non_blocking=True), finish) for part, finish in parts]
    return torch.cat([part if finish is None else finish(part) for part, finish in there])


def view_crops(height: int, width: int, spec: ClipSpec) -> list[SpatialView]:
    """The test crops of frames of a size, all of one resized picture."""
    sizes = {"short_side": spec.short_side, "crop": spec.crop}
    if spec.pixels != "slowfast":
        return [torchvision_spatial_view(height, width, **sizes)]
    return spatial_views(height, width, num_crops=spec.num_crops, **sizes)


def resize_for_test(frames: Tensor, spec: ClipSpec) -> Tensor:
    """Resize and normalise uint8 frames (N, 3, H, W) as a model's tests do: float (N, 3, h, w).

    It is the one way from a ``ClipSpec`` to pixels: of files, windows, tensors and explanations.
    """
    height, width = frames.shape[-2:]
    view = view_crops(height, width, spec)[0]
    if spec.pixels == "image":  # as Pillow does it, antialiased
        resized = resize_bytes(frames, view.resized_height, view.resized_width, "bicubic").float()
    else:  # bilinear without antialiasing, as in the official code; it commutes with normalisation
        resized = _resize(frames, view.resized_height, view.resized_width)
    if spec.pixels != "slowfast":  # whole levels, as torchvision leaves them
        resized = resized.round()
    return normalise(resized, spec.mean, spec.std)


def cut_views(frames: Tensor, clips: Sequence[Sequence[int]], crops: Sequence[SpatialView]) -> Tensor:
    """Cut the views of one video: every clip with every crop, crops varying fastest.

    Args:
        frames: float (N, 3, h, w), resized, the frames that the clips need, each once.
        clips: for each clip, positions in ``frames``.

    Returns:
        float (clips * crops, 3, T, crop, crop)
    """
    pieces = [frames[:, :, c.top : c.top + c.crop, c.left : c.left + c.crop] for c in crops]
    return torch.stack([piece[list(clip)].transpose(0, 1) for clip in clips for piece in pieces])


def cut(frames: Tensor, box: CropBox) -> Tensor:
    """The box of pixels (..., H, W), a view of them."""
    return frames[..., box.top : box.top + box.height, box.left : box.left + box.width]


def cut_and_resize(frames: Tensor, view: CropBox | SpatialView, size: int | tuple[int, int]) -> Tensor:
    """Cut one rectangle out of uint8 frames (N, 3, H, W), mirrored where the view says so.

    Args:
        view: a box of the frames, which is resized, or a part of the resized frames.
        size: pixels of the square that it gives, or its height and width.

    Returns:
        float (N, 3, *size), from 0 to 255.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if isinstance(view, CropBox):
        frames = _resize(cut(frames, view), height, width)
    else:
        frames = _resize(frames, view.resized_height, view.resized_width)
        frames = frames[:, :, view.top : view.top + height, view.left : view.left + width]
    return frames.flip(-1) if view.flip else frames


def resize_bytes(frames: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize uint8 frames (N, 3, H, W) with antialiasing, as Pillow and torchvision do.

    Args:
        mode: "bilinear" or "bicubic".
    """
    if frames.shape[-2:] == (height, width):
        return frames
    options: dict[str, Any] = {"mode": mode, "align_corners": False, "antialias": True}
    if frames.device.type == "cpu":  # its kernel for bytes is Pillow's
        return F.interpolate(frames, size=(height, width), **options)
    resized = F.interpolate(frames.float(), size=(height, width), **options)
    return resized.round().clamp(0, 255).to(torch.uint8)


def normalise(frames: Tensor, mean: RGB, std: RGB) -> Tensor:
    """(N, 3, H, W) in [0, 255] -> float (x / 255 - mean) / std."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), frames.device)
    return torch.addcmul(shift, frames.float(), scale)


def denormalise(frames: Tensor, mean: RGB, std: RGB) -> Tensor:
    """The contrary of ``normalise``, rounded to uint8."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), frames.device)
    return ((frames - shift) / scale).round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _scale_and_shift(mean: RGB, std: RGB, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each (3, 1, 1); kept, since copies to a GPU wait for it."""
    with torch.inference_mode(mode=False):
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=device)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale[:, None, None], shift.float()[:, None, None]


def _resize(frames: Tensor, height: int, width: int) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames.float()
    at_once = max(1, _PIXELS_AT_ONCE // (frames.shape[-2] * frames.shape[-1]))
    options: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
    parts = [F.interpolate(part.float(), (height, width), **options) for part in frames.split(at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
