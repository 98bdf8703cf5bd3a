"""Rows of a box file from what CVAT exports of a video ("CVAT for video 1.1").

python datasets/cvat/from_cvat.py annotations.xml film.mp4 --names names.txt >> train.csv

    A track is a person. What they do are its attributes: checkboxes by their names, others by their values
    (several with commas); without attributes it is the track's label. Rows are written for a moment a second.
"""

from __future__ import annotations

import argparse
import csv
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

from mvit_video.data.decode import open_video
from mvit_video.errors import DataError, MVitVideoError

NOTHING = ("", "false", "none", "__undefined__")
SIDES = ("xtl", "ytl", "xbr", "ybr")


class Shape(NamedTuple):
    """A person in a frame: pixels, and what they do."""

    frame: int
    box: tuple[float, ...]
    is_shown: bool
    actions: tuple[str, ...]


class _Reader:
    """Gathers the shapes of each track while expat reads the file."""

    def __init__(self) -> None:
        self.tracks: dict[str, list[Shape]] = defaultdict(list)
        self.tasks: set[str] = set()
        self._track: dict[str, str] = {}
        self._box: dict[str, str] | None = None
        self._actions: list[str] | None = None
        self._name, self._text = "", ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "track":
            self._track = attributes
            self.tasks.add(attributes.get("task_id", ""))
        elif tag == "box" and self._track:
            self._box, self._actions = attributes, None
        elif tag == "attribute":
            self._name, self._text = attributes.get("name", ""), ""

    def text(self, text: str) -> None:
        self._text += text

    def end(self, tag: str) -> None:
        if tag == "attribute" and self._box is not None:
            value = self._text.strip()
            said = [self._name] if value.lower() == "true" else [part.strip() for part in value.split(",")]
            self._actions = (self._actions or []) + [one for one in said if one.lower() not in NOTHING]
        elif tag == "box" and self._box is not None:
            box, own = self._box, self._track
            actions = [own["label"]] if self._actions is None else self._actions
            corners = tuple(float(box[side]) for side in SIDES)
            shape = Shape(int(box["frame"]), corners, box.get("outside") != "1", tuple(actions))
            self.tracks[own["id"]].append(shape)
            self._box = None
        elif tag == "track":
            self._track = {}


def read_tracks(path: str | Path) -> dict[str, list[Shape]]:
    """The shapes of each track by its id, by frame. Raises DataError for what isn't such an export."""
    reader, parser = _Reader(), expat.ParserCreate()

    def refuse(*_: Any) -> None:  # entities can fill the memory or name other files
        raise DataError(f"{path}: has a document type, which no export of CVAT has")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler = reader.text
    try:
        with Path(path).open("rb") as file:
            parser.ParseFile(file)
    except (OSError, expat.ExpatError, KeyError, ValueError) as error:
        raise DataError(f"{path}: no export of CVAT for video ({type(error).__name__}: {error})") from None
    if not reader.tracks:
        raise DataError(f"{path}: has no tracks with boxes; export the task as 'CVAT for video 1.1'")
    if len(reader.tasks) > 1:
        raise DataError(f"{path}: is of several videos; export each task by itself, not the project")
    return {name: sorted(shapes) for name, shapes in reader.tracks.items()}


def shape_at(shapes: list[Shape], frame: int) -> Shape | None:
    """A person in a frame, by a straight line between the shapes around it; None where they aren't shown."""
    index = bisect_right([shape.frame for shape in shapes], frame) - 1
    if index < 0 or not shapes[index].is_shown:
        return None
    before = shapes[index]
    if before.frame == frame:
        return before
    if index + 1 == len(shapes):
        return None
    after = shapes[index + 1]
    share = (frame - before.frame) / (after.frame - before.frame)
    return before._replace(box=tuple(a + share * (b - a) for a, b in zip(before.box, after.box, strict=True)))


def rows_of(
    tracks: dict[str, list[Shape]], video: str | Path, names: list[str], *, every: float = 1.0
) -> Iterator[list[Any]]:
    """Rows of a box file at seconds 0, ``every``, ...; actions that ``names`` lacks are added to it."""
    with open_video(video) as film:
        times, height, width = film.times, film.height, film.width
    for number in range(int(times[-1] / every + 1e-6) + 1):
        frame = int(times.searchsorted(number * every + 1e-3)) - 1
        for track, shapes in tracks.items():
            if (shape := shape_at(shapes, max(frame, 0))) is None:
                continue
            x1, y1, x2, y2 = (
                min(max(value / side, 0.0), 1.0)
                for value, side in zip(shape.box, (width, height, width, height), strict=True)
            )
            names += [action for action in shape.actions if action not in names]
            box = [f"{value:.4f}" for value in (x1, y1, x2, y2)]
            for action in shape.actions or (None,):
                class_id = "" if action is None else names.index(action) + 1
                yield [Path(video).stem, f"{number * every:g}", *box, class_id, track]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("annotations", type=Path, help="annotations.xml of one task")
    parser.add_argument("video", type=Path)
    parser.add_argument("--names", type=Path, required=True, help="actions, one a line; new ones are added")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one moment to the next")
    arguments = parser.parse_args()
    names = arguments.names.read_text("utf-8").splitlines() if arguments.names.exists() else []
    try:
        tracks = read_tracks(arguments.annotations)
        rows = list(rows_of(tracks, arguments.video, names, every=arguments.every))
    except MVitVideoError as error:
        sys.exit(f"from_cvat.py: error: {error}")
    csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
    arguments.names.write_text("".join(f"{name}\n" for name in names), "utf-8")


if __name__ == "__main__":
    main()
