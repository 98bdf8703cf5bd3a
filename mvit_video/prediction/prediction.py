"""What a model says of a video."""

from __future__ import annotations

from dataclasses import dataclass

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
