"""Videos from lists: a line or an entry for each, with errors that name it.

Every data set that comes with lists goes one way: its module reads `Row`s, `splits_of_lists` turns them into
indices of the videos that exist.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mvit_video.data.class_names import ClassNames, LabelOf, read_class_names
from mvit_video.data.decode.images import entry_on_disk
from mvit_video.data.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, existing, lines_of, parse_json, quoted
from mvit_video.data.index import (
    Label,
    LabelledVideo,
    VideoIndex,
    VideoSplits,
    check_videos,
    draw_split,
    leave_out,
    relative,
)
from mvit_video.errors import ConfigError, DataError

log = logging.getLogger(__name__)

NO_FILE = "no such file"
# mmaction2's lists of frames: `folder frames label`
_FOLDER_AND_COUNT = re.compile(r"([^.]*\S) ([1-9]\d{0,8})")
_MAX_CLASSES = 100_000  # of lists that come without class names
_FILE_ENDINGS = VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
# Names of columns without case, spaces, dashes and underscores
_PATH_COLUMN = re.compile(r"(video|clip|image|file|frame|relative)(s|path|file|filename|name|id)?|path|name")
_LABEL_COLUMN = re.compile(r"(class|label|category|action|activity|target)(s|es|name|id|index|label)?")


class Row(NamedTuple):
    """What a list says of one video; `where` is its place there, as "train.csv, line 3"."""

    where: str
    path: str
    label: int | str | tuple[int | str, ...] | None  # several: all classes of the video
    id: str | None = None


@dataclass
class VideoList:
    """The rows of a list, and where its videos are.

    Attributes:
        base: where relative paths start; by default in the folder of the list.
        remedy: what to do about missing videos, the end of an error.
        optional: none of its videos needs to exist; without any there is no such split.
    """

    file: Path
    rows: list[Row]
    base: Path | None = None
    remedy: str | None = None
    optional: bool = False


def csv_splits(
    train: str | Path,
    val: str | Path | None = None,
    *,
    test: str | Path | None = None,
    root: str | Path | None = None,
    class_names: ClassNames | None = None,
    max_missing: float = 0.2,
    multi_label: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
    group: str | None = None,
    read: Callable[..., VideoList] | None = None,
) -> VideoSplits:
    """Index lists with one `path label` or `path,label` a line, as PySlowFast's and mmaction2's are.

    The label follows the last space, so a path may contain spaces; a tab in place of the space lets labels
    have them too; in the form with commas or semicolons, quotes protect them. Blank lines, lines that begin
    with `#` and a first line of column names (`path label`, `video,class`, or any words above names of files)
    are passed over. With commas, semicolons or tabs it also tells which of several columns are meant. A path
    may also name a folder of pictures.

    Args:
        train, val, test: the list files; the lines of `test` may have no label. Without `val` a validation
            split is drawn from `train`.
        root: where relative paths start; by default in the folder of their list.
        class_names: in label order, or where to find them (`read_class_names`). By default they come from the
            training list: its names in sorted order, or "0" to the highest of its numbers.
        max_missing: how large a share of a list's videos may be missing on disk; they are left out. Of the
            test list one has to be there.
        multi_label: a video may have several classes, `a;b`, or none; fields are then parted by commas, tabs
            or the last space.
        val_fraction, seed, group: see `draw_split`.
        read: another form of list.

    Raises:
        DataError: a file is missing, empty or unreadable, a line has no label, a label is unknown or out of
            range, a video comes twice, or too many of the videos don't exist.
    """
    files = {"train": train, "val": val, "test": test}
    given = {split: existing(file) for split, file in files.items() if file is not None}
    lists = {split: (read or read_csv)(file, multi_label=multi_label) for split, file in given.items()}
    if val is not None and group is not None:
        raise ConfigError("data.group is for a split that is drawn: leave data.val out")
    for video_list in lists.values():
        video_list.base = None if root is None else existing(root, folder=True)
    names = names_in_rows(lists["train"].rows) if class_names is None else read_class_names(class_names)
    draw = partial(draw_split, val_fraction=val_fraction, seed=seed, group=group)
    return splits_of_lists(lists, names, max_missing=max_missing, draw=draw)


def json_splits(train: str | Path, val: str | Path | None = None, **options: Any) -> VideoSplits:
    """Index JSON lists of `{"path": ..., "label": name or integer, "id": optional}`.

    With `multi_label` a label is a list of names or integers.

    Arguments and errors are those of `csv_splits`.
    """
    return csv_splits(train, val, read=_read_json, **options)


def splits_of_lists(
    lists: Mapping[str, VideoList],
    names: tuple[str, ...],
    *,
    max_missing: float,
    draw: Callable[[VideoIndex], VideoSplits] | None = None,
) -> VideoSplits:
    """The splits of a data set from a list for each, of which `test` may have no labels and may lack.

    Without one for `val`, `draw` makes two splits of that for `train`.

    Raises:
        DataError: as `csv_splits`.
    """
    found: dict[str, VideoIndex] = {}
    for split, video_list in lists.items():
        index = _index_of_list(video_list, names, max_missing, labels=split != "test")
        if index is None:
            log.info("no %s split: none of the videos of %s exists", split, video_list.file)
        else:
            found[split] = index
    if draw is not None and "val" not in lists:
        drawn = draw(found["train"])
        found |= {"train": drawn.train, "val": drawn.val}
    both = {video.path for video in found["train"].videos} & {video.path for video in found["val"].videos}
    if both:
        log.warning("%d videos are in the training and the validation list, such as %s", len(both), min(both))
    return VideoSplits(found["train"], found["val"], found.get("test"))


def _index_of_list(
    video_list: VideoList, names: tuple[str, ...], max_missing: float, *, labels: bool
) -> VideoIndex | None:
    """The videos of a list that exist; without `labels` rows may lack one, and all videos but one may.

    None where none of an optional list exists.
    """
    base = os.path.abspath(video_list.base or video_list.file.parent)  # noqa: PTH100 (or in the current folder)
    if not video_list.rows:
        raise DataError(f"no videos found in {video_list.file}; it lists none")
    label_of = LabelOf(names)
    videos: list[LabelledVideo] = []
    for row in video_list.rows:
        path = row.path and os.path.normpath(os.path.join(base, row.path))  # noqa: PTH118 (240,000 a second)
        video_id = row.id or relative(path, base)
        label = _label(row, label_of, f"{row.where} ({quoted(video_id)})")
        if label is None and labels:
            raise DataError(f"{row.where} ({quoted(video_id)}): it has no label")
        videos.append(LabelledVideo(path, label, video_id))
    check_videos(videos, len(names), lambda number: video_list.rows[number].where)
    there = _existing(entry_on_disk(video.path) for video in videos)
    missing = {video.id: NO_FILE for video in videos if entry_on_disk(video.path) not in there}
    if video_list.optional and len(missing) == len(videos):
        return None
    remedy = video_list.remedy or f"relative paths start at root={base}"
    if missing and any("\\" in row.path for row in video_list.rows):
        remedy = f"paths have `\\` between folders, where this system has `/`; {remedy}"
    index, allowed = VideoIndex(tuple(videos), names), max_missing if labels else 1.0
    return leave_out(index, missing, source=video_list.file, max_missing=allowed, remedy=remedy)


def _label(row: Row, label_of: LabelOf, where: str) -> Label | None:
    if row.label is None or isinstance(row.label, int):
        return row.label
    if isinstance(row.label, str):
        return label_of(row.label, where)
    return tuple(sorted({label if isinstance(label, int) else label_of(label, where) for label in row.label}))


def names_in_rows(rows: Iterable[Row]) -> tuple[str, ...]:
    """Class names as the labels of a list tell them. Raises DataError where numbers and names are mixed."""
    first: dict[int | str, Row] = {}
    for row in rows:
        for label in row.label if isinstance(row.label, tuple) else (row.label,):
            if label is not None:
                first.setdefault(label, row)
    numbers = [label for label in first if isinstance(label, int)]
    names = sorted(label for label in first if isinstance(label, str))
    if numbers and names:
        raise DataError(
            f"{first[names[0]].where}: the label {quoted(names[0])} is a name, that of "
            f"{first[numbers[0]].where} the number {numbers[0]}; use one kind, or give class_names"
        )
    # A number that isn't a label, such as a time, would make names until memory is full.
    for label in numbers:
        if not 0 <= label < _MAX_CLASSES:
            where, path, *_ = first[label]
            raise DataError(
                f"{where} ({quoted(path)}): label {quoted(label)} is out of range; "
                f"labels are 0 to {_MAX_CLASSES - 1:,}, or names"
            )
    return tuple(map(str, range(max(numbers) + 1))) if numbers else tuple(names)


def _existing(paths: Iterable[str]) -> set[str]:
    """Those of the paths that exist, by listing each folder once.

    A stat for each of Kinetics' 240,000 files takes minutes on a network.
    """
    wanted: dict[str, list[str]] = {}
    for path in paths:
        wanted.setdefault(os.path.dirname(path), []).append(path)  # noqa: PTH120 (speed)
    found: set[str] = set()
    for folder, here in wanted.items():
        try:
            names = set(os.listdir(folder or os.curdir))  # noqa: PTH208 (names are all that is needed)
        except OSError:
            continue
        # The root of the file system has no name in it.
        found.update(path for path in here if path.rpartition(os.sep)[2] in names or path == folder)
    return found


# Forms of lists


def read_csv(file: Path, *, multi_label: bool = False) -> VideoList:
    """The rows of a list in one of the forms of `csv_splits`; a line of a path alone has no label."""
    lines = list(lines_of(file))
    content = [(where, line) for where, line in lines if not _is_comment(line)]
    if len(content) < len(lines):
        log.info("%s: %d lines that begin with # are ignored", file, len(lines) - len(content))
    marks = "," if multi_label else ",;"  # between columns, besides tabs
    rows = list(_rows_of_columns(content, marks))
    if not rows:
        rows = [_row_of_line(where, line, marks) for where, line in content]
        if _is_header(rows):
            del rows[0]
    if all(_FOLDER_AND_COUNT.fullmatch(row.path) for row in rows):
        counts = ((row, row.path.rpartition(" ")) for row in rows)
        rows = [row._replace(path=f"{folder}/img_[00001-{int(n):05}].jpg") for row, (folder, _, n) in counts]
    read_label = _several if multi_label else _number_or_name
    rows = [row._replace(label=read_label(row.label)) if isinstance(row.label, str) else row for row in rows]
    return VideoList(file, rows)


def cells_of(where: str, line: str, delimiter: str = ",") -> list[str]:
    """The fields of a line of a csv file. Raises DataError for one that is too long."""
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise DataError(f"{where}: {error}, in {quoted(line)}") from None
    return [cell.strip() for cell in cells]


def entries_of(file: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each entry of a JSON list stands, and its values. Raises DataError where it is no dictionary."""
    entries = parse_json(file)
    if not isinstance(entries, list):
        raise DataError(f"{file}: expected a list of {expected}")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise DataError(f"{file}, entry {number}: expected {expected}, got {quoted(entry)}")
        yield f"{file}, entry {number}", entry


