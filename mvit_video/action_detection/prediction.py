"""What the people in a film do: asked at key frames, followed, written, drawn, and shown on the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvit_video.action_detection.annotations import Box, BoxRow, KeyFrame
from mvit_video.action_detection.clips import read_key_frame
from mvit_video.action_detection.detector import ActionDetector
from mvit_video.action_detection.drawing import draw_people
from mvit_video.data.decode import Video
from mvit_video.data.pixels import finish_clips
from mvit_video.errors import DataError, VideoError
from mvit_video.prediction.follower import Follower
from mvit_video.prediction.overview import Demo, Overview, Progress
from mvit_video.prediction.prediction import NOT_FINITE, Segment
from mvit_video.prediction.recognizer import prefetch
from mvit_video.prediction.render import Paint, Picture, redraw_video
from mvit_video.prediction.stream import Source, iter_windows
from mvit_video.prediction.timeline import Timeline

SHOWN = 3  # actions of a person in a picture
SHOWN_SCORE = 0.5  # of what subtitles and copies tell, at least

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

    def likely(self, min_score: float) -> PersonActions:
        """The same without what is less likely, the likeliest action first."""
        best = sorted(self.scores.items(), key=lambda pair: -pair[1])
        return replace(self, scores={name: score for name, score in best if score >= min_score})


@dataclass(frozen=True)
class PeopleWatcher:
    """Says what the people in a film do at key frames, and follows them from one to the next.

    Attributes:
        find: detects people in a picture; None: their boxes are given.
        every: seconds from one key frame to the next where people are detected.
        min_person_score: people detected with a lower score are left out.
        autocast: the context that the detector runs in.
    """

    detector: ActionDetector
    find: FindPeople | None = None
    every: float = 1.0
    min_person_score: float = 0.8
    device: str = "cpu"
    autocast: Any = field(default_factory=nullcontext)

    def key_seconds(self, video: Video, rows: Iterable[BoxRow] = ()) -> list[float]:
        """Seconds of a video's key frames: those of ``rows``, or every ``every`` seconds."""
        if self.find is None:
            return sorted({row.second for row in rows})
        return [number * self.every for number in range(int(video.times[-1] / self.every + 1e-6) + 1)]

    def watch(self, video: Video, rows: Sequence[BoxRow] = ()) -> Iterator[list[PersonActions]]:
        """What people do at each key frame of a video, in order; no more than a clip is held.

        Args:
            rows: of this video, where people aren't detected.

        Raises:
            VideoError: the video can't give a clip, or the model's output isn't finite.
        """
        given: dict[float, dict[tuple[str, ...], Box]] = {}
        for row in rows:  # one for each action: a person comes once
            given.setdefault(row.second, {})[row.text] = (row.x1, row.y1, row.x2, row.y2)
        follow = Follower()
        for second in self.key_seconds(video, rows):
            people = None if self.find else torch.tensor(list(given[second].values()))
            yield self._recognize(video, second, second, follow, people)

    def watch_stream(
        self, source: Source, *, follow: float | None = None, drop: bool = False, **opening: Any
    ) -> Iterator[list[PersonActions]]:
        """The same of a stream, a camera, a pipe or a file that is read once, as soon as each clip was seen.

        Key frames are the middles of clips that start every ``every`` seconds. Arguments and errors: see
        ``Recognizer.watch``; ``opening`` as of ``iter_windows``.
        """
        spec, follower = self.detector.protocol, Follower()
        length = spec.clip_frames * spec.stride / spec.target_fps
        clips: Any = iter_windows(source, length=length, stride=self.every, follow=follow, **opening)
        for clip in prefetch(clips, 1, drop=drop):
            middle = min(length / 2, float(clip.times[-1]))
            yield self._recognize(clip, middle, clip.start + middle, follower)

    @torch.inference_mode()
    def _recognize(
        self, video: Video, at: float, second: float, follow: Follower, people: Tensor | None = None
    ) -> list[PersonActions]:
        """What people (N, 4), else detected ones, do ``at`` a second of a video, called ``second``."""
        height, width = video.size
        certain: list[float | None] = [None] * (0 if people is None else len(people))
        if people is None:
            assert self.find is not None
            index = int(np.searchsorted(video.times, at + 0.5 / video.fps)) - 1
            found, scores = self.find(video.get_frames([max(index, 0)])[0])
            sure = scores >= self.min_person_score
            people, certain = found[sure] / torch.tensor([width, height] * 2), scores[sure].tolist()
        numbers, names = follow(people), self.detector.class_names
        if not numbers:
            return []
        given: Any = people.tolist()
        frame = KeyFrame(Path(video.path).stem, video.path, at, 0.0, given, ())
        clip, boxes = read_key_frame(video, frame, self.detector.protocol)
        with self.autocast:
            logits = self.detector(finish_clips(clip, self.device), boxes.to(self.device)).float().cpu()
        if not logits.isfinite().all():
            raise VideoError(video.path, NOT_FINITE)
        names = names or tuple(str(number) for number in range(1, logits.shape[1] + 1))
        rows = zip(numbers, given, certain, logits.sigmoid().tolist(), strict=True)
        return [
            PersonActions(video.path, second, number, tuple(box), score, dict(zip(names, row, strict=True)))
            for number, box, score, row in rows
        ]


