"""Which videos there are and what they show: rows of path, label and id. Nothing here opens a video.

The data sets with lists are in `lists`, `kinetics`, `ssv2` and `fixed_folds`; what `mvit-data prepare` has
written is read by `table`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

from mvit_video.data.class_names import ClassNames, LabelOf, check_class_names, read_class_names
from mvit_video.data.files import IMAGE_EXTENSIONS, FileSearch, existing, is_text, names_in, quoted
from mvit_video.errors import ConfigError, DataError

_SPLIT_NAMES = {  # of folders and files
    "train": ("train", "training"),
    "val": ("validation", "val", "validate", "valid", "dev"),
    "test": ("test", "testing"),
}
# "train_256", "trainset", "videos_val", ...
_LONGER_NAME = r"((videos|rawframes|frames|clips)[-_ ]?)?({})([-_ ]?(val|set|split|data|videos|clips|\d+p?))?"

log = logging.getLogger(__name__)


Label: TypeAlias = int | tuple[int, ...]  # a class, or all classes of a video that may have several


@dataclass(frozen=True, slots=True)
class LabelledVideo:
    """One video: its file, its class (None where nobody knows) and a name that is unique in its index."""

    path: str
    label: Label | None
    id: str

    @property
    def labels(self) -> tuple[int, ...]:
        """All its classes, whether it may have several or not."""
        return self.label if isinstance(self.label, tuple) else () if self.label is None else (self.label,)


class LeftOut(NamedTuple):
    """A video that a list names and that can't be used."""

    video: LabelledVideo
    reason: str


@dataclass(frozen=True)
class VideoIndex:
    """The videos of one split; a label is a position in `class_names`.

    `left_out` are further videos of the split that are known to be unusable: reported, never read.

    Raises:
        DataError: as `check_videos`, or class names are blank or come twice.
    """

    videos: tuple[LabelledVideo, ...]
    class_names: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        check_class_names(self.class_names, "the data set")
        check_videos(self.videos, len(self.class_names), lambda row: f"row {row + 1}")

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def multi_label(self) -> bool:
        """Whether a video may be of several classes."""
        return any(isinstance(video.label, tuple) for video in self.videos)


@dataclass(frozen=True)
class VideoSplits:
    """What to train on and what to measure on, with the same classes; `test` may have no labels.

    Raises:
        DataError: there are no videos to train or to validate on, or one of them has no label.
    """

    train: VideoIndex
    val: VideoIndex
    test: VideoIndex | None = None

    def __post_init__(self) -> None:
        for split, index in (("training", self.train), ("validation", self.val)):
            if not index.videos:
                raise DataError(f"no videos found for the {split} split")
            for video in index.videos:
                if video.label is None:
                    raise DataError(f"{video.path} has no label; every video of the {split} split needs one")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def multi_label(self) -> bool:
        """Whether a video may be of several classes."""
        return self.train.multi_label


def check_videos(videos: Sequence[LabelledVideo], num_classes: int, where: Callable[[int], str]) -> None:
    """Raise DataError for a label out of range, a path or id that no file can have, an id that comes twice.

    Args:
        where: says where the video of a position stands, as the beginning of the error.
    """
    first: dict[str, int] = {}
    for row, video in enumerate(videos):
        problem = None
        if not all(0 < len(name) <= 4096 and is_text(name) for name in (video.path, video.id)):
            problem = "its name is no file's, or isn't UTF-8 text; rename it"
        elif not all(0 <= label < num_classes for label in video.labels):
            allowed = f"{num_classes} class names allow 0 to {num_classes - 1}"
            problem = f"label {quoted(video.label)} is out of range; {allowed}"
        elif first.setdefault(video.id, row) != row:
            problem = f"it comes twice, first in {where(first[video.id])}"
        if problem:
            raise DataError(f"{where(row)} ({quoted(video.id or video.path)}): {problem}")


