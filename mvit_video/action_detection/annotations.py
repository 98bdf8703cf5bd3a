"""Which people do what, and when: AVA's files, and one's own in the same form.

A row of a box file is ``video,second,x1,y1,x2,y2,action,score``, boxes as shares of the picture. In the
truth, the last is a person's number or lacks; a person who does nothing has no action. Rows are put
together as in PySlowFast's ``datasets/ava_helper.py`` at 287ec007.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mvit_video.action_detection.metrics import Moment, Row
from mvit_video.data.class_names import ClassNames, read_class_names
from mvit_video.data.decode.images import entry_on_disk, frame_pattern
from mvit_video.data.files import (
    VIDEO_EXTENSIONS,
    FileSearch,
    existing,
    find_first,
    lines_of,
    names_in,
    quoted,
    read_text,
)
from mvit_video.data.lists import cells_of
from mvit_video.errors import ConfigError, DataError
from mvit_video.io.writing import replacing

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
Files = str | Path | Sequence[str | Path]
Source = tuple[Path, float | None]  # a box file, and the score below which its rows are left out
Films = dict[str, tuple[str, float]]  # path and first second of each video

# Clips of Kinetics are named by where they were cut out: o3lCwWyyc_s_000012_000022.mp4
_CUT = re.compile(r"(?P<name>.+)_(?P<start>\d{6})_\d{6}")
_ITEM = re.compile(r"\{([^{}]*)\}")
_ITEM_NAME = re.compile(r'\bname:\s*"((?:[^"\\]|\\.)*)"')
_ITEM_ID = re.compile(r"\b(?:label_)?id:\s*(\d{1,6})\b")
_ACTION = re.compile(r"-?\d{1,6}")
_FARTHEST = 2.0  # of a box's corners from 0, in pictures


class BoxRow(NamedTuple):
    """A row of a box file; ``text`` is the box as the file has it, which PySlowFast tells boxes apart by."""

    video: str
    second: float
    x1: float
    y1: float
    x2: float
    y2: float
    class_id: int | None
    score: float | None
    text: tuple[str, ...] = ()


class KeyFrame(NamedTuple):
    """A moment of a video whose people are annotated.

    Attributes:
        path: of the video file, the folder of pictures or the numbered run of them.
        start: second that its first frame is counted as.
        boxes: shares of the picture.
        class_ids: of each box.
    """

    video: str
    path: str
    second: float
    start: float
    boxes: tuple[Box, ...]
    class_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ActionIndex:
    """The key frames of a split, what is true in them, and the moments that no measure counts."""

    key_frames: tuple[KeyFrame, ...]
    ground_truth: tuple[Row, ...] = ()
    excluded: tuple[Moment, ...] = ()

    def every(self, seconds: int) -> ActionIndex:
        """The part of it at seconds divisible by a number."""
        return ActionIndex(
            tuple(frame for frame in self.key_frames if frame.second % seconds == 0),
            tuple(row for row in self.ground_truth if row[1] % seconds == 0),
            self.excluded,
        )


@dataclass(frozen=True)
class ActionSplits:
    """What to train on and what to measure on.

    Attributes:
        names: the actions that are evaluated, by id; ids count from 1, and id 1 is a model's first output.
        val_every: validations in training take seconds divisible by this.
    """

    train: ActionIndex
    val: ActionIndex
    names: dict[int, str]
    val_every: int = 1
    test: ActionIndex | None = None

    @property
    def num_classes(self) -> int:
        return max(self.names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each output of a model, also for those that aren't evaluated."""
        return tuple(self.names.get(number, f"action {number}") for number in range(1, self.num_classes + 1))


