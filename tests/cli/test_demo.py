"""The web page: answers, messages and limits, over HTTP as a browser asks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio
import httpx
import pytest
import torch
from conftest import Command, error_line
from gradio_client import Client, handle_file
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.action_detection.prediction import ActionDemo, PeopleWatcher
from mvit_video.cli.demo import _Work, build_page, launch
from mvit_video.detection.recognizer import ObjectDemo
from mvit_video.errors import DataError
from mvit_video.prediction.overview import Demo
from mvit_video.prediction.render import is_playable


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    demo = Demo(mv.load_model(checkpoint), topk=2, max_seconds=5, num_workers=0)
    page = build_page(demo, title="test")
    _, address, _ = launch(page, host="127.0.0.1", port=None, max_megabytes=0.5, block=False)
    yield address
    page.close()


def ask(address: str, path: Path, num_clips: int = 3, explain: str = "none") -> tuple:
    client = Client(address, verbose=False)
    try:
        return client.predict(handle_file(path), num_clips, explain, api_name="/answer")
    except httpx.RemoteProtocolError:  # on a busy machine a download was once cut off
        return client.predict(handle_file(path), num_clips, explain, api_name="/answer")


@pytest.mark.parametrize("explain", ["none", "gradcam", "rollout"])
def test_an_uploaded_video_is_answered(address: str, checkpoint: Path, tmp_path: Path, explain: str) -> None:
    path = write_numbered_video(tmp_path / "my video.mp4", 30, height=48, width=64, audio_seconds=1)
    scores, annotated, timeline, strip, overlay, json_file = ask(address, path, explain=explain)
    (expected,) = mv.predict(path, checkpoint, num_clips=3)
    assert scores["label"] == expected.classes[0]
    told = json.loads(Path(json_file).read_text())
    assert told["path"] == "my_video.mp4" or told["path"] == "my video.mp4"
    assert told["scores"] == pytest.approx(expected.scores, abs=1e-5)
    assert len(told["clips"]) == 3
    with mv.open_video(annotated["video"] if isinstance(annotated, dict) else annotated) as video:
        assert video.num_frames == 30
    assert Path(timeline).stat().st_size > 1000
    assert (strip is None) == (overlay is None) == (explain == "none")


def test_files_of_former_answers_are_removed(checkpoint: Path, tmp_path: Path) -> None:
    demo = Demo(mv.load_model(checkpoint), topk=2, max_seconds=5, num_workers=0)
    path = write_numbered_video(tmp_path / "a.mp4", 30, height=48, width=64)
    first = demo.answer(str(path), 1, "none")
    assert Path(first.annotated).is_file()
    second = demo.answer(str(path), 1, "none")
    assert Path(second.annotated).is_file()
    assert not Path(first.annotated).parent.exists()


def test_what_can_not_be_answered_gets_a_message(address: str, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    long = write_numbered_video(tmp_path / "long.mp4", 60, height=48, width=64, fps=10)
    for path, message in ((tmp_path / "broken.mp4", "not a video file"), (long, "6 s long")):
        with pytest.raises(Exception, match=message):
            ask(address, path)
    (tmp_path / "huge.mp4").write_bytes(bytes(600_000))
    with pytest.raises(Exception, match=r"(?i)size|413"):
        ask(address, tmp_path / "huge.mp4")


def test_the_page_asks_nothing_of_other_machines(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "Classify" in text
    fetched = re.findall(r"""(?:src|href)=["'](https?://[^"']+)|url\(["']?(https?://[^"')]+)""", text)
    assert not [url for pair in fetched for url in pair if url and "127.0.0.1" not in url]


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/a.mp4", "https://example.org/a.mp4", "/etc/hostname"])
def test_only_uploads_are_opened(
    address: str, path: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []

    async def download(url: str, **_: object) -> None:
        asked.append(url)

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", download)
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = httpx.post(f"{address}gradio_api/call/answer", json={"data": [file, 1, "none"]}, timeout=60)
    event = answer.json()["event_id"]
    told = httpx.get(f"{address}gradio_api/call/answer/{event}", timeout=60).text
    assert "event: error" in told
    assert "upload" in told
    assert not asked
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use_is_said(command: Command, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = command("demo", f"weights={checkpoint}", f"port={port}")
    assert f"port={port}" in error_line(result, "demo")


@pytest.mark.slow
def test_nothing_is_left_of_it(checkpoint: Path, tmp_path: Path) -> None:
    """Ended from outside in the midst of an answer, the page removes its uploads and answers."""
    (tmp_path / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = [sys.executable, "-m", "mvit_video.demo", f"weights={checkpoint}", f"port={port}"]
    video = write_numbered_video(tmp_path / "a.mp4", 30, height=48, width=64)
    with subprocess.Popen(
        program, cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path / "tmp")}, stderr=subprocess.PIPE
    ) as process:
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(address, timeout=60).status_code == 200:
                    break
            time.sleep(0.2)
        assert ask(address, video)[0]["label"]
        left = {*(tmp_path / "tmp").rglob("*.mp4"), *(tmp_path / "tmp").rglob("*.timeline.png")}
        Client(address, verbose=False).submit(handle_file(video), 3, "gradcam", api_name="/answer")
        while process.poll() is None and left.issuperset((tmp_path / "tmp").rglob("*.timeline.png")):
            time.sleep(0.01)  # until the second answer is half done
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert left
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in err
    assert not list((tmp_path / "tmp").iterdir())


def test_bad_settings_are_said(command: Command, checkpoint: Path) -> None:
    result = command("demo", f"weights={checkpoint}", "max_megabytes=0")
    assert "max_megabytes" in error_line(result, "demo")
    shown = command("demo", "--cfg", "job").out
    assert "host: 127.0.0.1" in shown


@pytest.mark.parametrize(("name", "codec", "copied"), [("a.avi", "mpeg4", True), ("a.mp4", "libx264", False)])
def test_what_browsers_do_not_play_is_shown_as_a_copy(
    checkpoint: Path, tmp_path: Path, name: str, codec: str, copied: bool
) -> None:
    path = write_numbered_video(tmp_path / name, 30, height=48, width=64, codec=codec, audio_seconds=1)
    demo = Demo(mv.load_model(checkpoint), topk=2, max_seconds=5, num_workers=0)
    work = _Work(demo)
    shown, said, button = work.receive(str(path))
    assert button["interactive"] is True
    assert bool(said) == isinstance(shown, str) == copied
    assert is_playable(str(path)) != copied
    if copied:
        assert is_playable(shown)
        with mv.open_video(shown) as video:
            assert (video.num_frames, video.codec) == (30, "h264")
        told = work.answer(shown, 1, "none", "a", lambda *_, **__: None)
        assert json.loads(Path(told.json_file).read_text())["path"] == name


def test_what_is_wrong_with_an_upload_is_said_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    work = _Work(Demo(mv.load_model(checkpoint), topk=2, max_seconds=1, num_workers=0))
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    long = write_numbered_video(tmp_path / "long.mp4", 60, height=48, width=64, fps=10)
    for path, reason in ((tmp_path / "broken.mp4", "not a video file"), (long, "6 s long")):
        _, said, button = work.receive(str(path))
        assert reason in said
        assert str(tmp_path) not in said
        assert button["interactive"] is False


def test_a_run_tells_how_far_it_is_and_can_be_cancelled(checkpoint: Path, tmp_path: Path) -> None:
    path = str(write_numbered_video(tmp_path / "a.mp4", 75, height=48, width=64))
    work = _Work(Demo(mv.load_model(checkpoint), topk=2, max_seconds=5, num_workers=0))
    shares: list[float] = []
    work.answer(path, 1, "none", "a", lambda share, desc: shares.append(round(share, 6)))
    assert shares == sorted(shares)
    assert (shares[0], len(shares) > 20) == (0, True)
    assert 0.85 < shares[-1] <= 0.9

    def cancel_half_way(share: float, desc: str) -> None:
        if share > 0.5:
            work.cancel("someone else")
            assert share < 0.7
            work.cancel("a")

    with pytest.raises(gradio.Error, match="Cancelled"):
        work.answer(path, 1, "none", "a", cancel_half_way)
    assert work.answer(path, 1, "none", "a", lambda *_, **__: None).scores  # the next one


@pytest.mark.browser
def test_a_browser_shows_the_answer(browser, address: str, tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "mine.mp4", 30, height=48, width=64)
    page = browser.new_page(viewport={"width": 1300, "height": 1100})
    requests: list[str] = []
    page.on("request", lambda asked: requests.append(asked.url))
    page.goto(address)
    page.set_input_files("#video input[type=file]", str(path))
    page.wait_for_selector("#video video")
    page.wait_for_selector("#ask:enabled")
    assert page.is_hidden("a[download$='.json']")
    page.click("label:has-text('Grad-CAM')")
    page.click("#ask")
    page.wait_for_selector("#scores :text('%')", timeout=60_000)
    page.wait_for_selector("a[download$='.json']")
    videos = "[...document.querySelectorAll('video')].map(v => v.error === null && v.duration > 0)"
    page.wait_for_function(f"{videos}.filter(Boolean).length == 3")
    assert not [url for url in requests if not url.startswith((address, "blob:", "data:"))]
    page.click("#ask")
    page.click("#cancel")
    page.wait_for_selector("#ask:enabled")
    assert page.is_hidden("#cancel")
    assert page.locator("[data-testid=toast-body]").count() == 0  # who cancels needs no message
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    page.reload()
    page.set_input_files("#video input[type=file]", str(tmp_path / "broken.mp4"))
    page.wait_for_selector("#notice :text('not a video file')")
    assert page.is_disabled("#ask")
    avi = write_numbered_video(tmp_path / "mine.avi", 30, height=48, width=64, codec="mpeg4")
    page.reload()
    assert page.is_disabled("#ask")
    page.set_input_files("#video input[type=file]", str(avi))
    page.wait_for_selector("#notice :text('copy')")
    page.wait_for_selector("#ask:enabled")
    page.wait_for_function("document.querySelector('#video video')?.duration > 0")
    page.focus("input[type=radio]:checked")
    page.keyboard.press("ArrowDown")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(f"[document.activeElement.type, {outline}]") == ["radio", "solid"]


def test_what_people_do_is_shown(tmp_path: Path) -> None:
    film = write_numbered_video(tmp_path / "film.mp4", 45, fps=15, height=48, width=64)
    small: dict[str, Any] = {"embed_dim": 8, "stages": (1, 1), "crop_size": 32, "num_frames": 4}
    actions = mv.create_action_detector("mvitv2_nano_8x4", num_classes=3, **small)
    corner = torch.tensor([[0.0, 0.0, 20.0, 30.0]]), torch.tensor([0.9])
    watcher = PeopleWatcher(actions.eval(), lambda _: corner)
    demo = ActionDemo(watcher, topk=2, max_seconds=5, open_file=mv.open_video)
    page = build_page(demo, title="test")
    _, address, _ = launch(page, host="127.0.0.1", port=None, max_megabytes=0.5, block=False)
    try:
        scores, annotated, timeline, _, _, json_file = ask(address, film)
    finally:
        page.close()
    told = json.loads(Path(json_file).read_text())
    assert [(one["second"], one["person"]) for one in told["people"]] == [(0, 0), (1, 0), (2, 0)]
    best = max(told["people"], key=lambda one: max(one["scores"].values()))
    assert scores["label"] == next(iter(best["scores"]))
    with mv.open_video(annotated["video"] if isinstance(annotated, dict) else annotated) as video:
        assert video.num_frames == 45
    assert Path(timeline).stat().st_size > 1000
    demo.watcher = replace(watcher, find=lambda _: (torch.empty(0, 4), torch.empty(0)))
    with pytest.raises(DataError, match="nobody"):
        demo.answer(str(film))


def test_objects_are_shown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 8, "stages": (1, 1, 1, 1), "channels": 8, "box_channels": 16}
    small |= {"kv_strides": (), "min_size": 48, "max_size": 64, "box_score_thresh": 0.0}
    detector = mv.create_detector("mask_rcnn_mvitv2_nano", num_classes=3, box_detections_per_img=5, **small)
    film = write_numbered_video(tmp_path / "film.mp4", 45, fps=15, height=48, width=64)
    finder = mv.ObjectRecognizer(detector, stride=1.0)
    demo = ObjectDemo(finder, topk=2, max_seconds=5, open_file=mv.open_video)
    assert build_page(demo, title=demo.title).title == demo.title
    overview = demo.answer(str(film))
    told = json.loads(Path(overview.json_file).read_text())["objects"]
    assert {row["second"] for row in told} == {0, 1, 2}
    assert next(iter(overview.scores.values())) == pytest.approx(max(row["score"] for row in told))
    with mv.open_video(overview.annotated) as video:
        assert video.num_frames == 3
    assert Path(overview.timeline).stat().st_size > 1000
    finder.min_score = 1.0
    with pytest.raises(DataError, match="no object"):
        demo.answer(str(film))
