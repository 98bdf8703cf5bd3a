"""UCF101 and HMDB51: a folder per class, and three official ways to split it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mvit_video.data.files import existing_folder, find_first, read_text
from mvit_video.data.index import VideoIndex, VideoSplits
from mvit_video.data.lists import Row, VideoList, index_of_list
from mvit_video.errors import ConfigError, DataError

_HMDB_SPLIT = {"1": "train", "2": "val", "0": None}


def ucf101_splits(root: str | Path, *, fold: int = 1, max_missing: float = 0.2) -> VideoSplits:
    """Index UCF101: `root/UCF-101/<class>/*.avi` with `root/ucfTrainTestlist/` (or both in `root`).

    Labels are those of `classInd.txt`, from 0; the test list of the fold is the validation split.

    Raises:
        DataError: a file is missing or has another form, a label contradicts its folder, or too many videos
            are missing. ConfigError: there is no such fold.
    """
    root = existing_folder(root)
    _check_fold(fold)
    lists = find_first(root, ["ucfTrainTestlist", "annotations"]) or root
    videos = find_first(root, ["UCF-101", "UCF101", "videos"]) or root
    names = _class_index(lists / "classInd.txt")
    splits = [
        index_of_list(_ucf_list(lists / name, names), names, videos, max_missing=max_missing)
        for name in (f"trainlist{fold:02}.txt", f"testlist{fold:02}.txt")
    ]
    return VideoSplits(*splits)


def hmdb51_splits(root: str | Path, *, fold: int = 1, max_missing: float = 0.2) -> VideoSplits:
    """Index HMDB51: `<class>/*.avi` in `root` or `root/hmdb51_org`, and `<class>_test_split<fold>.txt` files.

    In those, 1 marks the videos to train on, 2 those to test on (the validation split), 0 neither.

    Raises:
        DataError: a file is missing or has another form, or too many videos are missing.
        ConfigError: there is no such fold.
    """
    root = existing_folder(root)
    _check_fold(fold)
    names = ["testTrainMulti_7030_splits", "test_train_splits", "splits", "annotations"]
    folder = find_first(root, names) or root
    files = sorted(folder.glob(f"**/*_test_split{fold}.txt"))
    if not files:
        raise DataError(f"{folder} has no <class>_test_split{fold}.txt")
    classes = tuple(file.name.removesuffix(f"_test_split{fold}.txt") for file in files)
    videos = find_first(root, ["hmdb51_org", "videos", "hmdb51"]) or root
    rows: dict[str, list[Row]] = {"train": [], "val": []}
    for label, file in enumerate(files):
        lines = read_text(file).splitlines()
        if not any(line.strip() for line in lines):
            raise DataError(f"{file} is empty; expected lines of a file name and 0, 1 or 2")
        for number, line in enumerate(lines, start=1):
            name, _, mark = line.strip().rpartition(" ")
            if not line.strip():
                continue
            if not name or mark not in _HMDB_SPLIT:
                raise DataError(f"{file}, line {number}: expected a file name and 0, 1 or 2, got {line!r}")
            split = _HMDB_SPLIT[mark]
            if split is not None:
                rows[split].append(Row(number, f"{classes[label]}/{name.strip()}", label))
    splits: list[VideoIndex] = [
        index_of_list(
            VideoList(folder / f"*_test_split{fold}.txt", rows[split]),
            classes,
            videos,
            max_missing=max_missing,
        )
        for split in ("train", "val")
    ]
    return VideoSplits(*splits)


def _check_fold(fold: int) -> None:
    if fold not in (1, 2, 3):
        raise ConfigError(f"fold is {fold}; there are 1, 2 and 3")


def _class_index(file: Path) -> tuple[str, ...]:
    names: list[str] = []
    for number, line in enumerate(_lines(file), start=1):
        found = re.fullmatch(r"(\d+)\s+(\S+)", line)
        if found is None or int(found[1]) != number:
            raise DataError(f"{file}, line {number}: expected `{number} <class>`, got {line!r}")
        names.append(found[2])
    return tuple(names)


def _ucf_list(file: Path, names: tuple[str, ...]) -> VideoList:
    rows: list[Row] = []
    for number, line in enumerate(_lines(file), start=1):
        path, *label = line.split()
        name = os.path.dirname(path)  # noqa: PTH120 (a class, not a folder)
        row = Row(number, path, name)
        if label and (not label[0].isdecimal() or names[int(label[0]) - 1 : int(label[0])] != (name,)):
            raise DataError(f"{file}, line {number}: label {label[0]} isn't {name!r} in classInd.txt")
        rows.append(row)
    return VideoList(file, rows)


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]
