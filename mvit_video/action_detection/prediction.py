"""What the people in a film do: asked at key frames, followed from one to the next, written and drawn."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.video.frame import VideoFrame
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

from mvit_video.action_detection.annotations import Box, BoxRow, KeyFrame
from mvit_video.action_detection.boxes import clip_view, move_boxes
from mvit_video.action_detection.clips import read_clip
from mvit_video.action_detection.detector import ActionDetector
from mvit_video.action_detection.drawing import draw_people
from mvit_video.data.decode import Video
from mvit_video.errors import DataError
from mvit_video.prediction.prediction import Segment
from mvit_video.prediction.render import Picture

SHOWN = 3  # actions of a person in a picture
SAME_PERSON = 0.3  # IoU of boxes of one person at two key frames, at least

# Boxes (N, 4) in pixels and scores (N,) of the people in a picture, uint8 RGB (3, H, W).
FindPeople = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PersonActions:
    """A person at a key frame.

    Attributes:
        person: number that follows a person over key frames, from 0.
        box: shares of the picture.
        person_score: how sure it is that this is a person; None where the box was given.
        scores: of each action, by name; several may be true.
    """

    path: str
    second: float
    person: int
    box: Box
    person_score: float | None
    scores: dict[str, float]


class Follower:
    """Gives people numbers, and the same number to who stays nearly where they were."""

    def __init__(self) -> None:
        self._boxes, self._numbers, self._next = torch.empty(0, 4), list[int](), 0

    def __call__(self, boxes: Tensor) -> list[int]:
        """The number of each box (N, 4) of the next key frame."""
        overlaps = box_iou(boxes, self._boxes)
        pairs = zip(*(found.tolist() for found in linear_sum_assignment(-overlaps.numpy())), strict=True)
        before = {new: self._numbers[old] for new, old in pairs if overlaps[new, old] >= SAME_PERSON}
        fresh = itertools.count(self._next)
        self._numbers = [before[new] if new in before else next(fresh) for new in range(len(boxes))]
        self._boxes, self._next = boxes, next(fresh)
        return self._numbers


@torch.inference_mode()
def watch_people(
    detector: ActionDetector,
    video: Video,
    persons: FindPeople | Sequence[BoxRow],
    *,
    every: float = 1.0,
    min_person_score: float = 0.8,
    device: str = "cpu",
    autocast: Any,
) -> Iterator[list[PersonActions]]:
    """What people do at each key frame of a video, in order; no more than a clip is held.

    Args:
        persons: finds people in a picture, at key frames ``every`` so many seconds; or rows of this video,
            whose seconds are the key frames.
        autocast: the context that the detector runs in.

    Raises:
        VideoError: the video can't give a clip.
        DataError: the model's output isn't finite.
    """
    names, follow = _names(detector), Follower()
    height, width = video.size
    view, size = clip_view(height, width, detector.protocol, "test")
    for second, shares, found in _key_frames(video, persons, every, min_person_score):
        if not len(shares):
            follow(shares)
            continue
        frame = KeyFrame(Path(video.path).stem, video.path, second, 0.0, (), ())
        clip = read_clip(video, frame, detector.protocol, None)[None].to(device)
        boxes = move_boxes(shares, height, width, view, size)
        with autocast:
            logits = detector(clip, torch.nn.functional.pad(boxes, (1, 0)).to(device)).float().cpu()
        if not logits.isfinite().all():
            raise DataError(f"{video.path}: the model's output isn't finite; its weights are damaged")
        people = zip(follow(shares), shares.tolist(), found, logits.sigmoid().tolist(), strict=True)
        yield [
            PersonActions(video.path, second, number, tuple(box), score, dict(zip(names, row, strict=True)))
            for number, box, score, row in people
        ]


def _names(detector: ActionDetector) -> Sequence[str]:
    return detector.class_names or [str(number) for number in range(1, detector.config.num_classes + 1)]


def _key_frames(
    video: Video, persons: FindPeople | Sequence[BoxRow], every: float, min_score: float
) -> Iterator[tuple[float, Tensor, list[float | None]]]:
    """Seconds, boxes (N, 4) as shares of the picture, and how sure each of them is a person."""
    if not callable(persons):
        for second in sorted({row.second for row in persons}):
            # A row for each action: a person comes once.
            boxes = {row.text: (row.x1, row.y1, row.x2, row.y2) for row in persons if row.second == second}
            yield second, torch.tensor(list(boxes.values())), [None] * len(boxes)
        return
    scale = torch.tensor([video.width, video.height] * 2)
    for number in range(int(video.duration / every) + 1):
        second = number * every
        index = int(np.searchsorted(video.times, second + 0.5 / video.fps)) - 1
        found, scores = persons(video.get_frames([max(index, 0)])[0])
        sure = scores >= min_score
        yield second, found[sure].cpu() / scale, scores[sure].tolist()


def to_segments(people: Iterable[PersonActions], every: float, min_score: float) -> list[Segment]:
    """When who does what: neighbouring key frames of a person and an action, merged."""
    runs: dict[tuple[int, str], list[tuple[float, list[float]]]] = {}
    for one in people:
        for name, score in one.scores.items():
            if score < min_score:
                continue
            segments = runs.setdefault((one.person, name), [])
            if segments and one.second - segments[-1][0] - every * (len(segments[-1][1]) - 1) < 1.5 * every:
                segments[-1][1].append(score)
            else:
                segments.append((one.second, [score]))
    found = [
        Segment(
            max(start - every / 2, 0.0),
            start + every * (len(scores) - 0.5),
            f"person {person}: {name}",
            sum(scores) / len(scores),
        )
        for (person, name), segments in runs.items()
        for start, scores in segments
    ]
    return sorted(found, key=lambda segment: (segment.start, segment.class_name))


def to_rows(people: Iterable[PersonActions], min_score: float) -> Iterator[tuple[Any, ...]]:
    """Rows of a box file, one for each person and action."""
    for one in people:
        for number, score in enumerate(one.scores.values(), start=1):
            if score >= min_score:
                yield (Path(one.path).stem, one.second, *one.box, number, score)


def to_json(one: PersonActions, min_score: float) -> str:
    """A line of JSON, the likeliest action first."""
    likely = sorted(one.scores.items(), key=lambda pair: -pair[1])
    return json.dumps({**asdict(one), "scores": {k: v for k, v in likely if v >= min_score}}, allow_nan=False)


def people_painter(
    people: Iterable[PersonActions], *, every: float, min_score: float
) -> Callable[[Picture, float], VideoFrame]:
    """Draws people's boxes and what they do, for ``redraw_video``.

    A picture shows the people of the key frame nearest to it, if that is within ``every`` seconds.
    """
    at: dict[float, list[PersonActions]] = {}
    for one in people:
        at.setdefault(one.second, []).append(one)
    seconds = np.array(sorted(at) or [math.inf])

    def paint(picture: Picture, second: float) -> VideoFrame:
        nearest = float(seconds[np.abs(seconds - second).argmin()])
        shown = at[nearest] if abs(nearest - second) <= every else []
        height, width = (side // 2 * 2 for side in picture.shape[:2])
        boxes = torch.tensor([one.box for one in shown]).reshape(-1, 4) * torch.tensor([width, height] * 2)
        even = torch.from_numpy(picture[:height, :width].copy()).permute(2, 0, 1)
        drawn = draw_people(even, boxes, [_label(one, min_score) for one in shown])
        return VideoFrame.from_ndarray(drawn.permute(1, 2, 0).contiguous().numpy(), format="rgb24")

    return paint


def _label(one: PersonActions, min_score: float) -> str:
    likely = sorted(one.scores.items(), key=lambda pair: -pair[1])[:SHOWN]
    return f"{one.person}: " + ", ".join(f"{n} {score:.0%}" for n, score in likely if score >= min_score)
