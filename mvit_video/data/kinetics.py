"""Kinetics-400, -600 and -700 in the layouts that their copies have."""

from __future__ import annotations

import csv
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from mvit_video.data.class_names import ClassNames, read_class_names
from mvit_video.data.decode.stills import entry_on_disk
from mvit_video.data.files import VIDEO_EXTENSIONS, existing, existing_folder, find_first, read_text
from mvit_video.data.index import (
    NothingThereError,
    VideoIndex,
    VideoSplits,
    files_below,
    folder_splits,
    leave_out,
)
from mvit_video.data.lists import NO_FILE, Row, VideoList, index_of_list, index_of_rows, read_csv
from mvit_video.errors import DataError

log = logging.getLogger(__name__)

_SPLITS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
# <youtube id>_<start>_<end>; an id may contain underscores
_CLIP_NAME = re.compile(r"(?P<id>.+)_(?P<start>\d+)_(?P<end>\d+)$")


class Clip(NamedTuple):
    """A stretch of a YouTube video, in seconds."""

    youtube_id: str
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.youtube_id}_{self.start:06}_{self.end:06}"


def kinetics_splits(
    root: str | Path,
    *,
    class_names: ClassNames,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    max_missing: float = 0.2,
) -> VideoSplits:
    """Index a copy of Kinetics.

    Lists are the official csv (`label,youtube_id,time_start,time_end,split`, without labels for a hidden
    test), PySlowFast's (`path label` or `path,label`) or mmaction2's. The official csv finds its videos
    anywhere below `root` by their names, `<id>_<start>_<end>.mp4` with or without zeros in front; the others
    say where they are, from `root`, the folder of the list, or the folder of their split. Without lists the
    folders are taken: `train/<class>/`, `val/<class>/`, `test/`.

    Args:
        root: the folder of everything.
        class_names: in label order, or where to find them (`read_class_names`).
        train, val, test: the lists; by default the usual names in `root` or `root/annotations`.
        max_missing: how large a share of a list's videos may be missing; many are gone from YouTube. Those of
            `test` may all be.

    Raises:
        DataError: no list and no class folders, or as `csv_splits`.
    """
    root = existing_folder(root)
    names = read_class_names(class_names)
    given = {"train": train, "val": val, "test": test}
    lists = {
        split: existing(file) if file is not None else _find_list(root, split)
        for split, file in given.items()
    }
    if lists["train"] is None and lists["val"] is None:
        return _class_folders(root, names)
    for split in ("train", "val"):
        if lists[split] is None:
            raise DataError(f"{root} has no {split} list; give data.{split}=FILE ({_usual_names(split)})")
    official = [file for file in lists.values() if file is not None and _columns(file)]
    on_disk = _clips_below(root) if official else {}
    found: dict[str, VideoIndex] = {}
    for split, file in lists.items():
        if file is None:
            continue
        share = 1.0 if split == "test" else max_missing
        labels = split != "test"
        try:
            if file in official:
                found[split] = _official(file, names, root, split, on_disk, share, labels)
            else:
                video_list = read_csv(file)
                base = _base_of(video_list, root, split)
                found[split] = index_of_list(video_list, names, base, max_missing=share, labels=labels)
        except NothingThereError as error:
            # A list of the test videos comes with every copy, the videos themselves seldom do.
            if split != "test" or given["test"] is not None:
                raise
            log.info("no test split: %s", error)
    return VideoSplits(found["train"], found["val"], found.get("test"))


def parse_clip_name(stem: str) -> Clip | None:
    """The clip that a file is named after, whether its times have zeros in front or not."""
    found = _CLIP_NAME.match(stem)
    return None if found is None else Clip(found["id"], int(found["start"]), int(found["end"]))


def _find_list(root: Path, split: str) -> Path | None:
    for name in _SPLITS[split]:
        pattern = re.compile(
            rf"(k(inetics)?[-_]?\d*([-_]\d+)*[-_])?{name}(_list(_videos)?)?\.(csv|txt)", re.IGNORECASE
        )
        for folder in (root, root / "annotations", root / "lists", *sorted(root.glob("kinetics*"))):
            if folder.is_dir():
                files = sorted(entry for entry in folder.iterdir() if pattern.fullmatch(entry.name))
                if files:
                    return files[0]
    return None


