"""Kinetics-400, -600 and -700 in the layouts that their copies have."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from mvit_video.data.class_names import ClassNames, read_class_names
from mvit_video.data.decode.images import entry_on_disk
from mvit_video.data.files import FileSearch, existing, existing_folder, lines_of, names_in, quoted
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
    root = existing_folder(root)
    names = read_class_names(class_names)
    given = {"train": train, "val": val, "test": test}
    lists = {
        split: existing(file) if file is not None else _find_list(root, split)
        for split, file in given.items()
    }
    if lists["train"] is None and lists["val"] is None:
        return _class_folders(root, names)
    found: dict[str, VideoList] = {}
    on_disk: dict[Clip, list[str]] | None = None
    for split, file in lists.items():
        if file is None and split != "test":
            raise DataError(f"{root} has no {split} list; give data.{split}=FILE ({_usual_names(split)})")
        if file is None:
            continue
        if columns := _columns(file):
            on_disk = _clips_below(root) if on_disk is None else on_disk
            found[split] = _read_official(file, columns, root, split, on_disk)
        else:
            found[split] = read_csv(file)
            found[split].base = _base_of(found[split], root, split)
    if "test" in found:  # its list comes with every copy, its videos seldom do
        found["test"].optional = test is None
    return splits_of_lists(found, names, max_missing=max_missing)


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
                files = [folder / name for name in names_in(folder) if pattern.fullmatch(name)]
                if len(files) > 1:
                    log.warning("%s: of %s the first is used", folder, ", ".join(f.name for f in files))
                if files:
                    return files[0]
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


def _columns(file: Path) -> list[str]:
    """The columns of an official csv, nothing for another list."""
    first = next(lines_of(file), None)
    columns = [] if first is None else [cell.lower() for cell in cells_of(file, *first)]
    return columns if "youtube_id" in columns else []


def _read_official(
    file: Path, columns: list[str], root: Path, split: str, on_disk: dict[Clip, list[str]]
) -> VideoList:
    rows: list[Row] = []
    folders = _SPLITS[split]
    for number, line in list(lines_of(file))[1:]:
        cells = cells_of(file, number, line)
        if len(cells) != len(columns):
            raise DataError(f"{file}, line {number}: expected {','.join(columns)}, got {quoted(line)}")
        values = dict(zip(columns, cells, strict=True))
        try:
            start, end = (_seconds(values[key]) for key in ("time_start", "time_end"))
        except (KeyError, ValueError):
            raise DataError(
                f"{file}, line {number}: expected youtube_id, time_start and time_end in seconds, "
                f"got {quoted(line)}"
            ) from None
        clip = Clip(values["youtube_id"], start, end)
        path = _choose(on_disk.get(clip, []), folders, root)
        path = path or os.path.join(root, folders[0], clip.name + ".mp4")  # noqa: PTH118 (speed)
        rows.append(Row(number, path, values.get("label") or None, clip.name))
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
