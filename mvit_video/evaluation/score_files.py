"""Scores on the disk: Parquet files of whole tables, and logs that grow while an evaluation runs.

Both have a row per view: id, path, label, view, start and end in seconds, softmax scores. Class names and
provenance are in the metadata of the schema.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mvit_video.data.index import LabelledVideo
from mvit_video.errors import DataError, brief
from mvit_video.evaluation.scores import ScoreTable, VideoScores
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.writing import append, naming, replacing, set_aside

log = logging.getLogger(__name__)

_METADATA, _FILE = b"mvit_video", b"file"
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
_SAVE_EVERY_S = 1.0  # syncing a file to the disk takes as long as scoring several videos
_ROUNDING = 1e-3


def write_scores(table: ScoreTable, path: Path) -> None:
    """A Parquet file of the table; it appears whole or not at all."""
    schema = _schema(table.class_names, table.provenance)
    batch = _batch(table.videos, table.views, table.spans, schema)
    with replacing(path) as file:
        pq.write_table(pa.Table.from_batches([batch]), file)


def read_scores(path: Path) -> ScoreTable:
    """Read what ``write_scores`` writes.

    Raises:
        DataError: it isn't such a file, a value in it can't be (the error names row and value), or a video
            lacks views that others have, or has one twice.
    """
    try:
        found = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: no Parquet file of scores ({brief(error)})") from None
    return _table(found, str(path))


# Logs


class ScoreLog:
    """Adds scores to a new file as they are made: a killed process loses the last second at most."""

    def __init__(self, path: Path, class_names: Sequence[str], provenance: Mapping[str, Any]) -> None:
        self.path = path
        self._schema = _schema(class_names, provenance)
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        self._unsaved = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._unsaved, self._schema)
        self._save_at = 0.0  # the first video at once

    def append(self, scores: VideoScores, file: Fingerprint) -> None:
        """Add one video's scores, and which file they are of."""
        spans = torch.tensor(scores.spans, dtype=torch.float64)
        batch = _batch([scores.video], scores.views[None], spans[None], self._schema)
        self._stream.write_batch(batch, custom_metadata={_FILE: json.dumps(file)})
        if time.monotonic() >= self._save_at:
            self._save()

    def _save(self) -> None:
        content = self._unsaved.getvalue()
        self._unsaved.seek(0)
        self._unsaved.truncate()
        append(self._file, content)
        self._save_at = time.monotonic() + _SAVE_EVERY_S

    def __enter__(self) -> ScoreLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self.path), closing(self._file):
            self._save()


def read_logs(
    folder: Path, files: Mapping[str, Fingerprint], check: Callable[[Mapping[str, Any]], None]
) -> ScoreTable | None:
    """The videos of ``files`` that the logs in a folder hold, each once; None where there are none.

    A log whose end is torn, as a killed process leaves it, gives its whole videos; one that can't be read at
    all is set aside.

    Args:
        files: of each video's id, the file that its scores must be of; scores of another file don't count.
        check: of the class names and provenance of a log; raises for those of other work.
    """
    batches: dict[str, pa.RecordBatch] = {}
    outdated: set[str] = set()
    metadata = None
    for log_file in sorted(folder.glob("*.arrows")):
        for batch, file in _whole_batches(log_file, check):
            metadata = batch.schema.metadata
            video_id = batch.column("id")[0].as_py()
            if file == files.get(video_id):
                batches.setdefault(video_id, batch.replace_schema_metadata(None))
            else:
                outdated.add(video_id)
    outdated -= batches.keys()
    if outdated:
        text = "%s: scores of %d videos whose file, path or label has changed since don't count, such as %s"
        log.warning(text, folder, len(outdated), min(outdated))
    if not batches:
        return None
    return _table(pa.Table.from_batches(batches.values()).replace_schema_metadata(metadata), str(folder))


def _whole_batches(
    path: Path, check: Callable[[Mapping[str, Any]], None]
) -> Iterator[tuple[pa.RecordBatch, Fingerprint]]:
    if not path.stat().st_size:  # killed before the first video was done
        return
    try:
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        class_names, provenance = _metadata(reader.schema, str(path))
    except (pa.ArrowException, DataError) as error:
        set_aside(path, f"no log of scores ({brief(error)})")
        return
    check({"class_names": list(class_names), **provenance})
    try:
        for batch, custom in reader.iter_batches_with_custom_metadata():
            batch.validate(full=True)
            yield batch, json.loads(custom[_FILE]) if custom else {}
    except (pa.ArrowException, OSError, ValueError) as error:
        log.warning("%s: its end is torn; what is before it counts (%s)", path, brief(error))


# Rows


def _schema(class_names: Sequence[str], provenance: Mapping[str, Any]) -> pa.Schema:
    content = json.dumps({"class_names": list(class_names), _PROVENANCE: dict(provenance)})
    columns = [*_COLUMNS.items(), ("scores", pa.list_(pa.float32(), len(class_names)))]
    return pa.schema(columns, metadata={_METADATA: content.encode()})


