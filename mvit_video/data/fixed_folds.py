"""UCF101 and HMDB51: a folder per class, and three official ways to split it."""

from __future__ import annotations

from pathlib import Path, PurePath

from mvit_video.data.files import existing, find_first, lines_of, quoted
from mvit_video.data.index import VideoSplits
from mvit_video.data.lists import Row, VideoList, read_csv, splits_of_lists
from mvit_video.errors import ConfigError, DataError

_HMDB_SPLITS: dict[int | str | None, str] = {1: "train", 2: "val", 0: "neither"}


def ucf101_splits(root: str | Path, *, fold: int = 1, max_missing: float = 0.2) -> VideoSplits:
    """Index UCF101: `root/UCF-101/<class>/*.avi` with `root/ucfTrainTestlist/` (or both in `root`).

    Labels are those of `classInd.txt`, from 0; the test list of the fold is the validation split.

    Raises:
        DataError: a file is missing or has another form, a label contradicts its folder, or too many videos
            are missing. ConfigError: there is no such fold.
    """
    root = existing(root, folder=True)
    _check_fold(fold)
    folder = find_first(root, "ucfTrainTestlist", "annotations") or root
    videos = find_first(root, "UCF-101", "UCF101", "videos") or root
    labels = _ucf_labels(existing(folder / "classInd.txt"))
    lists: dict[str, VideoList] = {}
    for split, prefix in (("train", "train"), ("val", "test")):
        rows: list[Row] = []
        file = existing(folder / f"{prefix}list{fold:02}.txt")
        for row in read_csv(file).rows:
            name = PurePath(row.path).parent.name
            if row.label not in (None, labels.get(name)):
                raise DataError(f"{row.where}: label {row.label} isn't {quoted(name)} in classInd.txt")
            rows.append(row._replace(label=name))
        lists[split] = VideoList(file, rows, base=videos)
    return splits_of_lists(lists, tuple(labels), max_missing=max_missing)


def _ucf_labels(file: Path) -> dict[str, int]:
    """Labels from 1, by class."""
    labels: dict[str, int] = {}
    for where, line in lines_of(file):
        index, _, name = (part.strip() for part in line.partition(" "))
        if index != str(len(labels) + 1) or not name or name in labels:
            raise DataError(f"{where}: expected `{len(labels) + 1} <class>`, got {quoted(line)}")
        labels[name] = int(index)
    return labels


def hmdb51_splits(root: str | Path, *, fold: int = 1, max_missing: float = 0.2) -> VideoSplits:
    """Index HMDB51: `<class>/*.avi` in `root` or `root/hmdb51_org`, and `<class>_test_split<fold>.txt` files.

    In those, 1 marks the videos to train on, 2 those to test on (the validation split), 0 neither. Labels are
    the positions of the sorted class names, as in torchvision.

    Raises:
        DataError: a file is missing or has another form, two of a class differ, or too many videos are
            missing. ConfigError: there is no such fold.
    """
    root = existing(root, folder=True)
    _check_fold(fold)
    folder = (
        find_first(root, "testTrainMulti_7030_splits", "test_train_splits", "splits", "annotations") or root
    )
    files = _hmdb_files(folder, f"_test_split{fold}.txt")
    classes = tuple(sorted(files))
    rows: dict[str, list[Row]] = {split: [] for split in _HMDB_SPLITS.values()}
    for label, name in enumerate(classes):
        for where, path, mark, _ in read_csv(files[name]).rows:
            if mark not in _HMDB_SPLITS:
                raise DataError(f"{where}: expected a file name and 0, 1 or 2, got {quoted(path)} {mark}")
            rows[_HMDB_SPLITS[mark]].append(Row(where, f"{name}/{path}", label))
        if not rows["train"] or rows["train"][-1].label != label:
            raise DataError(
                f"{files[name]} marks no video to train on; expected lines of a file name and 0, 1 or 2"
            )
    videos = find_first(root, "hmdb51_org", "videos", "hmdb51") or root
    source = folder / f"*_test_split{fold}.txt"
    lists = {split: VideoList(source, rows[split], base=videos) for split in ("train", "val")}
    return splits_of_lists(lists, classes, max_missing=max_missing)


def _check_fold(fold: int) -> None:
    if fold not in (1, 2, 3):
        raise ConfigError(f"fold is {fold}; there are 1, 2 and 3")


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
