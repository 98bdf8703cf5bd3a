"""Files of predictions that grow by whole videos: JSON, JSON lines, csv and Parquet.

Beside ``FILE`` lie ``FILE.run.json``, the fingerprint of the run, and ``FILE.videos.jsonl``, the journal:
each prediction, before it is in ``FILE``, with the size and time of its video. A killed run is resumed from
the journal. ``FILE`` is written from it, and only compared with it, to see whether someone else has changed
it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast, get_args

from mvit_video.data.decode import FREE_KEYS
from mvit_video.errors import ConfigError
from mvit_video.io.console import csv_text, valid_text
from mvit_video.io.fingerprint import (
    Fingerprint,
    file_sha256,
    file_stamp,
    read_fingerprint,
    require_same,
    write_fingerprint,
)
from mvit_video.io.journal import Entry, journal, read_journal, rewrite_journal
from mvit_video.io.writing import (
    append,
    growing,
    keep_former,
    keep_whole_lines,
    remove_unfinished,
    replacing,
    set_aside,
    sole_writer,
    write_json,
)
from mvit_video.prediction.prediction import ClipPrediction, Prediction, Segment

log = logging.getLogger(__name__)

Format = Literal["json", "jsonl", "csv", "parquet"]
Add = Callable[[Prediction], None]
COLUMNS = ("path", "part", "start", "end", "rank", "class", "score", "error")
_VERSION = {"version": 2}  # of what lies beside the output
_PARTS = "part-*.parquet"
_CLIPS_PER_PART, _SECONDS_PER_PART = 4_000, 60.0  # of a Parquet file, about; what comes first


class Output(NamedTuple):
    """A file of predictions that is open.

    Attributes:
        todo: the videos that aren't in it as they are now.
        add: appends one video's prediction; when it returns, that survives a kill.
    """

    todo: list[str]
    add: Add


class Rows(NamedTuple):
    """What is found in files, one after another.

    Attributes:
        todo: the files whose rows aren't there, or have changed since.
        add: notes rows of a file, in as many parts as one likes; when it returns, they survive a kill.
        finish: says that these were all of a file, which a resumed run needn't read again.
    """

    todo: list[str]
    add: Callable[[str, list[Entry]], None]
    finish: Callable[[str], None]


def format_of(path: str | Path, given: str | None = None) -> Format:
    """The format that is given, or that a file's suffix says. Raises ConfigError for any other."""
    name = given or Path(path).suffix.lower().removeprefix(".")
    if name not in get_args(Format):
        known = ", ".join(get_args(Format))
        raise ConfigError(f"{path}: unsupported output format {name!r}; give a suffix or format= of {known}")
    return cast(Format, name)


@contextmanager
def open_output(
    path: str | Path,
    videos: Sequence[str],
    *,
    format: Format,
    settings: Fingerprint,
    per_clip: bool = False,
    resume: bool = True,
) -> Iterator[Output]:
    """Begin a file of predictions or take it up, as the only run that writes to it.

    A JSON document is written when the block ends well. Parquet is a folder of parts, as other tools write
    and read it.

    Args:
        videos: those to be predicted.
        settings: what the predictions depend on, besides the videos; also the head of a JSON document.
        resume: False starts the file anew, if a run of before has written it.

    Raises:
        ConfigError: the file holds predictions of other settings or wasn't written here, another run writes
            to it, or it can't be written. OSError: with the file's name.
    """
    path = Path(os.path.realpath(path))
    stamps = {video: file_stamp(video) for video in videos}
    text_of = partial(as_text, format=format, per_clip=per_clip)
    with ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(path))
            done = _take_up(path, stamps, settings, format, text_of, resume=resume)
            note = stack.enter_context(journal(_journal_of(path)))
            if format == "parquet":
                write = stack.enter_context(_parts(path, note, per_clip=per_clip))
            elif format == "json":
                write = stack.enter_context(_document(path, settings))
            else:
                write = stack.enter_context(_lines(path, text_of))
        except OSError as error:
            raise ConfigError(f"output={path} can't be written: {error.strerror or error}") from None

        def add(prediction: Prediction) -> None:
            if not per_clip and format in ("csv", "parquet"):
                prediction = replace(prediction, clips=())
            note({"stamp": stamps.get(prediction.path, {}), "prediction": asdict(prediction)})
            write(prediction)

        yield Output([video for video in videos if video not in done], add)