def _batch(
    videos: Sequence[LabelledVideo], views: Tensor, spans: Tensor, schema: pa.Schema
) -> pa.RecordBatch:
    """Rows of videos whose views are (N, V, C) and spans (N, V, 2), views varying fastest."""
    number = views.shape[1]
    rows = [video for video in videos for _ in range(number)]
    columns = [
        [video.id for video in rows],
        [video.path for video in rows],
        [video.label for video in rows],
        list(range(number)) * len(videos),
        spans[..., 0].flatten().numpy(),
        spans[..., 1].flatten().numpy(),
    ]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, _COLUMNS.values(), strict=True)]
    flat = pa.array(views.flatten().numpy(), pa.float32())
    arrays.append(pa.FixedSizeListArray.from_arrays(flat, views.shape[-1]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _table(rows: pa.Table, where: str) -> ScoreTable:
    class_names, provenance = _metadata(rows.schema, where)
    first_row = rows["scores"][0].as_py() if len(rows) else None
    if not class_names and isinstance(first_row, list):
        class_names = tuple(map(str, range(len(first_row))))
    if not class_names or not len(rows):
        raise DataError(f"{where}: no scores; it has {len(rows)} rows, the first with {first_row!r:.60}")
    kinds = {**_COLUMNS, "scores": pa.list_(pa.float32(), len(class_names))}
    ids, paths, labels, view, start, end, scores = (_column(rows, *item, where) for item in kinds.items())
    scores = scores.reshape(len(rows), -1)
    wrong = ~((scores >= 0) & (scores <= 1 + _ROUNDING))
    first_wrong = scores[np.arange(len(rows)), wrong.argmax(1)]
    _refuse(wrong.any(1), first_wrong, f"{where}: scores", "no softmax: NaN, infinite, or not in 0 to 1")
    unknown = labels != labels  # a missing label has become nan
    outside = ~unknown & ~((labels >= 0) & (labels < len(class_names)))
    _refuse(outside, labels, f"{where}: label", f"there are {len(class_names)} classes, counted from 0")

    of_video = pa.array(ids).dictionary_encode().indices.to_numpy()
    order = np.lexsort((view, of_video))
    counts = np.bincount(of_video)
    number = int(counts.max())
    expected = np.arange(len(rows)) - (counts.cumsum() - counts)[of_video[order]]
    odd = (view[order] != expected) | (counts[of_video[order]] != number)
    if odd.any():
        video_id = ids[order[odd.argmax()]]
        raise DataError(f"{where}: {video_id} lacks a view of 0 to {number - 1}, or has one twice")
    first = order[::number]
    for name, values in (("label", np.where(unknown, -1, labels)), ("path", paths)):
        differs = np.zeros(len(rows), dtype=bool)
        differs[order] = values[order] != values[first].repeat(number)
        _refuse(differs, values, f"{where}: {name}", "other views of the same video have another one")
    videos = tuple(
        LabelledVideo(path, None if label != label else int(label), video_id)
        for path, label, video_id in zip(paths[first], labels[first], ids[first], strict=True)
    )
    spans = torch.from_numpy(np.stack([start, end], axis=1)[order]).view(-1, number, 2)
    views = torch.from_numpy(scores[order]).view(-1, number, len(class_names))
    return ScoreTable(videos, views, spans, class_names, provenance)


def _column(rows: pa.Table, name: str, kind: pa.DataType, where: str) -> Any:
    """A column as an array; lists of scores one after the other."""
    column = rows[name]
    if column.null_count and name not in ("label", "start", "end"):
        raise DataError(f"{where}: {name} of row {column.is_null().index(True)} is missing")
    try:
        column = column.cast(kind).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{where}: {name} of {column.type}, expected {kind}: {brief(error)}") from None
    values = column.flatten() if name == "scores" else column
    return values.to_numpy(zero_copy_only=False)


def _refuse(wrong: Any, values: Any, what: str, why: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{what} of row {row} is {values[row]}; {why}")


def _metadata(schema: pa.Schema, where: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Class names, () where there are none, and provenance."""
    missing = [name for name in (*_COLUMNS, "scores") if name not in schema.names]
    if missing:
        raise DataError(f"{where}: no scores of mvit-eval; it has no column {missing[0]}")
    try:
        content = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
        names, provenance = content.get("class_names") or [], content.get(_PROVENANCE) or {}
        provenance = {name: value for name, value in provenance.items() if value is not None}
        for name, kind in _PROVENANCE_TYPES.items():
            if not isinstance(provenance.get(name, kind()), kind):
                raise ValueError(f"{name} is {provenance[name]!r:.60}")
        for video in provenance.get("bad_videos", []):
            if not all(isinstance(video[name], str) for name in ("id", "path", "reason")):
                raise ValueError(f"a bad video is {video!r:.60}")
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("class_names aren't different names")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: damaged metadata ({brief(error)})") from None
    return tuple(names), provenance