def _usual_names(split: str) -> str:
    return f"{split}.csv, kinetics400_{split}_list_videos.txt, in the root or its annotations/"


def _class_folders(root: Path, names: tuple[str, ...]) -> VideoSplits:
    train = find_first(root, ["train"])
    if train is None or not any(entry.is_dir() for entry in train.iterdir()):
        raise DataError(
            f"{root} has neither lists ({_usual_names('train')}) nor a folder per class in {root / 'train'}; "
            "give data.train=FILE and data.val=FILE"
        )
    return folder_splits(root, class_names=names)


# The official csv


def _columns(file: Path) -> list[str]:
    """The columns of an official csv, nothing for another list."""
    first = read_text(file).partition("\n")[0].strip().lower().replace(" ", "")
    columns = [column.strip('"') for column in first.split(",")]
    return columns if "youtube_id" in columns else []


def _official(
    file: Path,
    names: tuple[str, ...],
    root: Path,
    split: str,
    on_disk: dict[Clip, list[str]],
    max_missing: float,
    labels: bool,
) -> VideoIndex:
    rows: list[Row] = []
    missing: dict[str, str] = {}
    folders = _SPLITS[split]
    columns = _columns(file)
    lines = csv.reader(read_text(file).splitlines())
    next(lines)  # the header
    for fields in lines:
        if not "".join(fields).strip():
            continue
        number = lines.line_num
        if len(fields) != len(columns):
            raise DataError(f"{file}, line {number}: expected {','.join(columns)}, got {','.join(fields)!r}")
        values = dict(zip(columns, fields, strict=True))
        try:
            times = [int(float(values[key])) for key in ("time_start", "time_end")]
            clip = Clip(values["youtube_id"].strip(), *times)
        except (KeyError, ValueError):
            raise DataError(
                f"{file}, line {number}: expected youtube_id, time_start and time_end in seconds, "
                f"got {','.join(fields)!r}"
            ) from None
        path = _choose(on_disk.get(clip, []), folders, root)
        if path is None:
            path = os.path.join(root, folders[0], clip.name + ".mp4")  # noqa: PTH118 (speed)
            missing[clip.name] = NO_FILE
        rows.append(Row(number, path, values.get("label", "").strip() or None, clip.name))
    index = index_of_rows(VideoList(file, rows), names, labels=labels)
    remedy = f"videos are looked for below {root} by their names, <youtube id>_<start>_<end>.mp4"
    return leave_out(index, missing, source=file, max_missing=max_missing, remedy=remedy)


def _clips_below(root: Path) -> dict[Clip, list[str]]:
    found: dict[Clip, list[str]] = {}
    for path in files_below(root, VIDEO_EXTENSIONS):
        clip = parse_clip_name(os.path.splitext(os.path.basename(path))[0])  # noqa: PTH119, PTH122 (speed)
        if clip is not None:
            found.setdefault(clip, []).append(path)
    return found


def _choose(paths: list[str], folders: tuple[str, ...], root: Path) -> str | None:
    """One of a clip's files: a replacement of a corrupted one first, then one in a folder of the split."""

    def rank(path: str) -> tuple[bool, bool, str]:
        parents = Path(path.removeprefix(str(root)).lower()).parts[:-1]
        replaced = any("replacement" in parent for parent in parents)
        of_split = any(name in parent for name in folders for parent in parents)
        return not replaced, not of_split, path

    return min(paths, key=rank) if len(paths) > 1 else next(iter(paths), None)


# Lists of paths


def _base_of(video_list: VideoList, root: Path, split: str) -> Path:
    """Where relative paths start: the folder in which most of the first videos are."""
    first = [row.path for row in video_list.rows[:: max(len(video_list.rows) // 20, 1)]]
    folders = [root, video_list.file.parent]
    folders += [
        root / f"{prefix}{name}" for name in _SPLITS[split] for prefix in ("", "videos_", "rawframes_")
    ]
    folders += [root / "videos"]

    def there(folder: Path) -> int:
        return sum(Path(entry_on_disk(str(folder / path))).exists() for path in first)

    return max(folders, key=there)
