"""All about one uploaded video: what the people in it do, drawn and over time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from av.video.frame import VideoFrame

from mvit_video.action_detection.prediction import (
    SHOWN_SCORE,
    PeopleWatcher,
    PersonActions,
    people_painter,
    to_json,
    to_segments,
)
from mvit_video.data.datasets import OpenVideo
from mvit_video.errors import DataError
from mvit_video.io.writing import write_json
from mvit_video.prediction.overview import NO_MAP, Demo, Overview, Progress
from mvit_video.prediction.render import Picture, plot_timeline, redraw_video
from mvit_video.prediction.timeline import Timeline


class ActionDemo(Demo):
    """As ``Demo``, by an action detector. Its timeline has of each action what the surest person does."""

    has_choices = False
    title = "What people do"

    def __init__(
        self, watcher: PeopleWatcher, *, topk: int, max_seconds: float, open_file: OpenVideo
    ) -> None:
        super().__init__(watcher.detector, topk=topk, max_seconds=max_seconds, open_file=open_file)
        self.watcher, self.topk = watcher, topk

    def answer(
        self,
        path: str | None,
        num_clips: int = 1,
        explain: str = NO_MAP,
        progress: Progress = lambda *_, **__: None,
    ) -> Overview:
        """What people do in a video; ``num_clips`` and ``explain`` say nothing here.

        Raises:
            DataError: there is no video, it is too long, or shows nobody.
            VideoError: it can't be read.
        """
        if path is None:
            raise DataError("Please upload a video first")
        duration, every = self.check(path), self.watcher.every
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
        plot_timeline(timeline, (), plot := Path(f"{name}.timeline.png"))

        draw = people_painter(people, every=every, min_score=SHOWN_SCORE)

        def paint(picture: Picture, second: float) -> VideoFrame:
            progress(0.7 + 0.3 * min(second / max(duration, 1e-6), 1), desc="writing the annotated video")
            return draw(picture, second)

        copy = redraw_video(path, paint, Path(f"{name}.annotated.mp4"))
        told = {
            "path": Path(path).name,
            "people": [json.loads(to_json(one, 0.0)) | {"path": Path(path).name} for one in people],
            "segments": [segment.__dict__ for segment in to_segments(people, every, SHOWN_SCORE)],
        }
        write_json(json_file := Path(f"{name}.json"), told)
        best = surest.amax(0).topk(min(self.topk, surest.shape[1]))
        scores = {timeline.class_names[i]: s for s, i in zip(*map(torch.Tensor.tolist, best), strict=True)}
        return Overview(scores, str(copy), str(plot), None, None, str(json_file))
