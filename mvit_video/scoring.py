"""Scores of whole videos: the softmax of every view, averaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from mvit_video.data.clips import OpenVideo, TestViews, VideoViews, views_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import Kind
from mvit_video.model import MViT


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
    model: MViT,
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
        batch_size: clips that go through the model at once; they come from several videos.
        num_workers, loader: how many processes or threads decode ahead.
    """
    views = views_loader(
        TestViews(videos, model.protocol, open_file=open_file),
        num_workers=num_workers,
        kind=loader,
        pin_memory=torch.device(device).type == "cuda" and num_workers > 0,
    )
    model = model.to(device).eval()
    with closing(views):
        for group in _groups(views, batch_size):
            yield from _score_group(model, group, batch_size, device)


def _groups(views: Iterable[VideoViews], batch_size: int) -> Iterator[list[VideoViews]]:
    """Collect videos until their views fill a batch."""
    group: list[VideoViews] = []
    for video in views:
        group.append(video)
        if sum(len(v.spans) for v in group) >= batch_size:
            yield group
            group = []
    if group:
        yield group


@torch.inference_mode()
def _score_group(
    model: MViT, group: list[VideoViews], batch_size: int, device: str | torch.device
) -> Iterator[VideoScores]:
    good = [views for views in group if views.error is None]
    scores: Iterator[Tensor] = iter(())
    if good:
        clips = torch.cat([views.clips for views in good])
        probabilities = [
            model(part.to(device, non_blocking=True)).float().softmax(-1).cpu()
            for part in clips.split(batch_size)
        ]
        scores = iter(torch.cat(probabilities).split([len(views.spans) for views in good]))
    for views in group:
        if views.error is None:
            yield VideoScores(views.video, next(scores), views.spans)
        else:
            yield VideoScores(views.video, torch.empty(0), [], views.error)
