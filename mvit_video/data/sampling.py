"""Which frames and which pixels a view of a video is made of: integers in, integers out, no video needed.

The test plans are PySlowFast's, whose published accuracies they are meant to reproduce. A random plan depends
on its `random.Random` alone, so a seed gives the same plan in any process or thread. Frame numbers lie in
[0, num_frames) and don't decrease. ValueError names an argument that is out of range.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

import torch


def kinetics_frame_indices(
    num_frames: int,
    fps: float,
    *,
    clip_frames: int = 16,
    stride: int = 4,
    num_clips: int = 5,
    target_fps: float = 30.0,
    use_offset: bool = True,
) -> list[list[int]]:
    """Frame numbers of the `num_clips` test clips of one video, as PySlowFast spreads them.

    A clip spans `clip_frames * stride` frames of a `target_fps` video, that is `* fps / target_fps` frames of
    this one (51.2 at 24 fps for 16 x 4). Its last index is the span's last frame, so 16 x 4 at 30 fps is
    0, 4, 8, 12, 16, 21, ..., 63 and not every fourth frame. A video shorter than the span starts at 0 and
    repeats its last frame.

    Args:
        num_frames: frames in the video.
        fps: its frames per second.
        use_offset: True (all published Kinetics results) starts clip c at `c * floor(room / (num_clips - 1))`
            and a single clip at `floor(room / 2)`, where room is what the span leaves of the video. False
            starts it at `c * room / num_clips`.

    Returns:
        `num_clips` lists of `clip_frames` numbers in [0, num_frames).

    Raises:
        ValueError: an argument is not positive.
    """
    _require_positive(num_frames=num_frames, num_clips=num_clips)
    span = _span(fps, clip_frames, stride, target_fps)
    room = max(num_frames - span, 0.0)
    if not use_offset:
        starts = [room * clip / num_clips for clip in range(num_clips)]
    elif num_clips == 1:
        starts = [float(math.floor(room / 2))]
    else:
        starts = [float(clip * math.floor(room / (num_clips - 1))) for clip in range(num_clips)]
    return [_clip_indices(num_frames, start, span, clip_frames, stride) for start in starts]


def random_frame_indices(
    num_frames: int,
    fps: float,
    *,
    clip_frames: int,
    stride: int,
    target_fps: float = 30.0,
    rng: random.Random,
) -> list[int]:
    """Frame numbers of one training clip: a span as in `kinetics_frame_indices`, starting anywhere."""
    _require_positive(num_frames=num_frames)
    span = _span(fps, clip_frames, stride, target_fps)
    start = rng.uniform(0.0, max(num_frames - span, 0.0))
    return _clip_indices(num_frames, start, span, clip_frames, stride)


def segment_frame_indices(num_frames: int, *, clip_frames: int = 16) -> list[int]:
    """Frame numbers of the test clip of Something-Something v2: the middle of each of `clip_frames` segments.

    Returns:
        `clip_frames` numbers in [0, num_frames), not decreasing; a video with fewer frames repeats some.

    Raises:
        ValueError: an argument is not positive.
    """
    return [(first + last) // 2 for first, last in _segments(num_frames, clip_frames)]


def random_segment_frame_indices(num_frames: int, *, clip_frames: int, rng: random.Random) -> list[int]:
    """Frame numbers of one training clip of Something-Something v2: a random frame of each segment.

    Neighbouring segments share their border frame, so a frame can come twice.
    """
    return [rng.randint(first, last) for first, last in _segments(num_frames, clip_frames)]


def torchvision_frame_indices(
    num_frames: int, fps: float, *, clip_frames: int = 16, frame_rate: float = 7.5, num_clips: int = 5
) -> list[list[int]]:
    """Frame numbers of the test clips as torchvision's reference spreads them, for its own weights.

    The video is thinned to `frame_rate` frames per second; of all runs of `clip_frames` neighbours in it,
    `num_clips` are taken at equal distances, the first and the last included (VideoClips and
    UniformClipSampler). The reference leaves videos out that are too short for a run; here the last frame is
    repeated.
    """
    _require_positive(
        num_frames=num_frames, fps=fps, clip_frames=clip_frames, frame_rate=frame_rate, num_clips=num_clips
    )
    step = fps / frame_rate
    whole = step.is_integer()
    count = math.ceil(num_frames / step) if whole else max(math.floor(num_frames * frame_rate / fps), 1)
    starts = torch.linspace(0, max(count - clip_frames, 0), num_clips, device="cpu").long()
    positions = (starts[:, None] + torch.arange(clip_frames, device="cpu")).clamp_(max=count - 1)
    # float32 and truncation, as there
    indices: list[list[int]] = (
        positions * int(step) if whole else (positions.float() * step).long()
    ).tolist()
    return indices


@dataclass(frozen=True)
class SpatialView:
    """Resize the whole frame, then take a `crop` x `crop` square of the result, then mirror. In pixels."""

    resized_height: int
    resized_width: int
    top: int
    left: int
    crop: int
    flip: bool = False


@dataclass(frozen=True)
class CropBox:
    """Take this box of the source frame, then resize it to the network's size, then mirror. In source pixels.

    Not a `SpatialView`: the resize of a box never sees the pixels outside it.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def spatial_views(
    height: int, width: int, *, short_side: int = 256, crop: int = 224, num_crops: int = 1
) -> list[SpatialView]:
    """The test crops of a frame of `height` x `width` pixels, as PySlowFast places them.

    The shorter side becomes `short_side`, the longer one keeps the ratio and is rounded down. One crop is the
    centre; three are the start, centre and end of the longer side (of the width in a square frame), centred
    along the other side. A centre that falls between two pixels takes the later one.

    Raises:
        ValueError: a size is not positive, `crop` exceeds `short_side`, or `num_crops` is neither 1 nor 3.
    """
    if num_crops not in (1, 3):
        raise ValueError(f"num_crops is {num_crops}; allowed are 1 (centre) and 3 (along the longer side)")
    _require_crop_fits(crop, short_side)
    resized_height, resized_width = _resized(height, width, short_side)
    top, left = _centred(resized_height, crop), _centred(resized_width, crop)
    if num_crops == 1:
        corners = [(top, left)]
    elif resized_height > resized_width:
        corners = [(0, left), (top, left), (resized_height - crop, left)]
    else:
        corners = [(top, 0), (top, left), (top, resized_width - crop)]
    return [SpatialView(resized_height, resized_width, *corner, crop) for corner in corners]


