"""Numbers of an evaluation, from a table of scores alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import binomtest, norm
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from mvit_video.errors import DataError
from mvit_video.evaluation.scores import Combination, ScoreTable, combine, log_scores

_CALIBRATION_BINS = 15
_VIEW_ORDERS = 10  # random orders that accuracy against views is averaged over
_BOOTSTRAP_SAMPLES = 1000
_SAMPLES_AT_ONCE = 50  # of tens of thousands of videos each


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    """What a table of scores comes to. Accuracies are in [0, 1].

    Attributes:
        scores: float (N, C), the combined probabilities of each video.
        accuracy: video_top1, video_top5, clip_top1 and clip_top5 (all classes, where there are fewer than 5).
        intervals: 95 % intervals: Wilson's of video_top1 and video_top5; of clip_top1, clip_top5,
            mean_class_accuracy and macro_f1 see ``bootstrap_intervals``, which may leave some out.
        confusion: int64 (C, C), videos of class i that were predicted as class j.
        calibration_error: expected calibration error of the videos' top-1 confidence, 15 equal bins.
        by_views: top-1 with 1, 2, ..., V random views of each video.
    """

    scores: Tensor
    labels: Tensor
    accuracy: dict[str, float]
    intervals: dict[str, Interval]
    confusion: Tensor
    calibration_error: float
    by_views: list[float]

    @property
    def rates(self) -> ClassRates:
        """Precision, recall and F1 of each class."""
        return _class_rates(self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0))

    @property
    def per_class(self) -> Tensor:
        """float (C,), top-1 of each class's videos, which is its recall; nan for a class without videos."""
        return self.rates.recall

    @property
    def mean_class_accuracy(self) -> float:
        """Mean over the classes that have videos; also known as balanced accuracy."""
        return float(self.per_class.nanmean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have videos or were predicted."""
        return float(self.rates.f1.nanmean())

    @property
    def correct(self) -> Tensor:
        """bool (N,): the likeliest class is the right one."""
        return self.scores.argmax(-1) == self.labels


def measure(table: ScoreTable, how: Combination = "mean", *, seed: int = 0) -> Metrics:
    """Every metric of a table.

    Args:
        how: see ``combine``.
        seed: of the orders of views, and of the samples of ``bootstrap_intervals``.

    Raises:
        DataError: a video has no label, or there is only one class.
    """
    labels, scores = table.labels, combine(table.views, how)
    number, classes = scores.shape
    if classes < 2:
        raise DataError(f"there is only one class ({table.class_names[0]}); accuracy needs two or more")
    of_videos = {f"video_top{k}": _topk_correct(scores, labels, k) for k in (1, 5)}
    of_clips = {f"clip_top{k}": _topk_correct(table.views, labels[:, None], k) for k in (1, 5)}
    predicted = scores.argmax(-1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    wilson = {name: wilson_interval(int(correct.sum()), number) for name, correct in of_videos.items()}
    shares = {name: correct.double().mean(1) for name, correct in of_clips.items()}
    return Metrics(
        scores,
        labels,
        {name: float(correct.double().mean()) for name, correct in {**of_videos, **of_clips}.items()},
        wilson | bootstrap_intervals(labels, predicted, classes, shares, seed=seed),
        confusion,
        sum(b.videos * abs(b.accuracy - b.confidence) for b in reliability(scores, labels)) / number,
        accuracy_by_views(table.views, labels, how, seed=seed),
    )


def _topk_correct(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """bool (...): the right class is among the k likeliest of (..., C); all of them where there are fewer.

    torchmetrics counts in float32, which can't tell 19,999,999 from 20,000,000 right views.
    """
    k = min(k, scores.shape[-1])
    likeliest = scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices  # argmax also of ties
    return (likeliest == labels[..., None]).any(-1)


def wilson_interval(correct: int, number: int) -> Interval:
    """95 % interval of a share (Wilson, 1927); it has a width for 6 of 6 too."""
    return Interval(*map(float, binomtest(correct, number).proportion_ci(0.95, method="wilson")))


class ClassRates(NamedTuple):
    """float64 (..., C) each, in [0, 1]; nan where there is nothing to divide by.

    Attributes:
        precision: share of the videos predicted as a class that are of it.
        recall: share of the videos of a class that are predicted as it.
        f1: their harmonic mean; 0 for a class that has videos and is never predicted.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor


def _class_rates(right: Tensor, videos: Tensor, predicted: Tensor) -> ClassRates:
    """From counts (..., C): videos of a class that are predicted as it, all of it, all predicted as it."""
    right = right.double()  # 0 / 0 is nan
    return ClassRates(right / predicted, right / videos, 2 * right / (videos + predicted))


def bootstrap_intervals(
    labels: Tensor, predicted: Tensor, classes: int, shares: Mapping[str, Tensor], *, seed: int
) -> dict[str, Interval]:
    """95 % intervals of mean_class_accuracy, macro_f1 and means over videos, by resampling the videos.

    Percentiles of the metrics of 1000 samples with replacement (Efron, 1979); of macro_f1,
    which samples underestimate where classes have few videos, bias-corrected ones (Efron, 1981). One that
    is the same in every sample is left out: from videos that are all right, a bootstrap can't tell.

    Args:
        labels, predicted: int64 (N,).
        shares: float (N,) by name, such as the share of a video's views that is right.
    """
    number = len(labels)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in ("mean_class_accuracy", "macro_f1", *shares)}
    right = labels[labels == predicted]
    for _ in range(_BOOTSTRAP_SAMPLES // _SAMPLES_AT_ONCE):
        drawn = torch.randint(number, (_SAMPLES_AT_ONCE, number), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)  # how often each video is in each sample
        times.scatter_add_(1, drawn, torch.ones_like(times))
        none = torch.zeros(_SAMPLES_AT_ONCE, classes, dtype=torch.float64)
        rates = _class_rates(
            none.index_add(1, right, times[:, labels == predicted]),
            none.index_add(1, labels, times),
            none.index_add(1, predicted, times),
        )
        found["mean_class_accuracy"].append(rates.recall.nanmean(1))
        found["macro_f1"].append(rates.f1.nanmean(1))
        for name, share in shares.items():
            found[name].append(times @ share / number)
    ends = torch.tensor((0.025, 0.975), dtype=torch.float64)
    samples = {name: torch.cat(values) for name, values in found.items()}
    own = _class_rates(*(torch.bincount(x, minlength=classes) for x in (right, labels, predicted)))
    below = (samples["macro_f1"] < own.f1.nanmean()).double().mean()
    bias = torch.special.ndtri(below.clamp(1 / _BOOTSTRAP_SAMPLES, 1 - 1 / _BOOTSTRAP_SAMPLES))
    corrected = torch.special.ndtr(2 * bias + torch.special.ndtri(ends))
    intervals = {
        name: values.quantile(corrected if name == "macro_f1" else ends).tolist()
        for name, values in samples.items()
    }
    return {name: Interval(low, high) for name, (low, high) in intervals.items() if high - low > 1e-9}


def accuracy_by_views(views: Tensor, labels: Tensor, how: Combination, *, seed: int) -> list[float]:
    """Top-1 with k random views (N, V, C) of each video, for k from 1 to V, averaged over several orders."""
    generator = torch.Generator().manual_seed(seed)
    number, count, _ = views.shape
    totals = torch.zeros(count, dtype=torch.float64)
    terms = log_scores(views) if how == "logits" else views
    rows = torch.arange(number)
    for _ in range(_VIEW_ORDERS):
        order = torch.rand(number, count, generator=generator).argsort(1)
        running = torch.zeros_like(terms[:, 0]) if how != "max" else terms[rows, order[:, 0]]
        for k in range(count):
            view = terms[rows, order[:, k]]
            running = torch.maximum(running, view) if how == "max" else running.add_(view)
            totals[k] += (running.argmax(-1) == labels).double().mean()
    return (totals / _VIEW_ORDERS).tolist()


class Bin(NamedTuple):
    """Videos whose confidence lies in a range: how many, their mean confidence, their accuracy."""

    videos: int
    confidence: float
    accuracy: float


def reliability(scores: Tensor, labels: Tensor) -> list[Bin]:
    """The bins of the calibration error that have videos."""
    confidence, predicted = scores.double().max(-1)
    correct = (predicted == labels).double()
    where = (confidence * _CALIBRATION_BINS).long().clamp(max=_CALIBRATION_BINS - 1)
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


@dataclass(frozen=True)
class MultiLabelMetrics:
    """What a table of scores comes to where a video may be of several classes.

    Attributes:
        scores: float (N, C), the combined scores of each video.
        targets: bool (N, C), the classes that a video is of.
        per_class: float (C,), the average precision of each class; nan where no video is of it.
    """

    scores: Tensor
    targets: Tensor
    per_class: Tensor

    @property
    def accuracy(self) -> dict[str, float]:
        """ "map": the mean average precision, over the classes that have videos."""
        return {"map": float(self.per_class.nanmean())}


def measure_multi_label(table: ScoreTable, how: Combination) -> MultiLabelMetrics:
    """The average precisions of a table. Raises DataError where no video has a class."""
    scores = combine(table.views, how, multi_label=True)
    targets = torch.zeros(scores.shape, dtype=torch.bool)
    for row, video in zip(targets, table.videos, strict=True):
        row[list(video.labels)] = True
    if not targets.any():
        raise DataError("no video has a class")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without videos
        found = multilabel_average_precision(scores, targets.long(), scores.shape[1], average=None)
    return MultiLabelMetrics(scores, targets, found.where(targets.any(0), torch.nan))