def action_splits(
    root: str | Path,
    *,
    train_boxes: Files,
    val_boxes: Files,
    train_persons: Files | None = None,
    val_persons: Files | None = None,
    excluded: str | Path | None = None,
    class_names: ClassNames | None = None,
    videos: str | Path | None = None,
    frame_lists: Sequence[str | Path] | None = None,
    min_person_score: float = 0.8,
    start_second: float = 0.0,
    seconds: Sequence[float] | None = None,
    val_every: int = 1,
    max_missing: float = 0.2,
) -> ActionSplits:
    """Index videos with boxes and actions, as AVA comes and as one's own can be written.

    Args:
        root: where relative paths start.
        train_boxes, val_boxes: the true boxes and actions.
        train_persons: found people, with actions or without, that training sees besides.
        val_persons: found people that are asked about instead of the true boxes.
        excluded: (video, second) rows that a validation doesn't count.
        class_names: actions by id: AVA's ``.pbtxt``, or names in order of ids from 1
            (``read_class_names``). By default the ids themselves, up to the highest of training.
        videos: folder with a file NAME.*, a folder of pictures NAME or a cut NAME_000012_000022.* (seconds,
            as of Kinetics) for each video; by default root/videos, root/frames or root.
        frame_lists: PySlowFast's lists of pictures, for training and validation, whose paths start in
            ``videos``.
        min_person_score: people detected with a lower score are left out.
        start_second: which second the first frame of a file is; AVA's cuts start at 900.
        seconds: first and last that may occur.
        val_every: see ``ActionSplits``.
        max_missing: how large a share of a split's videos may be missing on disk; they are left out.

    Raises:
        DataError: a file is missing, a row can't be used, or too many videos are missing.
    """
    folder = existing(root, folder=True)
    given = folder / Path(str(videos)).expanduser() if videos else None
    place = existing(given or find_first(folder, "videos", "frames") or folder, folder=True)
    lists = [_read_frame_list(folder / str(file), place, start_second) for file in frame_lists or ()]
    train, true = _sources(folder, train_boxes), _sources(folder, val_boxes)
    names = _names(folder, class_names, [file for file, _ in train])
    within = tuple(map(float, seconds or (-math.inf, math.inf)))

    train += _sources(folder, train_persons, min_person_score)
    val = _sources(folder, val_persons, min_person_score) or true
    indices = []
    for files, listed in zip((train, val), lists or (None, None), strict=True):
        people = _people(files, within, max(names))
        films = _find_films(place, people, start_second) if listed is None else listed
        indices.append(_key_frames(people, films, files[0][0], place, max_missing))
    rows = tuple(row for file, _ in true for row in read_boxes(file) if row.class_id is not None)
    left_out = tuple(read_moments(folder / str(excluded))) if excluded else ()
    measured = replace(indices[1], ground_truth=rows, excluded=left_out)
    return ActionSplits(indices[0], measured, names, val_every)


def read_boxes(path: str | Path) -> list[BoxRow]:
    """The rows of a box file, but for rows of two columns, which name a frame without people.

    Raises:
        DataError: the file is missing, or a row has another form; it names the line.
    """
    return list(_rows(existing(path)))


