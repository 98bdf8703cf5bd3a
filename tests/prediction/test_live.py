"""Live sources over the network: RTSP, HTTP and UDP on this machine, broken off, silent and out of reach."""

from __future__ import annotations

import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from videos import read_number, write_numbered_video

import mvit_video as mv
from mvit_video.prediction import stream
from mvit_video.prediction.stream import iter_windows, redact_credentials

SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
ANSWERS = {  # to the requests of RTSP
    "OPTIONS": "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n",
    "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n\r\n{SDP}",
    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n\r\n",
}
CHUNK = 7 * 188  # bytes of MPEG-TS in a packet


@pytest.fixture(scope="module")
def broadcast(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three seconds of MPEG-TS."""
    path = tmp_path_factory.mktemp("broadcast") / "v.ts"
    options = {"g": "5", "bf": "0"}
    return write_numbered_video(path, 75, fps=25, height=48, width=64, options=options).read_bytes()


class RtspServer:
    """A camera: sends MPEG-TS in RTP over each connection in turn, then closes it.

    Args:
        after: called when a connection has had everything, before it is closed.
    """

    def __init__(self, data: bytes, connections: int = 1, after: Callable[[], object] = lambda: None) -> None:
        self.data, self.connections, self.after = data, connections, after
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"rtsp://127.0.0.1:{self.socket.getsockname()[1]}/live"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        with self.socket:
            for _ in range(self.connections):
                connection, _ = self.socket.accept()
                with connection, connection.makefile("rb") as lines:
                    self.answer(connection, lines)

    def answer(self, connection: socket.socket, lines: Any) -> None:
        while True:
            method = lines.readline().decode().partition(" ")[0]
            headers = dict(line.decode().strip().split(": ", 1) for line in iter(lines.readline, b"\r\n"))
            answer = "RTSP/1.0 200 OK\r\nCSeq: " + headers["CSeq"] + "\r\n" + ANSWERS.get(method, "\r\n")
            connection.sendall(answer.encode())
            if method == "PLAY":
                break
        for number, start in enumerate(range(0, len(self.data), CHUNK)):
            packet = struct.pack(">BBHII", 0x80, 33, number, 3000 * number, 1)
            packet += self.data[start : start + CHUNK]
            connection.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)
        self.after()


def shown(windows: Iterator[Any]) -> list[tuple[float, list[int | None]]]:
    return [(w.start, [read_number(f) for f in w.get_frames(range(w.num_frames))]) for w in windows]


WHOLE = [(0, [*range(25)]), (1, [*range(25, 50)]), (2, [*range(50, 75)])]
BY_RTSP = [*WHOLE[:2], (2, [*range(50, 74)])]  # FFmpeg waits for the packet after the last frame


def test_rtsp(broadcast: bytes, predict: Command) -> None:
    assert shown(iter_windows(RtspServer(broadcast).address, length=1, stride=1)) == BY_RTSP
    address = RtspServer(broadcast).address.replace("//", "//user:secret@")
    options = ["window=1", "stride=1", "live=true", "format=jsonl", "batch_size=1"]
    result = predict(address, *options)
    assert result.code == 0, result.err
    told = [json.loads(line) for line in result.out.splitlines()]
    assert told  # a slow machine may leave windows out
    assert told[-1]["classes"][0] in ("cats", "dogs and birds")
    assert "secret" not in result.out + result.err


def test_http(broadcast: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.ts").write_bytes(broadcast)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v.ts"
        for follow in (None, 0.1):
            assert shown(iter_windows(address, length=1, stride=1, follow=follow)) == WHOLE
        with pytest.raises(mv.VideoError, match="404"):
            next(iter_windows(f"{address}.gone", length=1, stride=1))
        server.shutdown()


class HttpServer:
    """Answers the first requests with the given bytes each, the others with 404; counts them.

    Args:
        kind: how an answer ends: "chunked" and "closed" tell no length, "length" does; "broken" leaves a
            chunk unfinished.
    """

    def __init__(self, data: bytes, kind: str, answers: int = 1) -> None:
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                self.close_connection = True
                if len(outer.requests) > answers:
                    self.send_error(404)
                    return
                self.send_response(200)
                sent = data
                if kind == "length":
                    self.send_header("Content-Length", str(len(data)))
                elif kind in ("chunked", "broken"):
                    self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if kind in ("chunked", "broken"):
                    length = len(sent) + (1000 if kind == "broken" else 0)
                    sent = (
                        f"{length:x}\r\n".encode() + sent + (b"\r\n0\r\n\r\n" if kind == "chunked" else b"")
                    )
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/live"

    def __enter__(self) -> HttpServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("kind", ["chunked", "closed", "broken"])
def test_a_stream_over_http_is_asked_for_again(
    broadcast: bytes, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(stream, "_PAUSE", 0.05)
    with HttpServer(broadcast, kind, answers=2) as server:
        found = shown(iter_windows(server.address, length=1, stride=1, follow=1.5))
        numbers = [number for _, window in found for number in window]
        assert numbers == [*range(75), *range(75)]
        assert len(server.requests) > 2  # asked for until that much time had passed
        asked = len(server.requests)
        with pytest.raises(mv.VideoError, match="404"):
            next(iter_windows(server.address, length=1, stride=1, follow=1.5))
        assert len(server.requests) == asked + 1
    with HttpServer(broadcast, kind, answers=2) as server:
        assert shown(iter_windows(server.address, length=1, stride=1)) == WHOLE
        assert len(server.requests) == 1


def test_a_file_over_http_is_read_once(broadcast: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PAUSE", 0.05)
    with HttpServer(broadcast, "length", answers=9) as server:
        assert shown(iter_windows(server.address, length=1, stride=1, follow=1.5)) == WHOLE
        assert len(server.requests) == 1


def test_udp(broadcast: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_TIMEOUT", 4.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def send() -> None:
        time.sleep(0.5)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for start in range(0, len(broadcast), CHUNK):
                sender.sendto(broadcast[start : start + CHUNK], ("127.0.0.1", port))
                time.sleep(0.002)

    sender = threading.Thread(target=send)
    sender.start()
    found = shown(iter_windows(f"udp://127.0.0.1:{port}", length=1, stride=1))
    sender.join()
    assert found == WHOLE  # it ends when nothing came for long


def test_a_camera_that_breaks_off_is_reached_again(
    broadcast: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "_PAUSE", 0.05)
    camera = RtspServer(broadcast, connections=2)
    found = shown(iter_windows(camera.address, length=1, stride=1, follow=0.5))
    numbers = [number for _, window in found for number in window]
    assert numbers == [*range(74), *range(74)]
    assert [start for start, _ in found] == [0, 1, 2, 3, 4, 5]
    assert "trying to reach it again" in caplog.text


@pytest.mark.slow
def test_the_time_without_pictures_counts(broadcast: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PAUSE", 4.5)
    camera = RtspServer(broadcast, connections=2)
    starts = [start for start, _ in shown(iter_windows(camera.address, length=1, stride=1, follow=0.5))]
    assert starts[:3] == [0, 1, 2]
    assert starts[3] >= 4  # the second connection's first frame came then


def test_a_camera_that_falls_silent_ends(broadcast: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_TIMEOUT", 3.0)
    released = threading.Event()
    camera = RtspServer(broadcast, after=released.wait)
    started = time.monotonic()
    assert shown(iter_windows(camera.address, length=1, stride=1)) == BY_RTSP
    assert time.monotonic() - started < 60
    released.set()


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp", "udp"])
def test_nothing_answers(predict: Command, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Nobody is there, or somebody who says nothing: an error with the address, within seconds."""
    monkeypatch.setattr(stream, "_TIMEOUT", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/live"
        started = time.monotonic()
        for follow in ("null", "30"):
            options = ["window=1", "live=true", f"follow={follow}"]
            result = predict(address, *options)
            assert result.code == 1
            assert f"mvit-predict: error: {address}: can't be opened: there was no answer" in result.err
        assert time.monotonic() - started < 60
    if scheme != "udp":
        result = predict(address, "window=1", "live=true")
        assert result.code == 1
        assert f"error: {address}: can't be opened: Connection refused; is the address right" in result.err


@pytest.mark.parametrize("login", ["user:secret", "user:p@ss", "user"])
def test_a_name_tells_no_password(login: str) -> None:
    assert redact_credentials(f"rtsp://{login}@camera/stream") == "rtsp://camera/stream"
