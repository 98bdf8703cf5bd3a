"""Numbers of an evaluation, from a table of scores alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import binomtest, norm
from torch import Tensor

from mvit_video.errors import DataError
from mvit_video.evaluation.scores import Combination, ScoreTable, combine, log_scores

CALIBRATION_BINS = 15
VIEW_ORDERS = 10  # random orders that accuracy against views is averaged over


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    """What a table of scores comes to. Accuracies are in [0, 1].

    Attributes:
        scores: float (N, C), the combined probabilities of each video.
        accuracy: video_top1, video_top5, clip_top1 and clip_top5 (all classes, where there are fewer than 5).
        intervals: 95 % Wilson intervals of video_top1 and video_top5.
        confusion: int64 (C, C), videos of class i that were predicted as class j.
        per_class: float (C,), top-1 of each class's videos; nan for a class without videos.
        calibration_error: expected calibration error of the videos' top-1 confidence, 15 equal bins.
        by_views: top-1 with 1, 2, ..., V random views of each video.
    """

    scores: Tensor
    labels: Tensor
    accuracy: dict[str, float]
    intervals: dict[str, Interval]
    confusion: Tensor
    per_class: Tensor
    calibration_error: float
    by_views: list[float]

    @property
    def mean_class_accuracy(self) -> float:
        """Mean over the classes that have videos."""
        return float(self.per_class.nanmean())

    @property
    def correct(self) -> Tensor:
        """bool (N,): the likeliest class is the right one."""
        return self.scores.argmax(-1) == self.labels


def measure(table: ScoreTable, how: Combination = "mean", *, seed: int = 0) -> Metrics:
    """Every metric of a table.

    Args:
        how: see ``combine``.
        seed: of the orders of views.

    Raises:
        DataError: a video has no label, or there is only one class.
    """
    labels, scores = table.labels, combine(table.views, how)
    number, classes = scores.shape
    if classes < 2:
        raise DataError(f"there is only one class ({table.class_names[0]}); accuracy needs two or more")
    of_videos = {f"video_top{k}": topk_correct(scores, labels, k) for k in (1, 5)}
    of_clips = {f"clip_top{k}": topk_correct(table.views, labels[:, None], k) for k in (1, 5)}
    pairs = labels * classes + scores.argmax(-1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    return Metrics(
        scores,
        labels,
        {name: float(correct.double().mean()) for name, correct in {**of_videos, **of_clips}.items()},
        {name: wilson_interval(int(correct.sum()), number) for name, correct in of_videos.items()},
        confusion,
        confusion.diagonal() / confusion.sum(1).double(),  # 0 / 0 is nan
        sum(b.videos * abs(b.accuracy - b.confidence) for b in reliability(scores, labels)) / number,
        accuracy_by_views(table.views, labels, how, seed=seed),
    )


def topk_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """bool (...): the right class is among the k likeliest of (..., C); all of them where there are fewer.

    torchmetrics counts in float32, which can't tell 19,999,999 from 20,000,000 right views.
    """
    k = min(k, scores.shape[-1])
    likeliest = scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices  # argmax also of ties
    return (likeliest == labels[..., None]).any(-1)


def wilson_interval(correct: int, number: int) -> Interval:
    """95 % interval of a share (Wilson, 1927); it has a width for 6 of 6 too."""
    interval = binomtest(correct, number).proportion_ci(0.95, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def accuracy_by_views(views: Tensor, labels: Tensor, how: Combination, *, seed: int) -> list[float]:
    """Top-1 with k random views (N, V, C) of each video, for k from 1 to V, averaged over several orders."""
    generator = torch.Generator().manual_seed(seed)
    number, count, _ = views.shape
    totals = torch.zeros(count, dtype=torch.float64)
    terms = log_scores(views) if how == "logits" else views
    rows = torch.arange(number)
    for _ in range(VIEW_ORDERS):
        order = torch.rand(number, count, generator=generator).argsort(1)
        running = torch.zeros_like(terms[:, 0]) if how != "max" else terms[rows, order[:, 0]]
        for k in range(count):
            view = terms[rows, order[:, k]]
            running = torch.maximum(running, view) if how == "max" else running.add_(view)
            totals[k] += (running.argmax(-1) == labels).double().mean()
    return (totals / VIEW_ORDERS).tolist()


class Bin(NamedTuple):
    """Videos whose confidence lies in a range: how many, their mean confidence, their accuracy."""

    videos: int
    confidence: float
    accuracy: float


def reliability(scores: Tensor, labels: Tensor) -> list[Bin]:
    """The bins of the calibration error that have videos."""
    confidence, predicted = scores.double().max(-1)
    correct = (predicted == labels).double()
    where = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    inside = [where == index for index in where.unique()]
    return [Bin(int(m.sum()), float(confidence[m].mean()), float(correct[m].mean())) for m in inside]


class Confusion(NamedTuple):
    true: str
    predicted: str
    videos: int
    share: float  # of the class: of all its videos


def most_confused(confusion: Tensor, class_names: Sequence[str], count: int) -> list[Confusion]:
    """The pairs of classes with the most mistakes, the most frequent first."""
    mistakes = confusion.clone().fill_diagonal_(0)
    order = mistakes.flatten().argsort(descending=True, stable=True)[:count]
    totals = confusion.sum(1)
    pairs = [divmod(int(index), len(class_names)) for index in order]
    return [
        Confusion(class_names[i], class_names[j], int(mistakes[i, j]), float(mistakes[i, j] / totals[i]))
        for i, j in pairs
        if mistakes[i, j]
    ]


def worst_mistakes(scores: Tensor, labels: Tensor, count: int) -> list[int]:
    """Rows of the videos whose wrong class leads the right one by most."""
    lead = scores.max(-1).values - scores.gather(1, labels[:, None])[:, 0]
    order = lead.argsort(descending=True, stable=True)[:count].tolist()
    return [row for row in order if scores[row].argmax() != labels[row]]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same videos.

    Attributes:
        difference: top-1 of the second minus that of the first.
        interval: its 95 % interval (Agresti and Min's for matched pairs, Statistics in Medicine 24, 2005).
        only_first, only_second: videos that one of them alone gets right.
        p_value: McNemar's exact test, two-sided: how likely a split of these videos is that is at least as
            uneven, if both models were equally good.
        per_class: float (C,), the difference for each class's videos; nan for a class without videos.
    """

    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p_value: float
    per_class: Tensor


def compare(first: Metrics, second: Metrics) -> Comparison:
    """Compare two measurements of the same videos, in the same order."""
    gain = second.correct.long() - first.correct.long()
    only_first, only_second = int((gain < 0).sum()), int((gain > 0).sum())
    differing = only_first + only_second
    return Comparison(
        (only_second - only_first) / len(gain),
        paired_interval(only_first, only_second, len(gain)),
        only_first,
        only_second,
        float(binomtest(only_first, differing).pvalue) if differing else 1.0,
        second.per_class - first.per_class,
    )


def paired_interval(only_first: int, only_second: int, number: int) -> Interval:
    """95 % interval of the difference of two accuracies on the same videos.

    The normal one after half a video is added to each of the four outcomes, which gives it a width where the
    models agree on every video.
    """
    total, differing, difference = number + 2, only_first + only_second + 1, only_second - only_first
    deviation = math.sqrt(differing - difference**2 / total) / total
    reach = float(norm.ppf(0.975)) * deviation
    return Interval(max(difference / total - reach, -1.0), min(difference / total + reach, 1.0))