@contextmanager
def rows_of_files(
    path: str | Path,
    files: Sequence[str],
    *,
    settings: Fingerprint,
    resume: bool,
    write: Callable[[Path, Iterator[Entry]], None],
    replaces: bool = False,
) -> Iterator[Rows]:
    """A file of rows that is there once those of all files are, by one run at a time; a killed one goes on.

    Beside ``path`` lie ``<path>.run.json``, the fingerprint of the run, and ``<path>.objects.jsonl``, the
    journal. What former runs have found in other files stays.

    Args:
        files: those to read.
        settings: what the rows depend on, besides the files.
        resume: False starts anew, if a run of before has written the file.
        write: makes ``path`` of all rows when the block ends well.
        replaces: the rows of ``files`` alone take the place of those of other files.

    Raises:
        ConfigError: the file holds rows of other settings or wasn't written here, or another run writes to
            it. OSError: with the file's name.
    """
    path = Path(os.path.realpath(path))
    journal_file = Path(f"{path}.objects.jsonl")
    stamps = {file: file_stamp(file) for file in files}
    with sole_writer(path):
        _claim(path, settings, journal_file, resume=resume)
        known = {e["path"]: e["stamp"] for e in read_journal(journal_file) if resume and "stamp" in e}
        done = {file for file, stamp in known.items() if stamps.get(file, stamp) in ({}, stamp)}
        rewrite_journal(journal_file, (e for e in read_journal(journal_file) if e["path"] in done))
        write_fingerprint(_run_of(path), settings | _VERSION)
        with journal(journal_file) as note:

            def finish(file: str) -> None:
                if stamps[file]:  # an address has none
                    note({"path": file, "stamp": stamps[file]})

            yield Rows(
                [file for file in stamps if file not in done],
                lambda file, rows: note({"path": file, "rows": rows}),
                finish,
            )
        entries = (e for e in read_journal(journal_file) if not replaces or e["path"] in stamps)
        write(path, (row for entry in entries for row in entry.get("rows", ())))


@contextmanager
def open_live_output(
    path: str | Path, settings: Fingerprint, *, resume: bool
) -> Iterator[Callable[[str], None]]:
    """A file that lines are appended to, behind those of the same settings; gives a function that does it."""
    path = Path(os.path.realpath(path))
    with sole_writer(path):
        _claim(path, settings, None, resume=resume and path.exists())
        if not resume:
            path.unlink(missing_ok=True)
        elif path.exists():
            keep_whole_lines(path)
        write_fingerprint(_run_of(path), settings | _VERSION)
        with growing(path) as file:
            yield lambda line: append(file, line.encode(), sync=False)


def rows_of(prediction: Prediction, *, per_clip: bool) -> list[dict[str, Any]]:
    """A prediction as rows with ``COLUMNS``: each class of the video, its segments and, if asked, its clips.

    ``part`` says which of these a row belongs to; seconds are empty for the video as a whole. A video with an
    error is one row, one without classes (`min_score`) begins with an empty one.
    """
    path = valid_text(prediction.path)
    if prediction.error is not None:
        error = valid_text(prediction.error)
        return [dict.fromkeys(COLUMNS) | {"path": path, "part": "video", "error": error}]
    none = [] if prediction.classes else [dict.fromkeys(COLUMNS) | {"path": path, "part": "video"}]
    parts: list[tuple[str, float | None, float | None, Sequence[str], Sequence[float]]] = [
        ("video", None, None, prediction.classes, prediction.scores)
    ]
    parts += [("segment", s.start, s.end, [s.class_name], [s.score]) for s in prediction.segments]
    if per_clip:
        parts += [("clip", c.start, c.end, c.classes, c.scores) for c in prediction.clips]
    return none + [
        dict(zip(COLUMNS, (path, part, start, end, rank, valid_text(name), score, None), strict=True))
        for part, start, end, classes, scores in parts
        for rank, (name, score) in enumerate(zip(classes, scores, strict=True), start=1)
    ]


