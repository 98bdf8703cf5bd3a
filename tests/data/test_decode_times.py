"""Clocks that restart or jump, zeros behind a recording, and encrypted files."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import copy_packet, read_number, remux, write_numbered_video

from mvit_video.data.decode import open_video, times
from mvit_video.data.decode.times import NO_TIME, measure_times
from mvit_video.errors import VideoError
from mvit_video.prediction.stream import iter_windows

X264 = {"preset": "veryfast", "bf": "2", "g": "30"}
VP8 = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}

# name: (arguments, how exact the clock is)
FORMATS: dict[str, dict[str, Any]] = {
    "a.ts": {"options": X264, "fps": 30},
    "a.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "10"}, "fps": 25},
    "a.webm": VP8 | {"fps": 30, "container_options": {"live": "1"}},
    "ntsc.ts": {"options": X264, "fps": Fraction(30000, 1001)},
}


def _check(path: Path, num_frames: int, fps: float) -> None:
    with open_video(path) as video:
        seconds = [video.frame_time(index) for index in range(video.num_frames)]
        assert video.num_frames == num_frames
        assert video.fps == pytest.approx(fps, rel=2e-4)
        assert (np.diff(seconds) > 0).all()
        assert video.duration == pytest.approx(num_frames / fps, rel=2e-4)
        assert seconds[-1] == pytest.approx((num_frames - 1) / fps, rel=2e-3)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_joined_recordings_keep_their_rate(
    tmp_path: Path, name: str, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    times.warn_of_jumps.cache_clear()
    path = write_numbered_video(tmp_path / name, 40, **FORMATS[name])
    path.write_bytes(path.read_bytes() * parts)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            _check(path, 40 * parts, float(FORMATS[name]["fps"]))
    assert len([record for record in caplog.records if str(path) in record.getMessage()]) == 1


@pytest.mark.parametrize("seconds", [20, 36_000])
def test_a_clock_that_jumps_ahead_does_not_slow_the_rate(tmp_path: Path, seconds: int) -> None:
    first = write_numbered_video(tmp_path / "a.ts", 60, options=X264, fps=30)
    ticks, path = seconds * 90_000, tmp_path / "joined.ts"
    remux(
        first, path, lambda packets: (copy_packet(p, pts=p.pts + ticks, dts=p.dts + ticks) for p in packets)
    )
    path.write_bytes(first.read_bytes() + path.read_bytes())
    _check(path, 120, 30)
    with open_video(path) as video:
        assert [read_number(frame) for frame in video.get_frames([59, 60, 119])] == [59, 0, 59]


@pytest.mark.parametrize("count", [10, 90])
def test_avi_with_b_frames_has_the_rate_of_its_header(tmp_path: Path, count: int) -> None:
    _check(write_numbered_video(tmp_path / "a.avi", count, options=X264 | {"bf": "3"}, fps=30), count, 30)


def test_a_pause_of_a_recording_stays_in_its_times(tmp_path: Path) -> None:
    """Formats whose clocks don't jump: an MP4 of a screen on which nothing changed for a while."""
    shown = [i / 25 + 7 * (i >= 20) for i in range(60)]
    with open_video(write_numbered_video(tmp_path / "a.mp4", 60, times=shown)) as video:
        assert video.fps == pytest.approx(25)
        assert [video.frame_time(i) for i in range(60)] == pytest.approx(shown, abs=1e-3)


@pytest.mark.parametrize(
    ("pts", "fps", "num_jumps"),
    [
        ([0, 33, 67, 100, 133], 1000 * 4 / 133, 0),
        ([0, 40, 80, 0, 40, 80], 25, 1),
        ([0, 40, 80, 80, 120], 25, 1),
        ([0, 80, 40, 120, 200, 160], 25, 0),
        ([0, 40, 80, 90_000, 90_040], 25, 1),
        ([0, 2000, 4000, 9000], 1000 * 3 / 9000, 0),
        ([0, 0, 0], 24, 0),
        ([5, None, 7], 24, 0),
        ([7], 24, 0),
        ([], 24, 0),
    ],
)
def test_rates(pts: list[int | None], fps: float, num_jumps: int) -> None:
    told = np.array([NO_TIME if time is None else time for time in pts], np.int64)
    found = measure_times(told, Fraction(1, 1000), 24.0, clock_may_jump=True)
    assert found.fps == pytest.approx(fps)
    assert found.num_jumps == num_jumps
    assert len(found.seconds) == len(pts)
    assert (np.diff(found.seconds) > 0).all()


