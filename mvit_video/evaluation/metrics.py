"""Numbers of an evaluation, from a table of scores alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from mvit_video.errors import DataError
from mvit_video.evaluation.tables import Combination, ScoreTable, combine

CALIBRATION_BINS = 15
RESAMPLES = 10_000
VIEW_ORDERS = 10  # random orders that accuracy against views is averaged over
_CHUNK = 4096  # videos at once: torchmetrics' top-k makes several integers of each score


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    """What a table of scores comes to. Accuracies are in [0, 1].

    Attributes:
        scores: float (N, C), the combined probabilities of each video.
        accuracy: video_top1, video_top5, clip_top1 and clip_top5 (all classes, where there are fewer than 5).
        intervals: 95 % bootstrap intervals of video_top1 and video_top5.
        confusion: int64 (C, C), videos of class i that were taken for class j.
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
        seed: of the bootstrap and of the orders of views.

    Raises:
        DataError: a video has no label, or there is only one class.
    """
    labels, scores = table.labels, combine(table.views, how)
    number, classes = scores.shape
    if classes < 2:
        raise DataError(f"there is only one class ({table.class_names[0]}); accuracy needs two or more")
    accuracy = MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro"),
            "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
        }
    )
    of_clips, of_videos = accuracy.clone(prefix="clip_"), accuracy.clone(prefix="video_")
    matrix = MulticlassConfusionMatrix(classes)
    calibration = MulticlassCalibrationError(classes, n_bins=CALIBRATION_BINS, norm="l1")
    for start in range(0, number, _CHUNK):
        part = slice(start, start + _CHUNK)
        of_videos.update(scores[part], labels[part])
        matrix.update(scores[part], labels[part])
        calibration.update(scores[part], labels[part])
        for view in table.views[part].unbind(1):
            of_clips.update(view, labels[part])
    computed = {**of_videos.compute(), **of_clips.compute()}
    totals = {"video": number, "clip": number * table.views.shape[1]}
    # torchmetrics counts in float32; the nearest whole number of right answers gives all digits.
    found = {
        name: round(float(value) * totals[name.split("_")[0]]) / totals[name.split("_")[0]]
        for name, value in computed.items()
    }
    confusion = matrix.compute()
    videos_of_class = confusion.sum(1).double()
    return Metrics(
        scores,
        labels,
        found,
        {
            name: bootstrap_interval(round(found[name] * number), number, seed=seed)
            for name in ("video_top1", "video_top5")
        },
        confusion,
        confusion.diagonal() / videos_of_class,  # 0 / 0 is nan
        float(calibration.compute()),
        accuracy_by_views(table.views, labels, how, seed=seed),
    )


def bootstrap_interval(correct: int, number: int, *, seed: int) -> Interval:
    """95 % percentile interval of an accuracy, over resamples of its videos.

    The number of right answers in a resample of 0s and 1s is binomial, so it is drawn as such.
    """
    draws = np.random.default_rng(seed).binomial(number, correct / number, RESAMPLES) / number
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(low), float(high))


def accuracy_by_views(views: Tensor, labels: Tensor, how: Combination, *, seed: int) -> list[float]:
    """Top-1 with k random views (N, V, C) of each video, for k from 1 to V, averaged over several orders."""
    generator = torch.Generator().manual_seed(seed)
    number, count, _ = views.shape
    totals = torch.zeros(count, dtype=torch.float64)
    orders = 1 if count == 1 else VIEW_ORDERS
    rows = torch.arange(number)
    terms = views if how != "logits" else views.clamp(min=torch.finfo(views.dtype).tiny).log()
    for _ in range(orders):
        order = torch.rand(number, count, generator=generator).argsort(1)
        running = terms[rows, order[:, 0]]
        for k in range(count):
            if k:
                view = terms[rows, order[:, k]]
                running = torch.maximum(running, view) if how == "max" else running.add_(view)
            totals[k] += (running.argmax(-1) == labels).double().mean()
    return (totals / orders).tolist()


class Bin(NamedTuple):
    """Videos whose confidence lies in a range: how many, their mean confidence, their accuracy."""

    videos: int
    confidence: float
    accuracy: float


def reliability(scores: Tensor, labels: Tensor) -> list[Bin]:
    """The bins of the calibration error that have videos."""
    confidence, predicted = scores.max(-1)
    correct = (predicted == labels).double()
    borders = torch.linspace(0, 1, CALIBRATION_BINS + 1)
    where = (torch.bucketize(confidence, borders, right=True) - 1).clamp(0, CALIBRATION_BINS - 1)
    inside = [where == index for index in range(CALIBRATION_BINS)]
    return [
        Bin(int(mask.sum()), float(confidence[mask].mean()), float(correct[mask].mean()))
        for mask in inside
        if mask.any()
    ]


class Confusion(NamedTuple):
    true: str
    predicted: str
    videos: int
    share: float  # of the true class's videos


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
        difference: top-1 of the second minus that of the first, with its 95 % bootstrap interval over videos.
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


def compare(first: Metrics, second: Metrics, *, seed: int = 0) -> Comparison:
    """Compare two measurements of the same videos, in the same order."""
    gain = second.correct.long() - first.correct.long()
    number = len(gain)
    only_first, only_second = int((gain < 0).sum()), int((gain > 0).sum())
    shares = [only_first / number, only_second / number]
    drawn = np.random.default_rng(seed).multinomial(number, [*shares, max(0.0, 1 - sum(shares))], RESAMPLES)
    low, high = np.percentile((drawn[:, 1] - drawn[:, 0]) / number, [2.5, 97.5])
    differing = only_first + only_second
    return Comparison(
        (only_second - only_first) / number,
        Interval(float(low), float(high)),
        only_first,
        only_second,
        float(binomtest(only_first, differing).pvalue) if differing else 1.0,
        second.per_class - first.per_class,
    )