def write_boxes(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows of video, second, x1, y1, x2, y2, class id, score as the official evaluators read them."""
    with replacing(path, "w", newline="") as file:
        file.writelines(box_lines(rows))


def box_lines(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a box file, see ``write_boxes``."""
    for video, second, *box, number, score in (row[:8] for row in rows):
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow([video])
        shown = f"{second:04.0f}" if float(second).is_integer() else f"{second:g}"
        boxes = ",".join(f"{value:.3f}" for value in box)
        yield f"{text.getvalue()},{shown},{boxes},{'' if number is None else number},{score or 0:.4f}\n"


def read_moments(path: str | Path) -> list[Moment]:
    """The rows video,second of a file, such as of excluded moments. Raises DataError."""
    file = existing(path)
    moments = []
    for where, line in lines_of(file):
        cells = cells_of(where, line)
        _require(cells, 2, where)
        moments.append((cells[0], _number(cells[1], where)))
    return moments


def read_actions(path: str | Path) -> dict[int, str]:
    """Names by id of AVA's ``.pbtxt`` lists. Raises DataError where there are none."""
    file = existing(path)
    names: dict[int, str] = {}
    for item in _ITEM.findall(read_text(file)):
        name, number = _ITEM_NAME.search(item), _ITEM_ID.search(item)
        if name and number:
            names[int(number[1])] = name[1].replace('\\"', '"').replace("\\'", "'")
    if not names or min(names) < 1:
        raise DataError(f'{file}: expected items such as {{ name: "stand" id: 12 }}, ids from 1')
    return dict(sorted(names.items()))


# By video, second and text, boxes with their actions in the order of the files.
People = dict[str, dict[float, dict[tuple[str, ...], tuple[Box, list[int]]]]]


def _people(files: Sequence[Source], seconds: tuple[float, ...], num_classes: int) -> People:
    people: People = {}
    first, last = seconds
    for file, min_score in files:
        for row in _rows(existing(file)):
            if min_score is not None and row.score is not None and row.score < min_score:
                continue
            if not first <= row.second <= last:
                raise DataError(
                    f"{file}: second {row.second:g} of {row.video} is outside of {first:g} to {last:g} "
                    "(data.seconds)"
                )
            if row.class_id is not None and not 1 <= row.class_id <= num_classes:
                raise DataError(
                    f"{file}: action {row.class_id} of {row.video}, second {row.second:g}: ids go from 1 to "
                    f"{num_classes}, see data.class_names"
                )
            moment = people.setdefault(row.video, {}).setdefault(row.second, {})
            _, actions = moment.setdefault(row.text, (row[2:6], []))
            if row.class_id is not None and row.class_id not in actions:
                actions.append(row.class_id)
    return people


def _key_frames(people: People, films: Films, source: Path, place: Path, max_missing: float) -> ActionIndex:
    """The key frames in the order of the films, a film's by time."""
    if not people:
        raise DataError(f"{source}: has no rows that can be used")
    missing = {
        name for name in people if name not in films or not Path(entry_on_disk(films[name][0])).exists()
    }
    if len(missing) == len(people) or len(missing) > max_missing * len(people):
        raise DataError(
            f"{source}: {len(missing)} of its {len(people)} videos are missing in {place}, such as "
            f"{quoted(min(missing))}; set data.videos, or allow it: max_missing is the share allowed"
        )
    if missing:
        log.warning("%s: %d videos are missing, such as %s", source, len(missing), min(missing))
    found = []
    for video in (name for name in films if name in people and name not in missing):
        path, start = films[video]
        for second, moment in sorted(people[video].items()):
            boxes, actions = zip(*moment.values(), strict=True)
            found.append(
                KeyFrame(video, path, second, start, boxes, tuple(tuple(sorted(a)) for a in actions))
            )
    return ActionIndex(tuple(found))


def _find_films(folder: Path, names: Collection[str], start: float) -> Films:
    """Those of some videos that are in a folder or, as Kinetics has them, in folders of classes in it."""
    found: Films = {}

    def take(path: str) -> None:
        name = Path(path).name
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if name in names:
            found[name] = (path, start)
        elif suffix.lower() not in VIDEO_EXTENSIONS:
            return
        elif stem in names:
            found[stem] = (path, start)
        elif (cut := _CUT.fullmatch(stem)) and cut["name"] in names:
            found[cut["name"]] = (path, float(cut["start"]))

    others = []
    for path in (folder / name for name in names_in(folder)):
        if path.is_dir() and path.name not in names:
            others.append(path)
        else:
            take(str(path))
    for other in others if len(found) < len(names) else ():
        for file in FileSearch().below(other):
            take(file)
    return {name: found[name] for name in names if name in found}


def _read_frame_list(file: Path, folder: Path, start: float) -> Films:
    """Of each video of PySlowFast's list, the numbered run of its pictures."""
    ends: dict[str, list[str]] = {}
    for where, line in islice(lines_of(existing(file)), 1, None):  # below the names of the columns
        cells = line.split()
        if len(cells) < 4:
            raise DataError(f"{where}: expected original_vido_id video_id frame_id path labels")
        run = ends.setdefault(cells[0], [cells[3], cells[3]])
        run[1] = cells[3]
    runs: Films = {}
    for name, (first, last) in ends.items():
        pattern = frame_pattern(str(folder / first), str(folder / last))
        if pattern is None:
            raise DataError(f"{file}: the pictures of {name} aren't numbered in order")
        runs[name] = (pattern, start)
    return runs


def _names(folder: Path, source: ClassNames | None, files: Sequence[Path]) -> dict[int, str]:
    if source is None:
        found = {row.class_id for file in files for row in _rows(existing(file)) if row.class_id is not None}
        if max(found, default=0) < 1:
            raise DataError(f"{files[0]}: no row has an action, by an id from 1")
        return {number: str(number) for number in range(1, max(found) + 1)}
    if isinstance(source, str | Path):
        if str(source).endswith((".pbtxt", ".pbtxt.txt")):
            return read_actions(folder / source)
        source = folder / source if (folder / source).exists() else source
    return dict(enumerate(read_class_names(source), start=1))


def _sources(folder: Path, files: Files | None, min_score: float | None = None) -> list[Source]:
    if files is None:
        return []
    paths = [files] if isinstance(files, str | Path) else list(files)
    if not paths:
        raise ConfigError("a list of box files is empty; leave it null")
    return [(folder / Path(str(path)).expanduser(), min_score) for path in paths]


def _require(cells: list[str], count: int, where: str) -> None:
    if len(cells) < count:
        raise DataError(f"{where}: expected at least {count} columns, got {len(cells)}")


def _rows(file: Path) -> Iterator[BoxRow]:
    for number, (where, line) in enumerate(lines_of(file)):
        cells = cells_of(where, line)
        if len(cells) == 2:  # a frame without people
            continue
        if number == 0 and not any(_is_number(cell) for cell in cells[1:6]):  # names of columns
            continue
        _require(cells, 7, where)
        numbers = [_number(cell, where) for cell in cells[1:6]]
        box = ",".join(cells[2:6])
        if any(abs(value) > _FARTHEST for value in numbers[1:]):
            raise DataError(f"{where}: boxes are shares of the picture, 0 to 1, got {box}")
        action = cells[6].strip()
        if action and not _ACTION.fullmatch(action):
            raise DataError(f"{where}: {quoted(action)} is no number of an action")
        score = _number(cells[7], where) if len(cells) > 7 and cells[7].strip() else None
        known = int(action) if action and int(action) >= 0 else None
        second, x1, y1, x2, y2 = numbers
        if x1 > x2 or y1 > y2:
            raise DataError(f"{where}: a box is x1,y1,x2,y2 with x1 <= x2 and y1 <= y2, got {box}")
        yield BoxRow(cells[0], second, x1, y1, x2, y2, known, score, tuple(cells[2:6]))


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _number(cell: str, where: str) -> float:
    if not _is_number(cell):
        raise DataError(f"{where}: {quoted(cell)} is no number")
    return float(cell)
