"""mvit-demo: a web page on which a video is dropped and answered. It asks nothing of other machines."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.errors import ConfigError, DataError, MVitVideoError
from mvit_video.model import VideoModel
from mvit_video.prediction.explain import write_overlay_video, write_strip
from mvit_video.prediction.recognizer import Recognizer
from mvit_video.prediction.render import annotate_video, plot_timeline

log = logging.getLogger(__name__)

NO_MAP = "none"
_HEIGHT = 360  # pixels of a video on the page
_DELETE_CACHE = (600, 3600)  # seconds: how often gradio looks, and how old its copies of files get


class Answer(NamedTuple):
    """What the page shows of a video; paths of files."""

    scores: dict[str, float]
    annotated: str
    timeline: str
    strip: str | None
    overlay: str | None
    json_file: str


class Demo:
    """Answers for the page.

    Args:
        max_seconds: longer videos are refused.
    """

    def __init__(self, model: VideoModel, *, topk: int, max_seconds: float, **recognizing: Any) -> None:
        self.model, self.topk, self.max_seconds, self.recognizing = model, topk, max_seconds, recognizing
        self._files = tempfile.TemporaryDirectory(prefix="mvit-demo-")  # of the newest answer

    def answer(self, path: str | None, num_clips: int, explain: str) -> Answer:
        """The classes of a video, as a whole and over time, and a map for ``explain`` other than "none".

        The files of an answer stay until the next one, or the end of the process.

        Raises:
            DataError: there is no video, or it is too long. VideoError: it can't be read.
        """
        if path is None:
            raise DataError("drop a video first")
        recognizer = Recognizer(self.model, topk=self.topk, num_clips=int(num_clips), **self.recognizing)
        with recognizer.open_file(path) as video:
            duration = video.duration
        if duration > self.max_seconds:
            raise DataError(
                f"the video is {duration:.0f} s long, this page takes {self.max_seconds:g} s at most; "
                "mvit-predict with window= has no limit"
            )
        (prediction,) = recognizer([path])
        if prediction.error is not None:
            raise DataError(prediction.error)
        self._files.cleanup()
        self._files = tempfile.TemporaryDirectory(prefix="mvit-demo-")
        folder, name = Path(self._files.name), Path(path).stem
        protocol = self.model.protocol
        length = protocol.clip_frames * protocol.stride / protocol.target_fps
        windows = Recognizer(self.model, topk=self.topk, num_clips=1, **self.recognizing)
        timeline = windows.timeline(path, length=length, stride=length / 4).smoothed(length / 2)
        segments = timeline.segments()
        plot_timeline(timeline, segments, folder / f"{name}.timeline.png")
        annotated = annotate_video(path, segments, folder / f"{name}.annotated.mp4")
        strip = overlay = None
        if explain != NO_MAP:
            explanation = recognizer.explain(path, method=explain)  # type: ignore[arg-type]  # a choice
            strip, overlay = folder / f"{name}.{explain}.png", folder / f"{name}.{explain}.mp4"
            write_strip(explanation, strip)
            write_overlay_video(explanation, overlay)
        told = asdict(prediction) | {"path": Path(path).name, "segments": [asdict(s) for s in segments]}
        json_file = folder / f"{name}.json"
        json_file.write_text(json.dumps(told, indent=2), encoding="utf-8")
        return Answer(
            dict(zip(prediction.classes, prediction.scores, strict=True)),
            str(annotated),
            str(folder / f"{name}.timeline.png"),
            None if strip is None else str(strip),
            None if overlay is None else str(overlay),
            str(json_file),
        )


def build_page(demo: Demo, *, title: str) -> Any:
    """The page, a ``gradio.Blocks``."""
    gradio = _gradio()

    def answer(path: str | None, num_clips: int, explain: str) -> Answer:
        try:
            return demo.answer(path, num_clips, explain)
        except MVitVideoError as error:
            reason = getattr(error, "reason", str(error))  # without the path of an uploaded copy
            raise gradio.Error(reason, print_exception=False) from None

    def show(explain: str) -> tuple[Any, ...]:
        explained = gradio.update(visible=explain != NO_MAP)
        return gradio.update(visible=True), explained, explained

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=_DELETE_CACHE) as page:
        gradio.Markdown(f"## {title}\nDrop a video; it stays on this machine.")
        with gradio.Row():
            with gradio.Column():
                video = gradio.Video(
                    label="video", sources=["upload"], include_audio=True, elem_id="video", height=_HEIGHT
                )
                num_clips = gradio.Slider(
                    1, 20, value=demo.model.protocol.num_clips, step=1, label="clips over the whole video"
                )
                explain = gradio.Radio(
                    [NO_MAP, "gradcam", "rollout"],
                    value=NO_MAP,
                    label="where it looks",
                    info="gradcam: what speaks for the class; rollout: what attention reads",
                )
                button = gradio.Button("What happens?", variant="primary", elem_id="ask")
            with gradio.Column():
                annotated = gradio.Video(
                    label="with its classes over time", interactive=False, height=_HEIGHT
                )
                scores = gradio.Label(label="classes of the whole video", elem_id="scores")
        with gradio.Column(visible=False) as more:  # wide pictures, once there are some
            picture = {
                "interactive": False,
                "type": "filepath",
                "show_label": False,
                "buttons": ["download", "fullscreen"],
            }
            gradio.Markdown("### Classes over time")
            timeline = gradio.Image(**picture)
            strip = gradio.Image(visible=False, **picture)
            overlay = gradio.Video(label="where it looks", interactive=False, visible=False, height=_HEIGHT)
            json_file = gradio.File(label="all of it as JSON")
        outputs = [scores, annotated, timeline, strip, overlay, json_file]
        answered = button.click(
            answer, [video, num_clips, explain], outputs, api_name="answer", concurrency_limit=1
        )
        answered.success(show, explain, [more, strip, overlay], api_visibility="private")
    return page


def launch(page: Any, *, host: str, port: int | None, max_megabytes: float, block: bool = True) -> Any:
    """Serve the page; returns gradio's (app, local address, None)."""
    gradio = _gradio()
    return page.launch(
        server_name=host,
        server_port=port,
        max_file_size=int(max_megabytes * 1e6),
        share=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        prevent_thread_lock=not block,
        ssr_mode=False,
        # Its own theme fetches fonts from the network.
        theme=gradio.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
    )


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"the page needs gradio ({error}): pip install 'mvit-video[demo]'") from None
    return gradio


def serve(config: DictConfig) -> None:
    """Load the model and serve the page until the process is interrupted."""
    _gradio()  # missed before the model is loaded
    if min(config.max_megabytes, config.max_seconds, config.topk) <= 0:
        raise ConfigError("max_megabytes, max_seconds and topk must be positive")
    device = app.choose_device(config.device)
    demo = Demo(
        app.build_model(config),
        topk=config.topk,
        max_seconds=config.max_seconds,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=device,
        open_file=app.build_decoder(config),
    )
    title = "What happens in a video" if config.weights else "What happens in a video (random weights)"
    page = build_page(demo, title=title)
    log.info("http://%s:%s", config.host, config.port)
    launch(page, host=config.host, port=config.port, max_megabytes=config.max_megabytes)
