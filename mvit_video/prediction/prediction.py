"""What is said of a video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    A file that can't be read has an ``error`` and no classes; only a video seen through windows has segments.
    """

    path: str
    classes: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    clips: tuple[ClipPrediction, ...] = ()
    error: str | None = None
    segments: tuple[Segment, ...] = ()


def printable(path: str) -> str:
    """A path as text for files and terminals: bytes that aren't UTF-8 become ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def best_classes(
    scores: Tensor, class_names: Sequence[str], topk: int
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The names and scores of the ``topk`` best of (num_classes,) scores, best first."""
    top = torch.topk(scores, min(topk, len(class_names)))
    return tuple(class_names[i] for i in top.indices.tolist()), tuple(top.values.tolist())
