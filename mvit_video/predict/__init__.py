"""Say what happens in video files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mvit_video.data.clips import OpenVideo
from mvit_video.data.decode import open_video
from mvit_video.data.index import LabelledVideo, find_videos
from mvit_video.model import VideoModel, load_model
from mvit_video.scoring import VideoScores, score_videos


@dataclass(frozen=True)
class ClipPrediction:
    """The likeliest classes of one clip, best first, and its first and last frame in seconds."""

    start: float
    end: float
    classes: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a video, best first, with scores in [0, 1], and those of its clips.

    A file that can't be read has an ``error`` and no classes.
    """

    path: str
    classes: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    clips: tuple[ClipPrediction, ...] = ()
    error: str | None = None


def predict(
    paths: str | Path | Iterable[str | Path],
    model: VideoModel | str | Path,
    *,
    topk: int = 5,
    num_clips: int | None = None,
    num_crops: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    device: str = "cpu",
) -> list[Prediction]:
    """Classify video files.

    Args:
        paths: a file, a folder (searched for videos), or several of them.
        model: a model, or a checkpoint of ``mvit-train`` or PySlowFast.
        topk: how many classes to return.
        num_clips, num_crops: views of each video; None: what the model's protocol says.
        batch_size: clips that go through the model at once.
        num_workers: processes that decode ahead.
        device: where the model runs.

    Returns:
        One prediction a file, in order; folders in alphabetical order.

    Raises:
        DataError: a path doesn't exist. CheckpointError: the weights can't be read.
    """
    model = model if isinstance(model, VideoModel) else load_model(model)
    protocol = model.protocol
    model.protocol = replace(
        protocol,
        num_clips=protocol.num_clips if num_clips is None else num_clips,
        num_crops=protocol.num_crops if num_crops is None else num_crops,
    )
    try:
        return list(
            iter_predictions(
                find_videos(paths),
                model,
                topk=topk,
                batch_size=batch_size,
                num_workers=num_workers,
                device=device,
            )
        )
    finally:
        model.protocol = protocol


def iter_predictions(
    files: Sequence[str],
    model: VideoModel,
    *,
    topk: int,
    batch_size: int,
    num_workers: int,
    device: str,
    open_file: OpenVideo = open_video,
) -> Iterator[Prediction]:
    """Predictions for video files as they are made, in order, with the views of ``model.protocol``."""
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    videos = [LabelledVideo(file, None, file) for file in files]
    class_names = model.class_names or [str(index) for index in range(model.config.num_classes)]
    for video in score_videos(
        model, videos, batch_size=batch_size, num_workers=num_workers, device=device, open_file=open_file
    ):
        yield _prediction(video, class_names, topk, model.protocol.num_crops)


def _prediction(video: VideoScores, class_names: Sequence[str], topk: int, num_crops: int) -> Prediction:
    if video.error is not None:
        return Prediction(video.video.path, error=video.error)
    clips = video.views.unflatten(0, (-1, num_crops)).mean(1)  # (clips, num_classes)
    return Prediction(
        video.video.path,
        *_best(video.mean, class_names, topk),
        tuple(
            ClipPrediction(start, end, *_best(scores, class_names, topk))
            for scores, (start, end) in zip(clips, video.spans[::num_crops], strict=True)
        ),
    )


def _best(scores: Tensor, class_names: Sequence[str], topk: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
    top = torch.topk(scores, min(topk, len(class_names)))
    return tuple(class_names[i] for i in top.indices.tolist()), tuple(top.values.tolist())
