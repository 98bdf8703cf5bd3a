"""Masks of objects: from polygons or bitmaps to what the mask head learns, and from what it says to pixels.

As in detectron2's ``structures/masks.py`` and ``layers/mask_ops.py`` at 02b5c4e2.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, roi_align

Polygons = Sequence[Sequence[Sequence[float]]]  # objects, their parts, x0, y0, x1, y1, ... in pixels
FAR = 1e4  # pixels; no point is farther away, for pycocotools takes memory for each pixel between two


def crop_masks(masks: Polygons | Tensor, boxes: Tensor, size: int) -> Tensor:
    """The part of each object's mask inside a box, ``size`` x ``size``: bool (N, size, size).

    Args:
        masks: N objects, each a list of polygons, or bool (N, H, W).
        boxes: (N, 4), xyxy pixels.
    """
    if isinstance(masks, Tensor):
        rois = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None].to(boxes), boxes], 1)
        return roi_align(masks[:, None].float(), rois, size, aligned=True)[:, 0] >= 0.5
    if not len(boxes):
        return torch.zeros(0, size, size, dtype=torch.bool, device=boxes.device)
    corners = boxes.double().cpu().numpy()
    cropped = [_rasterised(parts, box, size) for parts, box in zip(masks, corners, strict=True)]
    return torch.from_numpy(np.stack(cropped)).to(boxes.device)


def _rasterised(parts: Sequence[Sequence[float]], box: np.ndarray, size: int) -> np.ndarray:
    """Polygons, moved and scaled so that ``box`` becomes the unit square of ``size`` pixels."""
    scale = size / np.maximum(box[2:] - box[:2], 0.1)
    moved = [(np.asarray(part, dtype=np.float64).reshape(-1, 2) - box[:2]) * scale for part in parts]
    return to_mask([part.clip(-FAR, FAR).ravel() for part in moved], size, size)


def to_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels that any of some polygons covers, or a run-length encoding, as a bitmap (height, width)."""
    from pycocotools import mask as coco

    if not len(segmentation):
        return np.zeros((height, width), dtype=bool)
    encoded = segmentation
    if not isinstance(segmentation, dict):
        encoded = coco.merge(coco.frPyObjects(list(segmentation), height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = coco.frPyObjects(segmentation, height, width)
    return coco.decode(encoded).astype(bool)


def run_lengths(counts: Any) -> NDArray[np.int64]:
    """Those of COCO's encoding; none for what isn't one. pycocotools trusts that they fill the image.

    Text has groups of five bits, the lowest first, and from the fourth number on differences to the last but
    one (``rleToString`` in cocoapi's ``common/maskApi.c`` at 8c9bcc3c).

    Raises:
        TypeError, ValueError, AttributeError: other things than whole numbers or ASCII text.
    """
    if isinstance(counts, list):
        return np.array([operator.index(count) for count in counts], dtype=np.int64)
    groups = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(groups < 32)  # the others say that one more follows
    starts = np.concatenate([[0], ends[:-1] + 1])
    if not len(ends) or ends[-1] != len(groups) - 1 or groups.min() < 0 or groups.max() > 63:
        return np.zeros(0, dtype=np.int64)
    places = 5 * (np.arange(len(groups)) - np.repeat(starts, ends - starts + 1))
    if places.max() > 30:
        return np.zeros(0, dtype=np.int64)
    runs = np.add.reduceat((groups & 31) << places, starts)
    runs -= np.where(groups[ends] & 16, np.int64(32) << places[ends], 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities inside boxes -> masks of the picture.

    Args:
        masks: float (N, M, M), probabilities on a grid over each box.
        boxes: (N, 4), xyxy pixels.

    Returns:
        bool (N, height, width)
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    around = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], 1)
    corners = clip_boxes_to_image(around, (height, width)).long().tolist()
    for mask, box, target, (x0, y0, x1, y1) in zip(masks, boxes, pasted, corners, strict=True):
        if x1 <= x0 or y1 <= y0:
            continue
        x = torch.arange(x0, x1, device=boxes.device, dtype=torch.float32) + 0.5
        y = torch.arange(y0, y1, device=boxes.device, dtype=torch.float32) + 0.5
        x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        y, x = torch.meshgrid(y, x, indexing="ij")
        sampled = F.grid_sample(mask[None, None].float(), torch.stack([x, y], -1)[None], align_corners=False)
        target[y0:y1, x0:x1] = sampled[0, 0] >= 0.5
    return pasted