def as_text(prediction: Prediction | None, format: Format, *, per_clip: bool) -> str:
    """One video's lines of a csv file or, with all its clips, of a file of JSON lines; of None, the head."""
    if format != "csv":
        return "" if prediction is None else json.dumps(_told(asdict(prediction)), allow_nan=False) + "\n"
    if prediction is None:
        return csv_text([COLUMNS])
    return csv_text(row.values() for row in rows_of(prediction, per_clip=per_clip))


# What is there from before


def _take_up(
    path: Path,
    stamps: dict[str, Fingerprint],
    settings: Fingerprint,
    format: Format,
    text_of: Callable[[Prediction | None], str],
    *,
    resume: bool,
) -> set[str]:
    """Refuse what isn't ours, leave in the journal only what still counts, and say which videos that are."""
    is_folder, is_document = format == "parquet", format == "json"
    begun = resume and (is_document or path.exists())
    is_ours = {"protocol", "videos"} <= read_fingerprint(path).keys() if is_document else None
    _claim(path, settings, _journal_of(path), is_folder=is_folder, resume=begun, is_ours=is_ours)
    if is_folder:
        _clear_parts(path)
    elif begun and not is_document and not _begins(map(text_of, chain([None], _journaled(path))), path):
        set_aside(path, "it isn't as mvit-predict has left it")
    entries = partial(_entries, path) if begun else tuple
    done = {entry["prediction"]["path"] for entry in entries() if _still_counts(entry, stamps)}
    again = stamps.keys() - done
    kept = (entry for entry in entries() if entry["stamp"] and entry["prediction"]["path"] not in again)
    rewrite_journal(_journal_of(path), kept)
    write_fingerprint(_run_of(path), settings | _VERSION)
    return done


def _claim(
    path: Path,
    settings: Fingerprint,
    journal_file: Path | None,
    *,
    resume: bool,
    is_folder: bool = False,
    is_ours: bool | None = None,
) -> None:
    """Refuse an output that wasn't written here or, to be resumed, has other settings. Raises ConfigError.

    A journal of which nothing tells what run it is of may be somebody's file: it gets another name.

    Args:
        is_ours: whether a run has written it; None: what lies beside it tells.
    """
    if path.exists() and path.is_dir() != is_folder:
        raise ConfigError(f"{path} is {'no' if is_folder else 'a'} folder; name another output")
    before = read_fingerprint(_run_of(path))
    holds_something = any(path.iterdir()) if path.is_dir() else file_stamp(path).get("size")
    if holds_something and not (before if is_ours is None else is_ours):
        raise ConfigError(f"{path} exists and mvit-predict hasn't written it; name another output")
    if before and resume:
        remedy = "name another output, or resume=false to write it anew"
        require_same(before, settings | _VERSION, what=str(path), remedy=remedy, free=("weights", *FREE_KEYS))
    if journal_file and not before and file_stamp(journal_file).get("size"):
        keep_former(journal_file)


def _still_counts(entry: Entry, stamps: dict[str, Fingerprint]) -> bool:
    """Whether a video has a prediction and is as it was, or gone."""
    stamp, video = entry["stamp"], entry["prediction"]
    return bool(stamp) and video["error"] is None and stamps.get(video["path"]) in ({}, stamp)


def _clear_parts(path: Path) -> None:
    """Remove the parts that are as the journal has them, and set other ones aside."""
    remove_unfinished(path)
    parts = {entry["part"]: entry["sha256"] for entry in read_journal(_journal_of(path)) if "part" in entry}
    for part in sorted(path.glob(_PARTS)):
        if parts.get(part.name) == file_sha256(part):
            part.unlink()
        else:  # readers of the folder pass over what begins with "_"
            set_aside(part, "it isn't as mvit-predict has left it", prefix="_")


