"""Scores of whole videos: the softmax of every view, averaged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvit_video.data.clips import OpenVideo, TestViews, VideoViews, views_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import Kind
from mvit_video.model import VideoModel
from mvit_video.timing import stage


@dataclass(frozen=True)
class VideoScores:
    """What a model says of one video, or why it says nothing.

    Attributes:
        views: float (V, num_classes), softmax of each view; empty for a bad video.
        spans: for each view, its first and last frame in seconds.
    """

    video: LabelledVideo
    views: Tensor
    spans: list[tuple[float, float]]
    error: str | None = None

    @property
    def mean(self) -> Tensor:
        """(num_classes,): the views' mean, as published accuracies are computed."""
        return self.views.mean(0)


def score_videos(
    model: VideoModel,
    videos: Sequence[LabelledVideo],
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    loader: Kind = "auto",
    device: str | torch.device = "cpu",
    open_file: OpenVideo = open_video,
) -> Iterator[VideoScores]:
    """Score every video with the views of ``model.protocol``, in order.

    Args:
        batch_size: clips that go through the model at once; a video's may be spread over several batches.
        num_workers, loader: how many processes or threads decode ahead.
    """
    videos_views = views_loader(
        TestViews(videos, model.protocol, open_file=open_file),
        num_workers=num_workers,
        kind=loader,
        pin_memory=torch.device(device).type == "cuda" and num_workers > 0,
    )
    model = model.to(device).eval()

    def softmax(clips: Tensor) -> Tensor:
        with stage("transfer"):
            clips = clips.to(device, non_blocking=True)
        return _softmax(model, clips)

    with closing(videos_views):
        for views, scores in in_full_batches(videos_views, softmax, batch_size):
            yield VideoScores(views.video, scores, views.spans, views.error)


def in_full_batches(
    videos: Iterable[VideoViews], run: Callable[[Tensor], Tensor], batch_size: int
) -> Iterator[tuple[VideoViews, Tensor]]:
    """Send the views of many videos through a model, exactly ``batch_size`` clips at once but for the last.

    Args:
        run: makes a row for each clip of a batch (B, 3, T, H, W).

    Yields each video, in order and as soon as it is done, without its clips but with its rows (V, ...).
    """
    waiting: deque[VideoViews] = deque()  # videos whose rows aren't complete
    parts: list[Tensor] = []  # clips that have not been run, and how many
    count = 0
    rows = torch.empty(0)  # that no video has got yet

    def append(found: Tensor) -> Tensor:
        return torch.cat([rows, found]) if len(rows) else found

    def take_finished() -> Iterator[tuple[VideoViews, Tensor]]:
        nonlocal rows
        while waiting and len(waiting[0].spans) <= len(rows):
            views = waiting.popleft()
            own, rows = rows[: len(views.spans)], rows[len(views.spans) :]
            yield views, own if views.spans else torch.empty(0)

    for views in videos:
        waiting.append(replace(views, clips=torch.empty(0)))
        if views.error is None:
            parts.append(views.clips)
            count += len(views.clips)
        while count >= batch_size:
            clips = torch.cat(parts) if len(parts) > 1 else parts[0]
            rows = append(run(clips[:batch_size]))
            count -= batch_size
            parts = [clips[batch_size:]] if count else []
        yield from take_finished()
    if parts:
        rows = append(run(torch.cat(parts)))
    yield from take_finished()


@torch.inference_mode()
def _softmax(model: VideoModel, clips: Tensor) -> Tensor:
    return model(clips).float().softmax(-1).cpu()
