"""Look at every video of a data set once: make its index file, say what is wrong, compare it with disks."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from itertools import chain
from multiprocessing.pool import ThreadPool
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mvit_video.data.decode import Decoder
from mvit_video.data.decode.images import entry_on_disk, is_images
from mvit_video.data.files import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, FileSearch
from mvit_video.data.index import LabelledVideo, VideoSplits
from mvit_video.data.lists import NO_FILE
from mvit_video.data.loader import ClipLoader
from mvit_video.data.probe import probe, settings, stat_of
from mvit_video.data.samplers import AllVideos
from mvit_video.data.table import SPLITS, Entry, FileInfo, Table, read_table, write_table
from mvit_video.errors import ConfigError, DataError
from mvit_video.io.console import track
from mvit_video.io.fingerprint import Fingerprint, differences
from mvit_video.io.writing import set_aside, sole_writer

log = logging.getLogger(__name__)

KINDS = ("missing", "corrupt", "duplicate", "label mismatch")
SAVE_EVERY_S = 20.0  # what a run has found out so far


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

    So is what an unfinished run has found out: it is saved beside the index again and again.

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
    if splits.multi_label:
        raise ConfigError("an index knows one class a video; with data.multi_label=true train from the lists")
    if file.exists() and not file.is_file():
        raise DataError(f"{file} is no file; name another: index=FILE")
    listed = list(_videos_of(splits))
    paths = list(dict.fromkeys(video.path for _, video in listed))
    decoder = Decoder("pyav", frame_rate=frame_rate, index_cache=index_cache)
    made_with = settings(frame_rate, index_cache)
    place = None if root is None else str(root.absolute())
    unfinished = file.with_name(file.name + ".unfinished")

    def save(to: Path, unlisted: Sequence[str] = ()) -> Table:
        entries = [Entry(split, video, info[video.path]) for split, video in listed if video.path in info]
        table = Table(entries, splits.class_names, place, tuple(unlisted), made_with)
        write_table(to, table)
        return table

    try:
        with sole_writer(file):
            known = _read_known(file, made_with) | _read_unfinished(unfinished, made_with)
            info, todo = _sort_out(paths, known)
            log.info("%d videos: %d to read, %d known or missing", len(paths), len(todo), len(info))
            _read_all(todo, decoder, num_workers, info, save=lambda: save(unfinished))
            table = save(file, _unlisted(place, info))
            unfinished.unlink(missing_ok=True)
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
        if not info.sha256 or (other := first.setdefault(info.sha256, entry)) is entry:
            continue
        same = f"{other.split} {other.video.id}"
        problems.append(Problem("duplicate", split, video.id, video.path, f"the same content as {same}"))
        labels = (video.labels, other.video.labels)
        if all(labels) and labels[0] != labels[1]:
            mine, theirs = (table.class_names[label] for (label,) in labels)
            detail = f"{mine!r} here, {theirs!r} in {same}"
            problems.append(Problem("label mismatch", split, video.id, video.path, detail))
    return problems


def summary(table: Table, problems: Sequence[Problem]) -> dict[str, Any]:
    """Counts for people and programs: splits, classes, durations in seconds, codecs, problems."""
    usable = [entry for entry in table.entries if entry.info.error is None]
    splits = [split for split in SPLITS if any(entry.split == split for entry in table.entries)]
    seconds = sorted(entry.info.duration for entry in usable)
    to_mend = Counter((problem.split, problem.kind) for problem in problems)
    per_class = Counter((entry.split, entry.video.label) for entry in usable)
    found: dict[str, Any] = {"videos": len(table.entries), "splits": {}}
    for split in splits:
        durations = [entry.info.duration for entry in usable if entry.split == split]
        kinds = {kind: to_mend[split, kind] for kind in KINDS}
        found["splits"][split] = {"videos": len(durations), "hours": sum(durations) / 3600, **kinds}
    found["classes"] = {
        name: {split: per_class[split, label] for split in splits}
        for label, name in enumerate(table.class_names)
    }
    found["without_label"] = sum(entry.video.label is None for entry in usable)
    found["seconds"] = {}
    if seconds:
        found["seconds"] = {"shortest": seconds[0], "median": median(seconds), "longest": seconds[-1]}
    found["codecs"] = dict(Counter(entry.info.codec for entry in usable).most_common())
    found["unlisted_files"] = len(table.unlisted)
    return found


def compare(table: Table) -> Changes:
    """How the disk differs from an index; of the files only those are opened that couldn't be read before."""
    info = {entry.video.path: entry.info for entry in table.entries}
    changes = Changes([], [], [], sorted(set(_unlisted(table.root, info)) - set(table.unlisted)))
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


class _Probes:
    """What files turn out to be, as samples of a loader."""

    sample_nbytes = 0

    def __init__(self, paths: list[str], decoder: Decoder) -> None:
        self.paths = paths
        self.open_file: Callable[[str], Any] = decoder

    def __getitem__(self, index: int) -> tuple[str, FileInfo]:
        return self.paths[index], probe(self.paths[index], self.open_file)


def _read_all(
    paths: list[str],
    decoder: Decoder,
    num_workers: int,
    info: dict[str, FileInfo],
    save: Callable[[], object],
) -> None:
    """Add what the files turn out to be to ``info``, saved from time to time and where something ends it."""
    workers, one_by_one = min(num_workers, len(paths)), AllVideos(len(paths), 1)
    loader: ClipLoader[tuple[str, FileInfo]] = ClipLoader(
        _Probes(paths, decoder), one_by_one, itemgetter(0), num_workers=workers, worker_type="process"
    )
    saved = time.monotonic()
    try:
        with closing(loader):
            for path, found in track(loader, len(paths), what="reading"):
                info[path] = found
                if time.monotonic() > saved + SAVE_EVERY_S:
                    save()
                    saved = time.monotonic()
    except BaseException:
        save()
        raise


# What former runs have found out


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


def _read_unfinished(file: Path, made_with: Fingerprint) -> dict[str, FileInfo]:
    try:
        known = _read_known(file, made_with)
    except DataError:
        set_aside(file, "this isn't what an unfinished run leaves")
        return {}
    if known:
        log.info("resuming an unfinished run: %d videos are done", len(known))
    return known


def _read_known(file: Path, made_with: Fingerprint) -> dict[str, FileInfo]:
    """Those descriptions of an index that hold with these settings and libraries.

    What other libraries have read well is kept; what couldn't be read is tried again: permissions, disks and
    libraries get better.
    """
    if not file.is_file():
        return {}
    table = read_table(file)
    changed = differences(table.made_with, made_with)
    if table.entries and changed:
        listed = "; ".join(f"{key} {change}" for key, change in changed.items())
        log.warning("%s was made with others: %s", file, listed)
    if "probe" in changed or ("index_cache" in changed and made_with["index_cache"]):
        return {}
    return {
        video.path: info
        for _, video, info in table.entries
        if info.error is None
        and not (
            "frame_rate" in changed and (entry_on_disk(video.path) != video.path or is_images(video.path))
        )
    }
