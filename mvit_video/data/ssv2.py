"""Something-Something v2: the official json files, with the .webm videos or with extracted frames."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mvit_video.data.class_names import ClassNames, read_class_names
from mvit_video.data.decode.stills import entry_on_disk, run_of_pictures
from mvit_video.data.files import VIDEO_EXTENSIONS, existing, existing_folder, find_first, parse_json
from mvit_video.data.index import NothingThereError, VideoIndex, VideoSplits, leave_out
from mvit_video.data.lists import NO_FILE, Row, VideoList, existing_paths, index_of_rows
from mvit_video.errors import DataError

log = logging.getLogger(__name__)

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
    root = existing_folder(root)
    labels_file = existing(labels) if labels is not None else _find(root, ("labels",))
    names = read_class_names(class_names if labels_file is None else labels_file)
    if videos is not None:
        folders = [existing_folder(videos)]
    else:
        folders = [root / name for name in _VIDEO_FOLDERS if (root / name).is_dir()] + [root]
    there = None if frame_lists is not None else _entries(folders[0])
    found: dict[str, VideoIndex] = {}
    for split, given in {"train": train, "val": val, "test": test}.items():
        file = existing(given) if given is not None else _find(root, _NAMES[split])
        if file is None and split == "test":
            continue
        if file is None:
            raise DataError(f"{root} has no {_NAMES[split][0]}.json; give data.{split}=FILE")
        if frame_lists is not None and split == "test":
            continue  # PySlowFast has no frame list for it
        if frame_lists is not None:
            there = _runs(existing(root / frame_lists[split == "val"]), folders)
        try:
            found[split] = _index(
                file, names, folders[0], there or {}, 1.0 if split == "test" else max_missing, split
            )
        except NothingThereError as error:
            if split != "test" or given is not None:
                raise
            log.info("no test split: %s", error)
    return VideoSplits(found["train"], found["val"], found.get("test"))


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    files = [f"{prefix}{name}.json" for name in names for prefix in (_PREFIX, "")]
    folders = (root, root / "labels", root / "annotations")
    return next((found for folder in folders if (found := find_first(folder, files))), None)


def _entries(folder: Path) -> dict[str, str]:
    """Id to path of the videos and the folders of frames in a folder."""
    found: dict[str, str] = {}
    for name in os.listdir(folder):  # noqa: PTH208 (220,000 names)
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if not suffix or suffix.lower() in VIDEO_EXTENSIONS:
            path = os.path.join(folder, name)  # noqa: PTH118
            if suffix or stem not in found:  # the video where there are also its frames
                found[stem] = path
    return found


def _index(
    file: Path,
    names: tuple[str, ...],
    folder: Path,
    paths: dict[str, str],
    max_missing: float,
    split: str,
) -> VideoIndex:
    entries = parse_json(file)
    if not isinstance(entries, list):
        raise DataError(f'{file}: expected a list of {{"id": ..., "template": ...}}')
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for number, entry in enumerate(entries, start=1):
        match entry:
            case {"id": (str() | int()) as video, "template": str(template)}:
                label: str | None = template.replace("[", "").replace("]", "")
            case {"id": (str() | int()) as video} if split == "test":
                label = None
            case _:
                raise DataError(
                    f'{file}, entry {number}: expected {{"id": ..., "template": ...}}, got {entry!r}'
                )
        video = str(video)
        if video not in paths:
            missing[video] = NO_FILE
        rows.append(Row(number, paths.get(video, os.path.join(folder, f"{video}.webm")), label, video))  # noqa: PTH118
    index = index_of_rows(VideoList(file, rows, "entry"), names, labels=split != "test")
    remedy = f"videos are looked for in {folder}: give data.videos=FOLDER"
    return leave_out(index, missing, source=file, max_missing=max_missing, remedy=remedy)


# PySlowFast's lists of frames


def _runs(file: Path, folders: list[Path]) -> dict[str, str]:
    """Id to the path of its pictures, `folder/78687/78687_[000001-000042].jpg`, of the videos that exist.

    The paths start at the first of the folders that has the first picture.

    Raises:
        DataError: the frames of a video are not numbered one after the other.
    """
    found: dict[str, str] = {}
    first: list[str] = []  # id, path and line of a video's first frame
    last, count = "", 0
    folder = folders[0]
    for number, video, path in _frames(file):
        if not first:
            folder = next((folder for folder in folders if (folder / path).exists()), folder)
        if first and video == first[0]:
            if (len(path), path) <= (len(last), last):
                raise DataError(f"{file}, line {number}: {path} comes after {last}; expected rising numbers")
            last, count = path, count + 1
            continue
        if first:
            found[first[0]] = _run(file, folder, first, last, count)
        if video in found:
            raise DataError(
                f"{file}, line {number}: frames of {video} come again after those of other videos"
            )
        first, last, count = [video, path, str(number)], path, 1
    if not first:
        raise DataError(f"{file}: it lists no frames")
    found[first[0]] = _run(file, folder, first, last, count)
    there = existing_paths(entry_on_disk(path) for path in found.values())
    return {video: path for video, path in found.items() if entry_on_disk(path) in there}


def _frames(file: Path) -> Iterator[tuple[int, str, str]]:
    with file.open(encoding="utf-8-sig") as lines:  # gigabytes: never read as a whole
        if not next(lines, "").startswith("original_vido_id"):
            raise DataError(
                f"{file}: expected PySlowFast's `original_vido_id video_id frame_id path labels` in line 1"
            )
        for number, line in enumerate(lines, start=2):
            fields = line.split()
            if not fields:
                continue
            if len(fields) not in (4, 5):
                raise DataError(
                    f"{file}, line {number}: expected original_vido_id, video_id, frame_id, path and labels, "
                    f"got {line.rstrip()!r}"
                )
            yield number, fields[0], fields[3]


def _run(file: Path, folder: Path, first: list[str], last: str, count: int) -> str:
    video, path, line = first
    run = run_of_pictures(path, last)
    if run is not None:
        start, end = run.rpartition("[")[2].partition("]")[0].split("-")
        if int(end) - int(start) + 1 != count:
            run = None
    if run is None:
        raise DataError(
            f"{file}, line {line}: the {count} frames of {video} from {path} to {last} "
            "are not numbered one by one"
        )
    return os.path.join(folder, run)  # noqa: PTH118
