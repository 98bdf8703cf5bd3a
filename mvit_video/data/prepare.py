"""Look at every video of a data set once: make its index file, say what is wrong, compare it with disks."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from mvit_video.data.decode.images import entry_on_disk, is_images
from mvit_video.data.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, FileSearch
from mvit_video.data.index import LabelledVideo, VideoSplits
from mvit_video.data.lists import NO_FILE
from mvit_video.data.probe import probe, settings, stat_of
from mvit_video.data.table import SPLITS, Entry, FileInfo, Table, read_table, write_table
from mvit_video.errors import DataError
from mvit_video.io.console import track
from mvit_video.io.fingerprint import Fingerprint, differences
from mvit_video.io.writing import replacing, set_aside, sole_writer

log = logging.getLogger(__name__)

KINDS = ("missing", "corrupt", "duplicate", "label mismatch")


class Problem(NamedTuple):
    """Something to mend, of one of the `KINDS`."""

    kind: str
    split: str
    id: str
    path: str
    detail: str


class Changes(NamedTuple):
    """How a disk differs from an index, as paths."""

    missing: list[str]
    changed: list[str]
    returned: list[str]  # were missing or unreadable
    new: list[str]


def prepare(
    splits: VideoSplits,
    file: Path,
    *,
    root: Path | None,
    num_workers: int,
    frame_rate: float = 30.0,
    index_cache: str | None = None,
) -> Table:
    """Probe all videos and write the index file; what an earlier run has found out is kept.

    Finished videos are noted beside the index as they are done: a run that was killed goes on where it was.

    Args:
        file: the index to write, or to bring up to date: only files are read whose size or time changed, that
            couldn't be read before, or that other settings describe otherwise.
        root: the folder of the data set, to find files that it doesn't name.
        num_workers: processes that read videos; 0 reads them in this one.
        frame_rate: of folders of pictures.
        index_cache: folder that keeps where each video's frames are, for `decoder.index_cache` of later runs.

    Raises:
        DataError: an older index can't be read, the new one can't be written, or a process died.
        ConfigError: another run is writing the same index.
    """
    if file.exists() and not file.is_file():
        raise DataError(f"{file} is no file; name another: index=FILE")
    listed = list(_videos_of(splits))
    paths = list(dict.fromkeys(video.path for _, video in listed))
    made_with = settings(frame_rate, index_cache)
    look = partial(probe, frame_rate=frame_rate, index_cache=index_cache)
    journal = file.with_name(file.name + ".unfinished")
    try:
        with sole_writer(file):
            known = _read_known(file, made_with) | _read_journal(journal, made_with)
            info, todo = _sort_out(paths, known)
            log.info("%d videos: %d to read, %d known or missing", len(paths), len(todo), len(info))
            with replacing(journal, "w") as notes:
                notes.write(json.dumps({"made_with": made_with}) + "\n")
                notes.writelines(json.dumps([path, *values]) + "\n" for path, values in info.items())
            # No line is synced: what a power loss takes is read again.
            with journal.open("a", encoding="utf-8", buffering=1) as notes:
                found = _probe_all(todo, num_workers, look)
                for path, new in track(found, len(todo), done=0, what="reading"):
                    info[path] = new
                    notes.write(json.dumps([path, *new]) + "\n")
            entries = [Entry(split, video, info[video.path]) for split, video in listed]
            place = None if root is None else str(root.absolute())
            table = Table(entries, splits.class_names, place, tuple(_unlisted(place, info)), made_with)
            write_table(file, table)
            journal.unlink()
    except OSError as error:
        raise DataError(f"{file} can't be written ({error}); choose another place: index=FILE") from None
    return table


def find_problems(table: Table) -> list[Problem]:
    """Missing and corrupt files; content that comes twice, and that has two labels."""
    problems: list[Problem] = []
    first: dict[str, Entry] = {}
    for entry in table.entries:
        split, video, info = entry
        if info.error is not None:
            kind = "missing" if info.error == NO_FILE else "corrupt"
            problems.append(Problem(kind, split, video.id, video.path, info.error))
        if not info.sha256:
            continue
        other = first.setdefault(info.sha256, entry)
        if other is entry:
            continue
        same = f"{other.split} {other.video.id}"
        problems.append(Problem("duplicate", split, video.id, video.path, f"the same content as {same}"))
        labels = (video.label, other.video.label)
        if None not in labels and labels[0] != labels[1]:
            mine, theirs = (table.class_names[label] for label in labels if label is not None)
            detail = f"{mine!r} here, {theirs!r} in {same}"
            problems.append(Problem("label mismatch", split, video.id, video.path, detail))
    return problems


def summary(table: Table, problems: Sequence[Problem]) -> dict[str, Any]:
    """Counts for people and programs: splits, classes, durations in seconds, codecs, problems."""
    usable = [entry for entry in table.entries if entry.info.error is None]
    splits = [split for split in SPLITS if any(entry.split == split for entry in table.entries)]
    durations = {split: [e.info.duration for e in usable if e.split == split] for split in splits}
    seconds = sorted(chain.from_iterable(durations.values()))
    to_mend = Counter((problem.split, problem.kind) for problem in problems)
    per_class = Counter((entry.split, entry.video.label) for entry in usable)
    return {
        "videos": len(table.entries),
        "splits": {
            split: {
                "videos": len(durations[split]),
                "hours": sum(durations[split]) / 3600,
                **{kind: to_mend[split, kind] for kind in KINDS},
            }
            for split in splits
        },
        "classes": {
            name: {split: per_class[split, label] for split in splits}
            for label, name in enumerate(table.class_names)
        },
        "without_label": sum(entry.video.label is None for entry in usable),
        "seconds": {"shortest": seconds[0], "median": median(seconds), "longest": seconds[-1]}
        if seconds
        else {},
        "codecs": dict(Counter(entry.info.codec for entry in usable).most_common()),
        "unlisted_files": len(table.unlisted),
    }


def compare(table: Table) -> Changes:
    """How the disk differs from an index; of the files only those are opened that couldn't be read before."""
    info = {entry.video.path: entry.info for entry in table.entries}
    changes = Changes([], [], [], [])
    for (path, old), now in zip(info.items(), _stats(list(info)), strict=True):
        if now.error is not None:
            if old.error != now.error:
                changes.missing.append(path)
        elif old.error == NO_FILE:
            changes.returned.append(path)
        elif (now.size, now.mtime_ns) != (old.size, old.mtime_ns):
            changes.changed.append(path)
        elif old.error is not None and probe(path).error is None:
            changes.returned.append(path)
    changes.new.extend(sorted(set(_unlisted(table.root, info)) - set(table.unlisted)))
    return changes


