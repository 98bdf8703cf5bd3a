"""Results where a video may be of several classes: average precisions."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.scores import Combination, ScoreTable, combine
from mvit_video.io.console import print_table
from mvit_video.io.writing import replacing
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


def report_multi_label(tables: Mapping[str, ScoreTable], output: Path, how: Combination) -> None:
    """Write results.json with the mean average precision and that of each class, and print them.

    Raises ConfigError for more than one table, DataError where no video has a class.
    """
    from mvit_video.evaluation.results import describe  # which imports matplotlib

    if len(tables) > 1:
        raise ConfigError("of several classes a video there is no comparison; ensemble=true averages scores")
    (table,) = tables.values()
    scores, names = combine(table.views, how, multi_label=True), table.class_names
    targets = torch.zeros(len(table), len(names), dtype=torch.bool)
    for row, video in zip(targets, table.videos, strict=True):
        row[list(video.labels)] = True
    if not targets.any():
        raise DataError("no video has a class")
    found, counts = average_precisions(scores, targets), targets.sum(0).tolist()
    per_class = {
        name: {"videos": count, "average_precision": value}
        for name, count, value in zip(names, counts, found.tolist(), strict=True)
        if count
    }
    results = {**describe(table, how), "map": float(found.nanmean()), "per_class": per_class}
    with replacing(output / "results.json", "w") as file:
        json.dump(results, file, indent=2, allow_nan=False)
    rows = [(name, row["videos"], f"{row['average_precision']:.4f}") for name, row in per_class.items()]
    print_table(f"{len(table)} videos; {results['protocol']}", ("class", "videos", "AP"), rows)
    log.info("mAP %.4f over %d classes; results.json is in %s", results["map"], len(rows), output)
