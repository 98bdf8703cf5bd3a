"""One evaluation of a data set: shared by several processes, and resumed where a killed one has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mvit_video.data.bad_videos import BadVideos
from mvit_video.data.datasets import BadVideo
from mvit_video.data.index import VideoIndex
from mvit_video.data.ranks import Ranks
from mvit_video.errors import ConfigError, DataError
from mvit_video.evaluation.classes import map_classes
from mvit_video.evaluation.provenance import file_identity, identity
from mvit_video.evaluation.score_files import ScoreLog, read_logs
from mvit_video.evaluation.scores import Combination, ScoreTable, VideoScores, combine, with_labels
from mvit_video.evaluation.scoring import score_videos
from mvit_video.io.fingerprint import Fingerprint, require_same
from mvit_video.io.writing import next_number
from mvit_video.model import VideoModel

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"  # folder of the score logs that a killed evaluation leaves
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
        logs = sorted(runs.glob(f"*/*/{UNFINISHED}/*.arrows"), key=lambda path: path.stat().st_mtime)
        if not logs:
            raise ConfigError(f"resume=last: no evaluation below {runs} is unfinished")
        return logs[-1].parents[1]
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
        matrix: the model's classes as the data set's, see ``class_matrix``; None: they are the same.
        combination: of the accuracy in the progress bar.
        loading: as of ``score_videos``.

    Returns:
        The scores in the order of the index in rank 0, None in the others.

    Raises:
        ConfigError: the scores in ``output`` are of other work; the error says what differs.
        DataError: more videos are unreadable than allowed, or the model gives NaN.
    """
    logs = _Logs(output / UNFINISHED, index, identity({**provenance, "class_names": index.class_names}))
    bad_file = output / "bad_videos.csv"
    files, done = ranks.broadcast_from_rank0(logs.files_and_done)
    ranks.broadcast_from_rank0(lambda: bad_file.unlink(missing_ok=True))  # they are tried again
    log.info("%d videos; %s", len(index), model.protocol)
    if done:
        log.info("resuming: %d of them have been scored before, see %s", len(done), logs.folder)
    videos = [video for video in index.videos if video.id not in done][ranks.rank :: ranks.size]
    bad = BadVideos(bad_file, allowed=allowed_bad_videos, total=len(index), go_on=True)
    with (
        ScoreLog(logs.new_file(ranks.rank), index.class_names, provenance) as score_log,
        _progress(len(videos), combination, shown=ranks.rank == 0) as advance,
    ):
        for scores in score_videos(model, videos, **loading):
            if scores.error is not None:
                bad.note([BadVideo(scores.video.path, scores.error)])
            else:
                if matrix is not None:
                    scores = replace(scores, views=map_classes(scores.views, matrix))
                score_log.append(scores, files[scores.video.id])
            advance(scores)
    for found in ranks.all_gather(bad.found):
        bad.found |= found
    if ranks.rank:
        return None
    bad.check()
    table = logs.read(files)
    if table is None:
        raise DataError("no video could be read")
    provenance = {**provenance, **_not_scored(index, bad)}
    return with_labels(replace(table, provenance=provenance), index.videos, index.class_names)


@dataclass(frozen=True)
class _Logs:
    """The score logs in a folder, of evaluations of one identity."""

    folder: Path
    index: VideoIndex
    identity: Fingerprint

    def read(self, files: Mapping[str, Fingerprint]) -> ScoreTable | None:
        """Raises ConfigError for logs of other work."""
        return read_logs(self.folder, files, self._check)

    def files_and_done(self) -> tuple[dict[str, Fingerprint], set[str]]:
        """Which file each video is, and which videos have been scored."""
        files = {video.id: file_identity(video) for video in self.index.videos}
        before = self.read(files)
        return files, {video.id for video in before.videos} if before else set()

    def new_file(self, rank: int) -> Path:
        return self.folder / f"{next_number(self.folder, f'*-{rank:04d}.arrows'):06d}-{rank:04d}.arrows"

    def _check(self, there: Mapping[str, Any]) -> None:
        remedy = "choose another hydra.run.dir, or remove that folder"
        require_same(identity(there), self.identity, what=str(self.folder), remedy=remedy, free=_FREE)


def remove_logs(output: Path) -> None:
    """Remove the score logs of an evaluation whose scores are written."""
    for file in (output / UNFINISHED).glob("*.arrows"):
        file.unlink()
    with suppress(OSError):  # it holds files of somebody else
        (output / UNFINISHED).rmdir()


def _not_scored(index: VideoIndex, bad: BadVideos) -> dict[str, list[dict[str, str]]]:
    return {
        "left_out_videos": [
            {"id": out.video.id, "path": out.video.path, "reason": out.reason} for out in index.left_out
        ],
        "bad_videos": [
            {"id": video.id, **bad.found[video.path]._asdict()}
            for video in index.videos
            if video.path in bad.found
        ],
    }


@contextmanager
def _progress(total: int, combination: Combination, *, shown: bool) -> Iterator[Any]:
    """Gives a function that takes each video's scores and shows videos/s and the top-1 so far."""
    columns = (
        TextColumn("scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.2f} videos/s, top-1 {task.fields[top1]:.4f}"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    correct = seen = 0
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task("scoring", total=total, rate=0.0, top1=0.0)

        def advance(scores: VideoScores) -> None:
            nonlocal correct, seen
            if scores.error is None:
                seen += 1
                correct += int(combine(scores.views, combination).argmax()) == scores.video.label
            rate = (progress.tasks[0].completed + 1) / (time.perf_counter() - start)
            progress.update(task, advance=1, rate=rate, top1=correct / max(seen, 1))

        yield advance
