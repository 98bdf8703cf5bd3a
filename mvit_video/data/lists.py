"""Videos from lists: a line or an entry for each, with errors that name it."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mvit_video.data.class_names import ClassNames, LabelOf, read_class_names
from mvit_video.data.decode.stills import entry_on_disk
from mvit_video.data.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, existing, parse_json, read_text
from mvit_video.data.index import LabelledVideo, VideoIndex, VideoSplits, leave_out, out_of_range, relative
from mvit_video.errors import DataError

NO_FILE = "no such file"
# mmaction2's lists of frames: `folder frames label`
_FOLDER_AND_COUNT = re.compile(r"[^.]*\S \d+")
_MAX_CLASSES = 100_000  # of lists that come without class names
_FILE_ENDINGS = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS


class Row(NamedTuple):
    """What a list says of one video; `number` is its line or entry."""

    number: int
    path: str
    label: int | str | None
    id: str | None = None


class VideoList(NamedTuple):
    file: Path
    rows: list[Row]
    unit: str = "line"  # what `Row.number` counts


def csv_splits(
    train: str | Path,
    val: str | Path,
    *,
    test: str | Path | None = None,
    root: str | Path | None = None,
    class_names: ClassNames | None = None,
    max_missing: float = 0.2,
) -> VideoSplits:
    """Index lists with one `path label` or `path,label` a line, as PySlowFast's and mmaction2's are.

    The label follows the last space, so a path may contain spaces; a tab in place of the space lets labels
    have them too; in the comma form, quotes protect commas.
    Blank lines and a first line `path label` (or `video,class`, ...) are passed over. A path may also name a
    folder of pictures.

    Args:
        train, val, test: the list files; the lines of `test` may have no label.
        root: where relative paths start; by default in the folder of their list.
        class_names: in label order, or where to find them (`read_class_names`). By default they come from the
            training list: its names in sorted order, or "0" to the highest of its numbers.
        max_missing: how large a share of a list's videos may be missing on disk; they are left out.

    Raises:
        DataError: a file is missing, empty or unreadable, a line has no label, a label is unknown or out of
            range, a video comes twice, or too many of the videos don't exist.
    """
    return _list_splits(read_csv, train, val, test, root, class_names, max_missing)


def json_splits(
    train: str | Path,
    val: str | Path,
    *,
    test: str | Path | None = None,
    root: str | Path | None = None,
    class_names: ClassNames | None = None,
    max_missing: float = 0.2,
) -> VideoSplits:
    """Index JSON lists of `{"path": ..., "label": name or integer, "id": optional}`.

    Arguments and errors are those of `csv_splits`.
    """
    return _list_splits(_read_json, train, val, test, root, class_names, max_missing)


def index_of_list(
    video_list: VideoList,
    names: tuple[str, ...],
    base: str | Path,
    *,
    max_missing: float,
    labels: bool = True,
) -> VideoIndex:
    """Turn the rows of a list into an index of the videos that exist, paths starting at `base`.

    Args:
        labels: False where rows may lack a label.

    Raises:
        DataError: as `csv_splits`.
    """
    base = os.path.normpath(base)
    rows: list[Row] = []
    for number, path, label, video_id in video_list.rows:
        path = os.path.normpath(os.path.join(base, path))  # noqa: PTH118 (240,000 a second)
        rows.append(Row(number, path, label, relative(path, base) if video_id is None else video_id))
    index = index_of_rows(video_list._replace(rows=rows), names, labels=labels)
    there = existing_paths(entry_on_disk(video.path) for video in index.videos)
    return leave_out(
        index,
        {video.id: NO_FILE for video in index.videos if entry_on_disk(video.path) not in there},
        source=video_list.file,
        max_missing=max_missing,
        remedy=f"relative paths start at root={base}",
    )


def index_of_rows(video_list: VideoList, names: tuple[str, ...], *, labels: bool = True) -> VideoIndex:
    """An index of all rows, whose paths and ids are complete. Raises DataError as `csv_splits`."""
    file, rows, unit = video_list
    if not rows:
        raise DataError(f"no videos found in {file}; it lists none")
    label_of = LabelOf(names)
    numbers: dict[str, int] = {}
    videos: list[LabelledVideo] = []
    for row in rows:
        label, video_id = row.label, row.id or row.path
        if isinstance(label, str):
            label = label_of(label, f"{file}, {unit} {row.number} ({video_id})")
        elif label is None and labels:
            raise DataError(f"{file}, {unit} {row.number} ({video_id}): it has no label")
        elif label is not None and not 0 <= label < len(names):
            raise DataError(f"{file}, {unit} {row.number} ({video_id}): {out_of_range(label, len(names))}")
        if numbers.setdefault(video_id, row.number) != row.number:
            raise DataError(
                f"{file}: {video_id} comes twice, in {unit} {numbers[video_id]} and {unit} {row.number}"
            )
        videos.append(LabelledVideo(row.path, label, video_id))
    return VideoIndex(tuple(videos), names)


def read_csv(file: Path) -> VideoList:
    """The rows of a list in one of the forms of `csv_splits`; a line of a path alone has no label."""
    rows = list(_parse_lines(file))
    if rows and all(_FOLDER_AND_COUNT.fullmatch(row.path) for row in rows):
        rows = [row._replace(path=_mmaction_frames(row.path)) for row in rows]
    return VideoList(file, rows)


def _mmaction_frames(path: str) -> str:
    folder, _, count = path.rpartition(" ")
    return f"{folder}/img_[00001-{int(count):05}].jpg"


def _parse_lines(file: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        fields = _split_line(line)
        is_header = number == 1 and fields and (fields[0].lower() == "path" or _names_columns(fields))
        if not fields or is_header:
            continue
        if len(fields) > 2 or not all(fields):
            raise DataError(f"{file}, line {number}: expected `path label` or `path,label`, got {line!r}")
        label = fields[1] if len(fields) == 2 else None
        yield Row(number, fields[0], int(label) if label is not None and _is_integer(label) else label)


def _names_columns(fields: list[str]) -> bool:
    """Whether this is `video,label` or the like: as a row it would make a class of the word label."""
    return len(fields) == 2 and fields[0].isidentifier() and fields[1].lower() in ("label", "class")


def _split_line(line: str) -> list[str]:
    fields = line.rsplit(maxsplit=1)
    plain = len(fields) == 2 and _is_integer(fields[1]) and not fields[0].endswith(",")
    if plain:
        path, label = fields
        quoted = len(path) > 2 and path[0] == path[-1] == '"'
        return [path[1:-1] if quoted else path, label]
    if "\t" in line.strip():  # a label may have spaces and commas
        return [field.strip() for field in line.strip().rsplit("\t", 1)]
    if line.strip().lower().endswith(_FILE_ENDINGS):  # a path alone, maybe with spaces
        return [line.strip()]
    if "," not in line:
        return fields
    return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]


def _is_integer(text: str) -> bool:
    return len(text) < 20 and text.removeprefix("-").isdecimal()  # int() refuses thousands of digits


def _read_json(file: Path) -> VideoList:
    entries = parse_json(file)
    if not isinstance(entries, list):
        raise DataError(f'{file}: expected a list of {{"path": ..., "label": ...}}')
    rows: list[Row] = []
    for number, entry in enumerate(entries, start=1):
        label: int | str | None
        match entry:
            case {"path": str(path), "label": (int() | str()) as known} if not isinstance(known, bool):
                label = known
            case {"path": str(path), **rest} if "label" not in rest:
                label = None
            case _:
                expected = '{"path": text, "label": name or integer}'
                raise DataError(f"{file}, entry {number}: expected {expected}, got {entry!r}")
        rows.append(Row(number, path, label, str(entry["id"]) if "id" in entry else None))
    return VideoList(file, rows, "entry")


def _list_splits(
    read: Callable[[Path], VideoList],
    train: str | Path,
    val: str | Path,
    test: str | Path | None,
    root: str | Path | None,
    class_names: ClassNames | None,
    max_missing: float,
) -> VideoSplits:
    lists = [read(existing(file)) for file in (train, val, test) if file is not None]
    names = names_in_rows(lists[0]) if class_names is None else read_class_names(class_names)
    found = [
        index_of_list(
            video_list,
            names,
            video_list.file.parent if root is None else existing(root),
            max_missing=max_missing,
            labels=number < 2,
        )
        for number, video_list in enumerate(lists)
    ]
    return VideoSplits(*found)


def names_in_rows(video_list: VideoList) -> tuple[str, ...]:
    """Class names as the labels of a list tell them. Raises DataError where numbers and names are mixed."""
    labels = {row.label for row in video_list.rows}
    numbers = [label for label in labels if isinstance(label, int)]
    words = [label for label in labels if isinstance(label, str)]
    for row in video_list.rows:
        # A number that isn't a label, such as a time, would make names until memory is full.
        if isinstance(row.label, int) and not 0 <= row.label < _MAX_CLASSES:
            raise DataError(
                f"{video_list.file}, {video_list.unit} {row.number} ({row.path}): label {row.label} is out "
                f"of range; labels are 0 to {_MAX_CLASSES - 1:,}, or names"
            )
    if numbers and words:
        raise DataError(
            f"{video_list.file}: labels are numbers and names ({numbers[0]}, {words[0]!r}); "
            "use one kind, or give class_names"
        )
    return tuple(sorted(words)) or tuple(str(label) for label in range(max(numbers, default=-1) + 1))


def existing_paths(paths: Iterable[str]) -> set[str]:
    """Those of the paths that exist, by listing each folder once.

    A stat for each of Kinetics' 240,000 files takes minutes on a network.
    """
    wanted: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition(os.sep)
        wanted.setdefault(folder or os.sep, []).append(name)
    found: set[str] = set()
    for folder, names in wanted.items():
        try:
            here = set(os.listdir(folder))  # noqa: PTH208 (names are all that is needed)
        except OSError:
            continue
        found.update(os.path.join(folder, name) for name in names if name in here)  # noqa: PTH118
    return found
