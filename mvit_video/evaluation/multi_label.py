"""Results where a video may be of several classes: average precisions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.scores import Combination, ScoreTable, combine
from mvit_video.model import VideoModel


def require_same_kind(model: VideoModel, multi_label: bool, *, class_map: bool) -> None:
    """Raise ConfigError where a model is of several classes a video and the data of one, or vice versa."""
    if model.multi_label and not multi_label:
        raise ConfigError(
            "the model is of several classes a video, the data set of one; its lists may say several: "
            "data=csv or json with data.multi_label=true"
        )
    if multi_label and not model.multi_label:
        raise ConfigError("the data set is of several classes a video (data.multi_label), the model of one")
    if multi_label and class_map:
        raise ConfigError("class_map is for models of one class a video")


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
