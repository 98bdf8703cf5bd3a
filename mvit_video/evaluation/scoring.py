"""Scores of whole videos: the softmax of every view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from mvit_video.data.batches import in_full_batches
from mvit_video.data.datasets import OpenVideo, TestViews, views_loader
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.loader import WORKER_TYPES
from mvit_video.data.timing import stage
from mvit_video.errors import DataError
from mvit_video.evaluation.scores import VideoScores
from mvit_video.model import VideoModel


def score_videos(
    model: VideoModel,
    videos: Sequence[LabelledVideo],
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    loader: str = "auto",
    device: str | torch.device = "cpu",
    open_file: OpenVideo = open_video,
) -> Iterator[VideoScores]:
    """Score every video with the views of ``model.protocol``, in order.

    Args:
        batch_size: clips that go through the model at once; a video's may be spread over several batches.
        num_workers, loader: how many processes or threads decode ahead.

    Raises:
        DataError: the model gives NaN or infinite scores, as soon as it does; the error names the video.
    """
    videos_views = views_loader(
        TestViews(videos, model.protocol, open_file=open_file),
        num_workers=num_workers,
        worker_type=WORKER_TYPES[loader],
        pin_memory=torch.device(device).type == "cuda" and num_workers > 0,
    )
    model = model.to(device).eval()

    def softmax(clips: Tensor) -> Tensor:
        with stage("transfer"):
            clips = clips.to(device, non_blocking=True)
        return _softmax(model, clips)

    with closing(videos_views):
        for views, scores in in_full_batches(videos_views, softmax, batch_size):
            if not bool(torch.isfinite(scores).all()):
                raise DataError(
                    f"{views.video.path}: the model gives NaN or infinite scores; its weights are damaged, "
                    "or overflow in this precision (then precision=fp32 helps)"
                )
            yield VideoScores(views.video, scores, views.spans, views.error)


@torch.inference_mode()
def _softmax(model: VideoModel, clips: Tensor) -> Tensor:
    return model(clips).float().softmax(-1).cpu()
