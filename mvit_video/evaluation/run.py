"""One evaluation of a data set: shared by several processes, and resumed where a killed one has ended."""

from __future__ import annotations

import base64
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.datasets import (
    BadVideo,
    OpenVideo,
    VideoViews,
    ViewDataset,
    in_full_batches,
    validation_loader,
)
from mvit_video.data.decode import FREE_KEYS, open_video
from mvit_video.data.index import LabelledVideo, VideoIndex
from mvit_video.data.loader import WORKER_TYPES
from mvit_video.data.pixels import finish_clips
from mvit_video.data.probe import stat_of
from mvit_video.data.ranks import Ranks
from mvit_video.data.timing import stage
from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.classes import map_classes
from mvit_video.evaluation.provenance import identity
from mvit_video.evaluation.scores import Combination, ScoreTable, combine
from mvit_video.io.console import csv_cell, track
from mvit_video.io.fingerprint import Fingerprint, read_fingerprint, require_same, write_fingerprint
from mvit_video.io.journal import Entry, journal, read_journal
from mvit_video.io.writing import keep_former
from mvit_video.model import VideoModel

log = logging.getLogger(__name__)

_RESULTS = ("results.json", "scores.parquet", "detections.json", "detections.csv")
_UNFINISHED = "unfinished"  # folder that a killed evaluation leaves: its identity, each process's journal
_FREE = ("data.max_missing", *FREE_KEYS)  # which videos can be read, not what they give


