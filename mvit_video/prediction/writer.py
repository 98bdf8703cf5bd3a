"""Predictions in files: one JSON document, JSON lines, csv and Parquet. A killed run can be resumed in each.

Beside ``FILE`` lie ``FILE.run.json``, the fingerprint of the run, and ``FILE.videos.jsonl``, the journal:
each prediction, before it is in ``FILE``, with the size and time of its video. A run is resumed from the
journal. ``FILE`` is written from it, and only compared with it, to see
whether someone else has changed it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from mvit_video.errors import ConfigError
from mvit_video.io.console import csv_cell, valid_text
from mvit_video.io.fingerprint import Fingerprint, file_sha256, file_stamp, require_same
from mvit_video.io.writing import (
    append,
    growing,
    next_number,
    remove_unfinished,
    replacing,
    set_aside,
    sole_writer,
)
from mvit_video.prediction.prediction import ClipPrediction, Prediction, Segment

log = logging.getLogger(__name__)

Format = Literal["json", "jsonl", "csv", "parquet"]
COLUMNS = ("path", "part", "start", "end", "rank", "class", "score", "error")
_VERSION = {"version": 2}  # of what lies beside the output
_FREE = {"weights", "decoder.index_cache", "decoder.max_pixels"}  # they change no prediction
_PARTS = "part-*.parquet"
_CLIPS_PER_PART, _SECONDS_PER_PART = 4_000, 60.0  # of a Parquet file, about; what comes first
_SECONDS_PER_SYNC = 1.0  # of the journal: what a power loss may cost


def format_of(path: str | Path, given: str | None = None) -> Format:
    """The format that is given, or that a file's suffix says. Raises ConfigError for any other."""
    name = given or Path(path).suffix.lower().removeprefix(".")
    if name not in get_args(Format):
        known = ", ".join(get_args(Format))
        raise ConfigError(f"{path}: unsupported output format {name!r}; give a suffix or format= of {known}")
    return cast(Format, name)


def rows_of(prediction: Prediction, *, per_clip: bool) -> list[dict[str, Any]]:
    """A prediction as rows with ``COLUMNS``: each class of the video, its segments and, if asked, its clips.

    ``part`` says which of these a row belongs to; seconds are empty for the video as a whole. A video with an
    error is one row.
    """
    path = valid_text(prediction.path)
    if prediction.error is not None:
        error = valid_text(prediction.error)
        return [dict.fromkeys(COLUMNS) | {"path": path, "part": "video", "error": error}]
    parts: list[tuple[str, float | None, float | None, Sequence[str], Sequence[float]]] = [
        ("video", None, None, prediction.classes, prediction.scores)
    ]
    parts += [("segment", s.start, s.end, [s.class_name], [s.score]) for s in prediction.segments]
    if per_clip:
        parts += [("clip", c.start, c.end, c.classes, c.scores) for c in prediction.clips]
    return [
        dict(zip(COLUMNS, (path, part, start, end, rank, valid_text(name), score, None), strict=True))
        for part, start, end, classes, scores in parts
        for rank, (name, score) in enumerate(zip(classes, scores, strict=True), start=1)
    ]


def as_text(prediction: Prediction, format: Format, *, per_clip: bool) -> str:
    """One video's lines of a csv file or, with all its clips, of a file of JSON lines."""
    if format != "csv":
        path = valid_text(prediction.path)
        return json.dumps(asdict(replace(prediction, path=path)), allow_nan=False) + "\n"
    text = io.StringIO()
    rows = [map(csv_cell, row.values()) for row in rows_of(prediction, per_clip=per_clip)]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def require_own(path: Path, settings: Fingerprint, *, resume: bool, is_ours: bool | None = None) -> None:
    """Refuse an output that wasn't written here or, to be resumed, has other settings. Raises ConfigError.

    Args:
        is_ours: whether a run has written it; None: what lies beside it tells.
    """
    before = _read_json(_run_file(path))
    if not (bool(before) if is_ours is None else is_ours) and _holds_something(path):
        raise ConfigError(f"{path} exists and mvit-predict hasn't written it; name another output")
    if before and resume:
        remedy = "name another output, or resume=false to write it anew"
        require_same(before, settings | _VERSION, what=str(path), remedy=remedy, free=_FREE)


