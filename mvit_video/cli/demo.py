"""mvit-demo: a web page that classifies an uploaded video. It asks nothing of other machines."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.errors import ConfigError, MVitVideoError
from mvit_video.prediction.overview import NO_MAP, Demo, Overview

log = logging.getLogger(__name__)

_METHODS = [("none", NO_MAP), ("Grad-CAM", "gradcam"), ("attention rollout", "rollout")]
_HEIGHT = 360  # pixels of a video on the page
_DELETE_CACHE = (600, 3600)  # seconds: how often gradio looks, and how old its copies of files get
_FOCUS = "input:focus-visible { outline: 3px solid currentColor; outline-offset: 2px }"


def build_page(demo: Demo, *, title: str) -> Any:
    """The page, a ``gradio.Blocks``."""
    gradio = _gradio()

    def answer(path: str | None, num_clips: int, explain: str, progress: Any = gradio.Progress()) -> Overview:  # noqa: B008
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
        before = tempfile.tempdir
        tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = folder
        try:
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
        finally:
            tempfile.tempdir = before