def _is_comment(line: str) -> bool:
    return line.startswith("#") and not any(ending in line.lower() for ending in _FILE_ENDINGS)


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]", "", column).lower()


def _rows_of_columns(content: list[tuple[str, str]], marks: str) -> Iterator[Row]:
    """The rows below a header that names a column of paths and one of labels; none without such a header."""
    where, line = content[0] if content else ("", "")
    delimiter = next((mark for mark in "\t" + marks if mark in line), None)
    if delimiter is None:
        return
    header = [_plain(cell) for cell in cells_of(where, line, delimiter)]
    paths = [index for index, name in enumerate(header) if _PATH_COLUMN.fullmatch(name)]
    labels = [index for index, name in enumerate(header) if _LABEL_COLUMN.fullmatch(name)]
    if len(paths) != 1 or len(labels) != 1:
        return
    for where, line in content[1:]:
        cells = cells_of(where, line, delimiter)
        cells += [""] * (len(header) - len(cells))
        if len(cells) != len(header) or not cells[paths[0]]:
            raise DataError(f"{where}: expected {len(header)} columns, got {quoted(line)}")
        yield Row(where, cells[paths[0]], cells[labels[0]])


def _row_of_line(where: str, line: str, marks: str) -> Row:
    path, *labels = _split_line(where, line, marks)
    if len(labels) > 1 or not path:
        raise DataError(f"{where}: expected `path label` or `path,label`, got {quoted(line)}")
    return Row(where, path, labels[0] if labels else None)


