"""The results of an evaluation, from tables of scores: results.json, videos.parquet and the report."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mvit_video.data.datasets import OpenVideo
from mvit_video.errors import ConfigError
from mvit_video.evaluation.metrics import (
    Metrics,
    MultiLabelMetrics,
    compare,
    measure,
    measure_multi_label,
    wilson_interval,
)
from mvit_video.evaluation.provenance import versions
from mvit_video.evaluation.report import write_comparison, write_multi_label_report, write_report
from mvit_video.evaluation.scores import Combination, ScoreTable
from mvit_video.evaluation.tables import write_comparison_tables, write_multi_label_tables, write_tables
from mvit_video.io.console import print_table
from mvit_video.io.writing import replacing, write_json

log = logging.getLogger(__name__)

_SETTINGS = (
    *("date", "command", "weights_sha256", "model_sha256", "model_name", "model", "precision"),
    *("class_map", "decoder", "split", "data"),
)


def report(
    tables: Mapping[str, ScoreTable],
    output: Path,
    *,
    how: Combination,
    seed: int,
    num_mistakes: int,
    open_file: OpenVideo | None = None,
) -> Metrics | MultiLabelMetrics | None:
    """Report a table, or compare several by their names, which gives no metrics.

    Writes results.json, tables, report.html and its pictures, of one table videos.parquet too.

    Args:
        how: see ``combine``.
        seed: see ``measure``.
        num_mistakes: how many of the worst mistakes to show; with frames, where ``open_file`` is given.

    Raises:
        ConfigError: tables to compare, where a video may be of several classes.
        DataError: see ``measure`` and ``measure_multi_label``.
    """
    (_, table), *others = tables.items()
    if any(table.multi_label for table in tables.values()):
        if others:
            raise ConfigError(
                "of several classes a video there is no comparison; ensemble=true averages scores"
            )
        return _report_multi_label(table, output, how)
    if others:
        _report_comparison(tables, output, how, seed)
        return None
    metrics = measure(table, how, seed=seed)
    results = _results(table, metrics, how, seed)
    _write_videos(table, metrics, output / "videos.parquet")
    write_json(output / "results.json", results)
    write_tables(output, results)
    write_report(output, table, metrics, results=results, num_mistakes=num_mistakes, open_file=open_file)
    rows = [(level, results[f"{level}_top1"], results[f"{level}_top5"]) for level in ("video", "clip")]
    print_table(f"{len(table)} videos; {results['protocol']}", ("level", "top-1", "top-5"), rows)
    log.info("mean class accuracy %.4f, macro F1 %.4f", metrics.mean_class_accuracy, metrics.macro_f1)
    text = "top-1 %.4f, 95 %% interval %.4f to %.4f; results.json and report.html are in %s"
    log.info(text, results["video_top1"], *metrics.intervals["video_top1"], output)
    return metrics


def _report_multi_label(table: ScoreTable, output: Path, how: Combination) -> MultiLabelMetrics:
    metrics = measure_multi_label(table, how)
    counts, found = metrics.targets.sum(0).tolist(), metrics.per_class.tolist()
    per_class = {
        name: {"videos": count, "average_precision": value}
        for name, count, value in zip(table.class_names, counts, found, strict=True)
        if count
    }
    results = {**_describe(table, how), **metrics.accuracy, "per_class": per_class}
    write_json(output / "results.json", results)
    write_multi_label_tables(output, results)
    write_multi_label_report(output, results=results)
    rows = [(name, row["videos"], row["average_precision"]) for name, row in per_class.items()]
    print_table(f"{len(table)} videos; {results['protocol']}", ("class", "videos", "AP"), rows)
    text = "mAP %.4f over %d classes; results.json and report.html are in %s"
    log.info(text, results["map"], len(rows), output)
    return metrics


def _report_comparison(tables: Mapping[str, ScoreTable], output: Path, how: Combination, seed: int) -> None:
    """Of tables of the same videos, pair by pair."""
    measured = {name: measure(table, how, seed=seed) for name, table in tables.items()}
    (first_table, *_) = tables.values()
    comparisons = []
    for first, second in combinations(measured, 2):
        found = compare(measured[first], measured[second])
        differences = zip(first_table.class_names, found.per_class.tolist(), strict=True)
        per_class = {name: value for name, value in differences if value == value}  # no nan: it has videos
        pair = {"first": first, "second": second, "per_class": per_class}
        comparisons.append(asdict(found) | pair)
    results = {
        "models": {name: _results(table, measured[name], how, seed) for name, table in tables.items()},
        "comparisons": comparisons,
        "videos": len(first_table),
        "combine": how,
        "seed": seed,
        "versions": versions(),
        "views": None,
        "data": None,
    }
    write_json(output / "results.json", results)
    write_comparison_tables(output, results)
    write_comparison(output, first_table.class_names, measured, results=results)
    accuracies = [(name, m.accuracy["video_top1"], m.accuracy["video_top5"]) for name, m in measured.items()]
    print_table(f"{len(first_table)} videos", ("scores", "top-1", "top-5"), accuracies)
    print_table(
        "McNemar's exact test on the videos that one alone gets right",
        ("first", "second", "points", "only first", "only second", "p"),
        [
            (*pair, f"{100 * c['difference']:+.2f}", c["only_first"], c["only_second"], f"{c['p_value']:.3g}")
            for pair, c in zip(combinations(measured, 2), comparisons, strict=True)
        ],
    )
    log.info("results.json and report.html are in %s", output)


def _describe(table: ScoreTable, how: Combination) -> dict[str, Any]:
    """What the scores of a table come from, as ``results.json`` has it."""
    known = table.provenance
    bad = known.get("bad_videos", [])
    return {
        "weights": known.get("weights", known.get("scores", "")),
        "protocol": known.get("protocol_text", "scores of an unknown protocol"),
        "views": known.get("protocol"),
        **{name: known.get(name) for name in _SETTINGS},
        "data_path": _data_path(table),
        "combine": how,
        "versions": known.get("versions", versions()),
        "videos": len(table),
        "views_per_video": table.views.shape[1],
        "bad_videos": bad,
        "num_bad_videos": len(bad),
        "left_out_videos": known.get("left_out_videos", []),  # missing on disk, or unreadable by the index
        "missing_videos": sum(not os.path.exists(video["path"]) for video in bad),  # noqa: PTH110 (any text)
    }


def _results(table: ScoreTable, metrics: Metrics, how: Combination, seed: int) -> dict[str, Any]:
    of_classes = {"mean_class_accuracy": metrics.mean_class_accuracy, "macro_f1": metrics.macro_f1}
    measured: dict[str, Any] = metrics.accuracy | of_classes
    measured |= {f"{name}_interval": metrics.intervals.get(name) for name in measured}
    for suffix in ("", "_interval"):  # it has two names
        measured[f"balanced_accuracy{suffix}"] = measured[f"mean_class_accuracy{suffix}"]
    return {
        **_describe(table, how),
        "seed": seed,
        **measured,
        "calibration_error": metrics.calibration_error,
        "top1_by_views": metrics.by_views,
        "per_class": _per_class(table.class_names, metrics),
    }


def _per_class(class_names: Sequence[str], metrics: Metrics) -> dict[str, dict[str, Any]]:
    """Of the classes that have videos; precision is None where a class is never predicted."""
    rates, found = metrics.rates, {}
    for index, (name, videos) in enumerate(zip(class_names, metrics.confusion.sum(1).tolist(), strict=True)):
        if videos:
            precision, recall, f1 = (float(rate[index]) for rate in rates)
            interval = wilson_interval(int(metrics.confusion[index, index]), videos)
            found[name] = {"videos": videos, "top1": recall, "support": videos, "recall": recall}
            found[name] |= {"recall_interval": interval, "f1": f1}
            found[name] |= {"precision": None if isnan(precision) else precision}
    return found


def _data_path(table: ScoreTable) -> str | None:
    """The data set's folder, else that of all videos."""
    data = table.provenance.get("data") or {}
    with suppress(ValueError):  # some paths are absolute, some aren't; or there is none
        paths = [str(Path(video.path).parent) for video in table.videos if video.path]
        return data.get("root") or os.path.commonpath(paths)
    return None


def _write_videos(table: ScoreTable, metrics: Metrics, path: Path) -> None:
    """A row per video: its class, the likeliest one and their scores, and all combined scores."""
    top = metrics.scores.max(-1)
    flat = pa.array(metrics.scores.flatten().numpy())
    columns = {
        "id": [video.id for video in table.videos],
        "path": [video.path for video in table.videos],
        "label": metrics.labels.numpy(),
        "class": [table.class_names[label] for label in metrics.labels],
        "predicted": top.indices.numpy(),
        "predicted_class": [table.class_names[index] for index in top.indices],
        "correct": metrics.correct.numpy(),
        "confidence": top.values.numpy(),
        "label_score": metrics.scores.gather(1, metrics.labels[:, None])[:, 0].numpy(),
        "scores": pa.FixedSizeListArray.from_arrays(flat, len(table.class_names)),
    }
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file)
