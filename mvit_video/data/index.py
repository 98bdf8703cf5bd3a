"""Which videos there are and what they show: rows of path, label and id. Nothing here opens a video."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mvit_video.errors import ConfigError, DataError

# fmt: off
VIDEO_EXTENSIONS = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts",
    ".wmv", ".flv", ".3gp", ".gif", ".ogv",
)
# fmt: on

ClassNames = Sequence[str] | str | Path


@dataclass(frozen=True, slots=True)
class LabelledVideo:
    """One video: its file, its class (None where nobody knows) and a name that is unique in its index."""

    path: str
    label: int | None
    id: str


@dataclass(frozen=True)
class VideoIndex:
    """The videos of one split; a label is a position in `class_names`.

    Raises:
        DataError: a label is out of range, or two videos share an id.
    """

    videos: tuple[LabelledVideo, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        rows: dict[str, int] = {}
        for row, video in enumerate(self.videos, start=1):
            if video.label is not None and not 0 <= video.label < num_classes:
                raise DataError(
                    f"row {row} ({video.path}): label {video.label} is out of range; "
                    f"{num_classes} class names allow 0 to {num_classes - 1}"
                )
            if rows.setdefault(video.id, row) != row:
                raise DataError(f"rows {rows[video.id]} and {row} have the same id, {video.id}")

    def __len__(self) -> int:
        return len(self.videos)


@dataclass(frozen=True)
class VideoSplits:
    """What to train on and what to measure on, with the same classes."""

    train: VideoIndex
    val: VideoIndex

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def folder_splits(root: str | Path, *, val_fraction: float = 0.2, seed: int = 0) -> VideoSplits:
    """Index `root/train/<class>/` and `root/val/<class>/` (or validation/, test/), or only `root/<class>/`.

    Class names are the sorted folder names of the training split; videos lie at any depth below them, hidden
    files and folders are passed over. Without the split folders, `val_fraction` of each class becomes the
    validation split: at least one video, and never the last one left for training. Who goes there depends on
    `seed` and the paths below `root` alone, so every machine finds the same split.

    Raises:
        DataError: `root` is not a folder, a class has no videos, or only the validation split has it.
        ConfigError: `val_fraction` is not between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; expected a number between 0 and 1")
    root = _existing(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected {root}/<class>/<video>.mp4")
    train_folder = root / "train"
    val_folder = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), None)
    if not train_folder.is_dir():
        return _split_by_hash(_index_of_folder(root, root), val_fraction, seed)
    if val_folder is None:
        raise DataError(f"{root} has train/ but none of val/, validation/ and test/")
    train = _index_of_folder(train_folder, root)
    return VideoSplits(train, _index_of_folder(val_folder, root, class_names=train.class_names))


def csv_splits(
    train: str | Path,
    val: str | Path,
    *,
    root: str | Path | None = None,
    class_names: ClassNames | None = None,
) -> VideoSplits:
    """Index two lists with one `path label` or `path,label` a line, as PySlowFast's Kinetics lists are.

    The label follows the last space, so a path may contain spaces; in the comma form, quotes protect commas.
    Blank lines and a first line `path label` are passed over.

    Args:
        train, val: the list files.
        root: where relative paths start; by default in the folder of their list.
        class_names: the names in label order, or a file of them: text with one name a line, a JSON list, or
            JSON `{name: index}`. By default they come from the training list: its names in sorted order, or
            "0" to the highest of its numbers.

    Raises:
        DataError: a file is missing, empty or unreadable, a line has no label, a label is unknown or out of
            range, a video comes twice, or none of the first videos exist.
    """
    return _list_splits(_read_csv(_existing(train)), _read_csv(_existing(val)), root, class_names)


def json_splits(
    train: str | Path,
    val: str | Path,
    *,
    root: str | Path | None = None,
    class_names: ClassNames | None = None,
) -> VideoSplits:
    """Index two JSON lists of `{"path": ..., "label": name or integer, "id": optional}`.

    Arguments and errors are those of `csv_splits`.
    """
    return _list_splits(_read_json(_existing(train)), _read_json(_existing(val)), root, class_names)


