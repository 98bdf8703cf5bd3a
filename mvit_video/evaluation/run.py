"""One evaluation of a data set: shared by several processes, and resumed where a killed one has ended."""

from __future__ import annotations

import base64
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvit_video.data.bad_videos import BadVideos
from mvit_video.data.batches import in_full_batches
from mvit_video.data.datasets import BadVideo, OpenVideo, VideoViews, ViewDataset, views_loader
from mvit_video.data.decode import open_video
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
from mvit_video.model import VideoModel

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # folder that a killed evaluation leaves: its identity, each process's journal
# Which videos can be read may change, not what they give.
_FREE = ("data.max_missing", "decoder.max_pixels", "decoder.index_cache")


def output_folder(resume: str | None, output: Path) -> Path:
    """Where results go: ``output``, or the folder that ``resume`` names ("last": the newest unfinished).

    Raises:
        ConfigError: no evaluation there is unfinished.
    """
    if resume is None:
        return output
    if resume == "last":
        runs = output.parents[1]
        found = sorted(runs.glob(f"*/*/{UNFINISHED}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ConfigError(f"resume=last: no evaluation below {runs} is unfinished")
        return found[-1].parent
    if not (Path(resume) / UNFINISHED).is_dir():
        raise ConfigError(f"resume={resume}: no evaluation there is unfinished (there is no {UNFINISHED}/)")
    return Path(resume)


def score_data_set(
    model: VideoModel,
    index: VideoIndex,
    output: Path,
    *,
    ranks: Ranks,
    provenance: Fingerprint,
    matrix: Tensor | None,
    allowed_bad_videos: int,
    combination: Combination,
    **loading: Any,
) -> ScoreTable | None:
    """Score every video of an index once; what an unfinished evaluation in ``output`` has scored counts.

    Args:
        provenance: see ``provenance_of``; with precision.
        combination: of the accuracy in the progress bar.
        matrix, loading: as of ``score_videos``.

    Returns:
        The scores in the order of the index in rank 0, None in the others.

    Raises:
        ConfigError: the scores in ``output`` are of other work; the error says what differs.
        DataError: more videos are unreadable than allowed, or the model gives NaN.
    """
    folder, bad_file = output / UNFINISHED, output / "bad_videos.csv"
    work = identity(provenance, index.class_names)
    files = ranks.broadcast_from_rank0(lambda: {video.id: _described(video) for video in index.videos})
    done = ranks.broadcast_from_rank0(lambda: take_up(folder, work, files, itemgetter("id")))
    ranks.broadcast_from_rank0(lambda: bad_file.unlink(missing_ok=True))  # they are tried again
    log.info("%d videos; %s", len(index), model.protocol)
    if done:
        log.info("resuming: %d of them have been scored before, see %s", len(done), folder)
    videos = [video for video in index.videos if video.id not in done][ranks.rank :: ranks.size]
    bad = BadVideos(bad_file, allowed=allowed_bad_videos, total=len(index), go_on=True)
    scored = score_videos(model, videos, matrix=matrix, **loading)
    if ranks.rank == 0:
        scored = _with_progress(scored, len(videos), combination)
    with journal(folder / f"{ranks.rank:04d}.jsonl") as note:
        for views, scores in scored:
            video = views.video
            if views.error is not None:
                bad.note([BadVideo(video.path, views.error)])
            else:
                packed = base64.b64encode(scores.numpy().tobytes()).decode()
                note({"file": files[video.id], "id": video.id, "spans": views.spans, "scores": packed})
    for found in ranks.all_gather(bad.found):
        bad.found |= found
    if ranks.rank:
        return None
    bad.check()
    table = _read_table(folder, index, files)
    return replace(table, provenance={**provenance, **_not_scored(index, bad.found)})


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
    videos_views = views_loader(
        ViewDataset(videos, model.protocol, open_file=open_file, pending=True),
        num_workers=num_workers,
        worker_type=WORKER_TYPES[loader],
        pin_memory=torch.device(device).type == "cuda" and num_workers > 0,
    )
    model = model.to(device).eval()

    def arriving() -> Iterator[VideoViews]:
        for views in videos_views:
            with stage("transfer"):
                views = replace(views, clips=finish_clips(views.clips, device))
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
    for file in (output / UNFINISHED).glob("*.json*"):
        file.unlink()
    with suppress(OSError):  # it holds files of somebody else
        (output / UNFINISHED).rmdir()


def file_identity(path: str) -> Fingerprint:
    """Which file it is, of pictures which and how many, and as what it was read."""
    info = stat_of(path)
    return {"path": os.path.abspath(path), "size": info.size, "mtime_ns": info.mtime_ns}  # noqa: PTH100 (speed)


def _described(video: LabelledVideo) -> Fingerprint:
    label = [*video.labels] if isinstance(video.label, tuple) else video.label  # as JSON has it
    return file_identity(video.path) | {"label": label}


def take_up(
    folder: Path, work: Fingerprint, files: Mapping[Any, Fingerprint], key: Callable[[Entry], Any]
) -> set[Any]:
    """The keys of what an unfinished evaluation has done and what still counts.

    Args:
        files: of each key, as ``file_identity`` has it.
        key: of an entry in the journals.

    Raises:
        ConfigError: the evaluation is of other work.
    """
    remedy = "choose another hydra.run.dir, or remove that folder"
    if any(folder.glob("*.arrows")):
        raise ConfigError(f"{folder} holds scores of an older version, which this one doesn't read; {remedy}")
    if any(folder.glob("*.jsonl")):
        require_same(read_fingerprint(folder / "run.json"), work, what=str(folder), remedy=remedy, free=_FREE)
    write_fingerprint(folder / "run.json", work)
    done = set(map(key, read_entries(folder, files, key)))
    if outdated := {key(entry) for entry in _entries(folder)} - done:
        text = (
            "%s: %d results don't count, as the file, its path or its label has changed since, such as of %s"
        )
        log.warning(text, folder, len(outdated), min(outdated))
    return done


def read_entries(
    folder: Path, files: Mapping[Any, Fingerprint], key: Callable[[Entry], Any]
) -> Iterator[Entry]:
    """The entries of journals whose files are as they were; arguments as of ``take_up``."""
    return (entry for entry in _entries(folder) if entry.get("file", "") == files.get(key(entry)))


def _entries(folder: Path) -> Iterator[Entry]:
    for file in sorted(folder.glob("*.jsonl")):
        yield from read_journal(file)


def _read_table(folder: Path, index: VideoIndex, files: Mapping[str, Fingerprint]) -> ScoreTable:
    """The scores that the journals have of these files, in the order of the index."""
    found = {
        entry["id"]: (np.frombuffer(base64.b64decode(entry["scores"]), np.float32), entry["spans"])
        for entry in read_entries(folder, files, itemgetter("id"))
    }
    if not found:
        raise DataError("no video could be read")
    videos = tuple(video for video in index.videos if video.id in found)
    scores, spans = zip(*(found[video.id] for video in videos), strict=True)
    views = torch.from_numpy(np.stack(scores)).view(len(videos), -1, len(index.class_names))
    return ScoreTable(videos, views, torch.tensor(spans, dtype=torch.float64), tuple(index.class_names))


def _not_scored(index: VideoIndex, bad: Mapping[str, BadVideo]) -> dict[str, list[dict[str, str]]]:
    left_out = [(out.video, out.reason) for out in index.left_out]
    found = [(video, bad.get(csv_cell(video.path))) for video in index.videos]
    unreadable = [(video, reading.reason) for video, reading in found if reading is not None]
    return {
        name: [{"id": video.id, "path": video.path, "reason": reason} for video, reason in videos]
        for name, videos in (("left_out_videos", left_out), ("bad_videos", unreadable))
    }


def _with_progress(
    scored: Iterator[tuple[VideoViews, Tensor]], total: int, how: Combination
) -> Iterator[tuple[VideoViews, Tensor]]:
    """The same; a bar shows videos/s and the top-1 so far."""
    start, num_read, num_right = time.perf_counter(), 0, 0

    def note() -> str:
        rate = num_read / (time.perf_counter() - start)
        return f"{rate:.2f} videos/s, top-1 {num_right / max(num_read, 1):.4f}"

    for views, scores in track(scored, total, what="scoring", note=note):
        if views.error is None:
            num_read += 1
            num_right += int(combine(scores, how).argmax()) in views.video.labels
        yield views, scores
