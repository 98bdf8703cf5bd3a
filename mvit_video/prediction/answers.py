"""Predictions in files: one JSON document, JSON lines, csv and Parquet; the last three can be continued."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TextIO, cast, get_args

from mvit_video.errors import ConfigError
from mvit_video.prediction.prediction import Prediction

Format = Literal["json", "jsonl", "csv", "parquet"]
COLUMNS = ("path", "part", "start", "end", "rank", "class", "score", "error")
_ROWS_PER_PART, _SECONDS_PER_PART = 20_000, 60.0  # of a Parquet file, about; what comes first


def format_of(path: str | Path, given: str | None = None) -> Format:
    """The format that is given, or that a file's suffix says. Raises ConfigError for any other."""
    name = given or Path(path).suffix.lower().removeprefix(".")
    if name not in get_args(Format):
        known = ", ".join(get_args(Format))
        raise ConfigError(f"{path}: {name!r} is no format of answers; give a suffix or format= of {known}")
    return cast(Format, name)


def rows_of(prediction: Prediction, *, per_clip: bool) -> list[dict[str, Any]]:
    """A prediction as rows with ``COLUMNS``: each class of the video, its segments and, if asked, its clips.

    ``part`` says which of these a row belongs to; seconds are empty for the video as a whole. A video with an
    error is one row.
    """
    if prediction.error is not None:
        return [
            dict.fromkeys(COLUMNS) | {"path": prediction.path, "part": "video", "error": prediction.error}
        ]
    parts: list[tuple[str, float | None, float | None, Sequence[str], Sequence[float]]] = [
        ("video", None, None, prediction.classes, prediction.scores)
    ]
    parts += [("segment", s.start, s.end, [s.class_name], [s.score]) for s in prediction.segments]
    if per_clip:
        parts += [("clip", c.start, c.end, c.classes, c.scores) for c in prediction.clips]
    return [
        dict(zip(COLUMNS, (prediction.path, part, start, end, rank, name, score, None), strict=True))
        for part, start, end, classes, scores in parts
        for rank, (name, score) in enumerate(zip(classes, scores, strict=True), start=1)
    ]


class Answers:
    """A file of predictions that grows by whole videos, so that a killed run can be taken up.

    ``finished`` are the files that it holds from an earlier run. What the run was asked for lies beside the
    file, in ``FILE.run.json``: answers of other settings are never mixed. A JSON document is written at
    the end, in one go. Parquet is a folder of parts, as other tools write and read it.

    Args:
        settings: what the answers depend on, plain values.
        resume: False starts the file anew.

    Raises:
        ConfigError: the file holds answers of other settings, or can't be written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        format: Format,
        settings: dict[str, Any],
        per_clip: bool = False,
        resume: bool = True,
    ) -> None:
        self.path, self.format, self.settings, self.per_clip = Path(path), format, settings, per_clip
        self.finished: set[str] = set()
        self._kept: list[Prediction] = []  # json: all; parquet: those of the next part
        self._rows = 0  # of the next part, about
        self._part_begun = time.monotonic()
        self._file: TextIO | None = None
        self._run_file = self.path.with_name(self.path.name + ".run.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open(resume)
        except OSError as error:
            raise ConfigError(f"output={path} can't be written: {error.strerror or error}") from None

    def _open(self, resume: bool) -> None:
        if self.format == "json":
            return
        if self.path.exists() and resume:
            self._check_settings()
            self._take_up()
        elif self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)
        _write_whole(self._run_file, json.dumps(self.settings, indent=2))
        if self.format == "parquet":
            self.path.mkdir(exist_ok=True)
        else:
            empty = not self.path.exists() or self.path.stat().st_size == 0
            self._file = self.path.open("a", encoding="utf-8", newline="")
            if self.format == "csv" and empty:
                self._file.write(",".join(COLUMNS) + "\n")

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self.format == "parquet":
            self._write_part()
        elif self.format == "json" and kind is None:
            content = self.settings | {"videos": [asdict(prediction) for prediction in self._kept]}
            _write_whole(self.path, json.dumps(content, indent=2))

    def add(self, prediction: Prediction) -> None:
        """Append one video's answer; when this returns, it survives a kill (Parquet: a minute later)."""
        if self._file is not None:
            self._file.write(as_text(prediction, self.format, per_clip=self.per_clip))
            self._file.flush()
            return
        self._kept.append(prediction)
        self._rows += 5 * (1 + (len(prediction.clips) if self.per_clip else 0))
        late = time.monotonic() - self._part_begun > _SECONDS_PER_PART
        if self.format == "parquet" and (late or self._rows >= _ROWS_PER_PART):
            self._write_part()

    def _check_settings(self) -> None:
        try:
            former = json.loads(self._run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            former = {}
        for key in self.settings:
            if former.get(key) != self.settings[key]:
                raise ConfigError(
                    f"{self.path} holds answers of another run ({key} was {former.get(key)!r}, now "
                    f"{self.settings[key]!r}); name another output, or resume=false to write it anew"
                )

    def _take_up(self) -> None:
        """Find what is finished, and cut off what an earlier run left half-written."""
        if self.format == "parquet":
            import pyarrow.parquet as pq

            for part in sorted(self.path.glob("*.parquet")):
                self.finished.update(pq.read_table(part, columns=["path"])["path"].to_pylist())
            return
        with self.path.open(encoding="utf-8", errors="replace", newline="") as file:
            if self.format == "jsonl":
                whole = [line for line in file if line.endswith("\n")]
                self.finished = {json.loads(line)["path"] for line in whole}
            else:
                # The last video's rows may not all be there: it is done again.
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
                last = rows[-1]["path"] if rows else None
                rows = [row for row in rows if row["path"] != last]
                whole = [",".join(COLUMNS) + "\n", _csv(rows)]
                self.finished = {row["path"] for row in rows}
        _write_whole(self.path, "".join(whole))

    def _write_part(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [row for prediction in self._kept for row in rows_of(prediction, per_clip=self.per_clip)]
        self._kept, self._rows, self._part_begun = [], 0, time.monotonic()
        number = len(list(self.path.glob("*.parquet")))
        if not rows and number:
            return
        kinds = {"start": pa.float64(), "end": pa.float64(), "rank": pa.int32(), "score": pa.float32()}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
        unfinished = self.path / f".part-{number:05d}"
        pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
        unfinished.replace(self.path / f"part-{number:05d}.parquet")


def as_text(prediction: Prediction, format: Format, *, per_clip: bool) -> str:
    """One video's lines of a csv file or, with all its clips, of a file of JSON lines."""
    if format == "csv":
        return _csv(rows_of(prediction, per_clip=per_clip))
    return json.dumps(asdict(prediction)) + "\n"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one go: a reader, or a run after a crash, sees the old or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