@pytest.mark.parametrize("fps", [30, 25, 24, 50, 60, Fraction(30000, 1001), Fraction(24000, 1001)])
@pytest.mark.parametrize("num_frames", [7, 50, 90])
def test_measured_rate_is_exact(fps: Fraction | int, num_frames: int) -> None:
    tick = 1 / (Fraction(fps) * 512)  # as in MP4
    found = measure_times(np.arange(num_frames) * 512, tick, 24.0, clock_may_jump=False)
    assert found.fps == float(fps)


@pytest.mark.parametrize("padding", [bytes(188), bytes(10_000), bytes(3_000_000), b"\xff" * 3_000_000])
@pytest.mark.parametrize("name", ["a.ts", "a.mpg", "a.mp4", "a.nut"])
def test_what_fills_the_end_is_no_damage(tmp_path: Path, name: str, padding: bytes) -> None:
    """Dashcams allocate ahead; flash memory that was erased reads as ones."""
    codec = {"a.mpg": {"codec": "mpeg2video"}, "a.nut": {"codec": "mpeg4"}}.get(name, {"options": X264})
    path = write_numbered_video(tmp_path / name, 40, **codec)
    path.write_bytes(path.read_bytes() + padding)
    for indices in ([39], [0, 20, 39], list(range(40))):
        with open_video(path) as video:
            assert [read_number(frame) for frame in video.get_frames(indices)] == indices


@pytest.mark.parametrize("filling", ["zeros", "noise"])
def test_what_follows_a_hole_in_a_transport_stream_is_read(tmp_path: Path, filling: str) -> None:
    """As players do, however long the hole is."""
    path = write_numbered_video(tmp_path / "a.ts", 40, options=X264)
    hole = bytes(300_000) if filling == "zeros" else np.random.default_rng(0).bytes(300_000)
    path.write_bytes(path.read_bytes() + hole + path.read_bytes())
    with open_video(path) as video:
        numbers = [read_number(frame) for frame in video.get_frames(range(video.num_frames))]
    assert numbers == [*range(40), *range(40)]


@pytest.mark.parametrize("write", ["mp4", "webm"])
def test_an_encrypted_file_is_called_encrypted(tmp_path: Path, write: str) -> None:
    path = {"mp4": _encrypted_mp4, "webm": _encrypted_webm}[write](tmp_path)
    with pytest.raises(VideoError, match="encrypted"), open_video(path) as video:
        video.get_frames([0, 29])
    with pytest.raises(VideoError, match="encrypted"):
        next(iter_windows(path, length=1, stride=1))


def _encrypted_mp4(folder: Path) -> Path:
    options = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
        "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
        "fflags": "bitexact",  # else encryption begins at random, and noise may look like a picture
    }
    return write_numbered_video(folder / "a.mp4", 30, options=X264, container_options=options)


def _encrypted_webm(folder: Path) -> Path:
    """Its track's name, as long as needed, gives way to the description of the encryption."""

    def element(name: str, *content: bytes) -> bytes:
        joined = b"".join(content)
        return bytes.fromhex(name) + bytes([0x80 | len(joined)]) + joined

    encryption = element(
        "5035", element("47e1", b"\5"), element("47e2", bytes(range(16)))
    )  # AES, a key's name
    encoding = element("6240", element("5032", b"\1"), element("5033", b"\1"), encryption)
    encodings = element("6d80", encoding)
    title = "t" * (len(encodings) - 3)

    def encrypted(plain: bytes) -> bytes:
        return b"\1" + bytes(8) + bytes(255 - byte for byte in plain)

    source, path = write_numbered_video(folder / "plain.webm", 30, **VP8), folder / "a.webm"
    remux(source, path, lambda packets: (copy_packet(p, encrypted(bytes(p))) for p in packets), title=title)
    path.write_bytes(path.read_bytes().replace(element("536e", title.encode()), encodings))
    return path
