"""From a video file to clips for the model: plan the views, decode once, transform.

A dataset here never raises for a bad video: training replaces it, testing returns the reason in its place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mvit_video.data.decode import Video, open_video
from mvit_video.data.index import LabelledVideo
from mvit_video.data.transform import test_clips, training_clip
from mvit_video.data.views import (
    kinetics_frame_indices,
    random_frame_indices,
    random_resized_crop,
    random_segment_frame_indices,
    segment_frame_indices,
    spatial_views,
    torchvision_frame_indices,
    torchvision_spatial_view,
)
from mvit_video.errors import DataError, VideoError
from mvit_video.model.protocol import Protocol

OpenVideo = Callable[[str], Video]

MAX_REPLACEMENTS = 20  # bad videos in a row before a training run gives up


@dataclass(frozen=True)
class Augment:
    """Random choices of a training clip: share of the area, aspect ratio (width / height), mirroring."""

    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", tuple(self.area))
        object.__setattr__(self, "aspect", tuple(self.aspect))
        # Any plan checks the ranges: find a bad one before data are read.
        random_resized_crop(8, 8, **vars(self), rng=random.Random(0))


class BadVideo(NamedTuple):
    path: str
    reason: str


class TrainingSample(NamedTuple):
    clip: Tensor  # float (3, T, H, W)
    label: int
    bad: list[BadVideo]  # videos that this one stands in for


class Batch(NamedTuple):
    """Labelled clips of several videos, and the videos that gave none."""

    clips: Tensor  # float (B, 3, T, H, W)
    labels: Tensor  # int64 (B,)
    bad: list[BadVideo]


@dataclass(frozen=True)
class VideoViews:
    """All test views of one video, or why there are none.

    Attributes:
        clips: float (V, 3, T, H, W), crops of a clip next to each other; V = 0 for a bad video.
        spans: for each view, its first and last frame in seconds from the start of the video.
    """

    video: LabelledVideo
    clips: Tensor
    spans: list[tuple[float, float]] = field(default_factory=list)
    error: str | None = None


class EpochSampler(Sampler[tuple[int, int]]):
    """Every video once an epoch, in an order that depends on the seed and the epoch alone.

    Yields (epoch, index), so that a sample's random choices follow from its key, whichever worker makes it.
    """

    def __init__(self, num_videos: int, *, seed: int) -> None:
        self.num_videos, self.seed, self.epoch = num_videos, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_videos

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(range(self.num_videos))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return iter([(self.epoch, index) for index in order])


class TrainingClips(Dataset[TrainingSample]):
    """One random clip of each video; keys are (epoch, index), or an index alone for epoch 0."""

    def __init__(
        self,
        videos: Sequence[LabelledVideo],
        protocol: Protocol,
        augment: Augment,
        *,
        seed: int,
        open_file: OpenVideo = open_video,
    ) -> None:
        self.videos, self.protocol, self.augment, self.seed = videos, protocol, augment, seed
        self.open_file = open_file

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int] | int) -> TrainingSample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = random.Random(f"{self.seed} {epoch} {index}")
        bad: list[BadVideo] = []
        for _ in range(MAX_REPLACEMENTS):
            video = self.videos[index]
            try:
                with self.open_file(video.path) as file:
                    clip = read_training_clip(file, self.protocol, self.augment, rng)
            except VideoError as error:
                bad.append(BadVideo(error.path, error.reason))
                index = rng.randrange(len(self.videos))
                continue
            assert video.label is not None  # the index has checked it
            return TrainingSample(clip, video.label, bad)
        raise DataError(f"{MAX_REPLACEMENTS} videos in a row can't be read, the last: {': '.join(bad[-1])}")


class TestViews(Dataset[VideoViews]):
    """All test views of each video, from one decode."""

    __test__ = False  # no test case, whatever pytest thinks of its name

    def __init__(
        self, videos: Sequence[LabelledVideo], protocol: Protocol, *, open_file: OpenVideo = open_video
    ) -> None:
        self.videos, self.protocol, self.open_file = videos, protocol, open_file

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> VideoViews:
        video = self.videos[index]
        try:
            with self.open_file(video.path) as file:
                clips, spans = read_test_views(file, self.protocol)
        except VideoError as error:
            return VideoViews(video, torch.empty(0), error=error.reason)
        return VideoViews(video, clips, spans)


def read_training_clip(video: Video, protocol: Protocol, augment: Augment, rng: random.Random) -> Tensor:
    """One random clip of a video, float (3, T, H, W). Raises VideoError for a bad file."""
    if protocol.sampling == "segment":
        indices = random_segment_frame_indices(video.num_frames, clip_frames=protocol.clip_frames, rng=rng)
    else:
        indices = random_frame_indices(
            video.num_frames,
            video.fps,
            clip_frames=protocol.clip_frames,
            stride=protocol.stride,
            target_fps=protocol.target_fps,
            rng=rng,
        )
    box = random_resized_crop(video.height, video.width, **vars(augment), rng=rng)
    frames = video.get_frames(indices)
    return training_clip(frames, box, protocol.crop, mean=protocol.mean, std=protocol.std)


def read_test_views(video: Video, protocol: Protocol) -> tuple[Tensor, list[tuple[float, float]]]:
    """All views of a video and their spans, as in ``VideoViews``. Raises VideoError for a bad file."""
    if protocol.sampling == "segment":
        clips = [segment_frame_indices(video.num_frames, clip_frames=protocol.clip_frames)]
    elif protocol.sampling == "torchvision":
        clips = torchvision_frame_indices(
            video.num_frames,
            video.fps,
            clip_frames=protocol.clip_frames,
            frame_rate=protocol.target_fps / protocol.stride,
            num_clips=protocol.num_clips,
        )
    else:
        clips = kinetics_frame_indices(
            video.num_frames,
            video.fps,
            clip_frames=protocol.clip_frames,
            stride=protocol.stride,
            num_clips=protocol.num_clips,
            target_fps=protocol.target_fps,
        )
    sizes = {"short_side": protocol.short_side, "crop": protocol.crop}
    round_pixels = protocol.pixels == "torchvision"
    if round_pixels:
        crops = [torchvision_spatial_view(video.height, video.width, **sizes)]
    else:
        crops = spatial_views(video.height, video.width, num_crops=protocol.num_crops, **sizes)
    needed = sorted({index for clip in clips for index in clip})
    position = {index: i for i, index in enumerate(needed)}
    positions = [[position[index] for index in clip] for clip in clips]
    frames = video.get_frames(needed)  # one decode, however many views
    spans = [(video.frame_time(clip[0]), video.frame_time(clip[-1])) for clip in clips for _ in crops]
    clip_pixels = test_clips(
        frames, positions, crops, mean=protocol.mean, std=protocol.std, round_pixels=round_pixels
    )
    return clip_pixels, spans


def training_loader(
    dataset: TrainingClips, *, batch_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[TrainingSample]:
    """Batches of random clips in the order of ``EpochSampler``.

    An incomplete last batch is dropped, unless it is the only one.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), seed=dataset.seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_collate_training,
        drop_last=len(dataset) > batch_size,
    )


def validation_loader(
    dataset: TestViews, *, batch_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[VideoViews]:
    """Batches of all views of ``batch_size`` labelled videos."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_collate_views,
    )


def _collate_training(samples: list[TrainingSample]) -> Batch:
    clips = torch.stack([sample.clip for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    return Batch(clips, labels, [bad for sample in samples for bad in sample.bad])


def _collate_views(videos: list[VideoViews]) -> Batch:
    good = [views for views in videos if views.error is None]
    labels = [views.video.label for views in good for _ in views.spans]
    return Batch(
        torch.cat([views.clips for views in good]) if good else torch.empty(0),
        torch.tensor(labels),
        [BadVideo(views.video.path, views.error) for views in videos if views.error is not None],
    )
