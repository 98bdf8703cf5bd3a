"""Clips around key frames with the boxes of their people: planned, decoded once, transformed."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mvit_video.action_detection.annotations import KeyFrame
from mvit_video.action_detection.boxes import PixelSplit, clip_view, key_frame_indices, move_boxes
from mvit_video.data.datasets import BadVideo, OpenVideo, cat_clips, read_or_replace
from mvit_video.data.decode import Video, open_video
from mvit_video.data.pixels import Clips, PendingClips, cut_and_resize, finish_clips, normalise
from mvit_video.data.sampling import SpatialView
from mvit_video.errors import VideoError
from mvit_video.model.clip_spec import ClipSpec

_SLACK = 1e-6  # frames: of a time that lies in the middle between two
_GREY = (0.299, 0.587, 0.114)  # shares of red, green and blue
# Principal components of ImageNet's colours (rows: red, green, blue) and their strengths, as in PySlowFast.
_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_STRENGTHS = (0.225, 0.224, 0.229)


@dataclass(frozen=True)
class ActionAugment:
    """How training clips with people are varied, as PySlowFast varies AVA's.

    Attributes:
        short_side_range, flip_probability: see ``clip_view``.
        colour_jitter: brightness, contrast and saturation change by factors of at most 1 +- this, in random
            order; PySlowFast has 0.4, turned off.
        lighting: standard deviation of what is added along the colours' principal components; PySlowFast has
            0.1, turned off.
    """

    short_side_range: tuple[int, int] | None = None
    flip_probability: float = 0.5
    colour_jitter: float = 0.0
    lighting: float = 0.0


class Colours(NamedTuple):
    """A change of all colours of a clip."""

    factors: tuple[tuple[str, float], ...] = ()  # of brightness, contrast and saturation, in their order
    shift: tuple[float, ...] = (0.0, 0.0, 0.0)  # of red, green and blue, in 255ths

    @classmethod
    def draw(cls, augment: ActionAugment, rng: random.Random) -> Colours:
        """A random one."""
        strength, colours = augment.colour_jitter, cls()
        if strength:
            kinds = rng.sample(("brightness", "contrast", "saturation"), 3)
            factors = tuple((kind, 1 + rng.uniform(-strength, strength)) for kind in kinds)
            colours = colours._replace(factors=factors)
        if augment.lighting:
            along = [rng.gauss(0, augment.lighting) * own for own in _STRENGTHS]
            shift = tuple(255 * sum(map(operator.mul, row, along)) for row in _COMPONENTS)
            colours = colours._replace(shift=shift)
        return colours

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) from 0 to 255 and, as in PySlowFast, beyond."""
        for kind, factor in self.factors:
            grey = torch.einsum("nchw,c->nhw", frames, frames.new_tensor(_GREY))[:, None]
            against = {
                "brightness": 0 * grey,
                "contrast": grey.mean((2, 3), keepdim=True),
                "saturation": grey,
            }
            frames = torch.lerp(against[kind], frames, factor)
        return frames + frames.new_tensor(self.shift)[:, None, None] if any(self.shift) else frames


class ActionBatch(NamedTuple):
    """Clips of one size with their people, and videos that gave none; samples are batches of one."""

    clips: Any  # float (B, 3, T, H, W); ``Clips`` until they are where the model is
    boxes: Tensor  # float (R, 5): clip, x1, y1, x2, y2 in pixels
    targets: Tensor  # float (R, num_classes), 1 for what is done
    key_frames: list[KeyFrame]
    bad: list[BadVideo]

    @property
    def paths(self) -> list[str]:
        return [frame.path for frame in self.key_frames]


class ActionClips(Dataset[ActionBatch]):
    """The clip around each key frame; keys are (epoch, index), or an index where nothing is random.

    Args:
        split: which pixels are seen, see ``clip_view``. In "train" a bad video is replaced by another.
        augment: of "train".
        seed: random choices depend on it, the epoch and the index alone.
        pending: leave what comes after decoding to ``finish_clips``, on the model's device.

    Raises, when a sample is made:
        ConfigError: ``short_side_range`` are smaller than the crop.
        DataError: in "train", many videos in a row can't be read.
    """

    def __init__(
        self,
        key_frames: Sequence[KeyFrame],
        spec: ClipSpec,
        num_classes: int,
        split: PixelSplit,
        *,
        augment: ActionAugment = ActionAugment(),
        seed: int = 0,
        open_file: OpenVideo = open_video,
        pending: bool = False,
    ) -> None:
        self.key_frames, self.spec, self.num_classes, self.split = key_frames, spec, num_classes, split
        self.augment, self.seed, self.open_file = augment, seed, open_file
        self.pending = pending
        side = spec.short_side if split == "test" else spec.crop
        self.sample_nbytes = 4 * 3 * spec.clip_frames * side * side * (2 if split == "test" else 1)

    def __len__(self) -> int:
        return len(self.key_frames)

    def __getitem__(self, key: tuple[int, int] | int) -> ActionBatch:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = random.Random(f"{self.seed} {epoch} {index}")

        def read(index: int) -> tuple[Clips, Tensor]:
            frame = self.key_frames[index]
            with self.open_file(frame.path) as video:
                clip, boxes = read_key_frame(video, frame, self.spec, self.split, self.augment, rng)
            return clip if self.pending else finish_clips(clip), boxes

        bad: list[BadVideo] = []
        if self.split == "train":
            (clip, boxes), index, bad = read_or_replace(read, index, len(self.key_frames), rng)
        else:
            try:
                clip, boxes = read(index)
            except VideoError as error:
                bad = [BadVideo(error.path, error.reason)]
                return ActionBatch(torch.empty(0), torch.empty(0, 5), torch.empty(0), [], bad)
        targets = torch.zeros(len(boxes), self.num_classes)
        for row, ids in enumerate(self.key_frames[index].class_ids):
            targets[row, [number - 1 for number in ids]] = 1
        return ActionBatch(clip, boxes, targets, [self.key_frames[index]], bad)


