"""All about one uploaded video: what the people in it do, drawn and over time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mvit_video.action_detection.prediction import (
    SHOWN_SCORE,
    PeopleWatcher,
    PersonActions,
    people_painter,
    to_segments,
)
from mvit_video.errors import DataError
from mvit_video.io.writing import write_json
from mvit_video.prediction.overview import Demo, Overview, Progress
from mvit_video.prediction.render import plot_timeline, redraw_video
from mvit_video.prediction.timeline import Timeline


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
        plot_timeline(timeline, (), plot := Path(f"{name}.timeline.png"))

        def reached(second: float) -> None:
            progress(0.7 + 0.3 * min(second / max(duration, 1e-6), 1), desc="writing the annotated video")

        painter = people_painter(people, every=every, min_score=SHOWN_SCORE)
        copy = redraw_video(path, painter, Path(f"{name}.annotated.mp4"), progress=reached)
        told = {
            "path": Path(path).name,
            "people": [asdict(one.likely(0.0)) | {"path": Path(path).name} for one in people],
            "segments": [asdict(segment) for segment in to_segments(people, every, SHOWN_SCORE)],
        }
        write_json(json_file := Path(f"{name}.json"), told)
        return Overview(self._likeliest(timeline), str(copy), str(plot), None, None, str(json_file))
