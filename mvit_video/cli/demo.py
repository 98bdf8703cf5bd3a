"""mvit-demo: a web page that classifies an uploaded video. It asks nothing of other machines."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable
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
_METHODS = [("none", NO_MAP), ("Grad-CAM", "gradcam"), ("attention rollout", "rollout")]
_HEIGHT = 360  # pixels of a video on the page
_DELETE_CACHE = (600, 3600)  # seconds: how often gradio looks, and how old its copies of files get
_FOCUS = "input:focus-visible { outline: 3px solid currentColor; outline-offset: 2px }"

Progress = Callable[..., Any]  # takes a share of the work, and what comes next as desc=


class Answer(NamedTuple):
    """What the page shows of a video; paths of files."""

    scores: dict[str, float]
    annotated: str
    timeline: str
    strip: str | None
    overlay: str | None
    json_file: str


class Demo:
    """Predictions for the page.

    Args:
        max_seconds: longer videos are refused.
    """

    def __init__(self, model: VideoModel, *, topk: int, max_seconds: float, **recognizing: Any) -> None:
        self.model, self.topk, self.max_seconds, self.recognizing = model, topk, max_seconds, recognizing
        self._files = tempfile.TemporaryDirectory(prefix="mvit-demo-")  # of the newest answer

    def answer(
        self, path: str | None, num_clips: int, explain: str, progress: Progress = lambda *_, **__: None
    ) -> Answer:
        """The classes of a video, as a whole and over time, and a map for ``explain`` other than "none".

        The files of an answer stay until the next one, or the end of the process.

        Raises:
            DataError: there is no video, it is too long, or its scores aren't finite.
            VideoError: it can't be read.
        """
        if path is None:
            raise DataError("Please upload a video first")
        progress(0, desc="classifying")
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
        name = Path(self._files.name) / Path(path).stem
        spec = self.model.protocol
        length = spec.clip_frames * spec.stride / spec.target_fps
        windows = Recognizer(self.model, topk=self.topk, num_clips=1, **self.recognizing)
        progress(0.2, desc="classes over time")
        timeline = windows.timeline(path, length=length, stride=length / 4).smoothed(length / 2)
        segments = timeline.segments()
        plot_timeline(timeline, segments, plot := Path(f"{name}.timeline.png"))
        progress(0.6, desc="writing the annotated video")
        annotated = annotate_video(path, segments, Path(f"{name}.annotated.mp4"))
        strip = overlay = None
        if explain != NO_MAP:
            progress(0.9, desc="explaining")
            explanation = recognizer.explain(path, method=explain)  # type: ignore[arg-type]  # a choice
            strip, overlay = f"{name}.{explain}.png", f"{name}.{explain}.mp4"
            write_strip(explanation, Path(strip))
            write_overlay_video(explanation, Path(overlay))
        told = asdict(prediction) | {"path": Path(path).name, "segments": [asdict(s) for s in segments]}
        json_file = Path(f"{name}.json")
        json_file.write_text(json.dumps(told, indent=2, allow_nan=False), encoding="utf-8")
        scores = dict(zip(prediction.classes, prediction.scores, strict=True))
        return Answer(scores, str(annotated), str(plot), strip, overlay, str(json_file))


def build_page(demo: Demo, *, title: str) -> Any:
    """The page, a ``gradio.Blocks``."""
    gradio = _gradio()

    def answer(path: str | None, num_clips: int, explain: str, progress: Any = gradio.Progress()) -> Answer:  # noqa: B008
        try:
            return demo.answer(path, num_clips, explain, progress)
        except MVitVideoError as error:
            reason = getattr(error, "reason", str(error))  # without the path of an uploaded copy
            raise gradio.Error(reason, print_exception=False) from None

    def show(explain: str) -> tuple[Any, ...]:
        explained = gradio.update(visible=explain != NO_MAP)
        return gradio.update(visible=True), explained, explained

    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=_DELETE_CACHE) as page:
        gradio.Markdown(f"## {title}\nUpload a video; it stays on this machine.")
        with gradio.Row():
            with gradio.Column():
                video = gradio.Video(
                    label="video", sources=["upload"], include_audio=True, elem_id="video", height=_HEIGHT
                )
                num_clips = gradio.Slider(
                    1, 20, value=demo.model.protocol.num_clips, step=1, label="clips over the whole video"
                )
                info = "Grad-CAM: evidence for the class; attention rollout: what the attention passes on"
                explain = gradio.Radio(_METHODS, value=NO_MAP, label="Explanation", info=info)
                button = gradio.Button("Classify", variant="primary", elem_id="ask", interactive=False)
            with gradio.Column():
                annotated = gradio.Video(label="annotated video", interactive=False, height=_HEIGHT)
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
            overlay = gradio.Video(label="explanation", interactive=False, visible=False, height=_HEIGHT)
            json_file = gradio.File(label="prediction as JSON")
        outputs = [scores, annotated, timeline, strip, overlay, json_file]
        inputs = [video, num_clips, explain]
        video.change(
            lambda path: gradio.update(interactive=path is not None), video, button, api_visibility="private"
        )
        answered = button.click(
            answer, inputs, outputs, api_name="answer", concurrency_limit=1, show_progress_on=annotated
        )
        answered.success(show, explain, [more, strip, overlay], api_visibility="private")
    page.preprocess_data = _without_addresses(page.preprocess_data)
    return page


def _without_addresses(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse files by address, which gradio would fetch, and whatever else isn't an upload, in one line."""
    gradio = _gradio()

    async def checked(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        paths = [str(value.get("path")) for value in inputs if isinstance(value, dict)]
        if any("://" in path for path in paths):
            raise gradio.Error("Please upload the video; addresses aren't opened", print_exception=False)
        try:
            return await preprocess(block_fn, inputs, *args, **kwargs)
        except (ValueError, OSError) as error:
            log.warning("a request was refused: %s", error)
            raise gradio.Error("Please upload a video", print_exception=False) from None

    return checked


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
        css=_FOCUS,
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
    """Load the model and serve the page until the process is interrupted; uploads are removed then."""
    _gradio()  # missed before the model is loaded
    if config.port:
        try:
            socket.create_server((config.host, config.port)).close()
        except OSError as error:
            raise ConfigError(
                f"port={config.port} can't be opened on {config.host}: {error.strerror or error}; "
                "port=null takes a free one"
            ) from None
    with tempfile.TemporaryDirectory(prefix="mvit-demo-") as folder:
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        demo = Demo(
            app.build_model(config),
            topk=config.topk,
            max_seconds=config.max_seconds,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            device=app.choose_device(config.device),
            open_file=app.build_decoder(config),
        )
        page = build_page(
            demo, title="Video classification" + ("" if config.weights else " (random weights)")
        )
        log.info("http://%s:%s", config.host, config.port)
        launch(page, host=config.host, port=config.port, max_megabytes=config.max_megabytes)