def output_folder(resume: str | None, output: Path) -> Path:
    """Where results go: ``output``, or the folder that ``resume`` names ("last": the newest unfinished).

    Raises:
        ConfigError: no evaluation there is unfinished.
    """
    if resume is None:
        return output
    if resume == "last":
        runs = output.parents[1]
        found = sorted(runs.glob(f"*/*/{_UNFINISHED}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(f"resume=last: no evaluation below {runs} is unfinished")
        return found[-1].parent
    if not (Path(resume) / _UNFINISHED).is_dir():
        raise ConfigError(f"resume={resume}: no evaluation there is unfinished (there is no {_UNFINISHED}/)")
    return Path(resume)


class Outcome(NamedTuple):
    """What an evaluation has come to: an entry for each file that could be read, and the others by path."""

    entries: list[Entry]
    bad: Mapping[str, BadVideo]


def resumable(
    output: Path,
    work: Fingerprint,
    describe: Callable[[], Mapping[Any, Fingerprint]],
    score: Callable[[Sequence[Any]], Iterator[Entry | BadVideo]],
    *,
    key: Callable[[Entry], Any],
    ranks: Ranks,
    max_bad_videos: float,
    what: str,
    note: Callable[[], str] = str,
) -> Outcome | None:
    """Score everything once, each process its share; what an unfinished evaluation in ``output`` has counts.

    Args:
        work: what the scores depend on.
        describe: gives of each key the file, as ``file_identity`` has it, and what else mustn't change.
        score: gives for each of some keys an entry of plain JSON values, or the file that can't be read.
        key: of an entry.
        max_bad_videos: see ``allowed_bad_videos``.
        what: stands for a key in messages, such as "video".
        note: see ``track``.

    Returns:
        The entries in the order of the keys in rank 0, None in the others.

    Raises:
        ConfigError: what lies in ``output`` is of other work; the error says what differs.
        DataError: more files are unreadable than allowed, or all.
    """
    folder, bad_file = output / _UNFINISHED, output / "bad_videos.csv"
    files = ranks.broadcast_from_rank0(describe)
    total = len({file["path"] for file in files.values()})
    allowed = allowed_bad_videos(max_bad_videos, total)
    done = ranks.broadcast_from_rank0(lambda: _take_up(folder, work, files, key))
    ranks.broadcast_from_rank0(lambda: bad_file.unlink(missing_ok=True))  # they are tried again
    if done:
        log.info("resuming: %d %ss have been scored before, see %s", len(done), what, folder)
    todo = [name for name in files if name not in done][ranks.rank :: ranks.size]
    bad = BadVideos(bad_file, allowed=allowed, total=total, go_on=True)
    scored = score(todo)
    if ranks.rank == 0:
        scored = track(scored, len(todo), what="scoring", note=note)
    with journal(folder / f"{ranks.rank:04d}.jsonl") as add:
        for found in scored:
            if isinstance(found, BadVideo):
                bad.note([found])
            else:
                add({"file": files[key(found)], **found})
    for others in ranks.all_gather(bad.found):
        bad.found |= others
    if ranks.rank:
        return None
    bad.check()
    entries = {name: entry for name, entry, counts in _entries(folder, files, key) if counts}
    if not entries:
        raise DataError(f"no {what} could be read")
    for result in _RESULTS:
        keep_former(output / result)
    return Outcome([entries[name] for name in files if name in entries], bad.found)


def score_data_set(
    model: VideoModel,
    index: VideoIndex,
    output: Path,
    *,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    provenance: Fingerprint,
    matrix: Tensor | None = None,
    max_bad_videos: float,
    combination: Combination,
    **loading: Any,
) -> ScoreTable | None:
    """Score every video of an index once.

    Args:
        provenance: see ``provenance_of``; the model's precision is added.
        combination: of the accuracy in the progress bar.
        matrix, loading: as of ``score_videos``.
        Others, returns and errors: see ``resumable``.
    """
    videos = {video.id: video for video in index.videos}
    start, num_read, num_right = time.perf_counter(), 0, 0

    def score(ids: Sequence[str]) -> Iterator[Entry | BadVideo]:
        nonlocal num_read, num_right
        for views, scores in score_videos(model, [videos[name] for name in ids], matrix=matrix, **loading):
            if views.error is not None:
                yield BadVideo(views.video.path, views.error)
                continue
            num_read += 1
            num_right += int(combine(scores, combination).argmax()) in views.video.labels
            packed = base64.b64encode(scores.numpy().tobytes()).decode()
            yield {"id": views.video.id, "spans": views.spans, "scores": packed}

    def note() -> str:
        rate = num_read / (time.perf_counter() - start)
        return f"{rate:.2f} videos/s, top-1 {num_right / max(num_read, 1):.4f}"

    log.info("%d videos; %s", len(index), model.protocol)
    provenance = provenance | {"precision": str(next(model.parameters()).dtype).removeprefix("torch.")}
    outcome = resumable(
        output,
        identity(provenance, index.class_names),
        lambda: {name: _described(video) for name, video in videos.items()},
        score,
        key=itemgetter("id"),
        ranks=ranks,
        max_bad_videos=max_bad_videos,
        what="video",
        note=note,
    )
    return None if outcome is None else _table_of(outcome, index, provenance)


def _table_of(outcome: Outcome, index: VideoIndex, provenance: Fingerprint) -> ScoreTable:
    """The scores of an outcome, whose entries lose them, so that they don't lie in memory twice."""
    videos = {video.id: video for video in index.videos}
    spans = torch.tensor([entry["spans"] for entry in outcome.entries], dtype=torch.float64)
    scores = torch.empty(*spans.shape[:2], len(index.class_names))
    for row, entry in zip(scores.flatten(1).numpy(), outcome.entries, strict=True):
        row[:] = np.frombuffer(base64.b64decode(entry.pop("scores")), np.float32)
    return ScoreTable(
        tuple(videos[entry["id"]] for entry in outcome.entries),
        scores,
        spans,
        tuple(index.class_names),
        {**provenance, **_not_scored(index, outcome.bad)},
    )


def score_videos(
    model: VideoModel,
    videos: Sequence[LabelledVideo],
    *,
    matrix: Tensor | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    loader: str = "auto",
    device: str | torch.device = "cpu",
    open_file: OpenVideo = open_video,
) -> Iterator[tuple[VideoViews, Tensor]]:
    """Each video, in order, with the probabilities (V, C) of its views, those of ``model.protocol``.

    Args:
        matrix: the model's classes as the data set's, see ``class_matrix``; None: they are the same.
        batch_size: clips that go through the model at once; a video's may be spread over several batches.
        num_workers, loader: how many processes or threads decode ahead.

    Raises:
        DataError: the model gives NaN or infinite scores, as soon as it does; the error names the video.
    """
    videos_views = validation_loader(
        ViewDataset(videos, model.protocol, open_file=open_file, pending=True),
        itemgetter(0),
        batch_size=1,
        num_workers=num_workers,
        worker_type=WORKER_TYPES[loader],
        pin_memory=torch.device(device).type == "cuda" and num_workers > 0,
    )
    model = model.to(device).eval()

    def arriving() -> Iterator[VideoViews]:
        for views in videos_views:
            with stage("transfer"):
                views = views._replace(clips=finish_clips(views.clips, device))
            yield views

    @torch.inference_mode()
    def probabilities(clips: Tensor) -> Tensor:
        scores = model.probabilities(model(clips).float()).cpu()
        return scores if matrix is None else map_classes(scores, matrix)

    with closing(videos_views):
        for views, scores in in_full_batches(arriving(), probabilities, batch_size):
            if not bool(torch.isfinite(scores).all()):
                raise DataError(
                    f"{views.video.path}: the model gives NaN or infinite scores; its weights are damaged, "
                    "or overflow in this precision (then precision=fp32 helps)"
                )
            yield views, scores


def remove_journals(output: Path) -> None:
    """Remove what would be resumed, when an evaluation's scores are written."""
    for file in (output / _UNFINISHED).glob("*.json*"):
        file.unlink()
    with suppress(OSError):  # it holds files of somebody else
        (output / _UNFINISHED).rmdir()


def file_identity(path: str) -> Fingerprint:
    """Which file it is, of pictures which and how many, and as what it was read."""
    info = stat_of(path)
    return {"path": os.path.abspath(path), "size": info.size, "mtime_ns": info.mtime_ns}  # noqa: PTH100 (speed)


def _described(video: LabelledVideo) -> Fingerprint:
    label = [*video.labels] if isinstance(video.label, tuple) else video.label  # as JSON has it
    return file_identity(video.path) | {"label": label}


def _take_up(
    folder: Path, work: Fingerprint, files: Mapping[Any, Fingerprint], key: Callable[[Entry], Any]
) -> set[Any]:
    """The keys of what an unfinished evaluation has done and what still counts.

    Raises ConfigError where it is of other work.
    """
    remedy = "choose another hydra.run.dir, or remove that folder"
    if any(folder.glob("*.arrows")):
        raise ConfigError(f"{folder} holds scores of an older version, which this one doesn't read; {remedy}")
    if any(folder.glob("*.jsonl")):
        require_same(read_fingerprint(folder / "run.json"), work, what=str(folder), remedy=remedy, free=_FREE)
    write_fingerprint(folder / "run.json", work)
    found: dict[bool, set[Any]] = {True: set(), False: set()}
    for name, _, counts in _entries(folder, files, key):
        found[counts].add(name)
    if outdated := found[False] - found[True]:
        text = (
            "%s: %d results don't count, as the file, its path or its label has changed since, such as of %s"
        )
        log.warning(text, folder, len(outdated), min(outdated))
    return found[True]


def _entries(
    folder: Path, files: Mapping[Any, Fingerprint], key: Callable[[Entry], Any]
) -> Iterator[tuple[Any, Entry, bool]]:
    """What the journals have, by key, and whether it counts: its file is as it was."""
    for file in sorted(folder.glob("*.jsonl")):
        for entry in read_journal(file):
            yield (name := key(entry)), entry, entry.get("file", "") == files.get(name)


def _not_scored(index: VideoIndex, bad: Mapping[str, BadVideo]) -> dict[str, list[dict[str, str]]]:
    left_out = [(out.video, out.reason) for out in index.left_out]
    found = [(video, bad.get(csv_cell(video.path))) for video in index.videos]
    unreadable = [(video, reading.reason) for video, reading in found if reading is not None]
    return {
        name: [{"id": video.id, "path": video.path, "reason": reason} for video, reason in videos]
        for name, videos in (("left_out_videos", left_out), ("bad_videos", unreadable))
    }
