"""Tables of scores: what a model says of every view of every video, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mvit_video.data.index import LabelledVideo
from mvit_video.errors import DataError, did_you_mean
from mvit_video.evaluation.scoring import VideoScores

Combination = Literal["mean", "max", "logits"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)

_METADATA = b"mvit_video"
_COLUMNS = ("id", "path", "label", "view", "start", "end", "scores")


@dataclass(frozen=True)
class ScoreTable:
    """Scores of N videos with V views each, of C classes.

    Attributes:
        views: float32 (N, V, C), the softmax of each view.
        spans: float64 (N, V, 2), first and last frame of each view in seconds; nan where nobody knows.
        class_names: C names; labels are positions in them.
        facts: how the scores came about (protocol, weights, bad videos, ...), as plain json values.
    """

    videos: tuple[LabelledVideo, ...]
    views: Tensor
    spans: Tensor
    class_names: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def labels(self) -> Tensor:
        """int64 (N,). Raises DataError for a video without a label."""
        for video in self.videos:
            if video.label is None:
                raise DataError(f"{video.id} has scores but no label; give data=... with labels")
        return torch.tensor([video.label for video in self.videos], dtype=torch.int64)


def combine(views: Tensor, how: Combination) -> Tensor:
    """Softmax scores of views (..., V, C) -> probabilities of videos (..., C).

    "mean" of the softmax scores (published accuracies), "max" (PySlowFast's other choice, scaled to sum to
    1), or "logits": the softmax of the mean of logits, which softmax scores determine up to a constant (as
    long as they don't underflow: 87 below the highest logit).
    """
    if how == "mean":
        return views.mean(-2)
    if how == "max":
        highest = views.amax(-2)
        return highest / highest.sum(-1, keepdim=True)
    return views.clamp(min=torch.finfo(views.dtype).tiny).log().mean(-2).softmax(-1)


# Classes


def class_matrix(
    known: Sequence[str], wanted: Sequence[str], mapping: Mapping[str, str | Sequence[str]] | None = None
) -> Tensor:
    """float (known, wanted): which of a model's classes count for each class of a data set.

    Args:
        mapping: for a wanted class, the name or names of the model's; classes that it leaves out are looked
            up by their own name.

    Raises:
        DataError: a wanted class has no counterpart, a name is unknown, or one counts twice.
    """
    mapping = mapping or {}
    position = {name: index for index, name in enumerate(known)}
    matrix = torch.zeros(len(known), len(wanted))
    for name in mapping:
        if name not in wanted:
            raise DataError(f"class_map has {name!r}, which the data set lacks{did_you_mean(name, wanted)}")
    for column, name in enumerate(wanted):
        sources = mapping.get(name, name)
        for source in [sources] if isinstance(sources, str) else sources:
            if source not in position:
                raise DataError(
                    f"class {name!r}: the model has no class {source!r}{did_you_mean(source, known)}; "
                    "class_map=FILE can say which one it is"
                )
            row = matrix[position[source]]
            if row.any():
                raise DataError(f"class {source!r} of the model counts for two classes of the data set")
            row[column] = 1
    return matrix


def map_classes(scores: Tensor, matrix: Tensor) -> Tensor:
    """Scores (..., known) -> (..., wanted): summed per class, scaled to sum to 1 over the wanted ones."""
    mapped = scores @ matrix
    return mapped / mapped.sum(-1, keepdim=True).clamp(min=torch.finfo(mapped.dtype).tiny)


# Labels


def with_labels(table: ScoreTable, videos: Sequence[LabelledVideo], class_names: Sequence[str]) -> ScoreTable:
    """A table with the labels and the order of a data set's ``videos``.

    Raises:
        DataError: a video has a label and no scores (and isn't among the table's bad videos), or scores and
            no label.
    """
    row = {video.id: index for index, video in enumerate(table.videos)}
    bad = {video["id"] for video in table.facts.get("bad_videos", [])}
    labelled = {video.id for video in videos}
    _none_left(
        [v.id for v in videos if v.id not in row and v.id not in bad], "in the data set but not scored"
    )
    _none_left([v.id for v in table.videos if v.id not in labelled], "scored but not in the data set")
    kept = [video for video in videos if video.id in row]
    order = torch.tensor([row[video.id] for video in kept], dtype=torch.int64)
    return replace(
        table,
        videos=tuple(kept),
        views=table.views[order],
        spans=table.spans[order],
        class_names=tuple(class_names),
    )


def aligned(tables: Mapping[str, ScoreTable]) -> dict[str, ScoreTable]:
    """The same videos and classes in the same order in every table; the first one's.

    Raises:
        DataError: their videos, labels or classes differ.
    """
    (first_name, first), *_ = tables.items()
    labels = {video.id: video.label for video in first.videos}
    result = {}
    for name, table in tables.items():
        if sorted(table.class_names) != sorted(first.class_names):
            odd = set(table.class_names) ^ set(first.class_names)
            raise DataError(f"{name} and {first_name} have different classes, such as {min(odd)!r}")
        columns = [table.class_names.index(class_name) for class_name in first.class_names]
        for video in table.videos:
            own = None if video.label is None else table.class_names[video.label]
            label = labels.get(video.id)
            if video.id in labels and label is not None and own != first.class_names[label]:
                raise DataError(
                    f"{video.id} is {own!r} in {name} and {first.class_names[label]!r} in {first_name}"
                )
        ids = {video.id for video in table.videos}
        _none_left([i for i in labels if i not in ids], f"in {first_name} but not in {name}")
        _none_left([i for i in ids if i not in labels], f"in {name} but not in {first_name}")
        same_classes = replace(table, views=table.views[..., columns])
        result[name] = with_labels(same_classes, first.videos, first.class_names)
    return result


def ensemble(tables: Mapping[str, ScoreTable], how: Combination) -> ScoreTable:
    """A table whose "views" are the tables: each one's videos as ``how`` combines them. See ``aligned``."""
    first = next(iter(tables.values()))
    views = torch.stack([combine(table.views, how) for table in tables.values()], dim=1)
    facts = {
        "weights": "ensemble of " + ", ".join(tables),
        "protocol_text": " + ".join(table.facts.get("protocol_text", "?") for table in tables.values()),
        "bad_videos": first.facts.get("bad_videos", []),
    }
    return replace(first, views=views, spans=first.spans[:, :1].expand(-1, len(tables), -1), facts=facts)


def _none_left(ids: Iterable[str], problem: str) -> None:
    ids = sorted(ids)
    if ids:
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        raise DataError(f"{', '.join(ids[:3])}{more}: {problem}")


# Files


def write_scores(table: ScoreTable, path: Path) -> None:
    """A Parquet file with a row per view: id, path, label, view, start and end in seconds, softmax scores.

    Class names and facts are in its schema's metadata. The file appears whole or not at all.
    """
    schema = _schema(table.class_names, table.facts)
    batch = _batch(table.videos, table.views, table.spans, schema)
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_batches([batch]), part)
    part.replace(path)


