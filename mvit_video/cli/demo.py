"""mvit-demo: a web page that classifies an uploaded video. It asks nothing of other machines."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.errors import ConfigError, MVitVideoError, import_extra
from mvit_video.prediction.explain import METHODS
from mvit_video.prediction.overview import NO_MAP, Demo, Overview, Progress
from mvit_video.prediction.render import is_playable, playable_copy
from mvit_video.weights.reading import read_task

log = logging.getLogger(__name__)

_METHODS = [("none", NO_MAP), *((title, name) for name, title in METHODS.items())]
_HEIGHT = 360  # pixels of a video on the page
_DELETE_CACHE = (600, 3600)  # seconds: how often gradio looks, and how old its copies of files get
_PATIENCE = 30  # seconds for a step of the work to end
_FOCUS = "input:focus-visible { outline: 3px solid currentColor; outline-offset: 2px }"


def build_page(demo: Demo, *, title: str) -> Any:
    """The page, a ``gradio.Blocks``."""
    gradio = _gradio()
    work = _Work(demo)
    answer, cancel = _with_session(work)
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=_DELETE_CACHE) as page:
        gradio.Markdown(f"## {title}\nUpload a video; it stays on this machine.")
        with gradio.Row():
            with gradio.Column():
                video = gradio.Video(
                    label="video", sources=["upload"], include_audio=True, elem_id="video", height=_HEIGHT
                )
                notice = gradio.Markdown(elem_id="notice")
                num = demo.model.protocol.num_clips if demo.has_choices else 1
                clips = {"value": num, "visible": demo.has_choices}
                num_clips = gradio.Slider(1, 20, step=1, label="clips over the whole video", **clips)
                info = "Grad-CAM: evidence for the class; attention rollout: what the attention passes on"
                explain = gradio.Radio(
                    _METHODS, value=NO_MAP, label="Explanation", info=info, visible=demo.has_choices
                )
                button = gradio.Button("Classify", variant="primary", elem_id="ask", interactive=False)
                stop = gradio.Button("Cancel", variant="stop", elem_id="cancel", visible=False)
            with gradio.Column():
                annotated = gradio.Video(label="annotated video", interactive=False, height=_HEIGHT)
                scores = gradio.Label(label="classes of the whole video", elem_id="scores")
        more, (timeline, strip, overlay, json_file) = _details()
        outputs = [scores, annotated, timeline, strip, overlay, json_file]
        inputs, buttons = [video, num_clips, explain], [button, stop]
        own: dict[str, Any] = {"api_visibility": "private"}  # of the page alone
        video.upload(work.receive, video, [video, notice, button], **own)
        video.clear(lambda: ("", _active(False)), None, [notice, button], **own)
        begun = button.click(lambda: (_active(False), _visible(True)), None, buttons, queue=False, **own)
        answered = begun.then(
            answer, inputs, outputs, api_name="answer", concurrency_limit=1, show_progress_on=annotated
        )
        answered.success(lambda _: _visible(True), explain, more, **own)
        answered.success(lambda kind: (_visible(kind != NO_MAP),) * 2, explain, [strip, overlay], **own)
        answered.then(_at_rest, None, buttons, queue=False, **own)
        stop.click(cancel, None, buttons, queue=False, cancels=[answered], **own)
    page.preprocess_data = _without_addresses(page.preprocess_data)
    page.end_work = work.end
    return page


def _details() -> tuple[Any, list[Any]]:
    """A hidden column of wide pictures, for when there are some: a timeline, a strip, an overlay, a file."""
    gradio = _gradio()
    picture = {
        "interactive": False,
        "type": "filepath",
        "show_label": False,
        "buttons": ["download", "fullscreen"],
    }
    with gradio.Column(visible=False) as column:
        gradio.Markdown("### Classes over time")
        timeline = gradio.Image(**picture)
        strip = gradio.Image(visible=False, **picture)
        overlay = gradio.Video(label="explanation", interactive=False, visible=False, height=_HEIGHT)
        json_file = gradio.File(label="prediction as JSON")
    return column, [timeline, strip, overlay, json_file]


def _active(yes: bool) -> Any:
    return _gradio().update(interactive=yes)


def _visible(yes: bool) -> Any:
    return _gradio().update(visible=yes)


def _at_rest() -> tuple[Any, Any]:
    return _active(True), _visible(False)


class _Work:
    """What the page asks for: one video at a time, until its session cancels it."""

    def __init__(self, demo: Demo) -> None:
        self._demo, self._one_by_one, self._gradio = demo, threading.Lock(), _gradio()
        self._running: dict[str | None, object] = {}  # by session; what isn't in it any more is cancelled
        self._originals: dict[str, str] = {}  # of copies that browsers can play, by name

    def answer(
        self, path: str | None, num_clips: int, explain: str, session: str | None, progress: Progress
    ) -> Overview:
        self._running[session] = run = object()

        def go_on(*done: Any, **what: Any) -> None:
            if self._running.get(session) is not run:
                raise self._gradio.Error("Cancelled", visible=False, print_exception=False)
            progress(*done, **what)

        try:
            with self._one_by_one:
                original = self._originals.get(Path(path).name, path) if path else None
                return self._demo.answer(original, num_clips, explain, go_on)
        except MVitVideoError as error:
            raise self._gradio.Error(_reason(error), print_exception=False) from None
        finally:
            if self._running.get(session) is run:
                del self._running[session]

    def end(self) -> None:
        """Cancel all work and wait until none is done: a thread that is cut off aborts the process."""
        self._running.clear()
        self._one_by_one.acquire(timeout=_PATIENCE)

    def cancel(self, session: str | None) -> tuple[Any, Any]:
        """The thread that answers ends with its next step."""
        self._running.pop(session, None)
        return _at_rest()

    def receive(self, path: str) -> tuple[Any, str, Any]:
        """What to play of an upload, what to say of it, and whether it can be classified."""
        try:
            self._demo.check(path)
            if is_playable(path):
                return self._gradio.skip(), "", _active(True)
            copy = Path(path).with_name(f"{secrets.token_hex(8)}.mp4")
            playable_copy(path, copy)
        except MVitVideoError as error:
            return self._gradio.skip(), f"**This video can't be used**: {_reason(error)}", _active(False)
        self._originals[copy.name] = path
        said = "Not every browser plays this format: shown is a copy without sound, classified is your file."
        return str(copy), said, _active(True)


def _with_session(work: _Work) -> tuple[Callable[..., Overview], Callable[..., tuple[Any, Any]]]:
    """``answer`` and ``cancel`` as gradio calls them: it hands over what it finds in their signatures."""
    gradio = _gradio()

    def answer(
        path: str | None,
        num_clips: int,
        explain: str,
        request: Any,
        progress: Any = gradio.Progress(),  # noqa: B008
    ) -> Overview:
        return work.answer(path, num_clips, explain, request.session_hash, progress)

    def cancel(request: Any) -> tuple[Any, Any]:
        return work.cancel(request.session_hash)

    for function in (answer, cancel):
        function.__annotations__["request"] = gradio.Request
    return answer, cancel


def _reason(error: MVitVideoError) -> str:
    return str(getattr(error, "reason", error))  # without the path of an uploaded copy


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
    served = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=int(max_megabytes * 1e6),
        share=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        prevent_thread_lock=True,
        ssr_mode=False,
        css=_FOCUS,
        # Its own theme fetches fonts from the network.
        theme=gradio.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
    )
    if block:
        try:
            threading.Event().wait()  # for a signal
        finally:
            page.end_work()
            page.close()
    return served


def _gradio() -> Any:
    return import_extra("gradio", "demo", "the page")


def serve(config: DictConfig) -> None:
    """Load the model and serve the page until the process is interrupted; uploads are removed then."""
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
            _gradio()  # makes folders as it is imported; missed before the model is loaded
            demo = _build_demo(config)
            page = build_page(demo, title=demo.title + ("" if config.weights else " (random weights)"))
            log.info("http://%s:%s", config.host, config.port)
            launch(page, host=config.host, port=config.port, max_megabytes=config.max_megabytes)
        finally:
            tempfile.tempdir = before


def _build_demo(config: DictConfig) -> Demo:
    shared = {"topk": config.topk, "max_seconds": config.max_seconds, "open_file": app.build_decoder(config)}
    task = read_task(config.weights)
    if task == "detection":
        from mvit_video.cli.tasks.detection import build_finder
        from mvit_video.detection.recognizer import ObjectDemo

        return ObjectDemo(build_finder(config), **shared)
    if task == "action_detection":
        from mvit_video.action_detection.prediction import ActionDemo
        from mvit_video.cli.tasks.action_detection import build_watcher

        return ActionDemo(build_watcher(config, find=True), **shared)
    return Demo(
        app.build_model(config),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=app.choose_device(config.device),
        **shared,
    )
