"""People and what they do, drawn into pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from mvit_video.action_detection.boxes import clip_boxes
from mvit_video.io.console import printable


def draw_people(picture: Tensor, boxes: Tensor, texts: Sequence[str]) -> Tensor:
    """A copy of a picture with a frame for each person and a text at its upper corner.

    Args:
        picture: uint8 RGB (3, H, W).
        boxes: (N, 4), x1, y1, x2, y2 in pixels.
    """
    if not len(boxes):
        return picture.clone()
    height, width = picture.shape[1:]
    return draw_bounding_boxes(
        picture,
        clip_boxes(boxes, height, width).round(),
        [f" {printable(text)}" if text else "" for text in texts],
        "#ffbe00",
        width=max(1, min(height, width) // 160),
        fill_labels=True,
    )