def _split_line(where: str, line: str, marks: str) -> list[str]:
    fields = line.rsplit(maxsplit=1)
    if re.fullmatch(r'".+"', fields[0]):
        fields[0] = fields[0][1:-1]
    if len(fields) == 2 and _is_integer(fields[1]) and not fields[0].endswith((",", ";")):
        return fields
    if "\t" in line:  # a label may have spaces and commas
        return [field.strip() for field in line.rsplit("\t", 1)]
    if line.lower().endswith(_FILE_ENDINGS):  # a path alone, maybe with spaces
        return [line]
    delimiter = next((mark for mark in marks if mark in line), None)
    return fields if delimiter is None else cells_of(where, line, delimiter)


def _is_header(rows: list[Row]) -> bool:
    """Whether the first row names columns: as a row it would make a class of the word label."""
    if len(rows) < 2:
        return False
    path, label = _plain(rows[0].path), _plain(str(rows[0].label or ""))
    is_class = label and any(row.label == rows[0].label for row in rows[1:])
    if is_class or _is_integer(label) or not path.isidentifier():
        return False
    above_files = all(row.path.lower().endswith(_FILE_ENDINGS) for row in rows[1:])
    known = _PATH_COLUMN.fullmatch(path) or _LABEL_COLUMN.fullmatch(label)
    return above_files or bool(label and known)


