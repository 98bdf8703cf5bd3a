"""Scores on the disk: Parquet with a row per view (id, path, label, view, start and end in seconds, scores).

Videos that may have several classes have them in a further column, "labels".

Class names and provenance are in the metadata of the schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mvit_video.data.class_names import check_class_names
from mvit_video.data.index import LabelledVideo
from mvit_video.data.table import read_parquet
from mvit_video.errors import DataError, brief
from mvit_video.evaluation.scores import ScoreTable
from mvit_video.io.writing import replacing

_METADATA = b"mvit_video"
_PROVENANCE = "facts"  # the name that files of all versions have for it
_COLUMNS = {  # and "scores", lists of C float32
    "id": pa.string(),
    "path": pa.string(),
    "label": pa.int64(),
    "view": pa.int32(),
    "start": pa.float64(),
    "end": pa.float64(),
}
_PROVENANCE_TYPES = {
    **dict.fromkeys(("weights", "scores", "protocol_text", "precision", "split", "date"), str),
    **dict.fromkeys(("versions", "protocol", "model", "decoder", "data"), dict),
    **dict.fromkeys(("bad_videos", "left_out_videos"), list),
}
_SEVERAL = "labels"  # column of videos that may have several classes, whose label is null
_ROUNDING = 1e-3


def write_scores(table: ScoreTable, path: Path) -> None:
    """A Parquet file of the table; it appears whole or not at all."""
    number, classes = table.views.shape[1:]
    rows = [video for video in table.videos for _ in range(number)]
    columns = [
        [video.id for video in rows],
        [video.path for video in rows],
        [None if isinstance(video.label, tuple) else video.label for video in rows],
        list(range(number)) * len(table),
        *table.spans.flatten(0, 1).T.numpy(),
    ]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, _COLUMNS.values(), strict=True)]
    scores = pa.FixedSizeListArray.from_arrays(pa.array(table.views.flatten().numpy(), pa.float32()), classes)
    content = {"class_names": list(table.class_names), _PROVENANCE: dict(table.provenance)}
    found = pa.table([*arrays, scores], names=[*_COLUMNS, "scores"])
    if table.multi_label:
        of_rows = pa.array([video.labels for video in rows], pa.list_(pa.int64()))
        found = found.append_column(_SEVERAL, of_rows)
    with replacing(path) as file:
        pq.write_table(found.replace_schema_metadata({_METADATA: json.dumps(content)}), file)


def read_scores(path: Path) -> ScoreTable:
    """Read what ``write_scores`` writes.

    Raises:
        DataError: it isn't such a file, a value in it can't be (the error names row and value), or a video
            lacks views that others have, or has one twice.
    """
    try:
        rows = read_parquet(path, [*_COLUMNS, "scores", _SEVERAL])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: no Parquet file of scores ({brief(error)})") from None
    try:
        return _table_of(rows)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _table_of(rows: pa.Table) -> ScoreTable:
    class_names, provenance = _metadata(rows.schema)
    first_row = rows["scores"][0].as_py() if len(rows) else None
    if not class_names and isinstance(first_row, list):
        class_names = tuple(map(str, range(len(first_row))))
    if not class_names or not len(rows):
        raise DataError(f"no scores; it has {len(rows)} rows, the first with {first_row!r:.60}")
    kinds = {**_COLUMNS, "scores": pa.list_(pa.float32(), len(class_names))}
    ids, paths, labels, view, start, end, scores = (_column(rows, *item) for item in kinds.items())
    scores = scores.reshape(len(rows), -1)
    wrong = ~((scores >= 0) & (scores <= 1 + _ROUNDING))
    first_wrong = scores[np.arange(len(rows)), wrong.argmax(1)]
    _refuse(wrong.any(1), "scores", first_wrong, "no softmax: NaN, infinite, or not in 0 to 1")
    _refuse(scores.sum(1) == 0, "scores", scores[:, 0], "no class has a score")
    for name, times in (("start", start), ("end", end)):
        _refuse(np.isinf(times), name, times, "no time in seconds")
    _refuse(start > end, "start", start, "behind its end")
    unknown = labels != labels  # a missing label has become nan
    outside = ~unknown & ~((labels >= 0) & (labels < len(class_names)))
    _refuse(outside, "label", labels, f"there are {len(class_names)} classes, counted from 0")

    of_video = pa.array(ids).dictionary_encode().indices.to_numpy()
    order = np.lexsort((view, of_video))
    counts = np.bincount(of_video)
    number = int(counts.max())
    expected = np.arange(len(rows)) - (counts.cumsum() - counts)[of_video[order]]
    odd = (view[order] != expected) | (counts[of_video[order]] != number)
    if odd.any():
        raise DataError(f"{ids[order[odd.argmax()]]} lacks a view of 0 to {number - 1}, or has one twice")
    first = order[::number]
    known: list[Any] = [None if label != label else int(label) for label in labels]
    if _SEVERAL in rows.schema.names:
        known = [_several(*item, len(class_names)) for item in enumerate(rows[_SEVERAL].to_pylist())]
    for name, values in (("label", np.array(list(map(str, known)))), ("path", paths)):
        _refuse(values != values[first][of_video], name, values, "other views of the video have another one")
    videos = tuple(map(LabelledVideo, paths[first], (known[row] for row in first), ids[first]))
    spans = torch.from_numpy(np.stack([start, end], axis=1)[order]).view(-1, number, 2)
    views = torch.from_numpy(scores[order]).view(-1, number, len(class_names))
    return ScoreTable(videos, views, spans, class_names, provenance)


def _several(row: int, value: Any, num_classes: int) -> tuple[int, ...]:
    fits = isinstance(value, list) and all(type(label) is int and 0 <= label < num_classes for label in value)
    if not fits:
        raise DataError(f"{_SEVERAL} of row {row} is {value!r:.60}; there are {num_classes} classes, from 0")
    return tuple(value)


def _column(rows: pa.Table, name: str, kind: pa.DataType) -> Any:
    """A column as an array; lists of scores one after the other."""
    column = rows[name]
    if column.null_count and name not in ("label", "start", "end"):
        raise DataError(f"{name} of row {column.is_null().index(True)} is missing")
    try:
        column = column.cast(kind).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{name} of {column.type}, expected {kind}: {brief(error)}") from None
    return (column.flatten() if name == "scores" else column).to_numpy(zero_copy_only=False)


def _refuse(wrong: Any, name: str, values: Any, why: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{name} of row {row} is {values[row]}; {why}")


def _metadata(schema: pa.Schema) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Class names, () where there are none, and provenance."""
    missing = [name for name in (*_COLUMNS, "scores") if name not in schema.names]
    if missing:
        raise DataError(f"no scores of mvit-eval; it has no column {missing[0]}")
    try:
        content = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # results will say it again
        names, provenance = content.get("class_names") or [], content.get(_PROVENANCE) or {}
        provenance = {name: value for name, value in provenance.items() if value is not None}
        for name, kind in _PROVENANCE_TYPES.items():
            if not isinstance(provenance.get(name, kind()), kind):
                raise ValueError(f"{name} is {provenance[name]!r:.60}")
        for video in provenance.get("bad_videos", []):
            if not all(isinstance(video[name], str) for name in ("id", "path", "reason")):
                raise ValueError(f"a bad video is {video!r:.60}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names aren't names")
        if names:
            check_class_names(names, "class_names")
    except (DataError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"damaged metadata ({brief(error)})") from None
    return tuple(names), provenance