def _videos_of(splits: VideoSplits) -> Iterator[tuple[str, LabelledVideo]]:
    """Split and video, with an absolute path, also of those that were left out."""
    for split in SPLITS:
        index = getattr(splits, split)
        for video in chain(index.videos, (out.video for out in index.left_out)) if index else ():
            yield split, LabelledVideo(os.path.abspath(video.path), video.label, video.id)  # noqa: PTH100


def _stats(paths: list[str]) -> list[FileInfo]:
    """Size and time of each path; many at once, for network disks."""
    with ThreadPool(16) as pool:
        return pool.map(stat_of, paths, chunksize=1000)


def _unlisted(root: str | None, named: Collection[str]) -> list[str]:
    """Files below the root of the kinds that the data set has, and that it doesn't name."""
    if root is None or not Path(root).is_dir():
        return []
    files = [path.lower() for path in named if entry_on_disk(path) == path]
    kinds = [kind for kind in (VIDEO_EXTENSIONS, IMAGE_EXTENSIONS) if any(f.endswith(kind) for f in files)]
    found = FileSearch(tuple(chain.from_iterable(kinds))).below(root) if kinds else []
    return [path for path in found if path not in named]


def _sort_out(paths: list[str], known: dict[str, FileInfo]) -> tuple[dict[str, FileInfo], list[str]]:
    """What is known of the files or that they are missing, and the files that have to be read."""
    info: dict[str, FileInfo] = {}
    todo: list[str] = []
    for path, now in zip(paths, _stats(paths), strict=True):
        old = known.get(path)
        if now.error is not None:
            info[path] = now
        elif old is not None and (old.size, old.mtime_ns) == (now.size, now.mtime_ns):
            info[path] = old
        else:
            todo.append(path)
    return info, todo


def _probe_all(
    paths: list[str], num_workers: int, look: Callable[[str], FileInfo]
) -> Iterator[tuple[str, FileInfo]]:
    # What collates runs where the sample is made: in a worker.
    workers = min(num_workers, len(paths))
    loader = DataLoader[Any](paths, batch_size=None, collate_fn=look, num_workers=workers)  # type: ignore[arg-type]
    try:
        yield from zip(paths, loader, strict=True)
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise DataError(
            "a process that read videos died: too little memory, or a file that crashes FFmpeg. "
            "What is done is kept; num_workers=0 stops at the file"
        ) from None


# What former runs have found out


def _read_known(file: Path, made_with: Fingerprint) -> dict[str, FileInfo]:
    """What the index has that still holds."""
    if not file.is_file():
        return {}
    table = read_table(file)
    known = {entry.video.path: entry.info for entry in table.entries}
    return _still_true(known, table.made_with, made_with, file)


def _read_journal(file: Path, made_with: Fingerprint) -> dict[str, FileInfo]:
    """What a killed run has noted, as far as it still holds; its last line may be torn."""
    if not file.is_file():
        return {}
    known: dict[str, FileInfo] = {}
    try:
        first, *lines = file.read_bytes().splitlines()
        before = dict(json.loads(first)["made_with"])
        for line in lines:
            with suppress(ValueError):  # a torn line
                path, *values = json.loads(line)
                known[path] = FileInfo(*values)
    except (ValueError, TypeError, LookupError, RecursionError):
        set_aside(file, "this isn't what an unfinished run leaves")
        return {}
    known = _still_true(known, before, made_with, file)
    log.info("resuming an unfinished run: %d videos are done", len(known))
    return known


def _still_true(
    known: dict[str, FileInfo], before: Fingerprint, made_with: Fingerprint, file: Path
) -> dict[str, FileInfo]:
    """Those of the files whose description holds with other settings and libraries than before.

    What other libraries have read well is kept; what couldn't be read is tried again: permissions, disks and
    libraries get better.
    """
    changed = differences(before, made_with)
    if known and changed:
        listed = "; ".join(f"{key} {change}" for key, change in changed.items())
        log.warning("%s was made with others: %s", file, listed)
    if "probe" in changed or ("index_cache" in changed and made_with["index_cache"]):
        return {}
    return {
        path: info
        for path, info in known.items()
        if info.error is None
        and not ("frame_rate" in changed and (entry_on_disk(path) != path or is_images(path)))
    }