def leave_out(
    index: VideoIndex, reasons: Mapping[str, str], *, source: str | Path, max_missing: float, remedy: str
) -> VideoIndex:
    """The index without the videos whose id has an entry in `reasons`; they become its `left_out`.

    Args:
        source: the list or the folder that the error and the line in the log begin with.
        max_missing: how large a share of the videos may be left out.
        remedy: what to do about it, the end of the error.

    Raises:
        DataError: no video is left, or more than `max_missing` are missing.
        ConfigError: `max_missing` isn't a share.
    """
    if not 0 <= max_missing <= 1:
        raise ConfigError(f"max_missing is {max_missing}; expected a share, 0 to 1")
    out = tuple(LeftOut(video, reasons[video.id]) for video in index.videos if video.id in reasons)
    if not out:
        return index
    first, total = f"the first is {out[0].video.path}: {out[0].reason}", len(index.videos)
    if len(out) == total:
        raise DataError(f"{source}: none of its {total} videos can be read, {first}; {remedy}")
    message = f"{source}: {len(out)} of its {total} videos can't be read, {first}"
    if len(out) > max_missing * total:
        raise DataError(f"{message}; {remedy}, or allow it: max_missing={max_missing} is the share allowed")
    log.warning("%s; they are left out", message)
    kept = tuple(video for video in index.videos if video.id not in reasons)
    return VideoIndex(kept, index.class_names, index.left_out + out)


def relative(path: str, base: str | Path) -> str:
    """The part of a path below `base`, with `/`; the whole path where it lies elsewhere."""
    return path.removeprefix(str(base).rstrip(os.sep) + os.sep).replace(os.sep, "/")


# Folders


def folder_splits(
    root: str | Path,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    class_names: ClassNames | None = None,
    group: str | None = None,
    search: FileSearch | None = None,
) -> VideoSplits:
    """Index `root/train/<class>/` and `root/val/<class>/` (or validation/, test/), or only `root/<class>/`.

    Videos lie at any depth below their class, hidden files and folders are passed over; of other files the
    log tells how many there are of each suffix. The names of the split folders may be in any case, and
    longer, such as `train_256` or `videos_val`. Without them, `val_fraction` of each class becomes the
    validation split: at least one video, and never the last one left for training. Who goes there depends on
    `seed` and the paths below `root` alone, so every machine finds the same split. A `root/test/` beside a
    validation folder becomes the test split: class folders, or files alone, without labels.

    Args:
        class_names: in label order, or where to find them (`read_class_names`); folders may then be spelt
            with underscores, and classes may lack. By default the sorted folders of the training split.
        group: which videos stay together where a validation split is drawn, see `draw_split`.
        search: the kinds of files to take; by default videos.

    Raises:
        DataError: `root` is not a folder, a class has no videos, only the validation split has it, or folders
            could mean several things. ConfigError: `val_fraction` is not between 0 and 1.
    """
    _check_val_fraction(val_fraction)
    root, search = existing(root, folder=True), search or FileSearch()
    names = None if class_names is None else read_class_names(class_names)
    folders = {split: folder for split in _SPLIT_NAMES if (folder := split_folder(root, split))}
    others = set(_folders_in(root)) - {folder.name for folder in folders.values()}
    # A class may be called training: it has no classes of its own, and others beside it.
    of_classes = {split for split, folder in folders.items() if _folders_in(folder)}
    if not of_classes and (others or len(folders) < 2):
        index = _index_of_folder(root, root, search, names)
        splits = draw_split(index, val_fraction, seed, group=group, class_folders=True)
    elif "train" not in folders or len(folders) == 1:
        lacking = "train/" if "train" not in folders else "val/, validation/ and test/"
        found = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise DataError(f"{root} has {found} but none of {lacking}; rename what is a class")
    else:
        if group is not None:
            raise ConfigError(f"data.group is for a split that is drawn, and {root} is split into folders")
        if others:
            log.warning("%s: folders beside the splits are ignored: %s", root, ", ".join(sorted(others)))
        train = _index_of_folder(folders["train"], root, search, names)
        held_out = folders.get("val") or folders.pop("test")
        val, test = _index_of_folder(held_out, root, search, train.class_names), None
        if "test" in folders and "test" in of_classes:
            test = _index_of_folder(folders["test"], root, search, train.class_names)
        elif "test" in folders and (videos := _videos_below(folders["test"], root, search, None)):
            test = VideoIndex(videos, train.class_names)
        splits = VideoSplits(train, val, test)
    search.report(root)
    return splits


def image_folder_splits(root: str | Path, *, val_fraction: float = 0.2, seed: int = 0) -> VideoSplits:
    """`folder_splits` of pictures, as ImageNet comes: each is a video of one frame, or an animation."""
    search = FileSearch((*IMAGE_EXTENSIONS, ".gif", ".apng"))
    return folder_splits(root, val_fraction=val_fraction, seed=seed, search=search)


