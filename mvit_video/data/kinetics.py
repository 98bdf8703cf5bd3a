"""Kinetics-400, -600 and -700 in the layouts that their copies have."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mvit_video.data.class_names import ClassNames, read_class_names
from mvit_video.data.decode.images import entry_on_disk
from mvit_video.data.files import FileSearch, existing, lines_of, names_in, quoted
from mvit_video.data.index import VideoSplits, folder_splits, split_folder
from mvit_video.data.lists import Row, VideoList, cells_of, read_csv, splits_of_lists
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
    root = existing(root, folder=True)
    names = read_class_names(class_names)
    given = {"train": train, "val": val, "test": test}
    files = {
        split: existing(file) if file is not None else _find_list(root, split)
        for split, file in given.items()
    }
    if files["train"] is None and files["val"] is None:
        return _class_folders(root, names)
    clips_below = cache(_clips_below)
    lists: dict[str, VideoList] = {}
    for split, file in files.items():
        if file is not None:
            lists[split] = _read_official(file, root, split, clips_below) or _read_paths(file, root, split)
            # The test list comes with every copy, its videos seldom do.
            lists[split].optional = split == "test" and test is None
        elif split != "test":
            raise DataError(f"{root} has no {split} list; give data.{split}=FILE ({_usual_names(split)})")
    return splits_of_lists(lists, names, max_missing=max_missing)


def parse_clip_name(stem: str) -> Clip | None:
    """The clip that a file is named after, whether its times have zeros in front or not."""
    found = _CLIP_NAME.match(stem)
    return None if found is None else Clip(found["id"], int(found["start"]), int(found["end"]))


def _find_list(root: Path, split: str) -> Path | None:
    names = "|".join(_SPLITS[split])
    usual = rf"(k(inetics)?[-_]?\d*([-_]\d+)*[-_])?({names})(_list(_videos)?)?\.(csv|txt)"
    for folder in (root, root / "annotations", root / "lists", *sorted(root.glob("kinetics*"))):
        if folder.is_dir():
            files = [name for name in names_in(folder) if re.fullmatch(usual, name, re.IGNORECASE)]
            if len(files) > 1:
                log.warning("%s: of %s the first is used", folder, ", ".join(files))
            if files:
                return folder / files[0]
    return None


def _usual_names(split: str) -> str:
    return f"{split}.csv, kinetics400_{split}_list_videos.txt, in the root or its annotations/"


def _class_folders(root: Path, names: tuple[str, ...]) -> VideoSplits:
    train = split_folder(root, "train")
    if train is None or not any((train / name).is_dir() for name in names_in(train)):
        raise DataError(
            f"{root} has neither lists ({_usual_names('train')}) nor a folder per class in {root / 'train'}; "
            "give data.train=FILE and data.val=FILE"
        )
    return folder_splits(root, class_names=names)


# The official csv


def _read_official(
    file: Path, root: Path, split: str, clips_below: Callable[[Path], dict[Clip, list[str]]]
) -> VideoList | None:
    """None for another kind of list."""
    lines = lines_of(file)
    columns = [cell.lower() for cell in cells_of(*next(lines, ("", "-")))]
    if "youtube_id" not in columns:
        return None
    rows: list[Row] = []
    for where, line in lines:
        values = dict(zip(columns, cells := cells_of(where, line), strict=False))
        clip = None
        with suppress(KeyError, ValueError):
            clip = Clip(values["youtube_id"], _seconds(values["time_start"]), _seconds(values["time_end"]))
        if clip is None or len(cells) != len(columns):
            raise DataError(
                f"{where}: expected {','.join(columns)} with times in seconds, got {quoted(line)}"
            )
        path = _choose(clips_below(root).get(clip, []), split, root)
        path = path or os.path.join(root, split, clip.name + ".mp4")  # noqa: PTH118 (speed)
        rows.append(Row(where, path, values.get("label") or None, clip.name))
    remedy = f"videos are looked for below {root} by their names, <youtube id>_<start>_<end>.mp4"
    return VideoList(file, rows, base=Path(), remedy=remedy)


def _seconds(text: str) -> int:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ValueError(text)
    return int(value)


def _clips_below(root: Path) -> dict[Clip, list[str]]:
    found: dict[Clip, list[str]] = {}
    search = FileSearch()
    for path in search.below(root):
        clip = parse_clip_name(os.path.splitext(os.path.basename(path))[0])  # noqa: PTH119, PTH122 (speed)
        if clip is not None:
            found.setdefault(clip, []).append(path)
    search.report(root)
    return found


def _choose(paths: list[str], split: str, root: Path) -> str | None:
    """One of a clip's files: a replacement of a corrupted one first, then one in a folder of the split."""

    def rank(path: str) -> tuple[bool, bool, str]:
        parents = Path(path.removeprefix(str(root)).lower()).parts[:-1]
        replaced = any("replacement" in parent for parent in parents)
        of_split = any(name in parent for name in _SPLITS[split] for parent in parents)
        return not replaced, not of_split, path

    return min(paths, key=rank) if len(paths) > 1 else next(iter(paths), None)


# Lists of paths


def _read_paths(file: Path, root: Path, split: str) -> VideoList:
    """Relative paths start in the folder that has most of the first videos."""
    found = read_csv(file)
    first = [row.path for row in found.rows[:: max(len(found.rows) // 20, 1)]]
    names = [f"{prefix}{name}" for name in _SPLITS[split] for prefix in ("", "videos_", "rawframes_")]
    folders = [root, file.parent, *(root / name for name in names), root / "videos"]

    def there(folder: Path) -> int:
        return sum(Path(entry_on_disk(str(folder / path))).exists() for path in first)

    found.base = max(folders, key=there)
    return found
