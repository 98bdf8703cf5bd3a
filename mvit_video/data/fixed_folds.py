"""UCF101 and HMDB51: a folder per class, and three official ways to split it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mvit_video.data.files import existing, existing_folder, find_first, lines_of, quoted
from mvit_video.data.index import VideoSplits
from mvit_video.data.lists import Row, VideoList, splits_of_lists
from mvit_video.errors import ConfigError, DataError

_HMDB_SPLITS = {"1": "train", "2": "val", "0": "neither"}


def ucf101_splits(root: str | Path, *, fold: int = 1, max_missing: float = 0.2) -> VideoSplits:
    """Index UCF101: `root/UCF-101/<class>/*.avi` with `root/ucfTrainTestlist/` (or both in `root`).

    Labels are those of `classInd.txt`, from 0; the test list of the fold is the validation split.

    Raises:
        DataError: a file is missing or has another form, a label contradicts its folder, or too many videos
            are missing. ConfigError: there is no such fold.
    """
    root = existing_folder(root)
    _check_fold(fold)
    folder = find_first(root, ["ucfTrainTestlist", "annotations"]) or root
    videos = find_first(root, ["UCF-101", "UCF101", "videos"]) or root
    names = _ucf_classes(folder / "classInd.txt")
    lists = {
        split: _ucf_list(folder / f"{name}list{fold:02}.txt", names, videos)
        for split, name in (("train", "train"), ("val", "test"))
    }
    return splits_of_lists(lists, names, max_missing=max_missing)


def hmdb51_splits(root: str | Path, *, fold: int = 1, max_missing: float = 0.2) -> VideoSplits:
    """Index HMDB51: `<class>/*.avi` in `root` or `root/hmdb51_org`, and `<class>_test_split<fold>.txt` files.

    In those, 1 marks the videos to train on, 2 those to test on (the validation split), 0 neither. Labels are
    the positions of the sorted class names, as in torchvision.

    Raises:
        DataError: a file is missing or has another form, two of a class differ, or too many videos are
            missing. ConfigError: there is no such fold.
    """
    root = existing_folder(root)
    _check_fold(fold)
    names = ["testTrainMulti_7030_splits", "test_train_splits", "splits", "annotations"]
    folder = find_first(root, names) or root
    files = _hmdb_files(folder, f"_test_split{fold}.txt")
    classes = tuple(sorted(files))
    rows: dict[str, list[Row]] = {split: [] for split in _HMDB_SPLITS.values()}
    for label, name in enumerate(classes):
        file = files[name]
        for number, line in lines_of(file):
            video, _, mark = line.rpartition(" ")
            if not video or mark not in _HMDB_SPLITS:
                raise DataError(
                    f"{file}, line {number}: expected a file name and 0, 1 or 2, got {quoted(line)}"
                )
            rows[_HMDB_SPLITS[mark]].append(Row(number, f"{name}/{video.strip()}", label, file=file))
        if not rows["train"] or rows["train"][-1].label != label:
            raise DataError(f"{file} marks no video to train on; expected lines of a file name and 0, 1 or 2")
    videos = find_first(root, ["hmdb51_org", "videos", "hmdb51"]) or root
    source = folder / f"*_test_split{fold}.txt"
    lists = {split: VideoList(source, rows[split], base=videos) for split in ("train", "val")}
    return splits_of_lists(lists, classes, max_missing=max_missing)


def _check_fold(fold: int) -> None:
    if fold not in (1, 2, 3):
        raise ConfigError(f"fold is {fold}; there are 1, 2 and 3")


def _ucf_classes(file: Path) -> tuple[str, ...]:
    names: list[str] = []
    for number, line in lines_of(existing(file)):
        index, _, name = line.partition(" ")
        if index != str(len(names) + 1) or not name.strip():
            raise DataError(f"{file}, line {number}: expected `{len(names) + 1} <class>`, got {quoted(line)}")
        names.append(name.strip())
    return tuple(names)


def _ucf_list(file: Path, names: tuple[str, ...], videos: Path) -> VideoList:
    labels = {str(label): name for label, name in enumerate(names, start=1)}
    rows: list[Row] = []
    for number, line in lines_of(existing(file)):
        found = re.fullmatch(r"(.*\S)\s+(\d+)", line)  # of the training list; a name may have spaces
        path = line if found is None else found[1]
        name = os.path.dirname(path)  # noqa: PTH120 (a class, not a folder)
        if found is not None and labels.get(found[2].lstrip("0")) != name:
            raise DataError(
                f"{file}, line {number}: label {found[2][:20]} isn't {quoted(name)} in classInd.txt"
            )
        rows.append(Row(number, path, name))
    return VideoList(file, rows, base=videos)


def _hmdb_files(folder: Path, ending: str) -> dict[str, Path]:
    """The split file of each class."""
    files: dict[str, Path] = {}
    for file in sorted(folder.glob(f"**/*{ending}")):
        if file.name.startswith(".") or not file.is_file():  # macOS leaves such copies
            continue
        first = files.setdefault(file.name.removesuffix(ending), file)
        if first.read_bytes() != file.read_bytes():
            raise DataError(f"{first} and {file} split the same class in two ways; keep one of them")
    if not files:
        raise DataError(f"{folder} has no <class>{ending}")
    return files
