"""Augmentation of images with objects: resized, cropped, flipped and padded together.

The recipes are those of detectron2's ``configs/common/data`` and ``projects/MViTv2/configs`` at 02b5c4e2.
Images are resized by Pillow's bilinear filter, whose pixels torchvision's resizing misses by up to a
level; polygons are cut at the border of a crop, which ``torchvision.transforms.v2`` doesn't know.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvit_video.detection.roi_heads import Target
from mvit_video.errors import ConfigError

TEST_SHORT_SIDE, MAX_SIDE = 800, 1333
JITTER_SIZE = 1024
PADDING = 128  # grey level

Masks = list[list[NDArray[np.float64]]] | NDArray[np.bool_]


@dataclass(frozen=True)
class Objects:
    """An image and the objects in it.

    Attributes:
        boxes: float64 (M, 4), xyxy pixels; they may reach beyond the image until ``target`` clips them.
        labels: int64 (M,).
        masks: of each object its polygons, float64 (points, 2), or one bool (H, W) for each.
    """

    image: Image.Image
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: Masks

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image, pixels."""
        return self.image.height, self.image.width

    def resized(self, height: int, width: int) -> Objects:
        """Stretched to another size; bitmaps by their nearest pixels."""
        scale = np.array([width / self.image.width, height / self.image.height])
        masks: Masks
        if isinstance(self.masks, np.ndarray):
            bitmaps = map(Image.fromarray, self.masks)
            stretched = [bitmap.resize((width, height), Image.Resampling.NEAREST) for bitmap in bitmaps]
            masks = np.array([np.asarray(m) for m in stretched], bool).reshape(-1, height, width)
        else:
            masks = [[part * scale for part in parts] for parts in self.masks]
        image = self.image.resize((width, height), Image.Resampling.BILINEAR)
        return replace(self, image=image, boxes=self.boxes * np.tile(scale, 2), masks=masks)

    def cropped(self, top: int, left: int, height: int, width: int) -> Objects:
        """The part of the image, and of the objects' masks, in a window."""
        offset = np.array([left, top], dtype=np.float64)
        masks: Masks
        if isinstance(self.masks, np.ndarray):
            masks = self.masks[:, top : top + height, left : left + width]
        else:
            masks = [
                [part - offset for whole in parts for part in _cut(whole, top, left, height, width)]
                for parts in self.masks
            ]
        image = self.image.crop((left, top, left + width, top + height))
        return replace(self, image=image, boxes=self.boxes - np.tile(offset, 2), masks=masks)

    def flipped(self) -> Objects:
        """Mirrored, left to right."""
        width = self.image.width
        boxes = self.boxes.copy()
        boxes[:, [0, 2]] = width - self.boxes[:, [2, 0]]
        masks: Masks
        if isinstance(self.masks, np.ndarray):
            masks = self.masks[:, :, ::-1]
        else:
            masks = [[part * [-1, 1] + [width, 0] for part in parts] for parts in self.masks]
        image = self.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return replace(self, image=image, boxes=boxes, masks=masks)

    def padded(self, height: int, width: int) -> Objects:
        """On a grey canvas, in its upper left corner."""
        canvas = Image.new("RGB", (width, height), (PADDING,) * 3)
        canvas.paste(self.image, (0, 0))
        masks = self.masks
        if isinstance(masks, np.ndarray):
            masks = np.pad(masks, [(0, 0), (0, height - masks.shape[1]), (0, width - masks.shape[2])])
        return replace(self, image=canvas, masks=masks)

    def target(self, *, boxes_from_masks: bool = False) -> tuple[Tensor, Target]:
        """The image, uint8 (3, H, W), and the objects that are left in it.

        Args:
            boxes_from_masks: boxes tight around what is left of the masks, else the annotated ones, clipped.
        """
        limits = np.array([self.image.width, self.image.height] * 2)
        boxes = np.minimum(self.boxes.clip(min=0), limits).astype(np.float32)
        kept = np.array([np.any(m) if isinstance(m, np.ndarray) else len(m) > 0 for m in self.masks], bool)
        for i in np.flatnonzero(kept) if boxes_from_masks else ():
            boxes[i] = _box_around(self.masks[i])
        kept &= ((boxes[:, 2:] - boxes[:, :2]) > 1e-5).all(1)
        masks: Tensor | list[list[list[float]]]
        if isinstance(self.masks, np.ndarray):
            masks = torch.from_numpy(np.ascontiguousarray(self.masks[kept]))
        else:
            masks = [[part.ravel().tolist() for part in self.masks[i]] for i in np.flatnonzero(kept)]
        pixels = torch.from_numpy(np.array(self.image)).permute(2, 0, 1)
        boxes_left, labels = torch.from_numpy(boxes[kept]), torch.from_numpy(self.labels[kept])
        return pixels, {"boxes": boxes_left, "labels": labels, "masks": masks}


