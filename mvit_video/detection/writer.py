"""Detected objects in files: COCO's results format, JSON lines, csv and Parquet. A killed run goes on.

Beside ``FILE`` lie ``FILE.run.json``, the fingerprint of the run, and ``FILE.objects.jsonl``, the journal: a
line for each picture or video that is done. ``FILE`` is made of it when the run ends.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvit_video.detection.metrics import to_result
from mvit_video.detection.recognizer import FoundObjects
from mvit_video.io.console import csv_cell, valid_text
from mvit_video.io.fingerprint import Fingerprint, file_stamp, write_fingerprint
from mvit_video.io.journal import journal, read_journal
from mvit_video.io.writing import replacing, sole_writer
from mvit_video.prediction.follower import LOST
from mvit_video.prediction.writer import Format, require_own, write_parquet

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


@contextmanager
def open_objects(
    path: str | Path, files: Sequence[str], *, format: Format, settings: Fingerprint, resume: bool
) -> Iterator[tuple[list[str], Callable[[str, list[dict[str, Any]]], None]]]:
    """A file of detected objects, as the only run that writes to it; it is there when the block ends well.

    Gives those of the files that are still to be done, and a function that adds a file with all its rows;
    when that returns, they survive a kill.

    Args:
        settings: what the objects depend on, besides the files.
        resume: False starts anew, if a run of before has written the file.

    Raises:
        ConfigError: the file holds objects of other settings or wasn't written here, or another run writes
            to it. OSError: with the file's name.
    """
    path, settings = Path(os.path.realpath(path)), settings | {"format": format}
    journal_file = Path(f"{path}.objects.jsonl")
    with sole_writer(path):
        require_own(path, settings, resume=resume)
        if not resume:
            journal_file.unlink(missing_ok=True)
        done = {
            entry["path"]
            for entry in read_journal(journal_file)
            if entry["stamp"] == file_stamp(entry["path"]) and not any("error" in r for r in entry["rows"])
        }
        write_fingerprint(Path(f"{path}.run.json"), settings)
        with journal(journal_file) as note:
            yield (
                [file for file in files if file not in done],
                lambda file, rows: note({"path": file, "stamp": file_stamp(file), "rows": rows}),
            )
        newest = {entry["path"]: entry["rows"] for entry in read_journal(journal_file)}
        _write([row for file in files for row in newest.get(file, ())], path, format)


def _write(rows: list[dict[str, Any]], path: Path, format: Format) -> None:
    if format == "parquet":
        kinds = dict.fromkeys(("frame", "category_id", "track"), "int64")
        kinds |= dict.fromkeys(("second", "score", "x0", "y0", "x1", "y1"), "float64")
        with replacing(path) as file:
            write_parquet(list(map(_flat, rows)), COLUMNS, kinds, file)
        return
    with replacing(path, "w", newline="") as text:
        if format == "json":
            numbers: dict[Any, int] = {}
            for row in rows:
                place = row["file_name"], row["frame"]
                row["image_id"] = numbers.setdefault(place, len(numbers) + 1)
            json.dump([row for row in rows if "error" not in row], text, allow_nan=False)
        else:
            text.write(",".join(COLUMNS) + "\n" if format == "csv" else "")
            text.write(as_text(rows, format))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with ``COLUMNS``: corners, and the mask as COCO's run-length encoding in JSON."""
    flat = dict.fromkeys(COLUMNS) | {name: row.get(name) for name in ("frame", "second", "error")}
    flat["path"] = row["file_name"]
    if "error" not in row:
        x, y, width, height = row["bbox"]
        flat |= {name: row[name] for name in ("class", "category_id", "score", "track")}
        flat |= {"x0": x, "y0": y, "x1": x + width, "y1": y + height, "mask": json.dumps(row["segmentation"])}
    return flat