def find_videos(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """List the video files to predict on: files as given, folders searched at any depth, in sorted order.

    Raises:
        DataError: a path is missing, or a folder has no videos.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = _existing(path)
        files = _videos_below(path) if path.is_dir() else [str(path)]
        if not files:
            raise DataError(f"no videos found in {path}; expected files such as {path / 'video.mp4'}")
        found += files
    return found


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()  # shells leave the ~ of an override such as data.root=~/k400 alone
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return path


# Folders


def _index_of_folder(folder: Path, root: Path, *, class_names: tuple[str, ...] | None = None) -> VideoIndex:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))
    if not found:
        raise DataError(f"no videos found in {folder}; expected {folder}/<class>/<video>.mp4")
    class_names = class_names or tuple(found)
    videos: list[LabelledVideo] = []
    for name in found:
        if name not in class_names:
            raise DataError(f"{folder / name}: the training split has no class {name}")
        files = _videos_below(folder / name)
        if not files:
            raise DataError(f"no videos found in class folder {folder / name}; add some or remove it")
        label = class_names.index(name)
        videos += [LabelledVideo(path, label, _relative(path, str(root))) for path in files]
    return VideoIndex(tuple(videos), class_names)


def _videos_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [os.path.join(parent, name) for name in files if _is_video(name)]  # noqa: PTH118 (speed)
    return sorted(found)


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_EXTENSIONS) and not _hidden(name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _split_by_hash(index: VideoIndex, val_fraction: float, seed: int) -> VideoSplits:
    def rank(video: LabelledVideo) -> bytes:
        return hashlib.sha256(f"{seed}:{video.id}".encode()).digest()

    of_class: dict[int | None, list[LabelledVideo]] = {}
    for video in sorted(index.videos, key=rank):
        of_class.setdefault(video.label, []).append(video)
    val_ids: set[str] = set()
    for videos in of_class.values():
        wanted = max(1, round(len(videos) * val_fraction))
        val_ids.update(video.id for video in videos[: min(wanted, len(videos) - 1)])
    if not val_ids:
        raise DataError("no class has two videos, so none can be set aside for validation")
    train = tuple(video for video in index.videos if video.id not in val_ids)
    val = tuple(video for video in index.videos if video.id in val_ids)
    return VideoSplits(VideoIndex(train, index.class_names), VideoIndex(val, index.class_names))


# Lists


class _Row(NamedTuple):
    path: str
    label: int | str
    id: str | None = None


class _VideoList(NamedTuple):
    file: Path
    rows: list[_Row]


def _read_csv(file: Path) -> _VideoList:
    rows = _read_with_pytorchvideo(file)
    if rows is None:
        rows = list(_parse_lines(file))
    return _VideoList(file, rows)


def _read_with_pytorchvideo(file: Path) -> list[_Row] | None:
    """The rows of a list in plain `path integer` form, None if it has another form or a mistake."""
    from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths  # takes a second to import

    try:
        rows = [(path, info["label"]) for path, info in LabeledVideoPaths.from_csv(str(file))]
    except (AssertionError, ValueError, OSError):
        return None
    # It gives -1 to a line without a space, and takes the comma of "path, label" for a part of the path.
    plain = all(label >= 0 and not path.endswith(",") for path, label in rows)
    return [_Row(path, label) for path, label in rows] if plain else None


def _parse_lines(file: Path) -> Iterator[_Row]:
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        fields = _split_line(line)
        is_header = number == 1 and [field.lower() for field in fields] == ["path", "label"]
        if not fields or is_header:
            continue
        if len(fields) != 2 or not all(fields):
            raise DataError(f"{file}, line {number}: expected `path label` or `path,label`, got {line!r}")
        path, label = fields
        yield _Row(path, int(label) if _is_integer(label) else label)


def _split_line(line: str) -> list[str]:
    fields = line.rsplit(maxsplit=1)
    plain = len(fields) == 2 and _is_integer(fields[1]) and not fields[0].endswith(",")
    if plain or "," not in line:
        return fields
    return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _read_json(file: Path) -> _VideoList:
    entries = _parse_json(file)
    if not isinstance(entries, list):
        raise DataError(f'{file}: expected a list of {{"path": ..., "label": ...}}')
    rows: list[_Row] = []
    for number, entry in enumerate(entries, start=1):
        match entry:
            case {"path": str(path), "label": (int() | str()) as label} if not isinstance(label, bool):
                rows.append(_Row(path, label, str(entry["id"]) if "id" in entry else None))
            case _:
                expected = '{"path": text, "label": name or integer}'
                raise DataError(f"{file}, entry {number}: expected {expected}, got {entry!r}")
    return _VideoList(file, rows)


def _list_splits(
    train: _VideoList, val: _VideoList, root: str | Path | None, class_names: ClassNames | None
) -> VideoSplits:
    names = _names_in_rows(train) if class_names is None else _read_class_names(class_names)
    return VideoSplits(_index_of_list(train, root, names), _index_of_list(val, root, names))


def _index_of_list(video_list: _VideoList, root: str | Path | None, names: tuple[str, ...]) -> VideoIndex:
    file, rows = video_list
    if not rows:
        raise DataError(f"no videos found in {file}; it lists none")
    base = os.path.normpath(file.parent if root is None else _existing(root))
    label_of = {name: label for label, name in enumerate(names)}
    videos: list[LabelledVideo] = []
    for row, (path, label, video_id) in enumerate(rows, start=1):
        if isinstance(label, str):
            if label not in label_of:
                raise DataError(f"{file}, row {row} ({path}): unknown class {label!r}; {_preview(names)}")
            label = label_of[label]
        path = os.path.normpath(os.path.join(base, path))  # noqa: PTH118 (240,000 rows in a second)
        videos.append(LabelledVideo(path, label, _relative(path, base) if video_id is None else video_id))
    _require_some_exist(videos, file, base)
    try:
        return VideoIndex(tuple(videos), names)
    except DataError as error:
        raise DataError(f"{file}, {error}") from None


def _relative(path: str, base: str) -> str:
    return path.removeprefix(base + os.sep).replace(os.sep, "/")


def _require_some_exist(videos: list[LabelledVideo], file: Path, base: str) -> None:
    # Only a wrong root is looked for: a stat for each of Kinetics' 240,000 files takes minutes on a network.
    first = videos[:20]
    if not any(Path(video.path).exists() for video in first):
        raise DataError(
            f"{file}: none of the first {len(first)} videos exist, starting with {first[0].path}; "
            f"relative paths start at root={base}"
        )


# Class names


def _names_in_rows(video_list: _VideoList) -> tuple[str, ...]:
    labels = {row.label for row in video_list.rows}
    numbers = [label for label in labels if isinstance(label, int)]
    words = [label for label in labels if isinstance(label, str)]
    if numbers and words:
        raise DataError(
            f"{video_list.file}: labels are numbers and names ({numbers[0]}, {words[0]!r}); "
            "use one kind, or give class_names"
        )
    return tuple(sorted(words)) or tuple(str(label) for label in range(max(numbers, default=-1) + 1))


def _read_class_names(source: ClassNames) -> tuple[str, ...]:
    if isinstance(source, str | Path):
        file = _existing(source)
        where = str(file)
        if file.suffix.lower() == ".json":
            names = _names_in_json(file)
        else:
            names = [line.strip() for line in _read_text(file).splitlines() if line.strip()]
    else:
        where, names = "class_names", [str(name) for name in source]
    if not names:
        raise DataError(f"{where}: no class names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: class name {twice!r} comes twice")
    return tuple(names)


def _names_in_json(file: Path) -> list[str]:
    content = _parse_json(file)
    if isinstance(content, dict):
        # PySlowFast's Kinetics file has quotes inside its names, Something-Something's around its numbers.
        name_of = {str(label): name.strip('"') for name, label in content.items()}
        content = [name_of.get(str(label)) for label in range(len(content))]
        if None in content:
            raise DataError(f"{file}: expected each index from 0 to {len(content) - 1} once")
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{file}: expected a list of class names, or {{name: index}}")
    return content


def _preview(names: tuple[str, ...]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 5 else ""
    return f"the classes are {', '.join(names[:5])}{more}"


# Files


def _parse_json(file: Path) -> object:
    try:
        return json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read as text: {error}") from None