def read_key_frame(
    video: Video,
    frame: KeyFrame,
    spec: ClipSpec,
    split: PixelSplit = "test",
    augment: ActionAugment = ActionAugment(),
    rng: random.Random | None = None,
) -> tuple[list[PendingClips | Tensor], Tensor]:
    """The clip around a key frame, see ``read_clip``, and its people's boxes as ``ActionBatch`` has them.

    Args:
        split, rng: see ``clip_view``.
    """
    sides, flip_probability = augment.short_side_range, augment.flip_probability
    how: dict[str, Any] = {"short_side_range": sides, "flip_probability": flip_probability, "rng": rng}
    view, size = clip_view(*video.size, spec, split, **how)
    boxes = move_boxes(torch.tensor(frame.boxes).reshape(-1, 4), *video.size, view, size)
    colours = Colours.draw(augment, rng) if split == "train" and rng else Colours()
    return read_clip(video, frame, spec, view, size, colours), F.pad(boxes, (1, 0))


def read_clip(
    video: Video,
    frame: KeyFrame,
    spec: ClipSpec,
    view: SpatialView,
    size: tuple[int, int],
    colours: Colours = Colours(),  # noqa: B008 (immutable)
) -> list[PendingClips | Tensor]:
    """The clip around a key frame, what is seen by a view of (height, width) ``size``: (1, 3, T, H, W).

    It is pending where the pictures' bytes aren't more than the floats of the clip.

    Raises:
        VideoError: the file can't give it.
    """
    look = partial(_look, view=view, size=size, colours=colours, spec=spec)
    numbers = frame_numbers(frame, video.times, spec)
    if math.prod(video.size) <= 4 * math.prod(size):
        return [PendingClips(video.get_frames(numbers), partial(_to_clips, look=look))]
    return [video.get_frames(numbers, transform=look).transpose(0, 1)[None]]


def _look(
    frames: Tensor, *, view: SpatialView, size: tuple[int, int], colours: Colours, spec: ClipSpec
) -> Tensor:
    return normalise(colours(cut_and_resize(frames, view, size)), spec.mean, spec.std)


def _to_clips(frames: Tensor, *, look: Callable[[Tensor], Tensor]) -> Tensor:
    return look(frames).transpose(0, 1)[None]


def frame_numbers(frame: KeyFrame, times: Sequence[float] | np.ndarray, spec: ClipSpec) -> list[int]:
    """The frames around a key frame, ``spec.clip_frames`` of them.

    Strides count in a video of ``spec.target_fps``; of another one the frames are taken that FFmpeg's ``-r``
    would show there.

    Args:
        times: seconds of all frames of the video since the first.

    Raises:
        VideoError: the video isn't shown at that second.
    """
    fps = spec.target_fps
    ticks = np.asarray(times) * fps
    num_frames, center = round(float(ticks[-1])) + 1, round((frame.second - frame.start) * fps)
    if not 0 <= center <= num_frames + fps:
        last = frame.start + num_frames / fps
        raise VideoError(
            frame.path,
            f"second {frame.second:g} was asked of a video from {frame.start:g} to {last:g}; is "
            "data.start_second right?",
        )
    around = key_frame_indices(
        center, half_length=spec.clip_frames * spec.stride // 2, stride=spec.stride, num_frames=num_frames
    )
    shown = np.searchsorted(ticks, np.array(around[: spec.clip_frames]) + 0.5 - _SLACK) - 1
    return [max(int(index), 0) for index in shown]


def collate(samples: Sequence[ActionBatch]) -> ActionBatch:
    """Samples of one size as a batch; bad videos leave no clip."""
    bad = [bad for sample in samples for bad in sample.bad]
    good = [sample for sample in samples if len(sample.clips)]
    if not good:
        return ActionBatch(torch.empty(0), torch.empty(0, 5), torch.empty(0), [], bad)
    clips, boxes, targets, key_frames, _ = zip(*good, strict=True)
    rows = [own + own.new_tensor([number, 0, 0, 0, 0]) for number, own in enumerate(boxes)]
    return ActionBatch(cat_clips(clips), torch.cat(rows), torch.cat(targets), list(chain(*key_frames)), bad)