def torchvision_spatial_view(height: int, width: int, *, short_side: int, crop: int) -> SpatialView:
    """The centre crop of torchvision's presets: an offset between two pixels goes to the even one."""
    _require_crop_fits(crop, short_side)
    _require_positive(height=height, width=width)
    long_side = int(short_side * max(height, width) / min(height, width))
    rows, columns = (short_side, long_side) if height <= width else (long_side, short_side)
    return SpatialView(rows, columns, round((rows - crop) / 2), round((columns - crop) / 2), crop)


def random_short_side_crop(
    height: int,
    width: int,
    *,
    short_sides: tuple[int, int] = (256, 320),
    crop: int = 224,
    flip_probability: float = 0.0,
    rng: random.Random,
) -> SpatialView:
    """A training view by scale jitter: a random short side in `short_sides` (both included), a random crop.

    The inverse of the short side is what is drawn uniformly, which makes small sizes likelier. Mirroring is
    off unless asked for: the classes of Something-Something v2 tell left from right.
    """
    smallest, largest = _ordered("short_sides", short_sides)
    _require_crop_fits(crop, smallest)
    _require_probability(flip_probability)
    short_side = round(1.0 / rng.uniform(1.0 / largest, 1.0 / smallest))
    resized_height, resized_width = _resized(height, width, short_side)
    top, left = rng.randint(0, resized_height - crop), rng.randint(0, resized_width - crop)
    return SpatialView(resized_height, resized_width, top, left, crop, rng.random() < flip_probability)


