"""The index file: one Parquet table of all videos of a data set with what `mvit-data prepare` found out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mvit_video.data.files import existing
from mvit_video.data.index import LabelledVideo, VideoIndex, VideoSplits, leave_out, relative
from mvit_video.errors import DataError, brief
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.writing import replacing

INDEX_NAME = "index.parquet"
SPLITS = ("train", "val", "test")
_METADATA_KEY = b"mvit_video"
# Of a table in memory, and in bytes of its file; equal labels or times, and scores of 0, are packed well.
_MOST_BYTES, _MOST_TIMES = 1 << 26, 256


class FileInfo(NamedTuple):
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
    info: FileInfo


@dataclass(frozen=True)
class Table:
    """An index file's content.

    Attributes:
        root: the folder of the data set, if it has one.
        unlisted: files below `root` that the data set doesn't name.
        made_with: settings and libraries that described the files, as of `probe.settings`.
    """

    entries: list[Entry]
    class_names: tuple[str, ...]
    root: str | None = None
    unlisted: tuple[str, ...] = ()
    made_with: Fingerprint = field(default_factory=dict)


_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string(), str | None: pa.string()}
_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.string()),
        ("path", pa.string()),  # relative to the index where the video lies below it
        ("label", pa.int32()),
        *((name, _TYPES[kind]) for name, kind in get_type_hints(FileInfo).items()),
    ]
)
_OPTIONAL = ("label", "error")


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
    found: dict[str, VideoIndex] = {}
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split)).to_pydict()
        if split == "test" and None not in rows["error"]:
            continue  # none of its videos can be used
        videos = tuple(map(LabelledVideo, rows["path"], rows["label"], rows["id"]))
        try:
            index = VideoIndex(videos, tuple(metadata["class_names"]))
        except DataError as error:
            raise DataError(f"{file} ({split}): {error}") from None
        found[split] = leave_out(
            index,
            {video_id: error for video_id, error in zip(rows["id"], rows["error"], strict=True) if error},
            source=f"{file} ({split})",
            max_missing=1.0 if split == "test" else max_missing,
            remedy="mend them and run mvit-data prepare again",
        )
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
    table, metadata = _read(file, _SCHEMA.names)
    columns = table.to_pydict()
    infos = map(FileInfo, *(columns[name] for name in FileInfo._fields))
    videos = map(LabelledVideo, columns["path"], columns["label"], columns["id"])
    base, root = file.absolute().parent, metadata["root"]
    return Table(
        list(map(Entry, columns["split"], videos, infos)),
        tuple(metadata["class_names"]),
        None if root is None else os.path.normpath(base / root),
        tuple(os.path.join(base, path) for path in metadata["unlisted"]),  # noqa: PTH118
        metadata.get("made_with", {}),
    )


def write_table(file: Path, table: Table) -> None:
    """Write an index file at once: a reader sees the old one or the new one, never half of it."""
    base = str(file.absolute().parent)
    rows = [
        (split, video.id, _portable(video.path, base), video.label, *info)
        for split, video, info in table.entries
    ]
    metadata = {
        "class_names": table.class_names,
        "root": None if table.root is None else _portable(table.root, base),
        "unlisted": [_portable(path, base) for path in table.unlisted],
        "made_with": table.made_with,
    }
    schema = _SCHEMA.with_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in schema]
    with replacing(file) as content:
        pq.write_table(pa.table(columns, schema=schema), content, compression="zstd")


def read_parquet(file: Path, columns: Sequence[str]) -> pa.Table:
    """Those of the columns that a Parquet file has; text comes as dictionaries.

    Raises:
        ArrowException, OSError: it is another kind of file.
        ValueError: what it repeats would take far more memory than the file, of which kilobytes are enough.
    """
    most = max(_MOST_BYTES, _MOST_TIMES * file.stat().st_size)
    texts = [field.name for field in pq.read_schema(file) if field.type in (pa.string(), pa.large_string())]
    # Not pq.read_table, which makes columns of folders called such as a=b.
    with pq.ParquetFile(file, read_dictionary=texts) as content:
        groups = map(content.metadata.row_group, range(content.metadata.num_row_groups))
        values = sum(group.column(place).num_values for group in groups for place in range(group.num_columns))
        if 8 * values > most:
            raise ValueError(f"{values} values, more than the file can hold")
        table = content.read(columns=list(columns))
    for column in table.columns:
        for part in column.chunks if pa.types.is_dictionary(column.type) else ():
            most -= pc.sum(pc.binary_length(part.dictionary).take(part.indices)).as_py() or 0
    if most < 0:
        raise ValueError("text that is repeated more often than the file can hold")
    return table.unify_dictionaries()


def _portable(path: str, base: str) -> str:
    """Relative to the index below its folder, so that both can be moved together; else absolute."""
    path = os.path.abspath(path)  # noqa: PTH100 (speed)
    return "." if path == base else relative(path, base)


def _read(file: Path, columns: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
    """Some columns of an index file, with absolute paths, and its metadata."""
    try:
        table = read_parquet(file, columns).select(columns)
        metadata = json.loads(table.schema.metadata[_METADATA_KEY])
        table.validate(full=True)
        _check(table, metadata)
        table = table.cast(pa.schema([_SCHEMA.field(name) for name in columns]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is no index of mvit-data prepare, or damaged ({brief(error)})") from None
    paths = table["path"]
    below = pc.binary_join_element_wise(str(file.absolute().parent).rstrip(os.sep), paths, os.sep)
    # An empty one stays so: it is an error, or no such file.
    absolute = pc.if_else(pc.match_substring_regex(paths, f"^({os.sep}|$)"), paths, below)
    return table.set_column(columns.index("path"), "path", absolute), metadata


def _check(table: pa.Table, metadata: Any) -> None:
    """Raise ValueError for what isn't as `write_table` leaves it; others may have written the file."""
    for column in table.schema:
        values, wanted = table[column.name], _SCHEMA.field(column.name).type
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        for is_kind in (pa.types.is_integer, pa.types.is_floating):
            if is_kind(kind) != is_kind(wanted) and not pa.types.is_null(kind):
                raise ValueError(f"column {column.name!r} is {kind}, not {wanted}")
        if column.name not in _OPTIONAL and values.null_count:
            raise ValueError(f"column {column.name!r} lacks a value in some rows")
        if pa.types.is_floating(kind) and not pc.all(pc.is_finite(values)).as_py():
            raise ValueError(f"column {column.name!r} isn't finite in some rows")
    if unknown := set(pc.unique(table["split"]).to_pylist()) - set(SPLITS):
        raise ValueError(f"it has a split {min(unknown)!r}; there are {', '.join(SPLITS)}")
    match metadata:
        case {"class_names": [*names], "root": str() | None, "unlisted": [*paths], **others}:
            is_text = all(isinstance(text, str) for text in [*names, *paths])
            if is_text and isinstance(others.get("made_with", {}), dict):
                return
    raise ValueError("its metadata lacks class_names, root or unlisted, or has them in another form")
