"""What a model says of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_FINITE = "NaN or infinite scores: the weights are damaged, or precision=fp32 is needed"


@dataclass(frozen=True)
class ClipPrediction:
    """The likeliest classes of one clip, best first, and its first and last frame in seconds."""

    start: float
    end: float
    classes: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """A stretch of a long video, in seconds, with one class and its mean score."""

    start: float
    end: float
    class_name: str
    score: float


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a video, best first, with scores in [0, 1], and those of its clips.

    A video without scores has an ``error`` and no classes: it can't be read, or its scores aren't finite.
    Only a video seen through windows has segments.
    """

    path: str
    classes: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    clips: tuple[ClipPrediction, ...] = ()
    error: str | None = None
    segments: tuple[Segment, ...] = ()

    @classmethod
    def from_scores(
        cls,
        path: str,
        scores: Tensor,
        spans: Sequence[tuple[float, float]],
        class_names: Sequence[str],
        topk: int,
        *,
        segments: tuple[Segment, ...] = (),
    ) -> Prediction:
        """From the scores (clips, num_classes) of a video's clips and their seconds."""
        if not scores.isfinite().all():
            return cls(path, error=NOT_FINITE)
        clips = tuple(
            ClipPrediction(start, end, *topk_classes(row, class_names, topk))
            for row, (start, end) in zip(scores, spans, strict=True)
        )
        return cls(path, *topk_classes(scores.mean(0), class_names, topk), clips=clips, segments=segments)


def topk_classes(
    scores: Tensor, class_names: Sequence[str], topk: int
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The names and scores of the ``topk`` best of (num_classes,) scores, best first."""
    top = torch.topk(scores, min(topk, len(class_names)))
    return tuple(class_names[i] for i in top.indices.tolist()), tuple(top.values.tolist())
