"""All about one uploaded video: its classes, as a whole and over time, an explanation, and files of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mvit_video.data.datasets import OpenVideo
from mvit_video.data.decode import open_video
from mvit_video.errors import DataError
from mvit_video.io.writing import write_json
from mvit_video.model import VideoModel
from mvit_video.prediction.recognizer import Recognizer
from mvit_video.prediction.render import annotate_video, plot_timeline
from mvit_video.prediction.saving import save_explanation
from mvit_video.prediction.timeline import Timeline

NO_MAP = "none"

Progress = Callable[..., Any]  # takes a share of the work, and what comes next as desc=


class Overview(NamedTuple):
    """What is shown of a video; paths of files."""

    scores: dict[str, float]
    annotated: str
    timeline: str
    strip: str | None
    overlay: str | None
    json_file: str


class Demo:
    """Makes overviews of short videos, one after the other.

    Args:
        max_seconds: longer videos are refused.
        recognizing: as of ``Recognizer``.
    """

    has_choices = True  # of clips and of explanations
    title = "Video classification"

    def __init__(self, model: VideoModel, *, topk: int, max_seconds: float, **recognizing: Any) -> None:
        self.model, self.topk, self.max_seconds = model, topk, max_seconds
        self.recognizing = {"topk": topk, **recognizing}
        self.open_file: OpenVideo = recognizing.get("open_file", open_video)
        self._files = tempfile.TemporaryDirectory(prefix="mvit-demo-")  # of the newest overview

    def check(self, path: str) -> float:
        """The seconds of a video. Raises DataError if it is too long, VideoError if it can't be read."""
        with self.open_file(path) as video:
            duration = video.duration
        if duration > self.max_seconds:
            raise DataError(
                f"the video is {duration:.0f} s long, this page takes {self.max_seconds:g} s at most; "
                "mvit-predict with window= has no limit"
            )
        return duration

    def _new_files(self, path: str) -> Path:
        """Where an overview's files go, without suffix; those of the last one are gone then."""
        self._files.cleanup()
        self._files = tempfile.TemporaryDirectory(prefix="mvit-demo-")
        return Path(self._files.name) / Path(path).stem

    def _of_timeline(self, name: Path, timeline: Timeline, copy: Path, told: dict[str, Any]) -> Overview:
        """An overview by a timeline alone; its scores are the highest of each class in any window."""
        plot_timeline(timeline, (), plot := Path(f"{name}.timeline.png"))
        write_json(json_file := Path(f"{name}.json"), {"path": timeline.path, **told})
        best = timeline.scores.amax(0).topk(min(self.topk, len(timeline.class_names)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        scores = {timeline.class_names[index]: score for score, index in pairs}
        return Overview(scores, str(copy), str(plot), None, None, str(json_file))

    def answer(
        self,
        path: str | None,
        num_clips: int = 1,
        explain: str = NO_MAP,
        progress: Progress = lambda *_, **__: None,
    ) -> Overview:
        """What is in a video, as a whole and over time, and a map for ``explain`` other than "none".

        The files of an overview stay until the next one, or the end of the process. What ``progress`` raises
        ends the work.

        Args:
            num_clips, explain: say something where there are ``has_choices``.

        Raises:
            DataError: there is no video, it is too long, shows nothing, or its scores aren't finite.
            VideoError: it can't be read.
        """
        if path is None:
            raise DataError("Please upload a video first")
        return self._overview(path, self.check(path), progress, num_clips, explain)

    def _overview(
        self, path: str, duration: float, progress: Progress, num_clips: int, explain: str
    ) -> Overview:
        progress(0, desc="classifying")
        recognizer = Recognizer(self.model, num_clips=int(num_clips), **self.recognizing)

        def reached(second: float, start: float, share: float, desc: str) -> None:
            progress(start + share * min(second / max(duration, 1e-6), 1), desc=desc)

        (prediction,) = recognizer([path])
        if prediction.error is not None:
            raise DataError(prediction.error)
        name = self._new_files(path)
        progress(0.2, desc="classes over time")
        spec = self.model.protocol
        length = spec.clip_frames * spec.stride / spec.target_fps
        timeline = Recognizer(self.model, num_clips=1, **self.recognizing).timeline(
            path,
            length=length,
            stride=length / 4,
            progress=partial(reached, start=0.2, share=0.4, desc="classes over time"),
        )
        timeline = timeline.smoothed(length / 2)
        segments = timeline.segments()
        plot_timeline(timeline, segments, plot := Path(f"{name}.timeline.png"))
        progress(0.6, desc="writing the annotated video")
        copy = Path(f"{name}.annotated.mp4")
        told_of = partial(reached, start=0.6, share=0.3, desc="writing the annotated video")
        copy = annotate_video(path, segments, copy, max_pixels=recognizer.max_pixels, progress=told_of)
        strip = overlay = None
        if explain != NO_MAP:
            progress(0.9, desc="explaining")
            explanation = recognizer.explain(path, method=explain)  # type: ignore[arg-type]
            strip, overlay = map(str, save_explanation(explanation, name))
        told = asdict(prediction) | {"path": Path(path).name, "segments": [asdict(s) for s in segments]}
        write_json(json_file := Path(f"{name}.json"), told)
        scores = dict(zip(prediction.classes, prediction.scores, strict=True))
        return Overview(scores, str(copy), str(plot), strip, overlay, str(json_file))