def to_segments(people: Iterable[PersonActions], every: float, min_score: float) -> list[Segment]:
    """When who does what: neighbouring key frames of a person and an action, merged."""
    runs: dict[tuple[int, str], list[tuple[float, list[float]]]] = {}
    for one in people:
        for name, score in one.likely(min_score).scores.items():
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
    return json.dumps(asdict(one.likely(min_score)), allow_nan=False)


def people_painter(people: Iterable[PersonActions], *, every: float, min_score: float) -> Paint:
    """Draws people's boxes and what they do, for ``redraw_video``.

    A picture shows the people of the key frame nearest to it, if that is within ``every`` seconds.
    """
    at: dict[float, list[PersonActions]] = {}
    for one in people:
        at.setdefault(one.second, []).append(one)
    seconds = np.array(sorted(at) or [math.inf])

    def paint(picture: Picture, second: float) -> Picture:
        nearest = float(seconds[np.abs(seconds - second).argmin()])
        shown = at[nearest] if abs(nearest - second) <= every else []
        height, width = picture.shape[:2]
        boxes = torch.tensor([one.box for one in shown]).reshape(-1, 4) * torch.tensor([width, height] * 2)
        texts = [to_text(one, min_score) for one in shown]
        return draw_people(torch.from_numpy(picture).permute(2, 0, 1), boxes, texts).permute(1, 2, 0).numpy()

    return paint


def to_text(one: PersonActions, min_score: float, most: int = SHOWN) -> str:
    """A person's number and likeliest actions."""
    likely = islice(one.likely(min_score).scores.items(), most)
    return f"{one.person}: " + ", ".join(f"{name} {score:.0%}" for name, score in likely)


class ActionDemo(Demo):
    """As ``Demo``, by an action detector. Its timeline has of each action what the surest person does."""

    has_choices = False
    title = "What people do"

    def __init__(self, watcher: PeopleWatcher, **limits: Any) -> None:
        super().__init__(watcher.detector, **limits)
        self.watcher = watcher

    def _overview(self, path: str, duration: float, progress: Progress, *_: Any) -> Overview:
        every = self.watcher.every
        people: list[PersonActions] = []
        with self.open_file(path) as video:
            seconds = self.watcher.key_seconds(video)
            for second, found in zip(seconds, self.watcher.watch(video), strict=True):
                progress(0.7 * second / max(duration, 1e-6), desc="watching people")
                people += found
        if not people:
            raise DataError("nobody was detected in this video")
        name = self._new_files(path)
        surest = torch.zeros(len(seconds), len(people[0].scores))
        for one in people:
            row = seconds.index(one.second)
            surest[row] = surest[row].maximum(torch.tensor(list(one.scores.values())))
        spans = [(second - every / 2, second + every / 2) for second in seconds]
        timeline = Timeline(Path(path).name, tuple(people[0].scores), spans, surest, every)

        def reached(second: float) -> None:
            progress(0.7 + 0.3 * min(second / max(duration, 1e-6), 1), desc="writing the annotated video")

        painter = people_painter(people, every=every, min_score=SHOWN_SCORE)
        copy = redraw_video(path, painter, Path(f"{name}.annotated.mp4"), progress=reached)
        told = {
            "people": [asdict(one.likely(0.0)) | {"path": Path(path).name} for one in people],
            "segments": [asdict(segment) for segment in to_segments(people, every, SHOWN_SCORE)],
        }
        return self._of_timeline(name, timeline, copy, told)