def unlabelled_splits(root: str | Path, *, val_fraction: float = 0.05, seed: int = 0) -> VideoSplits:
    """All videos at any depth below `root`, whatever its folders mean, as one class: for pre-training.

    Of a folder with training and validation folders, as in `folder_splits`, these are the splits. Without
    them, `val_fraction` of the videos, one at least, is held out; which ones depends on `seed` and the paths
    below `root` alone.

    Raises:
        DataError: `root` is not a folder or has less than two videos. ConfigError: `val_fraction` is not
            between 0 and 1.
    """
    root, search = existing(root, folder=True), FileSearch()

    def index_of(folder: Path) -> VideoIndex:
        if videos := _videos_below(folder, root, search, 0):
            return VideoIndex(videos, ("unlabelled",))
        raise DataError(f"no videos found in {folder}; expected files such as {folder / 'video.mp4'}")

    train, val = split_folder(root, "train"), split_folder(root, "val")
    if train and val:
        splits = VideoSplits(index_of(train), index_of(val))
    else:
        splits = draw_split(index_of(root), val_fraction, seed)
    search.report(root)
    return splits


def find_videos(paths: str | Path | Iterable[str | Path]) -> list[str]:
    """List the video files to predict on: files as given, folders searched at any depth, in sorted order.

    Of a folder without videos its pictures are taken. The log tells which kinds of files were passed over.

    Raises:
        DataError: a path is missing, a folder can't be read or has no videos.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = existing(path)
        files = [str(path)]
        if path.is_dir():
            for search in (FileSearch(), FileSearch(IMAGE_EXTENSIONS)):
                if files := search.below(path):
                    break
            search.report(path)
        if not files:
            raise DataError(f"no videos found in {path}; expected files such as {path / 'video.mp4'}")
        found += files
    return found


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split, whatever its spelling. Raises DataError where two could be it."""
    names, words = _folders_in(root), _SPLIT_NAMES[split]
    longer = re.compile(_LONGER_NAME.format("|".join(words)), re.IGNORECASE)
    found = [name for name in names if name.lower() in words] or list(filter(longer.fullmatch, names))
    if len(found) > 1:
        raise DataError(f"{root} has {' and '.join(found)}, which could be the same split; keep one of them")
    return root / found[0] if found else None


