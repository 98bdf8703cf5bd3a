"""Data sets of clips, their batches, and the batches that a model takes them in.

A dataset here never raises for a bad video: training replaces it, testing returns the reason in its place.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from mvit_video.data.augment import Augment
from mvit_video.data.clips import read_pending_views, read_training_clips
from mvit_video.data.decode import Video, open_video
from mvit_video.data.index import Label, LabelledVideo
from mvit_video.data.loader import ClipLoader
from mvit_video.data.pixels import Clips, PendingClips, finish_clips
from mvit_video.data.samplers import AllVideos, EpochBatches
from mvit_video.errors import ConfigError, DataError, VideoError
from mvit_video.model.clip_spec import ClipSpec

OpenVideo = Callable[[str], Video]
Made = TypeVar("Made")

MAX_REPLACEMENTS = 20  # bad videos in a row before a training run gives up


class BadVideo(NamedTuple):
    path: str
    reason: str


class TrainingSample(NamedTuple):
    clips: Clips  # float (R, 3, T, H, W), R augmented versions of one clip
    label: Label
    bad: list[BadVideo]  # videos that this one stands in for
    path: str = ""


class Batch(NamedTuple):
    """Labelled clips of several videos, and the videos that gave none."""

    clips: Any  # float (B, 3, T, H, W); ``Clips`` until they are where the model is
    labels: Tensor  # int64 (B,); of videos of several classes (B, K), filled up with -1
    bad: list[BadVideo]
    paths: Sequence[str] = ()  # of each clip, in training


class VideoViews(NamedTuple):
    """All test views of one video, or why there are none.

    Attributes:
        clips: float (V, 3, T, H, W), crops of a clip next to each other; V = 0 for a bad video. Pending
            ones where they were asked for.
        spans: for each view, its first and last frame in seconds from the start of the video.
    """

    video: LabelledVideo
    clips: Any
    spans: Sequence[tuple[float, float]] = ()
    error: str | None = None


class ClipDataset(Dataset[TrainingSample]):
    """One random clip of each video; keys are (epoch, index), or an index alone for the epoch that was set.

    A third number in a key gives another clip of that video in the same epoch.

    In a loop of one's own::

        loader = DataLoader(clips, batch_size=8, shuffle=True, num_workers=4, collate_fn=collate_training)
        for epoch in range(epochs):
            clips.set_epoch(epoch)  # else each epoch would have the same crops and moments
            for batch in loader: ...

    Args:
        seed: random choices depend on it, the epoch and the video alone.
        open_file: opens the file of a video.
        pending: leave resizing, normalisation and erasing to ``finish_clips``, on the model's device.

    Raises:
        ConfigError: sizes of ``augment`` are too small for the crops.
        DataError: when a sample is made, if many videos in a row can't be read.
    """

    def __init__(
        self,
        videos: Sequence[LabelledVideo],
        protocol: ClipSpec,
        augment: Augment,
        *,
        seed: int,
        open_file: OpenVideo = open_video,
        pending: bool = False,
    ) -> None:
        if augment.short_side_range is not None and augment.short_side_range[0] < protocol.crop:
            raise ConfigError(
                f"short_side_range {augment.short_side_range} is too small for crops of {protocol.crop}"
            )
        self.videos, self.protocol, self.augment, self.seed = videos, protocol, augment, seed
        self.open_file, self.pending = open_file, pending
        self.sample_nbytes = augment.repeats * _clip_nbytes(protocol)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # reaches workers that go on

    def set_epoch(self, epoch: int) -> None:
        """The epoch of keys that name none."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, ...] | int) -> TrainingSample:
        key = key if isinstance(key, tuple) else (int(self._epoch), key)
        rng = random.Random(" ".join(map(str, (self.seed, *key))))

        def read(index: int) -> Clips:
            with self.open_file(self.videos[index].path) as file:
                return read_training_clips(file, self.protocol, self.augment, rng)

        clips, index, bad = read_or_replace(read, key[1], len(self.videos), rng)
        video = self.videos[index]
        assert video.label is not None  # the index has checked it
        return TrainingSample(clips if self.pending else finish_clips(clips), video.label, bad, video.path)


def read_or_replace(
    read: Callable[[int], Made], index: int, count: int, rng: random.Random, what: str = "videos"
) -> tuple[Made, int, list[BadVideo]]:
    """What is read at an index of ``count``, or else at random ones; at which, and what couldn't be read.

    Raises DataError where many in a row can't be read.
    """
    bad: list[BadVideo] = []
    for _ in range(MAX_REPLACEMENTS):
        try:
            made = read(index)
        except VideoError as error:
            bad.append(BadVideo(error.path, error.reason))
            index = rng.randrange(count)
            continue
        return made, index, bad
    raise DataError(f"{MAX_REPLACEMENTS} {what} in a row can't be read, the last: {': '.join(bad[-1])}")


