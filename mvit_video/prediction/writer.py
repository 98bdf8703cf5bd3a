"""Predictions in files: one JSON document, JSON lines, csv and Parquet. A killed run can be resumed in each.

Beside ``FILE`` lie ``FILE.run.json``, the fingerprint of the run, and ``FILE.videos.jsonl``, a line for each
finished video with the size and time of its file. What they don't vouch for is predicted again.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from mvit_video.errors import ConfigError
from mvit_video.io.console import csv_cell, valid_text
from mvit_video.io.fingerprint import Fingerprint, file_stamp, require_same
from mvit_video.io.writing import (
    append,
    naming,
    next_number,
    replacing,
    set_aside,
    sole_writer,
)
from mvit_video.prediction.prediction import Prediction

log = logging.getLogger(__name__)

Format = Literal["json", "jsonl", "csv", "parquet"]
COLUMNS = ("path", "part", "start", "end", "rank", "class", "score", "error")
_PARTS = "part-*.parquet"
_CLIPS_PER_PART, _SECONDS_PER_PART = 4_000, 60.0  # of a Parquet file, about; what comes first
_SECONDS_PER_SYNC = 1.0  # of growing text: what a power loss may cost


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


class PredictionWriter:
    """A file of predictions that grows by whole videos; a context that one run holds at a time.

    A JSON document is written when the context ends well; until then its predictions lie beside it, in
    ``FILE.unfinished.jsonl``. Parquet is a folder of parts, as other tools write and read it.

    Args:
        settings: what the predictions depend on, besides the videos; also the head of a JSON document.
        resume: False starts the file anew, if a run of before has written it.

    Raises:
        ConfigError: the file holds predictions of other settings or wasn't written here, or another run
            writes to it. OSError: with the file's name.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        format: Format,
        settings: Fingerprint,
        per_clip: bool = False,
        resume: bool = True,
    ) -> None:
        self.path, self.format, self.settings = Path(path), format, settings
        self.per_clip, self.resume = per_clip, resume
        self._run_file, self._journal_file, unfinished = (
            self.path.with_name(self.path.name + end)
            for end in (".run.json", ".videos.jsonl", ".unfinished.jsonl")
        )
        self._text_file = unfinished if format == "json" else self.path
        self._header = (",".join(COLUMNS) + "\n").encode() if format == "csv" else b""
        self._finished: set[str] = set()
        self._stamps: dict[str, Fingerprint] = {}
        self._pending: list[Prediction] = []
        self._synced_at = time.monotonic()
        self._files = ExitStack()

    def __enter__(self) -> PredictionWriter:
        try:
            with ExitStack() as stack:
                stack.enter_context(sole_writer(self.path))
                self._begin()
                self._journal = stack.enter_context(_growing(self._journal_file))
                if self.format != "parquet":
                    self._text = stack.enter_context(_growing(self._text_file))
                    append(self._text, b"" if self._text.tell() else self._header)
                self._files = stack.pop_all()
        except OSError as error:
            raise ConfigError(f"output={self.path} can't be written: {error.strerror or error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._files:
            self._flush(sync=True)
            if self.format == "json" and kind is None:
                self._write_document()

    def remaining(self, videos: Iterable[str]) -> list[str]:
        """The videos that aren't in the file as they are now; to be asked before they are read."""
        todo = [video for video in videos if video not in self._finished]
        self._stamps = {video: file_stamp(video) for video in todo}
        return todo

    def add(self, prediction: Prediction) -> None:
        """Append one video's prediction; when this returns, it survives a kill (Parquet: a minute later)."""
        self._pending.append(prediction)
        since = time.monotonic() - self._synced_at
        if self.format != "parquet":
            self._flush(sync=since > _SECONDS_PER_SYNC)
        elif since > _SECONDS_PER_PART or len(self._pending) * (1 + len(prediction.clips)) >= _CLIPS_PER_PART:
            self._flush(sync=True)

    def _flush(self, *, sync: bool) -> None:
        """Write what is pending, then vouch for it; videos with an error are tried again by the next run."""
        places = self._write_part() if self.format == "parquet" else self._write_text(sync=sync)
        entries = [
            {"path": prediction.path, **stamp, **place}
            for prediction, place in zip(self._pending, places, strict=True)
            if prediction.error is None and (stamp := self._stamps.get(prediction.path))
        ]
        append(self._journal, _json_lines(entries), sync=sync)
        self._pending = []
        self._synced_at = time.monotonic() if sync else self._synced_at

    def _write_text(self, *, sync: bool) -> list[dict[str, Any]]:
        """Returns where each video's text lies."""
        start, places, texts = self._text.tell(), [], []
        for prediction in self._pending:
            text = as_text(prediction, self.format, per_clip=self.per_clip).encode()
            places.append({"start": start, "length": len(text), "crc32": zlib.crc32(text)})
            start += len(text)
            texts.append(text)
        append(self._text, b"".join(texts), sync=sync)
        return places

    def _write_part(self) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = next_number(self.path, _PARTS)
        if not self._pending and number:
            return []
        part = self.path / _PARTS.replace("*", f"{number:05d}")
        rows = [row for prediction in self._pending for row in rows_of(prediction, per_clip=self.per_clip)]
        kinds = {"start": pa.float64(), "end": pa.float64(), "rank": pa.int32(), "score": pa.float32()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        with replacing(part) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema), file)
        return [{"part": part.name} for _ in self._pending]

    def _write_document(self) -> None:
        try:
            videos = [json.loads(line) for line in self._text_file.read_bytes().splitlines()]
            with replacing(self.path, "w") as file:
                json.dump(self.settings | {"videos": videos}, file, indent=2)
        except OSError:
            log.error("all predictions are in %s; the same command goes on from there", self._text_file)
            raise
        for extra in (self._text_file, self._journal_file, self._run_file):
            extra.unlink()

    def _begin(self) -> None:
        """Refuse what isn't ours, and leave only whole videos whose files are what they were."""
        if _holds_something(self.path) and not self._is_ours():
            raise ConfigError(f"{self.path} exists and mvit-predict hasn't written it; name another output")
        files = sorted(self.path.glob(_PARTS)) if self.format == "parquet" else [self._text_file]
        entries: list[dict[str, Any]] = []
        if self.resume and any(map(_holds_something, files)):
            remedy = "name another output, or resume=false to write it anew"
            before = _read_json(self._run_file)
            if not before.keys() >= self.settings.keys():
                raise ConfigError(f"{self.path} comes from another version of mvit-predict; {remedy}")
            require_same(before, self.settings, what=str(self.path), remedy=remedy, free={"weights"})
            entries = self._keep_parts(files) if self.format == "parquet" else self._keep_text()
        else:
            for old in files:
                old.unlink(missing_ok=True)
        self._finished = {entry["path"] for entry in entries}
        with replacing(self._journal_file) as file:
            file.write(_json_lines(entries))
        with replacing(self._run_file, "w") as file:
            json.dump(self.settings, file, indent=2)
        if self.format == "parquet":
            self.path.mkdir(exist_ok=True)

    def _is_ours(self) -> bool:
        if (self.format == "parquet") != self.path.is_dir():
            return False
        own_document = self.format == "json" and {"protocol", "videos"} <= _read_json(self.path).keys()
        return self._run_file.is_file() or own_document

    def _keep_text(self) -> list[dict[str, Any]]:
        content = self._text_file.read_bytes()
        damaged, kept, texts = not content.startswith(self._header), [], [self._header]
        end = len(self._header)
        for entry in _read_journal(self._journal_file, start=int, length=int, crc32=int):
            text = content[entry["start"] : entry["start"] + entry["length"]]
            if zlib.crc32(text) != entry["crc32"]:
                damaged = True
            elif _is_current(entry):
                kept.append(entry | {"start": end})
                texts.append(text)
                end += len(text)
        if damaged:
            set_aside(self._text_file, "some of its predictions are damaged")
        if damaged or b"".join(texts) != content:
            with replacing(self._text_file) as file:
                file.writelines(texts)
        return kept

    def _keep_parts(self, parts: Sequence[Path]) -> list[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        entries = defaultdict(list)
        for entry in _read_journal(self._journal_file, part=str):
            entries[entry["part"]].append(entry)
        kept = []
        for part in parts:
            try:
                table = pq.read_table(part)
                names = set(table["path"].to_pylist())
            except (pa.ArrowException, OSError, KeyError) as error:
                why = " ".join(str(error).split())[:100]
                set_aside(part, f"its predictions can't be read ({why})", prefix="_")
                continue
            found = {valid_text(e["path"]): e for e in entries[part.name] if _is_current(e)}
            kept += [entry for name, entry in found.items() if name in names]
            if not names <= found.keys():
                with replacing(part) as file:
                    whole = pc.is_in(table["path"], pa.array(list(found), pa.string()))
                    pq.write_table(table.filter(whole), file)
        return kept


def _is_current(entry: dict[str, Any]) -> bool:
    """Whether a video's file is what it was; what is no more keeps its prediction."""
    return file_stamp(entry["path"]) in ({}, {key: entry[key] for key in ("size", "mtime_ns")})


def _read_journal(path: Path, **place: type) -> Iterator[dict[str, Any]]:
    """The entries that are whole: with a path, what its file was, and the place of its rows."""
    kinds = {"path": str, "size": int, "mtime_ns": int, **place}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds:
                yield entry


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _json_lines(entries: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


@contextmanager
def _growing(path: Path) -> Iterator[IO[bytes]]:
    with naming(path), path.open("ab") as file:
        yield file
