"""The index file: one Parquet table of all videos of a data set with what `mvit-data prepare` found out."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mvit_video.data.files import existing
from mvit_video.data.index import LabelledVideo, VideoIndex, VideoSplits, leave_out
from mvit_video.errors import DataError

INDEX_NAME = "index.parquet"
_METADATA_KEY = b"mvit_video"


class Facts(NamedTuple):
    """What one file turned out to be; without `error` it can be read.

    Attributes:
        size: bytes; of pictures, of all of them.
        mtime_ns: when the file changed last, nanoseconds.
        frames, fps, duration (seconds), height, width, codec: as of `Video`; 0 and "" for a bad file.
        sha256: of the file's content; "" where it couldn't be read.
        error: why the video can't be used.
    """

    size: int = 0
    mtime_ns: int = 0
    frames: int = 0
    fps: float = 0.0
    duration: float = 0.0
    height: int = 0
    width: int = 0
    codec: str = ""
    sha256: str = ""
    error: str | None = None


class Entry(NamedTuple):
    """A video of the index: its split and what is known of its file."""

    split: str
    video: LabelledVideo
    facts: Facts


@dataclass(frozen=True)
class Table:
    """An index file's content.

    Attributes:
        root: the folder of the data set, if it has one.
        unlisted: files below `root` that the data set doesn't name.
    """

    entries: list[Entry]
    class_names: tuple[str, ...]
    root: str | None = None
    unlisted: tuple[str, ...] = ()


_SCHEMA = pa.schema(
    [
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("id", pa.string()),
        ("path", pa.string()),  # relative to the index where the video lies below it
        ("label", pa.int32()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("duration", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("codec", pa.dictionary(pa.int16(), pa.string())),
        ("sha256", pa.string()),
        ("error", pa.string()),
    ]
)


def index_splits(path: str | Path, *, max_missing: float = 0.2) -> VideoSplits:
    """The splits of an index file of `mvit-data prepare`.

    Args:
        path: the file, or the folder that has it as `index.parquet`.
        max_missing: how large a share of a split may be missing or unreadable; those videos are left out. All
            of the test split may be.

    Raises:
        DataError: there is no such file, it is no index, or too many videos can't be used.
    """
    file = index_file(path)
    table, metadata = _read(file, ["split", "id", "path", "label", "error"])
    names = tuple(metadata["class_names"])
    table = table.set_column(2, "path", _absolute(table["path"], str(file.absolute().parent)))
    videos: dict[str, list[LabelledVideo]] = {"train": [], "val": [], "test": []}
    reasons: dict[str, dict[str, str]] = {split: {} for split in videos}
    columns = (column.to_pylist() for column in table.columns)
    for split, video_id, place, label, error in zip(*columns, strict=True):
        videos[split].append(LabelledVideo(place, label, video_id))
        if error is not None:
            reasons[split][video_id] = error
    found = {
        split: leave_out(
            VideoIndex(tuple(of_split), names),
            reasons[split],
            source=f"{file} ({split})",
            max_missing=1.0 if split == "test" else max_missing,
            remedy="mend them and run mvit-data prepare again",
        )
        for split, of_split in videos.items()
        if (of_split and len(reasons[split]) < len(of_split)) or split != "test"
    }
    return VideoSplits(found["train"], found["val"], found.get("test"))


def index_file(path: str | Path) -> Path:
    """The index file that a path means. Raises `DataError` where there is none."""
    file = existing(path)
    file = file / INDEX_NAME if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"{file} does not exist; mvit-data prepare makes it")
    return file


def read_table(file: Path) -> Table:
    """All of an index file. Raises `DataError` for another kind of file."""
    table, metadata = _read(file, None)
    base = str(file.absolute().parent)
    columns = {name: table.column(name).to_pylist() for name in _SCHEMA.names}
    facts = map(Facts, *(columns[name] for name in Facts._fields))
    entries = [
        Entry(split, LabelledVideo(os.path.join(base, path), label, video_id), fact)  # noqa: PTH118
        for split, video_id, path, label, fact in zip(
            *(columns[name] for name in ("split", "id", "path", "label")), facts, strict=True
        )
    ]
    root = None if metadata["root"] is None else os.path.normpath(os.path.join(base, metadata["root"]))  # noqa: PTH118
    unlisted = tuple(os.path.join(base, path) for path in metadata["unlisted"])  # noqa: PTH118
    return Table(entries, tuple(metadata["class_names"]), root, unlisted)


def write_table(file: Path, table: Table) -> None:
    """Write an index file at once: a reader sees the old one or the new one, never half of it."""
    base, entries = str(file.absolute().parent), table.entries
    columns: dict[str, list[object]] = {
        "split": [entry.split for entry in entries],
        "id": [entry.video.id for entry in entries],
        "path": [_portable(entry.video.path, base) for entry in entries],
        "label": [entry.video.label for entry in entries],
    }
    for name in Facts._fields:
        columns[name] = [getattr(entry.facts, name) for entry in entries]
    metadata = {
        "class_names": table.class_names,
        "root": None if table.root is None else _portable(table.root, base),
        "unlisted": [_portable(path, base) for path in table.unlisted],
    }
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    partial = file.with_name(file.name + ".tmp")
    pq.write_table(pa.table(columns, schema=schema), partial, compression="zstd")
    partial.replace(file)


def _absolute(paths: pa.ChunkedArray, base: str) -> pa.ChunkedArray:
    below = pc.binary_join_element_wise(base.rstrip(os.sep), paths, os.sep)
    return pc.if_else(pc.starts_with(paths, os.sep), paths, below)


def _portable(path: str, base: str) -> str:
    """Relative to the index below its folder, so that both can be moved together; else absolute."""
    path = os.path.abspath(path)  # noqa: PTH100 (speed)
    return "." if path == base else path.removeprefix(base.rstrip(os.sep) + os.sep)


def _read(file: Path, columns: list[str] | None) -> tuple[pa.Table, dict[str, Any]]:
    try:
        table = pq.read_table(file, columns=columns)
        metadata = json.loads(table.schema.metadata[_METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{file} is no index of mvit-data prepare, or a damaged one ({reason})") from None
    return table, metadata
