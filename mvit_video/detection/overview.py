"""All about one uploaded video: the objects in it, drawn and over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from mvit_video.data.datasets import OpenVideo
from mvit_video.detection.recognizer import ObjectRecognizer, video_writer
from mvit_video.detection.writer import rows_of
from mvit_video.errors import DataError
from mvit_video.io.writing import write_json
from mvit_video.prediction.overview import NO_MAP, Demo, Overview, Progress
from mvit_video.prediction.render import plot_timeline
from mvit_video.prediction.timeline import Timeline


class ObjectDemo(Demo):
    """As ``Demo``, by a detector of objects. Its timeline has of each class the likeliest object."""

    has_choices = False
    title = "Objects"

    def __init__(
        self, recognizer: ObjectRecognizer, *, topk: int, max_seconds: float, open_file: OpenVideo
    ) -> None:
        model = cast("Any", recognizer.detector)
        super().__init__(model, topk=topk, max_seconds=max_seconds, open_file=open_file)
        self.finder, self.topk = recognizer, topk

    def answer(
        self,
        path: str | None,
        num_clips: int = 1,
        explain: str = NO_MAP,
        progress: Progress = lambda *_, **__: None,
    ) -> Overview:
        """The objects of a video; ``num_clips`` and ``explain`` say nothing here.

        Raises:
            DataError: there is no video, it is too long, or shows no object.
            VideoError: it can't be read.
        """
        if path is None:
            raise DataError("Please upload a video first")
        duration, names, every = self.check(path), self.finder.class_names, self.finder.stride
        ids = self.finder.detector.category_ids or range(len(names))
        name = self._new_files(path)
        rows: list[dict[str, Any]] = []
        spans, likeliest = [], []
        with video_writer(copy := Path(f"{name}.annotated.mp4")) as add:
            for found in self.finder.iterate(path):
                if found.error is not None or found.second is None:
                    raise DataError(found.error or "this is a picture, not a video")
                progress(found.second / max(duration, 1e-6), desc="detecting objects")
                add(found.draw(), found.second)
                rows += [row | {"file_name": Path(path).name} for row in rows_of(found, ids)]
                spans.append((found.second, found.second + every))
                best = torch.zeros(len(names))
                likeliest.append(best.scatter_reduce(0, found.labels, found.scores.float(), "amax"))
        if not rows:
            raise DataError("no object was detected in this video")
        timeline = Timeline(Path(path).name, names, spans, torch.stack(likeliest), every)
        plot_timeline(timeline, (), plot := Path(f"{name}.timeline.png"))
        write_json(json_file := Path(f"{name}.json"), {"path": Path(path).name, "objects": rows})
        scores, labels = timeline.scores.amax(0).topk(min(self.topk, len(names)))
        told = {names[label]: score for score, label in zip(scores.tolist(), labels.tolist(), strict=True)}
        return Overview(told, str(copy), str(plot), None, None, str(json_file))
