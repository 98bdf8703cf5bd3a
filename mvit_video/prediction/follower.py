"""The same thing in one picture of a film and in the next."""

from __future__ import annotations

import itertools

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

SAME = 0.3  # IoU of boxes of one thing in two pictures, at least
LOST = -1  # the number of what isn't followed


class Follower:
    """Gives boxes numbers from 0, and the same number to what stays nearly where it was.

    Args:
        patience: pictures that something may be missing from.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience, self._next = patience, 0
        self._boxes, self._labels = torch.empty(0, 4), torch.empty(0, dtype=torch.long)
        self._seen: list[tuple[int, int]] = []  # the number of each, and the pictures since

    def __call__(
        self, boxes: Tensor, labels: Tensor | None = None, is_sure: Tensor | None = None
    ) -> list[int]:
        """The number of each box (N, 4) in the next picture.

        Args:
            labels: (N,), what never changes; all are of one kind if None.
            is_sure: bool (N,), the others are taken for what was there, or else for ``LOST``, as in
                ByteTrack (arXiv 2110.06864); all are sure if None.
        """
        labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else labels
        sure = torch.ones(len(boxes), dtype=torch.bool) if is_sure is None else is_sure
        overlaps = box_iou(boxes, self._boxes) * (labels[:, None] == self._labels)
        weights = torch.where(overlaps >= SAME, overlaps + sure[:, None], 0)  # those that are sure first
        pairs = zip(*(found.tolist() for found in linear_sum_assignment(-weights.numpy())), strict=True)
        before = {new: old for new, old in pairs if weights[new, old]}
        fresh = itertools.count(self._next)
        numbers = [
            self._seen[before[new]][0] if new in before else next(fresh) if sure[new] else LOST
            for new in range(len(boxes))
        ]
        kept = [new for new, number in enumerate(numbers) if number != LOST]
        gone = [
            old
            for old, (_, missed) in enumerate(self._seen)
            if old not in before.values() and missed < self.patience
        ]
        self._seen = [(numbers[new], 0) for new in kept] + [
            (self._seen[old][0], self._seen[old][1] + 1) for old in gone
        ]
        self._boxes = torch.cat([boxes[kept], self._boxes[gone]])
        self._labels = torch.cat([labels[kept], self._labels[gone]])
        self._next = next(fresh)
        return numbers
