"""Pictures with the objects in them drawn."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from mvit_video.detection.masks import to_mask
from mvit_video.io.console import printable
from mvit_video.prediction.follower import LOST

OPACITY = 0.45  # of masks
GRID_SIZE = 400  # pixels, of a picture in a grid


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | Sequence[Any],
    class_names: Sequence[str],
    scores: Tensor | None = None,
    tracks: Sequence[int] | None = None,
) -> Tensor:
    """A copy of an image, uint8 (3, H, W), with boxes, masks and names; a class or track has one colour.

    Args:
        masks: bool (M, H, W), or of each object what ``to_mask`` takes.
    """
    if not len(boxes):
        return image.clone()
    height, width = image.shape[1:]
    if not isinstance(masks, Tensor):
        masks = torch.stack([torch.from_numpy(to_mask(parts, height, width)) for parts in masks])
    names = [
        printable(class_names[label]) if label < len(class_names) else str(label) for label in labels.tolist()
    ]
    if tracks is not None:
        names = [name_of_track(name, track) for name, track in zip(names, tracks, strict=True)]
    if scores is not None:
        names = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
    colours = [class_colour(label) for label in (labels.tolist() if tracks is None else tracks)]
    drawn = draw_segmentation_masks(image, masks.cpu(), alpha=OPACITY, colors=colours)
    line = max(1, round(min(height, width) / 300))
    inside = clip_boxes_to_image(boxes.cpu(), (height, width))
    return draw_bounding_boxes(drawn, inside, names, colours, width=line)


def name_of_track(class_name: str, track: int) -> str:
    return class_name if track == LOST else f"{class_name} #{track}"


def class_colour(label: int) -> tuple[int, int, int]:
    """Classes next to each other have colours far from each other."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def grid(images: Sequence[Tensor], columns: int = 4) -> Tensor:
    """Pictures of any sizes side by side, uint8 (3, H, W)."""
    cells = []
    for image in images:
        factor = GRID_SIZE / max(image.shape[1:])
        size = [max(round(side * factor), 1) for side in image.shape[1:]]
        small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        cells.append(F.pad(small, (0, GRID_SIZE - size[1], 0, GRID_SIZE - size[0]), value=255))
    return make_grid(cells, columns).round().clamp(0, 255).byte()


def as_png(image: Tensor) -> bytes:
    """A picture, uint8 (3, H, W), as the bytes of a file."""
    buffer = io.BytesIO()
    to_pil_image(image).save(buffer, "png")
    return buffer.getvalue()
