"""Results where a video may be of several classes: average precisions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.scores import Combination, ScoreTable, combine
from mvit_video.evaluation.tables import write_multi_label_tables
from mvit_video.io.console import print_table
from mvit_video.io.writing import write_json
from mvit_video.model import VideoModel

log = logging.getLogger(__name__)


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


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """float (C,): the average precision of each class; nan where no video is of it.

    Args:
        scores: (N, C) in [0, 1].
        targets: (N, C), 1 where a video is of a class.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes without videos
        found = multilabel_average_precision(scores, targets.long(), scores.shape[1], average=None)
    return found.where(targets.any(0), torch.nan)


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
    return MultiLabelMetrics(scores, targets, average_precisions(scores, targets))


def report_multi_label(tables: Mapping[str, ScoreTable], output: Path, how: Combination) -> MultiLabelMetrics:
    """Write results.json, report.html and tables of the average precisions, and print them.

    Raises ConfigError for more than one table, DataError where no video has a class.
    """
    from mvit_video.evaluation.report import write_multi_label_report  # which imports matplotlib
    from mvit_video.evaluation.results import describe

    if len(tables) > 1:
        raise ConfigError("of several classes a video there is no comparison; ensemble=true averages scores")
    (table,) = tables.values()
    metrics = measure_multi_label(table, how)
    counts, found = metrics.targets.sum(0).tolist(), metrics.per_class.tolist()
    per_class = {
        name: {"videos": count, "average_precision": value}
        for name, count, value in zip(table.class_names, counts, found, strict=True)
        if count
    }
    results = {**describe(table, how), **metrics.accuracy, "per_class": per_class}
    write_json(output / "results.json", results)
    write_multi_label_tables(output, results)
    write_multi_label_report(output, results=results)
    rows = [(name, row["videos"], f"{row['average_precision']:.4f}") for name, row in per_class.items()]
    print_table(f"{len(table)} videos; {results['protocol']}", ("class", "videos", "AP"), rows)
    text = "mAP %.4f over %d classes; results.json and report.html are in %s"
    log.info(text, results["map"], len(rows), output)
    return metrics
