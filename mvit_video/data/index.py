"""Which videos there are and what they show: rows of path, label and id. Nothing here opens a video.

The data sets with lists are in `lists`, `kinetics`, `ssv2` and `fixed_folds`; what `mvit-data prepare` has
written is read by `table`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mvit_video.data.class_names import ClassNames, LabelOf, read_class_names
from mvit_video.data.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, existing
from mvit_video.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelledVideo:
    """One video: its file, its class (None where nobody knows) and a name that is unique in its index."""

    path: str
    label: int | None
    id: str


class NothingThereError(DataError):
    """None of the videos of a list exist."""


class LeftOut(NamedTuple):
    """A video that a list names and that can't be used."""

    video: LabelledVideo
    reason: str


@dataclass(frozen=True)
class VideoIndex:
    """The videos of one split; a label is a position in `class_names`.

    `left_out` are further videos of the split that are known to be unusable: reported, never read.

    Raises:
        DataError: a label is out of range, a path isn't UTF-8, or two videos share an id.
    """

    videos: tuple[LabelledVideo, ...]
    class_names: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        rows: dict[str, int] = {}
        for row, video in enumerate(self.videos, start=1):
            if video.label is not None and not 0 <= video.label < num_classes:
                raise DataError(f"row {row} ({video.path}): {out_of_range(video.label, num_classes)}")
            if not video.path.isascii() and not _is_utf8(video.path):
                raise DataError(f"{os.fsencode(video.path)!r}: its name isn't UTF-8 text; rename it")
            if rows.setdefault(video.id, row) != row:
                raise DataError(f"rows {rows[video.id]} and {row} have the same id, {video.id}")

    def __len__(self) -> int:
        return len(self.videos)


@dataclass(frozen=True)
class VideoSplits:
    """What to train on and what to measure on, with the same classes; `test` may have no labels.

    Raises:
        DataError: a video to train or to validate on has no label.
    """

    train: VideoIndex
    val: VideoIndex
    test: VideoIndex | None = None

    def __post_init__(self) -> None:
        for split, index in (("training", self.train), ("validation", self.val)):
            nameless = next((video for video in index.videos if video.label is None), None)
            if nameless is not None:
                raise DataError(f"{nameless.path} has no label; every video of the {split} split needs one")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def out_of_range(label: int, num_classes: int) -> str:
    return f"label {label} is out of range; {num_classes} class names allow 0 to {num_classes - 1}"


def leave_out(
    index: VideoIndex, reasons: Mapping[str, str], *, source: str | Path, max_missing: float, remedy: str
) -> VideoIndex:
    """The index without the videos whose id has an entry in `reasons`; they become its `left_out`.

    Args:
        source: the list or the folder that the error and the line in the log begin with.
        max_missing: how large a share of the videos may be left out.
        remedy: what to do about it, the end of the error.

    Raises:
        NothingThereError: no video is left. DataError: more than `max_missing` are missing.
        ConfigError: `max_missing` isn't a share.
    """
    if not 0 <= max_missing <= 1:
        raise ConfigError(f"max_missing is {max_missing}; expected a share, 0 to 1")
    if not reasons:
        return index
    out = tuple(LeftOut(video, reasons[video.id]) for video in index.videos if video.id in reasons)
    first = f"{out[0].video.path}: {out[0].reason}"
    total = len(index.videos)
    if len(out) == total:
        raise NothingThereError(
            f"{source}: none of its {total} videos can be read, the first is {first}; {remedy}"
        )
    message = f"{source}: {len(out)} of its {total} videos can't be read, the first is {first}"
    if len(out) > max_missing * total:
        raise DataError(f"{message}; {remedy}, or allow it: max_missing={max_missing} is the share allowed")
    log.warning("%s; they are left out", message)
    kept = tuple(video for video in index.videos if video.id not in reasons)
    return VideoIndex(kept, index.class_names, index.left_out + out)


# Folders


