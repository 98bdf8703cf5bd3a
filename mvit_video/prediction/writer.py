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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from mvit_video.errors import ConfigError
from mvit_video.io.console import csv_cell, valid_text
from mvit_video.io.fingerprint import Fingerprint, file_stamp, require_same
from mvit_video.io.writing import (
    append,
    keep_whole_lines,
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
_HEADER = ",".join(COLUMNS) + "\n"
_CLIPS_PER_PART, _SECONDS_PER_PART = 4_000, 60.0  # of a Parquet file, about; what comes first
_SECONDS_PER_SYNC = 1.0  # of growing text: what a power loss may cost

csv.field_size_limit(1 << 30)  # paths and class names may be long


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
    if format == "csv":
        return _csv(*rows_of(prediction, per_clip=per_clip))
    path = valid_text(prediction.path)
    return json.dumps(asdict(replace(prediction, path=path)), allow_nan=False) + "\n"


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
        self._rows_file = unfinished if format == "json" else self.path
        self._finished: set[str] = set()
        self._stamps: dict[str, Fingerprint] = {}
        self._kept: list[Prediction] = []  # of the next Parquet part
        self._saved_at = time.monotonic()
        self._files = ExitStack()

    def __enter__(self) -> PredictionWriter:
        try:
            with ExitStack() as stack:
                stack.enter_context(sole_writer(self.path))
                self._begin()
                self._journal = stack.enter_context(_growing(self._journal_file))
                if self.format != "parquet":
                    self._rows = stack.enter_context(_growing(self._rows_file))
                    if self.format == "csv" and self._rows.tell() == 0:
                        append(self._rows, _HEADER)
                self._files = stack.pop_all()
        except OSError as error:
            raise ConfigError(f"output={self.path} can't be written: {error.strerror or error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._files:
            if self.format == "parquet":
                self._write_part()
            elif kind is None:
                append(self._rows, "")
                append(self._journal, "")
            if self.format == "json" and kind is None:
                self._write_document()

    def remaining(self, videos: Iterable[str]) -> list[str]:
        """The videos that aren't in the file as they are now; to be asked before they are read."""
        todo = [video for video in videos if video not in self._finished]
        self._stamps = {video: file_stamp(video) for video in todo}
        return todo

    def add(self, prediction: Prediction) -> None:
        """Append one video's prediction; when this returns, it survives a kill (Parquet: a minute later)."""
        since = time.monotonic() - self._saved_at
        if self.format == "parquet":
            self._kept.append(prediction)
            clips = len(self._kept) * (1 + len(prediction.clips) * self.per_clip)
            if since > _SECONDS_PER_PART or clips >= _CLIPS_PER_PART:
                self._write_part()
            return
        text = as_text(prediction, self.format, per_clip=self.per_clip)
        num_rows = len(rows_of(prediction, per_clip=self.per_clip)) if self.format == "csv" else 1
        sync = since > _SECONDS_PER_SYNC
        self._saved_at = time.monotonic() if sync else self._saved_at
        append(self._rows, text, sync=sync)
        self._vouch([(prediction, num_rows)], sync=sync)

    def _vouch(self, done: Iterable[tuple[Prediction, int]], *, sync: bool) -> None:
        """Note whole videos and how many rows they have; those with an error will be tried again."""
        lines = [
            json.dumps({"path": p.path, "rows": num_rows, **stamp}) + "\n"
            for p, num_rows in done
            if p.error is None and (stamp := self._stamps.get(p.path))
        ]
        append(self._journal, "".join(lines), sync=sync)

    def _write_part(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = next_number(self.path, _PARTS)
        if not self._kept and number:
            return
        rows = [rows_of(prediction, per_clip=self.per_clip) for prediction in self._kept]
        kinds = {"start": pa.float64(), "end": pa.float64(), "rank": pa.int32(), "score": pa.float32()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        with replacing(self.path / _PARTS.replace("*", f"{number:05d}")) as file:
            pq.write_table(pa.Table.from_pylist(list(chain(*rows)), schema), file)
        self._vouch(zip(self._kept, map(len, rows), strict=True), sync=True)
        self._kept, self._saved_at = [], time.monotonic()

    def _write_document(self) -> None:
        try:
            videos = [json.loads(line) for line in self._rows_file.read_text("utf-8").splitlines()]
            with replacing(self.path, "w") as file:
                json.dump(self.settings | {"videos": videos}, file, indent=2)
        except OSError:
            log.error("all predictions are in %s; the same command goes on from there", self._rows_file)
            raise
        for extra in (self._rows_file, self._journal_file, self._run_file):
            extra.unlink()

    def _begin(self) -> None:
        """Refuse what isn't ours, and leave only whole videos whose files are what they were."""
        if _holds_something(self.path) and not self._is_ours():
            raise ConfigError(f"{self.path} exists and mvit-predict hasn't written it; name another output")
        parts = sorted(self.path.glob(_PARTS)) if self.format == "parquet" else [self._rows_file]
        if self.resume and any(map(_holds_something, parts)):
            remedy = "name another output, or resume=false to write it anew"
            before = _read_json(self._run_file)
            require_same(before, self.settings, what=str(self.path), remedy=remedy, free={"weights"})
            self._keep_finished(parts)
        else:
            for old in (self._journal_file, *parts):
                old.unlink(missing_ok=True)
        with replacing(self._run_file, "w") as file:
            json.dump(self.settings, file, indent=2)
        if self.format == "parquet":
            self.path.mkdir(exist_ok=True)

    def _is_ours(self) -> bool:
        if (self.format == "parquet") != self.path.is_dir():
            return False
        own_document = self.format == "json" and {"protocol", "videos"} <= _read_json(self.path).keys()
        return self._run_file.is_file() or own_document

    def _keep_finished(self, parts: Sequence[Path]) -> None:
        entries = {entry["path"]: entry for entry in _read_journal(self._journal_file)}
        found = {part: _read_rows(part, self.format) for part in parts}
        counts = Counter(name for rows in found.values() for name, _ in rows)
        as_cell = csv_cell if self.format == "csv" else str
        names = {path: as_cell(valid_text(path)) for path in entries}
        self._finished = {
            path
            for path, entry in entries.items()
            if counts[names[path]] == entry["rows"]
            and file_stamp(path) in ({}, {"size": entry["size"], "mtime_ns": entry["mtime_ns"]})
        }
        whole = {names[path] for path in self._finished}
        for part, rows in found.items():
            if rows and (not part.exists() or not whole.issuperset(name for name, _ in rows)):
                _write_rows(part, rows, whole, self.format)
        with replacing(self._journal_file, "w") as file:
            file.writelines(json.dumps(entries[path]) + "\n" for path in entries if path in self._finished)


def _read_rows(part: Path, format: Format) -> list[tuple[str, str]]:
    """The video and, of text, the line of each row; a file with damaged rows is set aside."""
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return [(name, "") for name in pq.read_table(part, columns=["path"])["path"].to_pylist()]
        except (pa.ArrowException, OSError) as error:
            why = " ".join(str(error).split())[:100]
            set_aside(part, f"its predictions can't be read ({why})", prefix="_")
            return []
    if not part.exists():
        return []
    keep_whole_lines(part)
    text = part.read_bytes().decode("utf-8", "replace")
    rows, is_whole = _parse_csv(text) if format == "csv" else _parse_json_lines(text)
    if not is_whole:
        set_aside(part, "some of its lines are damaged")
    return rows


def _parse_csv(text: str) -> tuple[list[tuple[str, str]], bool]:
    found = [row for row in csv.reader(io.StringIO(text)) if row]
    good = [row for row in found[1:] if len(row) == len(COLUMNS) and row[1] in ("video", "segment", "clip")]
    rows = [(row[0], _csv(dict(zip(COLUMNS, row, strict=True)))) for row in good]
    return rows, found[:1] == [list(COLUMNS)] and len(good) == len(found) - 1


def _parse_json_lines(text: str) -> tuple[list[tuple[str, str]], bool]:
    rows = []
    lines = text.splitlines(keepends=True)
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            rows.append((str(json.loads(line)["path"]), line))
    return rows, len(rows) == len(lines)


def _write_rows(part: Path, rows: Sequence[tuple[str, str]], names: set[str], format: Format) -> None:
    """Leave the rows of these videos in a file, and no others."""
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        table = pq.read_table(part)
        with replacing(part) as file:
            pq.write_table(table.filter(pc.is_in(table["path"], pa.array(names, pa.string()))), file)
        return
    with replacing(part, "w", newline="") as file:
        file.write(_HEADER if format == "csv" else "")
        file.writelines(line for name, line in rows if name in names)


def _read_journal(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.keys() == {"path", "rows", "size", "mtime_ns"}:
                yield entry


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


@contextmanager
def _growing(path: Path) -> Iterator[IO[Any]]:
    with naming(path), path.open("a", encoding="utf-8", newline="") as file:
        yield file


def _csv(*rows: dict[str, Any]) -> str:
    text = io.StringIO()
    cells = ({name: csv_cell(value) for name, value in row.items()} for row in rows)
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(cells)
    return text.getvalue()
