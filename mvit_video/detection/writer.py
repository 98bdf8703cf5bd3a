"""Detected objects in files: COCO's results format, JSON lines, csv and Parquet. A killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from mvit_video.io.console import csv_text
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.writing import replacing
from mvit_video.prediction.writer import Format, Rows, rows_of_files, write_parquet

COLUMNS = (
    *("path", "frame", "second", "class", "category_id", "score"),
    *("x0", "y0", "x1", "y1", "mask", "error", "track"),
)


def as_text(rows: Iterable[dict[str, Any]], format: Format) -> str:
    """Rows as lines of a csv file, or of JSON."""
    if format != "csv":
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    return csv_text(_flat(row).values() for row in rows)


def open_objects(
    path: str | Path, files: Sequence[str], *, format: Format, settings: Fingerprint, resume: bool
) -> AbstractContextManager[Rows]:
    """A file of detected objects, see ``rows_of_files``; a document has those of ``files`` alone."""
    settings, write = settings | {"format": format}, partial(_write, format=format)
    replaces = format == "json"
    return rows_of_files(path, files, settings=settings, resume=resume, write=write, replaces=replaces)


def _write(path: Path, rows: Iterator[dict[str, Any]], *, format: Format) -> None:
    if format == "parquet":
        kinds = dict.fromkeys(("frame", "category_id", "track"), "int64")
        kinds |= dict.fromkeys(("second", "score", "x0", "y0", "x1", "y1"), "float64")
        with replacing(path) as file:
            write_parquet(list(map(_flat, rows)), COLUMNS, kinds, file)
        return
    with replacing(path, "w", newline="") as text:
        if format == "json":
            numbers: dict[Any, int] = {}
            found = list(rows)
            for row in found:
                place = row["file_name"], row["frame"]
                row["image_id"] = numbers.setdefault(place, len(numbers) + 1)
            json.dump([row for row in found if "error" not in row], text, allow_nan=False)
        else:
            text.write(",".join(COLUMNS) + "\n" if format == "csv" else "")
            text.writelines(as_text([row], format) for row in rows)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with ``COLUMNS``: corners, and the mask as COCO's run-length encoding in JSON."""
    flat = {name: row.get(name) for name in COLUMNS} | {"path": row["file_name"]}
    if "error" not in row:
        x, y, width, height = row["bbox"]
        flat |= {"x0": x, "y0": y, "x1": x + width, "y1": y + height, "mask": json.dumps(row["segmentation"])}
    return flat
