"""Scores of whole videos: the softmax of every view, averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from mvit_video.data.batches import in_full_batches
from mvit_video.data.datasets import OpenVideo, TestViews, views_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import Kind
from mvit_video.data.timing import stage
from mvit_video.model import VideoModel


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


@torch.inference_mode()
def _softmax(model: VideoModel, clips: Tensor) -> Tensor:
    return model(clips).float().softmax(-1).cpu()