def _begins(texts: Iterable[str], path: Path) -> bool:
    """Whether a file holds nothing but the first of the texts; a kill may have cut the last."""
    with path.open("rb") as file:
        for text in map(str.encode, texts):
            found = file.read(len(text))
            if found != text:
                return text.startswith(found)
        return not file.read(1)


def _run_of(path: Path) -> Path:
    return Path(f"{path}.run.json")


def _journal_of(path: Path) -> Path:
    return Path(f"{path}.videos.jsonl")


def _entries(path: Path) -> Iterator[Entry]:
    return (entry for entry in read_journal(_journal_of(path)) if "prediction" in entry)


def _journaled(path: Path) -> Iterator[Prediction]:
    for fields in (entry["prediction"] for entry in _entries(path)):
        clips = tuple(ClipPrediction(**clip) for clip in fields["clips"])
        segments = tuple(Segment(**segment) for segment in fields["segments"])
        yield Prediction(**fields | {"clips": clips, "segments": segments})


# Formats: each begins with what the journal has, and gives a function that adds a prediction


@contextmanager
def _lines(path: Path, text_of: Callable[[Prediction | None], str]) -> Iterator[Add]:
    with replacing(path, "w") as file:
        file.writelines(map(text_of, chain([None], _journaled(path))))
    with growing(path) as file:
        try:
            yield lambda prediction: append(file, text_of(prediction).encode(), sync=False)
        finally:
            append(file, b"")


@contextmanager
def _parts(path: Path, note: Callable[[Entry], None], *, per_clip: bool) -> Iterator[Add]:
    pending: list[Prediction] = []
    num_parts, num_clips, begun_at = 0, 0, time.monotonic()
    path.mkdir(exist_ok=True)

    def write_pending() -> None:
        nonlocal num_parts, num_clips, begun_at
        if pending or not num_parts:  # the first part may be empty, which makes the folder readable
            rows = [row for prediction in pending for row in rows_of(prediction, per_clip=per_clip)]
            _write_part(rows, path / _PARTS.replace("*", f"{num_parts:05d}"), note)
            num_parts += 1
        pending.clear()
        num_clips, begun_at = 0, time.monotonic()

    def add(prediction: Prediction) -> None:
        nonlocal num_clips
        pending.append(prediction)
        num_clips += 1 + len(prediction.clips)
        if num_clips >= _CLIPS_PER_PART or time.monotonic() - begun_at > _SECONDS_PER_PART:
            write_pending()

    for prediction in _journaled(path):
        add(prediction)
    try:
        yield add
    finally:
        write_pending()


def _write_part(rows: list[dict[str, Any]], part: Path, note: Callable[[Entry], None]) -> None:
    kinds = {"start": "float64", "end": "float64", "rank": "int32", "score": "float32"}
    write_parquet(rows, COLUMNS, kinds, content := io.BytesIO())
    note({"part": part.name, "sha256": hashlib.sha256(content.getbuffer()).hexdigest()})
    with replacing(part) as file:
        file.write(content.getbuffer())


def write_parquet(
    rows: list[dict[str, Any]], columns: Iterable[str], kinds: Mapping[str, str], file: IO[bytes]
) -> None:
    """Write rows as Parquet; columns hold text where ``kinds`` says nothing else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kinds.get(name, "string"))) for name in columns])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)


@contextmanager
def _document(path: Path, settings: Fingerprint) -> Iterator[Add]:
    yield lambda _: None
    videos = [_told(entry["prediction"]) for entry in _entries(path)]
    try:
        write_json(path, settings | {"videos": videos})
    except OSError:
        log.error("all predictions are in %s; the same command goes on from there", _journal_of(path))
        raise
    _journal_of(path).unlink()
    _run_of(path).unlink()


def _told(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"path": valid_text(fields["path"])}