def _folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, which gives the labels."""
    return [name for name in names_in(folder) if (folder / name).is_dir()]


def _videos_below(
    folder: Path, root: Path, search: FileSearch, label: int | None
) -> tuple[LabelledVideo, ...]:
    return tuple(LabelledVideo(path, label, relative(path, root)) for path in search.below(folder))


def _index_of_folder(
    folder: Path, root: Path, search: FileSearch, class_names: tuple[str, ...] | None
) -> VideoIndex:
    found = _folders_in(folder)
    loose = sum(search.takes(name) for name in names_in(folder) if name not in found)
    expected = f"{folder}/<class>/<video>{search.extensions[0]}"
    if loose and not found:
        raise DataError(f"videos lie directly in {folder}; expected one sub-folder per class: {expected}")
    if loose:
        log.warning("%s: %d videos that lie beside the class folders are ignored", folder, loose)
    if class_names is None and len(found) == 1 and len(deeper := _folders_in(folder / found[0])) > 1:
        raise DataError(
            f"{folder} has one class folder, {found[0]}, with folders in it ({', '.join(deeper[:3])}): are "
            f"they the classes? Then give data.root={folder / found[0]}; expected {expected}"
        )
    label_of = LabelOf(class_names or found)
    videos: list[LabelledVideo] = []
    for name in found:
        of_class = _videos_below(folder / name, root, search, label_of(name, str(folder / name)))
        if not of_class and class_names is None:
            hint = "add some or remove it"
            if FileSearch(IMAGE_EXTENSIONS).below(folder / name):
                hint = "pictures need data=imagenet, folders of frames a list (data=csv, a folder a line)"
            raise DataError(f"no videos found in class folder {folder / name}; {hint}")
        if not of_class:
            log.warning("no videos found in class folder %s", folder / name)
        videos += of_class
    if not videos:
        raise DataError(f"no videos found in {folder}; expected {expected}")
    return VideoIndex(tuple(videos), class_names or tuple(found))


# Splits that are drawn


def draw_split(
    index: VideoIndex,
    val_fraction: float,
    seed: int,
    *,
    group: str | None = None,
    class_folders: bool = False,
) -> VideoSplits:
    """Hold about `val_fraction` of each class out for validation, and leave each a video to train on.

    Who goes there depends on `seed`, ids and groups alone. A group is held out whole, if that brings its
    classes nearer to their shares; of a class of large groups only, it is the smallest one.

    Args:
        group: what is a group. None: each video; "folder": a folder of videos, of the same name in whichever
            class with `class_folders`; else a regular expression, whose first group, or whole match, in the
            id of a video is the name of its group.

    Raises:
        ConfigError: `val_fraction` is not between 0 and 1, or `group` is no regular expression.
        DataError: an id doesn't match it, or nothing can be held out.
    """
    _check_val_fraction(val_fraction)
    groups: dict[str, list[LabelledVideo]] = {}
    for name, video in zip(_group_names(index.videos, group, class_folders), index.videos, strict=True):
        groups.setdefault(name, []).append(video)
    # -1 stands for no class.
    counts = {name: Counter(label for v in of for label in v.labels or (-1,)) for name, of in groups.items()}
    left: Counter[int] = sum(counts.values(), Counter())
    quota = {label: min(max(1, round(n * val_fraction)), n - 1) for label, n in sorted(left.items())}
    lacking, chosen = Counter(quota), set[str]()

    def hold_out(names: Iterable[str]) -> None:
        for name in names:
            chosen.add(name)
            lacking.subtract(counts[name])
            left.subtract(counts[name])

    def possible(name: str) -> bool:
        return name not in chosen and all(left[label] > n for label, n in counts[name].items())

    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    for name in order:
        gain = sum(abs(lacking[label]) - abs(lacking[label] - n) for label, n in counts[name].items())
        hold_out([name] if gain > 0 and possible(name) else [])
    for label, wanted in quota.items():
        if wanted and lacking[label] == wanted:  # none of it is held out
            found = [name for name in order if label in counts[name] and possible(name)]
            hold_out(sorted(found, key=lambda name: counts[name].total())[:1])
    _report_groups(index, group, len(groups), len(chosen), [i for i in quota if 0 < quota[i] == lacking[i]])
    held = {video.id for name in chosen for video in groups[name]}
    train = tuple(video for video in index.videos if video.id not in held)
    val = tuple(video for video in index.videos if video.id in held)
    return VideoSplits(replace(index, videos=train), VideoIndex(val, index.class_names))


def _check_val_fraction(val_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; expected a number between 0 and 1")


def _group_names(videos: Sequence[LabelledVideo], group: str | None, class_folders: bool) -> list[str]:
    if group is None:
        return [video.id for video in videos]
    hint = r"give a regular expression that finds its recording, such as data.group='([^/]*)_\d+\.mp4'"
    if group == "folder":
        folders = ["/".join(video.id.split("/")[class_folders:-1]) for video in videos]
        if not any(folders):
            below = "<class>/" * class_folders
            raise DataError(
                f"data.group=folder: expected {below}<recording>/<video>, got {videos[0].id}; {hint}"
            )
        return [folder or video.id for folder, video in zip(folders, videos, strict=True)]
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ConfigError(f"data.group={group} is neither folder nor a regular expression: {error}") from None
    names = []
    for video in videos:
        match = pattern.search(video.id)
        if not match or match[bool(pattern.groups)] is None:
            raise DataError(f"data.group={group} finds nothing in {video.id}; {hint}")
        names.append(match[bool(pattern.groups)])
    return names


def _report_groups(
    index: VideoIndex, group: str | None, total: int, held_out: int, without: Sequence[int]
) -> None:
    if not held_out:
        why = f"data.group={group} puts all videos of each class into one group ({total} in all)"
        why = "no class has two videos" if group is None else why
        raise DataError(f"{why}, so none can be set aside for validation")
    if group is None:
        return
    log.info("data.group=%s: %d groups, %d of them for validation", group, total, held_out)
    if names := [index.class_names[label] for label in without if label >= 0]:
        text = "data.group=%s: no validation videos of %s, which would leave none to train on"
        log.warning(text, group, ", ".join(map(quoted, names[:5])) + ", ..." * (len(names) > 5))
