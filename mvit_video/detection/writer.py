"""Found objects in files: COCO's results format, JSON lines, csv and Parquet. A killed run goes on.

Beside ``FILE`` lie ``FILE.run.json``, the fingerprint of the run, and ``FILE.objects.jsonl``, the journal: a
line for each picture or video that was looked at. ``FILE`` is made of it when the run ends.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mvit_video.detection.metrics import to_result
from mvit_video.detection.recognizer import FoundObjects
from mvit_video.errors import ConfigError
from mvit_video.io.console import csv_cell, valid_text
from mvit_video.io.fingerprint import (
    Fingerprint,
    file_stamp,
    read_fingerprint,
    require_same,
    write_fingerprint,
)
from mvit_video.io.journal import journal, read_journal
from mvit_video.io.writing import replacing, sole_writer
from mvit_video.prediction.follower import LOST
from mvit_video.prediction.writer import Format

COLUMNS = (
    *("path", "frame", "second", "class", "category_id", "score"),
    *("x0", "y0", "x1", "y1", "mask", "error", "track"),
)


def rows_of(found: FoundObjects, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Each object as in COCO's results, with file, frame, second, class and track; an error is one row."""
    place = {"file_name": valid_text(found.path), "frame": found.frame, "second": found.second}
    if found.error is not None:
        return [place | {"error": valid_text(found.error)}]
    tensors = {name: getattr(found, name) for name in ("boxes", "scores", "labels", "masks")}
    height, width = found.image.shape[1:]
    names = dict(zip(category_ids, found.class_names, strict=True))
    tracks = [None if track == LOST else track for track in found.tracks or [LOST] * len(found.boxes)]
    return [
        row | place | {"class": valid_text(names[row["category_id"]]), "track": track}
        for row, track in zip(
            to_result(0, (height, width), tensors, category_ids).detections, tracks, strict=True
        )
    ]


def as_text(rows: Iterable[dict[str, Any]], format: Format) -> str:
    """Rows as lines of a csv file, or of JSON."""
    if format != "csv":
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [csv_cell(flat[name]) for name in COLUMNS] for flat in map(_flat, rows)
    )
    return text.getvalue()


class ObjectWriter:
    """A file of found objects that is there once all files are looked at; a context of one run at a time.

    Args:
        files: those to be looked at.
        settings: what the objects depend on, besides the files.
        resume: False starts anew, if a run of before has written the file.

    Attributes:
        todo: the files that weren't looked at as they are now; known once the context is entered.

    Raises:
        ConfigError: the file holds objects of other settings or wasn't written here, or another run writes
            to it. OSError: with the file's name.
    """

    def __init__(
        self, path: str | Path, files: Sequence[str], *, format: Format, settings: Fingerprint, resume: bool
    ) -> None:
        self.path, self.format, self.resume = Path(os.path.realpath(path)), format, resume
        self.settings, self.todo = settings | {"format": format}, list(files)
        self._files = list(files)
        self._journal_file = Path(f"{self.path}.objects.jsonl")
        self._open = ExitStack()

    def __enter__(self) -> ObjectWriter:
        run_file = Path(f"{self.path}.run.json")
        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.path))
            before = read_fingerprint(run_file)
            if self.path.exists() and not before:
                raise ConfigError(
                    f"{self.path} exists and mvit-predict hasn't written it; name another output"
                )
            if before and self.resume:
                remedy = "name another output, or resume=false to write it anew"
                require_same(before, self.settings, what=str(self.path), remedy=remedy)
            if not self.resume:
                self._journal_file.unlink(missing_ok=True)
            done = {
                entry["path"]
                for entry in read_journal(self._journal_file)
                if entry["stamp"] == file_stamp(entry["path"])
                and not any("error" in r for r in entry["rows"])
            }
            self.todo = [file for file in self._files if file not in done]
            write_fingerprint(run_file, self.settings)
            self._note = stack.enter_context(journal(self._journal_file))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open:
            if kind is None:
                self._write()

    def add(self, path: str, rows: list[dict[str, Any]]) -> None:
        """All of a file; when this returns, it survives a kill."""
        self._note({"path": path, "stamp": file_stamp(path), "rows": rows})

    def _write(self) -> None:
        by_file = {entry["path"]: entry["rows"] for entry in read_journal(self._journal_file)}  # the newest
        rows = [row for file in self._files for row in by_file.get(file, ())]
        if self.format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            kinds: dict[str, Any] = dict.fromkeys(("frame", "category_id", "track"), pa.int64())
            kinds |= dict.fromkeys(("second", "score", "x0", "y0", "x1", "y1"), pa.float64())
            schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
            with replacing(self.path) as file:
                pq.write_table(pa.Table.from_pylist(list(map(_flat, rows)), schema), file)
            return
        with replacing(self.path, "w", newline="") as text:
            if self.format == "json":
                numbers: dict[Any, int] = {}
                for row in rows:
                    place = row["file_name"], row["frame"]
                    row["image_id"] = numbers.setdefault(place, len(numbers) + 1)
                json.dump([row for row in rows if "error" not in row], text, allow_nan=False)
            else:
                text.write(",".join(COLUMNS) + "\n" if self.format == "csv" else "")
                text.write(as_text(rows, self.format))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with ``COLUMNS``: corners, and the mask as COCO's run-length encoding in JSON."""
    flat = dict.fromkeys(COLUMNS) | {name: row.get(name) for name in ("frame", "second", "error")}
    flat["path"] = row["file_name"]
    if "error" not in row:
        x, y, width, height = row["bbox"]
        flat |= {name: row[name] for name in ("class", "category_id", "score", "track")}
        flat |= {"x0": x, "y0": y, "x1": x + width, "y1": y + height, "mask": json.dumps(row["segmentation"])}
    return flat
