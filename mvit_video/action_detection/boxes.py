"""Key frames, and boxes that move with the pixels, as in PySlowFast's AVA data set.

``datasets/utils.py`` (``get_sequence``), ``ava_dataset.py`` and ``cv2_transform.py`` at 287ec007.
"""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from mvit_video.data.sampling import SpatialView, spatial_views
from mvit_video.errors import ConfigError
from mvit_video.model import ClipSpec

PixelSplit = Literal["train", "val", "test"]


def key_frame_indices(center: int, *, half_length: int, stride: int, num_frames: int) -> list[int]:
    """Frame numbers of the clip around a key frame; beyond the ends the first and the last frame repeat.

    Where ``stride`` doesn't divide ``half_length``, the key frame itself isn't among them, as officially.

    Args:
        center: number of the key frame.
        half_length: frames before it, and from it on; officially frames of a clip * stride // 2.

    Returns:
        ``ceil(2 * half_length / stride)`` numbers in [0, num_frames), not falling.

    Raises:
        ValueError: a length isn't positive.
    """
    for name, value in (("half_length", half_length), ("stride", stride), ("num_frames", num_frames)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    clip = range(center - half_length, center + half_length, stride)
    return [min(max(index, 0), num_frames - 1) for index in clip]


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) from shares of the picture to pixels, x1, y1, x2, y2, within the picture."""
    return clip_boxes(boxes * boxes.new_tensor([width, height, width, height]), height, width)


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) within [0, width - 1] x [0, height - 1]; those beyond lie on the border, without area."""
    return clip_boxes_to_image(boxes, (height - 1, width - 1))


def resize_boxes(boxes: Tensor, height: int, width: int, short_side: int) -> Tensor:
    """Boxes (N, 4) of a picture whose short side becomes ``short_side``.

    As officially, both axes are scaled by the factor of the long side, whose length is rounded down.
    """
    long, short = max(height, width), min(height, width)
    if short == short_side:
        return boxes
    return boxes * (int(long / short * short_side) / long)


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes (N, 4) of the mirrored picture: pixel x becomes ``width - 1 - x``."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2 - 1, y1, width - x1 - 1, y2], 1)


def move_boxes(boxes: Tensor, height: int, width: int, view: SpatialView, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4), shares of the whole picture, as pixels of a view of it, (height, width) ``size``.

    None is left out: of those outside of the view, a line or a corner stays at its border.
    """
    resized = resize_boxes(
        to_pixels(boxes, height, width), height, width, min(view.resized_height, view.resized_width)
    )
    cut = resized - boxes.new_tensor([view.left, view.top, view.left, view.top])
    if view.flip:
        cut = flip_boxes(cut, size[1])
    return clip_boxes(cut, *size)


def clip_view(
    height: int,
    width: int,
    spec: ClipSpec,
    split: PixelSplit,
    *,
    short_side_range: tuple[int, int] | None = None,
    flip_probability: float = 0.5,
    rng: random.Random | None = None,
) -> tuple[SpatialView, tuple[int, int]]:
    """What is seen of a picture, and height and width of that.

    "train": the inverse of the short side is drawn uniformly, then a square of ``spec.crop``, then whether it
    is mirrored. "val": the square in the middle of the picture whose short side is ``spec.crop``. "test": the
    whole picture, its short side ``spec.short_side``.

    Args:
        short_side_range: smallest and largest short side in training; None: 256 to 320 for crops of 224, and
            in proportion.
        rng: for "train".

    Raises:
        ConfigError: ``short_side_range`` are smaller than the crop.
    """
    if split == "test":
        view = spatial_views(height, width, short_side=spec.short_side, crop=1)[0]
        size = (view.resized_height, view.resized_width)
        return SpatialView(*size, top=0, left=0, crop=min(size)), size
    square = (spec.crop, spec.crop)
    if split == "val":
        return spatial_views(height, width, short_side=spec.crop, crop=spec.crop)[0], square
    assert rng is not None
    low, high = short_side_range or (round(spec.crop * 256 / 224), round(spec.crop * 320 / 224))
    if low < spec.crop or high < low:
        raise ConfigError(
            f"short_side_range [{low}, {high}] must rise and not be below the crop of {spec.crop}"
        )
    short_side = round(1.0 / rng.uniform(1.0 / high, 1.0 / low))
    view = spatial_views(height, width, short_side=short_side, crop=1)[0]
    rows, columns = view.resized_height, view.resized_width
    # The last possible offset is never drawn, as officially.
    top = rng.randrange(rows - spec.crop) if rows > spec.crop else 0
    left = rng.randrange(columns - spec.crop) if columns > spec.crop else 0
    return SpatialView(rows, columns, top, left, spec.crop, rng.random() < flip_probability), square


def cut_regions(maps: Tensor, boxes: Tensor, size: int, *, aligned: bool) -> Tensor:
    """RoIAlign with as many points as a box has places: float maps (B, C, H, W) -> (R, C, size, size).

    torchvision's has neither forward-mode nor second derivatives. The weights of its points are products of
    those along height and width, so products of matrices give the same.

    Args:
        boxes: (R, 5): index of the map, x1, y1, x2, y2 in its places; on the CPU, so that none waits for a
            GPU. No gradient of them is computed.
        aligned: as of ``torchvision.ops.roi_align``.
    """
    x1, y1, x2, y2 = boxes.detach()[:, 1:].unbind(1)
    rows = _cell_weights(y1, y2, maps.shape[2], size, aligned).to(maps.device)
    columns = _cell_weights(x1, x2, maps.shape[3], size, aligned).to(maps.device)
    with torch.autocast(maps.device.type, enabled=False):
        return rows[:, None] @ maps[boxes[:, 0].long()] @ columns[:, None].mT


def _cell_weights(low: Tensor, high: Tensor, length: int, size: int, aligned: bool) -> Tensor:
    """How much each place of an axis counts in each cell of regions on it, (R, size, length)."""
    low, extent = (low - 0.5, high - low) if aligned else (low, (high - low).clamp(min=1))
    low, cell = low[:, None, None], extent[:, None, None] / size
    counts = cell.ceil()  # points of a cell
    points = torch.arange(int(counts.max()) if len(counts) else 0)
    starts = low + torch.arange(size)[:, None] * cell
    places = starts + (points + 0.5) * cell / counts.clamp(min=1)
    counted = (points < counts) & (places >= -1) & (places <= length)
    distances = places.clamp(0, length - 1)[..., None] - torch.arange(length)
    weights = (1 - distances.abs()).clamp(min=0) * counted[..., None]  # of a point's two neighbours
    return weights.sum(2) / counts.clamp(min=1)