def leave_settings(path: Path, settings: Fingerprint) -> None:
    """Write down what an output depends on, for the next run; what has other ones must be gone before."""
    with replacing(_run_file(path), "w") as file:
        json.dump(settings | _VERSION, file, indent=2)


def _run_file(path: Path) -> Path:
    return Path(f"{path}.run.json")


class PredictionWriter:
    """A file of predictions that grows by whole videos; a context that one run holds at a time.

    A JSON document is written when the context ends well. Parquet is a folder of parts, as other tools write
    and read it.

    Args:
        videos: those to be predicted.
        settings: what the predictions depend on, besides the videos; also the head of a JSON document.
        resume: False starts the file anew, if a run of before has written it.

    Attributes:
        todo: the videos that aren't in the file as they are now; known once the context is entered.

    Raises:
        ConfigError: the file holds predictions of other settings or wasn't written here, or another run
            writes to it. OSError: with the file's name.
    """

    def __init__(
        self,
        path: str | Path,
        videos: Sequence[str],
        *,
        format: Format,
        settings: Fingerprint,
        per_clip: bool = False,
        resume: bool = True,
    ) -> None:
        self.path, self.format, self.settings = Path(os.path.realpath(path)), format, settings
        self.per_clip, self.resume, self.todo = per_clip, resume, list(videos)
        self._header = (",".join(COLUMNS) + "\n").encode() if format == "csv" else b""
        self._journal_file = Path(f"{self.path}.videos.jsonl")
        self._stamps: dict[str, Fingerprint] = {}
        self._pending: list[Prediction] = []  # of the next part
        self._synced_at = self._part_at = time.monotonic()
        self._files = ExitStack()

    def __enter__(self) -> PredictionWriter:
        try:
            with ExitStack() as stack:
                stack.enter_context(sole_writer(self.path))
                self._begin()
                self._journal = stack.enter_context(growing(self._journal_file))
                if self.format == "parquet":
                    self.path.mkdir(exist_ok=True)
                    for prediction in self._journaled():
                        self._add_to_part(prediction)
                elif self.format != "json":
                    with replacing(self.path) as file:
                        file.writelines(self._texts(self._journaled()))
                    self._text = stack.enter_context(growing(self.path))
                self._files = stack.pop_all()
        except OSError as error:
            raise ConfigError(f"output={self.path} can't be written: {error.strerror or error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._files:
            append(self._journal, b"")
            if self.format == "parquet":
                self._write_part()
            elif self.format != "json":
                append(self._text, b"")
            elif kind is None:
                self._write_document()

    def add(self, prediction: Prediction) -> None:
        """Append one video's prediction; when this returns, it survives a kill."""
        if not self.per_clip and self.format in ("csv", "parquet"):
            prediction = replace(prediction, clips=())
        entry = {"stamp": self._stamps.get(prediction.path, {}), "prediction": asdict(prediction)}
        sync = time.monotonic() - self._synced_at > _SECONDS_PER_SYNC
        append(self._journal, _sealed(entry), sync=sync)
        self._synced_at = time.monotonic() if sync else self._synced_at
        if self.format == "parquet":
            self._add_to_part(prediction)
        elif self.format != "json":
            append(self._text, self._text_of(prediction), sync=False)

    def _begin(self) -> None:
        """Refuse what isn't ours, see what is left to do, and leave only the rest of it in the journal."""
        is_folder, is_document = self.format == "parquet", self.format == "json"
        if self.path.exists() and self.path.is_dir() != is_folder:
            raise ConfigError(f"{self.path} is {'no' if is_folder else 'a'} folder; name another output")
        begun = self.resume and (is_document or self.path.exists())
        own_document = {"protocol", "videos"} <= _read_json(self.path).keys() if is_document else None
        require_own(self.path, self.settings, resume=begun, is_ours=own_document)
        self._stamps = {video: file_stamp(video) for video in self.todo}
        finished = set()
        for entry in self._entries() if begun else ():
            stamp, video = entry["stamp"], entry["prediction"]["path"]
            if stamp and entry["prediction"]["error"] is None and self._stamps.get(video) in ({}, stamp):
                finished.add(video)  # what is gone keeps its prediction
        self.todo = [video for video in self.todo if video not in finished]
        if is_folder:
            self._clear_parts()
        elif begun and not is_document and not _begins(self._texts(self._journaled()), self.path):
            set_aside(self.path, "it isn't as mvit-predict has left it")
        again = set(self.todo)
        with replacing(self._journal_file) as file:
            for entry in self._entries() if begun else ():
                if entry["stamp"] and entry["prediction"]["path"] not in again:
                    file.write(_sealed(entry))
        leave_settings(self.path, self.settings)

    def _entries(self) -> Iterator[dict[str, Any]]:
        return (entry for entry in _read_journal(self._journal_file) if "prediction" in entry)

    def _journaled(self) -> Iterator[Prediction]:
        for fields in (entry["prediction"] for entry in self._entries()):
            clips = tuple(ClipPrediction(**clip) for clip in fields["clips"])
            segments = tuple(Segment(**segment) for segment in fields["segments"])
            yield Prediction(**fields | {"clips": clips, "segments": segments})

    def _text_of(self, prediction: Prediction) -> bytes:
        return as_text(prediction, self.format, per_clip=self.per_clip).encode()

    def _texts(self, predictions: Iterable[Prediction]) -> Iterator[bytes]:
        yield self._header
        yield from map(self._text_of, predictions)

    def _add_to_part(self, prediction: Prediction) -> None:
        self._pending.append(prediction)
        num_clips = len(self._pending) * (1 + len(prediction.clips))
        if num_clips >= _CLIPS_PER_PART or time.monotonic() - self._part_at > _SECONDS_PER_PART:
            self._write_part()

    def _write_part(self) -> None:
        """Write what is pending; the first part may be empty, which makes the folder readable."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = next_number(self.path, _PARTS)
        if not self._pending and number:
            return
        rows = [row for prediction in self._pending for row in rows_of(prediction, per_clip=self.per_clip)]
        kinds = {"start": pa.float64(), "end": pa.float64(), "rank": pa.int32(), "score": pa.float32()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        content = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema), content)
        data = content.getvalue().to_pybytes()
        part = self.path / _PARTS.replace("*", f"{number:05d}")
        append(self._journal, _sealed({"part": part.name, "sha256": hashlib.sha256(data).hexdigest()}))
        with replacing(part) as file:
            file.write(data)
        self._pending, self._part_at = [], time.monotonic()

    def _clear_parts(self) -> None:
        """Remove the parts that are as the journal has them, and set other ones aside."""
        remove_unfinished(self.path)
        parts = {e["part"]: e["sha256"] for e in _read_journal(self._journal_file) if "part" in e}
        for part in sorted(self.path.glob(_PARTS)):
            if parts.get(part.name) == file_sha256(part):
                part.unlink()
            else:  # readers of the folder pass over what begins with "_"
                set_aside(part, "it isn't as mvit-predict has left it", prefix="_")

    def _write_document(self) -> None:
        videos = [entry["prediction"] for entry in self._entries()]
        told = [video | {"path": valid_text(video["path"])} for video in videos]
        try:
            with replacing(self.path, "w") as file:
                json.dump(self.settings | {"videos": told}, file, indent=2, allow_nan=False)
        except OSError:
            log.error("all predictions are in %s; the same command goes on from there", self._journal_file)
            raise
        self._journal_file.unlink()
        _run_file(self.path).unlink()


def _sealed(entry: dict[str, Any]) -> bytes:
    """An entry as a line that can tell whether it is whole."""
    crc32 = zlib.crc32(json.dumps(entry).encode())
    return json.dumps({"crc32": crc32, **entry}).encode() + b"\n"


def _read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The entries that are as they were written."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError, RecursionError):
                entry = json.loads(line)
                crc32 = entry.pop("crc32", None) if isinstance(entry, dict) else None
                if crc32 is not None and crc32 == zlib.crc32(json.dumps(entry).encode()):
                    yield entry


def _begins(texts: Iterable[bytes], path: Path) -> bool:
    """Whether a file holds nothing but the first of the texts; a kill may have cut the last."""
    with path.open("rb") as file:
        for text in texts:
            found = file.read(len(text))
            if found != text:
                return text.startswith(found)
        return not file.read(1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
