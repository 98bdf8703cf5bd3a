"""Scores of whole videos: the softmax of every view, averaged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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
    waiting: deque[VideoViews] = deque()  # videos whose scores aren't complete, without their clips
    scores = torch.empty(0)  # (views, num_classes) that no video has got yet
    with closing(videos_views):
        for clips in _full_batches(videos_views, waiting, batch_size):
            with stage("transfer"):
                clips = clips.to(device, non_blocking=True)
            found = _softmax(model, clips)
            scores = torch.cat([scores, found]) if len(scores) else found
            while waiting and len(waiting[0].spans) <= len(scores):
                views = waiting.popleft()
                yield VideoScores(views.video, scores[: len(views.spans)], views.spans, views.error)
                scores = scores[len(views.spans) :]
    for views in waiting:  # bad ones after the last batch
        yield VideoScores(views.video, torch.empty(0), [], views.error)


def _full_batches(
    videos: Iterable[VideoViews], waiting: deque[VideoViews], batch_size: int
) -> Iterator[Tensor]:
    """Batches of exactly ``batch_size`` clips, across videos; the last one may be smaller.

    Each video is noted in ``waiting``.
    """
    parts: list[Tensor] = []
    count = 0
    for views in videos:
        waiting.append(replace(views, clips=torch.empty(0)))
        if views.error is None:
            parts.append(views.clips)
            count += len(views.clips)
        while count >= batch_size:
            clips = torch.cat(parts) if len(parts) > 1 else parts[0]
            yield clips[:batch_size]
            count -= batch_size
            parts = [clips[batch_size:]] if count else []
    if parts:
        yield torch.cat(parts)


@torch.inference_mode()
def _softmax(model: VideoModel, clips: Tensor) -> Tensor:
    return model(clips).float().softmax(-1).cpu()