def _number_or_name(label: str) -> int | str | None:
    return int(label) if _is_integer(label) else label or None


def _several(labels: str) -> tuple[int | str, ...]:
    found = (_number_or_name(part.strip()) for part in labels.split(";"))
    return tuple(label for label in found if label is not None)


def _is_integer(text: str) -> bool:
    return len(text) < 20 and text.removeprefix("-").isdecimal()  # int() refuses thousands of digits


def _read_json(file: Path, *, multi_label: bool = False) -> VideoList:
    label_kind = "[names or integers]" if multi_label else "name or integer"
    expected = f'{{"path": text, "label": {label_kind}}}'
    rows: list[Row] = []
    for where, entry in entries_of(file, expected):
        # What is null is a mistake, what isn't there is not.
        label, parts = entry.get("label"), [entry[key] for key in ("label", "id") if key in entry]
        if multi_label and "label" in entry:
            label, parts = (tuple(label), [*label, *parts[1:]]) if isinstance(label, list) else (None, [None])
        if not isinstance(entry.get("path"), str) or not all(type(part) in (str, int) for part in parts):
            raise DataError(f"{where}: expected {expected}, got {quoted(entry)}")
        rows.append(Row(where, entry["path"], label, str(entry["id"]) if "id" in entry else None))
    return VideoList(file, rows)