def read_scores(path: Path) -> ScoreTable:
    """Read what ``write_scores`` writes.

    Raises:
        DataError: it isn't such a file, or a video lacks views that others have, or has one twice.
    """
    try:
        found = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: no Parquet file of scores ({' '.join(str(error).split())})") from None
    return _from_arrow(found, str(path))


class ScoreLog:
    """Appends scores to a new file as they are made, so that a killed process leaves them behind.

    Raises:
        DataError: the file exists.
    """

    def __init__(self, path: Path, class_names: Sequence[str], facts: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._schema = _schema(class_names, facts)
        try:
            self._file = path.open("xb")
        except FileExistsError:
            raise DataError(
                f"{path} has come into being just now: another evaluation works in this folder; wait for its "
                "end, or choose another hydra.run.dir"
            ) from None
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def append(self, scores: VideoScores) -> None:
        """Write one video's scores through to the operating system."""
        spans = torch.tensor(scores.spans, dtype=torch.float64)
        self._stream.write_batch(_batch([scores.video], scores.views[None], spans[None], self._schema))
        self._file.flush()

    def __enter__(self) -> ScoreLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._file.close()


def read_logs(
    folder: Path, class_names: Sequence[str], facts: Mapping[str, Any], compared: Iterable[str]
) -> ScoreTable | None:
    """Everything that the logs in a folder hold, each video once; None where there is nothing.

    Args:
        compared: the facts in which the logs must agree with ``facts``.

    Raises:
        DataError: a log belongs to another evaluation.
    """
    batches: list[pa.RecordBatch] = []
    seen: set[str] = set()
    for file in sorted(folder.glob("*.arrows")):
        for batch in _complete_batches(file):
            _check_same(batch.schema, class_names, facts, compared, folder)
            (video_id,) = set(batch.column("id").to_pylist())
            if video_id not in seen:  # two evaluations may have run at once
                batches.append(batch.replace_schema_metadata(None))
                seen.add(video_id)
    if not batches:
        return None
    found = pa.Table.from_batches(batches).replace_schema_metadata(_schema(class_names, facts).metadata)
    return _from_arrow(found, str(folder))


def _complete_batches(file: Path) -> Iterable[pa.RecordBatch]:
    with file.open("rb") as stream:
        try:
            reader = pa.ipc.open_stream(stream)
            yield from reader
        except (pa.ArrowInvalid, OSError):  # the process was killed while it wrote
            return


def _check_same(
    schema: pa.Schema,
    class_names: Sequence[str],
    facts: Mapping[str, Any],
    compared: Iterable[str],
    folder: Path,
) -> None:
    there = json.loads(schema.metadata[_METADATA])
    pairs: list[tuple[str, Any, Any]] = [("class_names", there["class_names"], list(class_names))]
    for name in compared:
        old, new = there["facts"].get(name), facts.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            pairs += [(f"{name}.{key}", old.get(key), new.get(key)) for key in {**old, **new}]
        else:
            pairs.append((name, old, new))
    for name, old, new in pairs:
        if old != json.loads(json.dumps(new)):
            raise DataError(
                f"{folder} holds scores of another evaluation: {name} is {_short(old)} there and "
                f"{_short(new)} here; choose another hydra.run.dir, or remove that folder"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _schema(class_names: Sequence[str], facts: Mapping[str, Any]) -> pa.Schema:
    content = json.dumps({"class_names": list(class_names), "facts": dict(facts)})
    types = (
        pa.string(),
        pa.string(),
        pa.int64(),
        pa.int32(),
        pa.float64(),
        pa.float64(),
        pa.list_(pa.float32(), len(class_names)),
    )
    return pa.schema(list(zip(_COLUMNS, types, strict=True)), metadata={_METADATA: content.encode()})


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
    arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.types[:-1], strict=True)]
    flat = views.contiguous().flatten().numpy()
    arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), views.shape[-1]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _from_arrow(found: pa.Table, name: str) -> ScoreTable:
    missing = [column for column in _COLUMNS if column not in found.column_names]
    if missing or not pa.types.is_fixed_size_list(found.schema.field("scores").type) or not len(found):
        raise DataError(
            f"{name}: no scores of mvit-eval (it needs rows with {', '.join(_COLUMNS)}, scores a list of the "
            f"same length everywhere)"
        )
    codes = found["id"].combine_chunks().dictionary_encode().indices.to_numpy()
    view = found["view"].to_numpy()
    order = np.lexsort((view, codes))
    number = int(view.max()) + 1
    found = found.take(pa.array(order))
    ids = found["id"].to_pylist()
    if len(order) % number or (view[order].reshape(-1, number) != np.arange(number)).any():
        uneven = _uneven(ids, view[order].tolist(), number)
        raise DataError(f"{name}: {uneven} has not each of the views 0 to {number - 1} once")
    classes = found.schema.field("scores").type.list_size
    values = found["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    views = torch.from_numpy(values.astype(np.float32)).view(-1, number, classes)
    if not bool(torch.isfinite(views).all()):
        row = int((~torch.isfinite(views)).flatten(1).any(1).nonzero()[0])
        raise DataError(f"{name}: {ids[row * number]} has scores that are no numbers")
    spans = np.stack([found["start"].to_numpy(), found["end"].to_numpy()], axis=1)
    content = json.loads((found.schema.metadata or {}).get(_METADATA, b"{}"))
    first = found.take(pa.array(range(0, len(found), number)))
    labels, paths = first["label"].to_pylist(), first["path"].to_pylist()
    return ScoreTable(
        tuple(
            LabelledVideo(path, label, video_id)
            for path, label, video_id in zip(paths, labels, ids[::number], strict=True)
        ),
        views,
        torch.from_numpy(spans).view(-1, number, 2),
        tuple(content.get("class_names") or map(str, range(classes))),
        content.get("facts", {}),
    )


def _uneven(ids: Sequence[str], views: Sequence[int], number: int) -> str:
    """The first video whose views aren't 0, 1, ..., number - 1."""
    found: dict[str, list[int]] = {}
    for video_id, view in zip(ids, views, strict=True):
        found.setdefault(video_id, []).append(view)
    return next(video_id for video_id, own in found.items() if own != list(range(number)))