@dataclass(frozen=True)
class MultiScale:
    """Another size, of a crop at times, and mirroring at times: the recipe of T, S and B.

    Attributes:
        short_sides: pixels; one of them is chosen.
        max_side: pixels; the long side is no longer.
        crop_probability: of a crop before.
        crop_short_sides: pixels; before a crop, the short side becomes one of them.
        crop_range: pixels; height and width of a crop are in this range.
        flip_probability: of mirroring, left to right.
    """

    short_sides: Sequence[int] = tuple(range(480, 801, 32))
    max_side: int = MAX_SIDE
    crop_probability: float = 0.5
    crop_short_sides: Sequence[int] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if not self.short_sides or (self.crop_probability and not self.crop_short_sides):
            raise ConfigError("augment.short_sides and crop_short_sides must name a size")

    @property
    def largest(self) -> int:
        """Pixels of the largest image that comes out."""
        return max(self.short_sides) * self.max_side

    def __call__(self, objects: Objects, rng: random.Random) -> tuple[Tensor, Target]:
        if rng.random() < self.crop_probability:
            short_side = rng.choice(self.crop_short_sides)
            objects = objects.resized(*shortest_edge(*objects.size, short_side, math.inf))
            low, high = self.crop_range
            height, width = (rng.randint(min(low, side), min(high, side)) for side in objects.size)
            top, left = objects.size[0] - height, objects.size[1] - width
            objects = objects.cropped(rng.randint(0, top), rng.randint(0, left), height, width)
        objects = objects.resized(*shortest_edge(*objects.size, rng.choice(self.short_sides), self.max_side))
        return (objects.flipped() if rng.random() < self.flip_probability else objects).target()


@dataclass(frozen=True)
class LargeScaleJitter:
    """Sizes between extremes on a square: the recipe of L and H.

    Attributes:
        size: pixels, of the square.
        scales: the least and the largest size of an image, as a multiple of the square's.
        flip_probability: of mirroring, left to right.
    """

    size: int = JITTER_SIZE
    scales: tuple[float, float] = (0.1, 2.0)
    flip_probability: float = 0.5

    @property
    def largest(self) -> int:
        """Pixels of the image that comes out."""
        return self.size**2

    def __call__(self, objects: Objects, rng: random.Random) -> tuple[Tensor, Target]:
        """Flip, resize, cut out of what is larger or pad what is smaller (arXiv 2012.07177)."""
        objects = objects.flipped() if rng.random() < self.flip_probability else objects
        objects = objects.resized(*jittered_size(*objects.size, rng.uniform(*self.scales), self.size))
        offset, (height, width) = rng.random(), objects.size
        top, left = (round(max(side - self.size, 0) * offset) for side in (height, width))
        objects = objects.cropped(top, left, min(height, self.size), min(width, self.size))
        return objects.padded(self.size, self.size).target(boxes_from_masks=True)


def shortest_edge(
    height: int, width: int, short_side: int = TEST_SHORT_SIDE, max_side: float = MAX_SIDE
) -> tuple[int, int]:
    """Height and width of an image whose short side becomes ``short_side``, its long at most ``max_side``."""
    scale = short_side / min(height, width)
    sides = [short_side if side == min(height, width) else scale * side for side in (height, width)]
    if max(sides) > max_side:
        shrink = max_side / max(sides)
        sides = [side * shrink for side in sides]
    new_height, new_width = (int(side + 0.5) for side in sides)
    return new_height, new_width


def jittered_size(height: int, width: int, scale: float, size: int = JITTER_SIZE) -> tuple[int, int]:
    """The size of an image that fits into ``scale`` times a square of ``size``."""
    factor = min(size * scale / height, size * scale / width)
    return round(height * factor), round(width * factor)


def _cut(
    polygon: NDArray[np.float64], top: int, left: int, height: int, width: int
) -> list[NDArray[np.float64]]:
    """The parts of a polygon in a window."""
    import shapely

    if len(polygon) < 3:
        return []
    whole = shapely.Polygon(polygon).buffer(0.0)  # which mends edges that cross
    inside = whole.intersection(shapely.box(left, top, left + width, top + height))
    parts = [part for part in shapely.get_parts(inside) if isinstance(part, shapely.Polygon)]
    return [np.asarray(part.exterior.coords)[:-1] for part in parts if part.is_valid and not part.is_empty]


def _box_around(mask: Sequence[NDArray[np.float64]] | NDArray[np.bool_]) -> NDArray[np.float32]:
    if isinstance(mask, np.ndarray):
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
    points = np.concatenate(mask)
    return np.concatenate([points.min(0), points.max(0)]).astype(np.float32)