class ViewDataset(Dataset[VideoViews]):
    """All test views of each video, from one decode; ``pending`` as of ``ClipDataset``."""

    def __init__(
        self,
        videos: Sequence[LabelledVideo],
        protocol: ClipSpec,
        *,
        open_file: OpenVideo = open_video,
        pending: bool = False,
    ) -> None:
        self.videos, self.protocol, self.open_file, self.pending = videos, protocol, open_file, pending
        self.sample_nbytes = protocol.num_clips * protocol.num_crops * _clip_nbytes(protocol)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> VideoViews:
        video = self.videos[index]
        try:
            with self.open_file(video.path) as file:
                clips, spans = read_pending_views(file, self.protocol)
        except VideoError as error:
            return VideoViews(video, torch.empty(0), error=error.reason)
        return VideoViews(video, clips if self.pending else finish_clips(clips), spans)


TrainingClips, TestViews = ClipDataset, ViewDataset  # their names until version 0.2


def _clip_nbytes(protocol: ClipSpec) -> int:
    return 4 * 3 * protocol.clip_frames * protocol.crop**2  # float32 RGB


def training_loader(
    dataset: Any,
    collate: Callable[[list[Any]], Any] | None = None,
    *,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    shuffle: bool = True,
    weights: Sequence[float] | None = None,
    arrange: Callable[[list[int], int], list[int]] | None = None,
    **loading: Any,
) -> ClipLoader[Any]:
    """Batches of random clips in the order of ``EpochBatches``.

    Args:
        dataset: with a ``seed``; its keys are (epoch, index).
        collate, loading: as of ``ClipLoader``; by default labelled clips.
    """
    order: dict[str, Any] = {"shuffle": shuffle, "weights": weights, "arrange": arrange}
    batches = EpochBatches(
        len(dataset), batch_size, seed=dataset.seed, rank=rank, num_replicas=num_replicas, **order
    )
    return ClipLoader(dataset, batches, collate or collate_training, **loading)


def validation_loader(
    dataset: Any,
    collate: Callable[[list[Any]], Any] | None = None,
    *,
    batch_size: int,
    rank: int = 0,
    num_replicas: int = 1,
    **loading: Any,
) -> ClipLoader[Any]:
    """All of a data set in order, ``batch_size`` videos at a time; see ``training_loader``."""
    batches = AllVideos(len(dataset), batch_size, rank=rank, num_replicas=num_replicas)
    return ClipLoader(dataset, batches, collate or collate_views, **loading)


def collate_training(samples: list[TrainingSample]) -> Batch:
    """Versions of one clip stay next to each other, as the official mixing expects them."""
    return Batch(
        cat_clips([sample.clips for sample in samples]),
        _labels([sample.label for sample in samples for _ in sample.clips]),
        [bad for sample in samples for bad in sample.bad],
        [sample.path for sample in samples for _ in sample.clips],
    )


def collate_views(videos: list[VideoViews]) -> Batch:
    """The views of several videos, without the bad ones; a batch of bad ones alone has no clips."""
    good = [views for views in videos if views.error is None]
    labels = [views.video.label for views in good for _ in views.spans if views.video.label is not None]
    return Batch(
        cat_clips([views.clips for views in good]),
        _labels(labels),
        [BadVideo(views.video.path, views.error) for views in videos if views.error is not None],
    )


def _labels(labels: list[Label]) -> Tensor:
    rows = [torch.tensor(label, dtype=torch.int64) for label in labels]
    if any(row.ndim for row in rows):
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    return torch.tensor(labels, dtype=torch.int64)


def cat_clips(parts: Sequence[Clips]) -> Clips:
    """The clips of several samples; of none an empty tensor."""
    pending: list[PendingClips | Tensor] = []
    for part in parts:
        pending += part if isinstance(part, list) else [part]
    tensors = [part for part in pending if isinstance(part, Tensor)]
    if len(tensors) < len(pending):
        return pending
    return torch.cat(tensors) if tensors else torch.empty(0)


def in_full_batches(
    videos: Iterable[VideoViews], run: Callable[[Tensor], Tensor], batch_size: int
) -> Iterator[tuple[VideoViews, Tensor]]:
    """Send the views of many videos through a model, exactly ``batch_size`` clips at once but for the last.

    Args:
        run: makes a row for each clip of a batch (B, 3, T, H, W).

    Yields:
        Each video, in order and as soon as it is done, without its clips but with its rows (V, ...).
    """
    unfinished: deque[VideoViews] = deque()  # videos whose rows aren't complete
    clips: list[Tensor] = []  # that haven't been run; one tensor for each video
    rows: list[Tensor] = []  # that no video has got yet, one for each clip

    def finished() -> Iterator[tuple[VideoViews, Tensor]]:
        while unfinished and len(unfinished[0].spans) <= len(rows):
            views = unfinished.popleft()
            count = len(views.spans)
            yield views, torch.stack(rows[:count]) if count else torch.empty(0)
            del rows[:count]

    for views in videos:
        unfinished.append(views._replace(clips=torch.empty(0)))
        if views.error is None:
            clips.append(views.clips)
        while sum(map(len, clips)) >= batch_size:
            waiting = torch.cat(clips) if len(clips) > 1 else clips[0]
            rows += run(waiting[:batch_size])
            clips = [waiting[batch_size:]] if len(waiting) > batch_size else []
        yield from finished()
    if clips:
        rows += run(torch.cat(clips))
    yield from finished()
