"""All about one uploaded video: the objects in it, drawn and over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from mvit_video.detection.recognizer import ObjectRecognizer, video_writer
from mvit_video.detection.writer import rows_of
from mvit_video.errors import DataError
from mvit_video.io.writing import write_json
from mvit_video.prediction.overview import Demo, Overview, Progress
from mvit_video.prediction.render import plot_timeline
from mvit_video.prediction.timeline import Timeline


class ObjectDemo(Demo):
    """As ``Demo``, by a detector of objects. Its timeline has of each class the likeliest object."""

    has_choices = False
    title = "Objects"

    def __init__(self, recognizer: ObjectRecognizer, **limits: Any) -> None:
        super().__init__(cast("Any", recognizer.detector), **limits)
        self.finder = recognizer

    def _overview(self, path: str, duration: float, progress: Progress, *_: Any) -> Overview:
        names, every = self.finder.class_names, self.finder.stride
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
        return Overview(self._likeliest(timeline), str(copy), str(plot), None, None, str(json_file))
