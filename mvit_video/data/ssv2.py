"""Something-Something v2: the official json files, with the .webm videos or with extracted frames."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from mvit_video.data.class_names import ClassNames, read_class_names
from mvit_video.data.decode.images import frame_pattern, image_files
from mvit_video.data.files import VIDEO_EXTENSIONS, existing, find_first, lines_of, names_in, quoted
from mvit_video.data.index import VideoSplits
from mvit_video.data.lists import Row, VideoList, entries_of, splits_of_lists
from mvit_video.errors import DataError, VideoError

_PREFIX = "something-something-v2-"
_NAMES = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}
_VIDEO_FOLDERS = ["20bn-something-something-v2", "videos", "frames", "rawframes"]


def ssv2_splits(
    root: str | Path,
    *,
    labels: str | Path | None = None,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    videos: str | Path | None = None,
    frame_lists: tuple[str | Path, str | Path] | None = None,
    class_names: ClassNames = "ssv2",
    max_missing: float = 0.2,
) -> VideoSplits:
    """Index a copy of Something-Something v2.

    Args:
        root: the folder of everything.
        labels, train, val, test: the official files; by default `labels.json`, `train.json`,
            `validation.json` and `test.json`, also with `something-something-v2-` in front, in `root`,
            `root/labels` or `root/annotations`. The test list has no labels.
        videos: the folder of `<id>.webm` (or another kind of video) or of folders `<id>/` of numbered
            pictures; by default `root/20bn-something-something-v2`, `videos`, `frames`,
            `rawframes` or `root`.
        frame_lists: PySlowFast's lists of training and validation frames (`original_vido_id video_id frame_id
            path labels`), relative to `root`; their paths start at `videos`, where that folder has them.
        class_names: used where there is no labels file.
        max_missing: how large a share of a list's videos may be missing; those of `test` may all be.

    Raises:
        DataError: a file is missing or has another form, a template is unknown, a video comes twice, or too
            many videos are missing.
    """
    root = existing(root, folder=True)
    labels_file = existing(labels) if labels is not None else _find(root, "labels")
    names = read_class_names(class_names if labels_file is None else labels_file)
    if videos is not None:
        folders = [existing(videos, folder=True)]
    else:
        folders = [*(root / name for name in _VIDEO_FOLDERS if (root / name).is_dir()), root]
    paths = _videos_in(folders[0]) if frame_lists is None else {}
    lists: dict[str, VideoList] = {}
    for split, given in {"train": train, "val": val, "test": test}.items():
        file = existing(given) if given is not None else _find(root, *_NAMES[split])
        if file is None and split != "test":
            raise DataError(f"{root} has no {_NAMES[split][0]}.json; give data.{split}=FILE")
        if file is None or (frame_lists is not None and split == "test"):
            continue  # PySlowFast has no frame list of the test videos
        if frame_lists is not None:
            paths = _frame_patterns(existing(root / frame_lists[split == "val"]), folders)
        lists[split] = _read(file, folders[0], paths, split)
        lists[split].optional = split == "test" and given is None
    return splits_of_lists(lists, names, max_missing=max_missing)


def _find(root: Path, *names: str) -> Path | None:
    files = [f"{prefix}{name}.json" for name in names for prefix in (_PREFIX, "")]
    return find_first(
        root, *(f"{folder}/{file}" for folder in (".", "labels", "annotations") for file in files)
    )


def _videos_in(folder: Path) -> dict[str, str]:
    """Id to path of the videos and the folders of frames in a folder."""
    found: dict[str, str] = {}
    for name in names_in(folder):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() in ("", *VIDEO_EXTENSIONS) and (suffix or stem not in found):
            found[stem] = os.path.join(folder, name)  # noqa: PTH118 (the video where there are also its frames)
    return found


def _read(file: Path, folder: Path, paths: dict[str, str], split: str) -> VideoList:
    expected = '{"id": ..., "template": ...}'
    rows: list[Row] = []
    for where, entry in entries_of(file, expected):
        match entry:
            case {"id": (str() | int()) as video, "template": str(template)}:
                label: str | None = template.replace("[", "").replace("]", "")
            case {"id": (str() | int()) as video} if split == "test":
                label = None
            case _:
                raise DataError(f"{where}: expected {expected}, got {quoted(entry)}")
        missing = os.path.join(folder, f"{video}.webm")  # noqa: PTH118
        rows.append(Row(where, paths.get(str(video), missing), label, str(video)))
    remedy = f"videos are looked for in {folder}: give data.videos=FOLDER"
    return VideoList(file, rows, base=Path(), remedy=remedy)


def _frame_patterns(file: Path, folders: list[Path]) -> dict[str, str]:
    """PySlowFast's list of frames: id to the path of its pictures, `folder/78687/78687_[000001-000042].jpg`.

    The paths start at the first of the folders that has the first picture.

    Raises:
        DataError: the list has another form, or the frames of a video are not numbered one after the other.
    """
    columns = "original_vido_id video_id frame_id path labels"
    lines = ((where, line.split()) for where, line in lines_of(file))
    if next(lines, ("", [""]))[1][0] != "original_vido_id":
        raise DataError(f"{file}: expected PySlowFast's `{columns}` in line 1")
    found: dict[str, str] = {}
    folder: Path | None = None
    for video, frames in groupby(lines, key=lambda line: line[1][0]):
        first = ""
        paths: list[str] = []
        for where, fields in frames:
            if len(fields) not in (4, 5):
                raise DataError(f"{where}: expected `{columns}`, got {quoted(' '.join(fields))}")
            first = first or where
            paths.append(fields[3])
        if video in found:
            raise DataError(f"{first}: frames of {quoted(video)} come again after those of others")
        pattern = frame_pattern(paths[0], paths[-1])
        if pattern is None or not _means(pattern, paths):
            listed = f"the {len(paths)} frames from {quoted(paths[0])} to {quoted(paths[-1])}"
            raise DataError(f"{first}: {listed} are not numbered one by one, rising")
        folder = folder or next((f for f in folders if (f / paths[0]).exists()), folders[0])
        found[video] = os.path.join(folder, pattern)  # noqa: PTH118
    if not found:
        raise DataError(f"{file}: it lists no frames")
    return found


def _means(pattern: str, paths: list[str]) -> bool:
    """Whether a pattern stands for these pictures in this order, and for no other."""
    with suppress(VideoError):
        return image_files(pattern) == paths
    return False
