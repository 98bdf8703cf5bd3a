"""Scores that other tools have written: PySlowFast's pickles, mmaction2's pickles and JSON files.

A pickle can run code when it is read. This reader builds arrays, tensors and plain containers and nothing
else; whatever else a file asks for is refused by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvit_video.data.files import existing, parse_json
from mvit_video.data.index import LabelledVideo, VideoIndex
from mvit_video.errors import DataError, brief
from mvit_video.evaluation.classes import ClassMap, map_classes, matching_classes
from mvit_video.evaluation.score_files import read_scores
from mvit_video.evaluation.scores import ScoreTable, with_labels
from mvit_video.weights.pickles import RefusedPickle, load_arrays
from mvit_video.weights.reading import require_bounded

_UNEXPECTED = (AttributeError, LookupError, ArithmeticError, RuntimeError, TypeError, ValueError)


def read_table(path: Path) -> ScoreTable:
    """Scores of mvit-eval or, by the suffix, of another tool. Raises DataError."""
    path = existing(path)
    return read_foreign_scores(path) if _is_foreign(path) else read_scores(path)


def _is_foreign(path: Path) -> bool:
    return path.suffix.lower() in (".pkl", ".pickle", ".json")


def read_foreign_scores(path: Path) -> ScoreTable:
    """Read the scores of another tool as a table with one view a video.

    Known forms:
        - PySlowFast's ``TEST.SAVE_RESULTS_PATH``: a pickled pair of scores (N, C), summed over views, and
          labels (N,).
        - mmaction2's ``--dump``: a pickled or JSON list of ``{"pred_score": (C,), "gt_label": label}``
          (releases before 1.1 say ``{"pred_scores": {"item": ...}, "gt_labels": {"item": ...}}``).
        - the list of scores alone (mmaction's ``--out``, pickled or JSON), without labels.

    Scores that aren't negative are divided by their sum; others are logits and go through a softmax. Videos
    are called "0", "1", ... in the order of the file.

    Raises:
        DataError: the file has another form, a score or a label can't be (the error names row and value), or
            a pickle asks for anything but arrays.
    """
    try:
        content = parse_json(path) if path.suffix.lower() == ".json" else _read_pickle(path)
        scores, labels = _scores_and_labels(content, most=path.stat().st_size)
    except _UNEXPECTED as error:
        raise DataError(
            f"{path}: neither PySlowFast's (scores, labels) nor mmaction2's list of pred_score and gt_label "
            f"({brief(error)})"
        ) from None
    number, classes = scores.shape
    for row, column in (~(scores.abs() <= torch.finfo(torch.float32).max)).nonzero()[:1].tolist():
        raise DataError(f"{path}: row {row} has the score {scores[row, column]}: NaN, infinite or too large")
    for row, label in enumerate(labels or ()):
        if not (float(label).is_integer() and 0 <= label < classes):
            possible = f"{classes} classes allow 0 to {classes - 1}"
            raise DataError(f"{path}: row {row} has the label {label}; {possible}")
    return ScoreTable(
        tuple(LabelledVideo("", int(labels[row]) if labels else None, str(row)) for row in range(number)),
        _probabilities(scores)[:, None],
        torch.full((number, 1, 2), torch.nan, dtype=torch.float64),
        tuple(map(str, range(classes))),
        {"scores": path.name},
    )


def as_in_data_set(
    table: ScoreTable, index: VideoIndex, class_map: ClassMap | None, path: Path
) -> ScoreTable:
    """The table of a file with the classes, labels and names of a data set's videos.

    Args:
        class_map: see ``read_class_map``; None: the classes must be the data set's.

    Raises:
        DataError: classes, videos or labels differ.
    """
    if _is_foreign(path):  # another tool's, which has no names
        table = _named_in_order(table, index.videos, path)
    unnamed = table.class_names == tuple(map(str, range(len(index.class_names))))
    if class_map is not None or not unnamed:
        matrix = matching_classes(table.class_names, len(table.class_names), index.class_names, class_map)
        if matrix is not None:
            table = replace(table, views=map_classes(table.views, matrix))
    return with_labels(table, index.videos, index.class_names)


def _named_in_order(table: ScoreTable, videos: Sequence[LabelledVideo], path: Path) -> ScoreTable:
    """Give the rows of a file without names the videos of a data set, one after the other."""
    if len(table) != len(videos):
        raise DataError(f"{path} has scores of {len(table)} videos, the data set lists {len(videos)}")
    for row, (scored, video) in enumerate(zip(table.videos, videos, strict=True)):
        if scored.label not in (None, video.label):
            raise DataError(
                f"{path}, row {row}: label {scored.label}, but {video.label} in the data set ({video.id}); "
                "its videos must come in the data set's order"
            )
    return replace(table, videos=tuple(videos))


def _scores_and_labels(content: Any, most: int) -> tuple[Tensor, list[float] | None]:
    """float64 (N, C) and, where they are known, N labels.

    Args:
        most: how many numbers there can be, a byte of the file for each; a pickle can claim any number.
    """
    require_bounded(content, most)  # lists in a pickle can hold one another
    is_pair = isinstance(content, list | tuple) and len(content) == 2 and not isinstance(content[0], dict)
    if is_pair and np.ndim(content[0][:1]) == 2:
        scores, labels = _matrix(content[0], most), _floats(content[1], most)
        if labels.shape != scores.shape[:1]:
            raise ValueError(f"{len(scores)} rows of scores, labels of shape {labels.shape}")
        return scores, labels.tolist()
    rows = list(content)
    if not rows or not isinstance(rows[0], dict):
        return _matrix(rows, most), None
    scores = _matrix([_item(row, "pred_score") for row in rows], most)
    if not any("gt_label" in row or "gt_labels" in row for row in rows):
        return scores, None
    return scores, [_floats(_item(row, "gt_label"), 1).item() for row in rows]


def _item(row: dict[str, Any], name: str) -> Any:
    return row[name] if name in row else row[f"{name}s"]["item"]


def _matrix(rows: Any, most: int) -> Tensor:
    whole = hasattr(rows, "shape")
    array = _floats(rows, most) if whole else np.stack([_floats(row, most // len(rows)) for row in rows])
    if array.ndim != 2 or not array.size:
        raise ValueError(f"scores of shape {array.shape}, expected videos x classes")
    return torch.from_numpy(array)


def _floats(values: Any, most: int) -> Any:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"values of type {array.dtype}, expected numbers")
    if array.size > most:
        raise ValueError(f"{array.size} numbers, more than the file can hold")
    return array.astype(np.float64)


def _probabilities(scores: Tensor) -> Tensor:
    """float32; sums and exponentials in float64, where no float32 overflows."""
    totals = scores.sum(1, keepdim=True)
    positive = bool((scores >= 0).all() and (totals > 0).all())
    return (scores / totals if positive else scores.softmax(1)).float()


def _read_pickle(path: Path) -> Any:
    try:
        return load_arrays(path)
    except RefusedPickle as error:
        raise DataError(f"{path}: {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: no readable pickle ({brief(error)})") from None