def folder_splits(
    root: str | Path,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    class_names: ClassNames | None = None,
    extensions: Sequence[str] = VIDEO_EXTENSIONS,
) -> VideoSplits:
    """Index `root/train/<class>/` and `root/val/<class>/` (or validation/, test/), or only `root/<class>/`.

    Videos lie at any depth below their class, hidden files and folders are passed over. Without the split
    folders, `val_fraction` of each class becomes the validation split: at least one video, and never the last
    one left for training. Who goes there depends on `seed` and the paths below `root` alone, so every machine
    finds the same split. A `root/test/` beside a validation folder becomes the test split: class folders, or
    files alone, without labels.

    Args:
        class_names: in label order, or where to find them (`read_class_names`); folders may then be spelt
            with underscores, and classes may lack. By default the sorted folders of the training split.
        extensions: of the files to take, in lower case.

    Raises:
        DataError: `root` is not a folder, a class has no videos, or only the validation split has it.
        ConfigError: `val_fraction` is not between 0 and 1.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; expected a number between 0 and 1")
    root = existing(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected {root}/<class>/<video>{extensions[0]}")
    names = None if class_names is None else read_class_names(class_names)
    ending = tuple(extensions)
    train_folder = root / "train"
    val_names = ("val", "validation", "validate", "test")
    val_folder = next((root / name for name in val_names if (root / name).is_dir()), None)
    if not train_folder.is_dir():
        return _split_by_hash(_index_of_folder(root, root, ending, names), val_fraction, seed)
    if val_folder is None:
        raise DataError(f"{root} has train/ but none of val/, validation/ and test/")
    train = _index_of_folder(train_folder, root, ending, names)
    val = _index_of_folder(val_folder, root, ending, train.class_names)
    test_folder = root / "test"
    if val_folder == test_folder or not test_folder.is_dir():
        return VideoSplits(train, val)
    return VideoSplits(train, val, _index_of_test_folder(test_folder, root, ending, train.class_names))


def image_folder_splits(root: str | Path, *, val_fraction: float = 0.2, seed: int = 0) -> VideoSplits:
    """`folder_splits` of pictures, as ImageNet comes: each is a video of one frame."""
    return folder_splits(root, val_fraction=val_fraction, seed=seed, extensions=IMAGE_EXTENSIONS)


def find_videos(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """List the video files to predict on: files as given, folders searched at any depth, in sorted order.

    Of a folder without videos its pictures are taken.

    Raises:
        DataError: a path is missing, or a folder has no videos.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = existing(path)
        files = files_below(path) or files_below(path, IMAGE_EXTENSIONS) if path.is_dir() else [str(path)]
        if not files:
            raise DataError(f"no videos found in {path}; expected files such as {path / 'video.mp4'}")
        found += files
    return found


def files_below(folder: Path, extensions: tuple[str, ...] = VIDEO_EXTENSIONS) -> list[str]:
    """All files with these extensions at any depth, sorted; nothing hidden."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _hidden(name)]
        found += [
            os.path.join(parent, name)  # noqa: PTH118 (speed)
            for name in files
            if name.lower().endswith(extensions) and not _hidden(name)
        ]
    return sorted(found)


def relative(path: str, base: str) -> str:
    """The part of a path below `base`, with `/`; the whole path where it lies elsewhere."""
    return path.removeprefix(base + os.sep).replace(os.sep, "/")


def _index_of_folder(
    folder: Path, root: Path, extensions: tuple[str, ...], class_names: tuple[str, ...] | None
) -> VideoIndex:
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name))
    if not found:
        raise DataError(f"no videos found in {folder}; expected {folder}/<class>/<video>{extensions[0]}")
    class_names = class_names or tuple(found)
    label_of = LabelOf(class_names)
    videos: list[LabelledVideo] = []
    for name in found:
        label = label_of(name, str(folder / name))
        files = files_below(folder / name, extensions)
        if not files:
            raise DataError(f"no videos found in class folder {folder / name}; add some or remove it")
        videos += [LabelledVideo(path, label, relative(path, str(root))) for path in files]
    return VideoIndex(tuple(videos), class_names)


def _index_of_test_folder(
    folder: Path, root: Path, extensions: tuple[str, ...], class_names: tuple[str, ...]
) -> VideoIndex | None:
    if any(entry.is_dir() and not _hidden(entry.name) for entry in folder.iterdir()):
        return _index_of_folder(folder, root, extensions, class_names)
    files = files_below(folder, extensions)
    videos = tuple(LabelledVideo(path, None, relative(path, str(root))) for path in files)
    return VideoIndex(videos, class_names) if videos else None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that Python could only put by
        return False
    return True


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
