"""Tables of scores whose metrics are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mvit_video.data.index import LabelledVideo
from mvit_video.evaluation.scores import ScoreTable


def score_table(views: Tensor, labels: Sequence[int]) -> ScoreTable:
    """Videos v0, v1, ... with softmax scores (N, V, C), and classes "class 0", "class 1", ..."""
    number, count, classes = views.shape
    return ScoreTable(
        tuple(LabelledVideo(f"/videos/v{i}.mp4", label, f"v{i}") for i, label in enumerate(labels)),
        views,
        torch.zeros(number, count, 2, dtype=torch.float64),
        tuple(f"class {index}" for index in range(classes)),
    )


def table_of_400_classes() -> ScoreTable:
    """4000 videos, 10 of each class, 3 views each.

    - Every third class (134) is predicted as the next one in 4 of its 10 videos, with confidence 0.6, and
      there the right class comes second: top-1 is 1 - 4 * 134 / 4000 = 0.866, top-5 is 1.
    - Everything else is right with confidence 0.8.
    - The first view of a wrong video is right: views have top-1 0.866 + 0.134 / 3.
    """
    classes, each, count = 400, 10, 3
    labels = torch.arange(classes).repeat_interleave(each)
    wrong = (labels % 3 == 0) & (torch.arange(len(labels)) % each < 4)
    likeliest = torch.where(wrong, (labels + 1) % classes, labels)
    rows = torch.arange(len(labels))
    views = torch.zeros(len(labels), count, classes)
    for view in range(count):
        top = likeliest if view else labels
        confidence = torch.where(wrong, 0.75 if view else 0.65, 0.8)
        second = torch.where(wrong, labels + (likeliest - labels) * (not view), (labels + 1) % classes)
        views[rows, view, second] = 1 - confidence
        views[rows, view, top] = confidence
    return score_table(views, labels.tolist())