def random_resized_crop(
    height: int,
    width: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
    rng: random.Random,
) -> CropBox:
    """A training box with a random share of the frame's area and a random width / height (log-uniform).

    Ten draws; if none fits inside the frame, the largest centred box whose ratio lies within `aspect`. These
    are the semantics of torchvision's RandomResizedCrop and of PySlowFast.
    """
    _require_positive(height=height, width=width)
    smallest, largest = _ordered("area", area)
    if largest > 1:
        raise ValueError(f"area is {area}; a share of the frame is at most 1")
    narrowest, widest = _ordered("aspect", aspect)
    _require_probability(flip_probability)
    for _ in range(10):
        pixels = height * width * rng.uniform(smallest, largest)
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        box_height, box_width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
            break
    else:
        box_height = min(height, max(round(width / narrowest), 1))
        box_width = min(width, max(round(height * widest), 1))
        top, left = (height - box_height) // 2, (width - box_width) // 2
    return CropBox(top, left, box_height, box_width, rng.random() < flip_probability)


def _span(fps: float, clip_frames: int, stride: int, target_fps: float) -> float:
    _require_positive(fps=fps, clip_frames=clip_frames, stride=stride, target_fps=target_fps)
    return stride * clip_frames / target_fps * fps  # in PySlowFast's order: its floats are floored later


def _clip_indices(num_frames: int, start: float, span: float, clip_frames: int, stride: int) -> list[int]:
    # PySlowFast decodes a short video whole, but reads only the frames shown within [start, start + span - 1]
    # of a longer one and counts from the first of them. "Short" ignores the frame rate.
    if num_frames <= clip_frames * stride:
        first, last = 0, num_frames - 1
        offset = start
    else:
        # The start is cut to whole ticks of the container's clock, which forgives a rounding error above an
        # integer (4.2 * 5 = 21.000000000000004 still shows frame 21).
        first = min(math.ceil(start - 1e-4), num_frames - 1)
        last = min(max(math.floor(start + span - 1), first), num_frames - 1)
        offset = 0.0
    # float32 and truncation, as there: 16.8 or 21.0 on the way decides between two frames.
    positions = torch.linspace(offset, offset + span - 1, clip_frames, dtype=torch.float32, device="cpu")
    return [first + min(max(int(position), 0), last - first) for position in positions.tolist()]


def _segments(num_frames: int, clip_frames: int) -> list[tuple[int, int]]:
    """First and last frame of each segment, both included; `round` takes a half to the even neighbour."""
    _require_positive(num_frames=num_frames, clip_frames=clip_frames)
    length = (num_frames - 1) / clip_frames
    borders = [round(length * index) for index in range(clip_frames + 1)]
    return list(pairwise(borders))


def _resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    _require_positive(height=height, width=width)
    if min(height, width) == short_side:  # 113 / 100 * 100 would be floored to 112
        return height, width
    if height > width:
        return math.floor(height / width * short_side), short_side
    return short_side, math.floor(width / height * short_side)


def _centred(length: int, crop: int) -> int:
    return math.ceil((length - crop) / 2)


def _ordered(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    lower, upper = bounds
    if not 0 < lower <= upper < math.inf:
        raise ValueError(f"{name} is {bounds}; expected two positive numbers, the smaller one first")
    return lower, upper


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be positive and finite")


def _require_crop_fits(crop: int, short_side: float) -> None:
    _require_positive(crop=crop)
    if crop > short_side:
        raise ValueError(f"crop is {crop}; it must not exceed the short side, {short_side}")


def _require_probability(flip_probability: float) -> None:
    if not 0 <= flip_probability <= 1:
        raise ValueError(f"flip_probability is {flip_probability}; allowed is 0 to 1")
