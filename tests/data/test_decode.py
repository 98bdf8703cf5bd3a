"""Frames by number: every file here shows in frame i the number i (or what its test says)."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from videos import (
    copy_packet,
    numbered_frame,
    read_number,
    remux,
    write_numbered_video,
    write_silence,
    write_video,
)

from mvit_video.data.decode import index_cache, open_video
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.data.decode.reader import PacketReader
from mvit_video.errors import ConfigError, VideoError

X264 = {"preset": "veryfast"}
VP9 = {"deadline": "realtime", "cpu-used": "8"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=12:bframes=3:open-gop=1"}
UNEVEN = [i * 0.04 + (i % 3) * 0.011 + (0.7 if i > 20 else 0) for i in range(40)]

# name: (arguments of write_numbered_video), 40 frames unless it says otherwise
FILES: dict[str, dict[str, Any]] = {
    "h264_long_gop.mp4": {"num_frames": 120, "options": X264 | {"bf": "3", "g": "250"}},
    "h264_short_gop.mp4": {"num_frames": 120, "options": X264 | {"bf": "2", "g": "10"}},
    "h264_open_gop.mp4": {"options": X264 | {"bf": "3", "g": "12", "x264-params": "open-gop=1"}},
    "h264_intra_refresh.mp4": {"options": X264 | {"g": "12", "x264-params": "intra-refresh=1"}},
    "h264_audio.mp4": {"options": X264 | {"g": "12"}, "audio_seconds": 3.0},
    "h264_uneven_times.mp4": {"times": UNEVEN, "options": X264 | {"g": "12"}},
    "h264_fragmented.mp4": {
        "options": X264 | {"g": "10"},
        "container_options": {"movflags": "frag_keyframe"},
    },
    "h264_gray.mp4": {"pix_fmt": "gray"},
    "h264_60fps.mov": {"fps": 60},
    "h264_ntsc.mp4": {"fps": Fraction(30000, 1001)},
    "h264_one.mp4": {"num_frames": 1},
    "h264_five.mkv": {"num_frames": 5},
    "h264_bframes.avi": {"options": X264 | {"bf": "1", "g": "3"}},
    "h264_bframes.asf": {"options": X264 | {"bf": "3", "g": "11"}},
    "h264_stream.ts": {"options": X264 | {"bf": "2", "g": "10"}, "audio_seconds": 1.0},
    "h264_webm_named.webm": {"codec": "libvpx-vp9", "options": VP9},
    "hevc_10bit_open_gop.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": X265},
    "vp9_12fps_audio.webm": {"codec": "libvpx-vp9", "options": VP9, "fps": 12, "audio_seconds": 1.0},
    "vp9_odd_size.webm": {"codec": "libvpx-vp9", "options": VP9, "height": 121, "width": 161},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "keyint=16"}},
    "vp8.webm": {"codec": "libvpx", "options": VP9},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "10"}},
    "mpeg4_bframes.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "10"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "10"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "10"}},
    "hevc.mpg": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=1"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "svq1.asf": {"codec": "svq1", "pix_fmt": "yuv410p", "height": 144, "width": 176},
    "animation.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "h264_one.flv": {"num_frames": 1},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "animation.gif": {"codec": "gif", "pix_fmt": "rgb8", "fps": 10},
}


_PICTURE = b"\x00\x00\x01\xb6"  # of MPEG-4
_NOT_CODED = _PICTURE + b"\x51\x4f"

# Files whose time stamps or marks of key frames mislead: they are decoded from the front.
COUNTED = (
    "h264_bframes.avi",
    "h264_bframes.asf",
    "h264_intra_refresh.mp4",
    "hevc.mpg",
    "svq1.asf",
    "animation.mov",
)


def requests(num_frames: int) -> dict[str, list[int]]:
    some = random.Random(num_frames)
    return {
        "first": [0],
        "last": [num_frames - 1],
        "random": sorted(some.randrange(num_frames) for _ in range(8)),
        "unsorted, repeated": [num_frames // 2, 0, num_frames - 1, num_frames // 2, num_frames // 3],
        "strided": list(range(num_frames // 3, num_frames, 4)),
        "none": [],
        "all": list(range(num_frames)),
    }


def settle(path: Path) -> None:
    """Make a file look as if nobody were writing it."""
    os.utime(path, (1_600_000_000, 1_600_000_000))


def numbers(frames: torch.Tensor) -> list[int | None]:
    return [read_number(frame) for frame in frames]


def plain_decode(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.mark.parametrize("name", FILES)
def test_every_request_gives_the_frames_of_a_plain_decode(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by an index that was kept, in memory or in a folder."""
    arguments = {"num_frames": 40, "options": X264 if name.startswith("h264") else None} | FILES[name]
    path = write_numbered_video(folder / name, **arguments)
    settle(path)
    expected = plain_decode(path)
    with open_video(path, index_cache=folder / "kept") as video:
        facts = (video.num_frames, video.fps, video.size, video.times.tolist())
        assert video.num_frames == len(expected) == arguments["num_frames"]
        assert (video.height, video.width) == expected[0].shape[:2]
        for request, indices in requests(video.num_frames).items():
            frames = video.get_frames(indices)
            assert frames.dtype == torch.uint8
            assert frames.shape == (len(indices), 3, video.height, video.width)
            assert numbers(frames) == indices, request
            for frame, index in zip(frames, indices, strict=True):
                tolerance = 3 if "odd_size" in name else 0  # levels; see test_colour
                np.testing.assert_allclose(
                    frame.permute(1, 2, 0).int(), expected[index].astype(int), 0, tolerance
                )
        assert isinstance(video, PyAVVideo)
        assert (video.index is None) == (name in COUNTED)
    monkeypatch.setattr(PacketReader, "read_all", None)  # the file is not read whole again
    for index_memory in (index_cache._memory, index_cache._Memory()):
        monkeypatch.setattr(index_cache, "_memory", index_memory)
        for indices in requests(len(expected)).values():
            with open_video(path, index_cache=folder / "kept") as video:
                assert (video.num_frames, video.fps, video.size, video.times.tolist()) == facts
                assert numbers(video.get_frames(indices)) == indices


def test_a_single_frame_of_a_fresh_video(folder: Path) -> None:
    for suffix in (".mp4", ".avi", ".ts", ".mkv"):
        path = write_numbered_video(folder / f"fresh{suffix}", 8, options=X264 | {"bf": "1", "g": "3"})
        for index in range(8):
            with open_video(path) as video:
                assert numbers(video.get_frames([index])) == [index]


@pytest.mark.parametrize("suffix", [".mkv", ".flv", ".nut"])
def test_times_that_hide_the_order_are_not_trusted(folder: Path, suffix: str) -> None:
    """B-frames whose times of showing are those of decoding, as old muxers wrote them."""
    source = write_numbered_video(folder / "ordered.mp4", 40, options=X264 | {"bf": "2", "g": "16"})
    path = folder / f"unordered{suffix}"
    remux(source, path, lambda packets: (copy_packet(p, pts=p.dts) for p in packets))
    for index in range(40):
        with open_video(path) as video:
            assert numbers(video.get_frames([index])) == [index]


@pytest.mark.parametrize(
    ("codec", "suffix"), [("mpeg4", ".mp4"), ("mpeg4", ".avi"), ("mpeg4", ".mkv"), ("h263p", ".avi")]
)
def test_marks_of_key_frames_are_not_trusted(folder: Path, codec: str, suffix: str) -> None:
    source = write_numbered_video(folder / f"few_keys.{codec}.avi", 30, codec=codec, options={"g": "12"})
    path = folder / f"all_keys.{codec}{suffix}"
    remux(source, path, lambda packets: (copy_packet(p, is_keyframe=True) for p in packets))
    for index in (29, 14, 7):
        with open_video(path) as video:
            assert numbers(video.get_frames([index])) == [index]
            assert numbers(video.get_frames([index, 3])) == [index, 3]


@pytest.mark.parametrize("wanted", [11, 39])
def test_the_first_frame_asked_of_an_av1_file_may_be_any(folder: Path, wanted: int) -> None:
    path = write_numbered_video(folder / "fresh.mp4", 40, codec="libsvtav1", options={"preset": "12"})
    with open_video(path) as video:
        assert isinstance(video, PyAVVideo)
        assert numbers(video.get_frames([wanted])) == [wanted]
        assert video.index is not None  # it was not decoded from the front


def test_times_and_rate_are_measured(folder: Path) -> None:
    path = write_numbered_video(folder / "times.mp4", 40, times=UNEVEN)
    with open_video(path) as video:
        assert video.frame_time(0) == 0
        assert [video.frame_time(i) for i in range(40)] == pytest.approx(UNEVEN, abs=1e-3)
        assert video.fps == pytest.approx(39 / UNEVEN[-1], abs=1e-3)
        assert video.duration == pytest.approx(40 / video.fps)


@pytest.mark.parametrize("fps", [12, 25, Fraction(30000, 1001), Fraction(24000, 1001), 60])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_constant_rate(folder: Path, fps: Fraction, suffix: str) -> None:
    with open_video(write_numbered_video(folder / f"rate{suffix}", 30, fps=fps)) as video:
        assert isinstance(video, PyAVVideo)
        assert video.index is not None
        assert video.fps == (float(fps) if suffix == ".mp4" else pytest.approx(float(fps), rel=1e-3))
        assert video.duration == pytest.approx(30 / fps, rel=1e-3)


def test_one_frame_has_the_declared_rate(folder: Path) -> None:
    with open_video(write_numbered_video(folder / "one.mp4", 1, fps=50)) as video:
        assert (video.fps, video.duration) == (50, 0.02)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(folder: Path, degrees: int) -> None:
    lying = (np.rot90(numbered_frame(i), -degrees // 90) for i in range(5))
    path = write_video(folder / f"turned{degrees}.mp4", lying, rotation=degrees)
    with open_video(path) as video:
        assert (video.height, video.width) == (120, 160)
        assert numbers(video.get_frames([4, 0])) == [4, 0]


def test_size_change_is_resized_to_the_first_size_and_equal_timestamps_are_counted(folder: Path) -> None:
    small = write_numbered_video(folder / "small.ts", 20, options=X264)
    large = write_video(folder / "large.ts", [numbered_frame(i, 176, 240) for i in range(20, 40)])
    path = folder / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())  # the clock starts again
    with open_video(path) as video:
        assert (video.num_frames, video.height, video.width) == (40, 120, 160)
        for indices in requests(40).values():
            assert numbers(video.get_frames(indices)) == indices


def test_the_video_and_not_a_few_pictures_before_it_are_decoded(folder: Path) -> None:
    path = folder / "two_streams.mkv"
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height = 160, 120
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number))
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(streams[1].encode(frame))
            if number < 3:
                container.mux(streams[0].encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    with open_video(path) as video:
        assert video.num_frames == 30
        assert numbers(video.get_frames([29, 3])) == [29, 3]


def test_edit_list_hides_frames(folder: Path) -> None:
    with open_video(Path(__file__).parent / "files" / "edit_list.mp4") as video:
        shown = [*range(25, 76), 77]
        assert video.num_frames == 52
        for indices in requests(52).values():
            assert _corpus_numbers(video.get_frames(indices)) == [shown[i] for i in indices]


def _corpus_numbers(frames: torch.Tensor) -> list[int]:
    """This file's numbers: 12 bits from the second cell on of a 6 x 3 grid in the upper two thirds."""
    gray = frames.float().mean(1)
    height, width = gray.shape[1:]
    cells = [
        (int((0.04 + 0.22 * (k // 6 + 0.5)) * height), int((0.04 + 0.92 * (k % 6 + 0.5) / 6) * width))
        for k in range(1, 13)
    ]
    return [sum(int(frame[y, x] > 128) << 11 - bit for bit, (y, x) in enumerate(cells)) for frame in gray]


@pytest.mark.parametrize("between", [1, 2])
def test_packed_b_frames_of_xvid_in_avi(folder: Path, between: int) -> None:
    """UCF101's files: two pictures in one packet, later an empty one. FFmpeg guesses their times wrongly."""
    options = {"bf": str(between), "g": "12", "sc_threshold": "1000000000"}
    source = write_numbered_video(folder / "unpacked.avi", 73, codec="mpeg4", options=options)
    path = remux(source, folder / f"packed{between}.avi", lambda packets: _numbered(_pack(_parts(packets))))
    assert [read_number(picture) for picture in plain_decode(path)] == list(range(73))
    with open_video(path) as video:
        assert isinstance(video, PyAVVideo)
        assert video.num_frames == 73
        assert video.fps == 25
        for indices in requests(73).values():
            assert numbers(video.get_frames(indices)) == indices
        assert video.index is not None  # it was not decoded from the front


def _parts(packets: Iterator[Any]) -> list[tuple[bytes, bool]]:
    return [(bytes(packet), packet.is_keyframe) for packet in packets]


def _numbered(parts: Iterable[tuple[bytes, bool]]) -> Iterator[Any]:
    for number, (data, is_key) in enumerate(parts):
        time = {"pts": number, "dts": number, "time_base": Fraction(1, 25)}
        yield copy_packet(av.Packet(data), **time, is_keyframe=is_key)


def _pack(packets: list[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
    """Each B-frame in the packet before its own."""
    signature = b"\x00\x00\x01\xb2DivX503b1393p"
    first = packets[0][0]
    start = first.index(_PICTURE)
    packets[0] = (first[:start] + signature + first[start:], True)
    following = [data if _is_b_frame(data) else b"" for data, _ in packets[1:]] + [b""]
    for (data, is_key), after in zip(packets, following, strict=True):
        own = b"" if _is_b_frame(data) else data
        yield (own + after or _NOT_CODED, is_key)


def _is_b_frame(data: bytes) -> bool:
    return data[data.index(_PICTURE) + len(_PICTURE)] >> 6 == 2


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_mpeg4_packets_without_a_picture_are_no_frames(folder: Path, suffix: str) -> None:
    """XviD leaves out pictures in which nothing changes."""
    source = write_numbered_video(folder / "mpeg4_all.avi", 30, codec="mpeg4", options={"g": "100"})

    def left_out(packets: Iterator[Any]) -> Iterator[Any]:
        parts = _parts(packets)
        parts[9:9] = parts[20:20] = [(_NOT_CODED, False)]
        return _numbered(parts)

    path = remux(source, folder / f"mpeg4_left_out{suffix}", left_out)
    shown = [read_number(picture) for picture in plain_decode(path)]
    assert shown == list(range(30))
    with open_video(path) as video:
        assert video.num_frames == 30
        for indices in requests(30).values():
            assert numbers(video.get_frames(indices)) == indices


def test_hidden_vp8_pictures_are_no_frames(folder: Path) -> None:
    source = write_numbered_video(folder / "vp8_shown.webm", 20, codec="libvpx", options=VP9)

    def hidden(packets: Iterator[Any]) -> Iterator[Any]:
        for number, p in enumerate(packets):
            data = bytearray(bytes(p))
            data[0] &= ~16 if number in (7, 12) else 255
            yield copy_packet(p, bytes(data))

    path = remux(source, folder / "vp8_hidden.webm", hidden)
    shown = [i for i in range(20) if i not in (7, 12)]
    with open_video(path) as video:
        assert video.num_frames == 18
        for indices in requests(18).values():
            assert numbers(video.get_frames(indices)) == [shown[i] for i in indices]


# Broken files and wrong calls


def _h264(folder: Path, *, faststart: bool = False) -> bytes:
    options = {"movflags": "faststart"} if faststart else {}
    path = folder / f"sound_{faststart}.mp4"
    write_numbered_video(path, 90, options=X264 | {"g": "30", "bf": "2"}, container_options=options)
    return path.read_bytes()


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _zeroed(data: bytes) -> bytes:
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    return data[:start] + bytes(end - start) + data[end:]


def _audio_only(folder: Path) -> bytes:
    with av.open(str(folder / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        write_silence(container, stream, 0.5)
    return (folder / "sound.m4a").read_bytes()


BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda folder: b"", "the file is empty"),
    "text": (lambda folder: b"not a video\n" * 50, "not a video file, or one that FFmpeg can't read"),
    "cut, table last": (lambda folder: _half(_h264(folder)), "without its table of frames: it is cut off"),
    "cut, table first": (
        lambda folder: _half(_h264(folder, faststart=True)),
        r"the file is cut off: \d+ of its 90 frames are there",
    ),
    "zeroed": (lambda folder: _zeroed(_h264(folder)), "no frame can be decoded, the file is damaged"),
    "audio only": (_audio_only, "the file has no video stream"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_refused_with_a_reason(folder: Path, kind: str) -> None:
    make, reason = BROKEN[kind]
    path = folder / "broken.mp4"
    path.write_bytes(make(folder))
    with pytest.raises(VideoError, match=f"{re.escape(str(path))}: .*{reason}"):
        open_video(path)


def test_missing_file_and_directory(folder: Path) -> None:
    with pytest.raises(VideoError, match=r"nowhere.mp4: no such file"):
        open_video(folder / "nowhere.mp4")
    with pytest.raises(VideoError, match="this is a directory, not a video file"):
        open_video(folder)
    with pytest.raises(VideoError, match="no such file"):
        open_video("null\0byte.mp4")


def test_damage_spoils_only_the_frames_that_depend_on_it(folder: Path) -> None:
    data = bytearray(_h264(folder))
    path = folder / "damaged.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:  # overwrite the coded picture in the middle of the second of three
        place = next(p.pos for p in container.demux(video=0) if p.pts and p.pts * p.time_base > 1.6)
    data[place + 8 : place + 40] = b"\xff" * 32
    path.write_bytes(data)
    with open_video(path) as video:
        assert video.num_frames == 90
        assert numbers(video.get_frames([0, 10, 29])) == [0, 10, 29]
        assert numbers(video.get_frames([60, 75, 89])) == [60, 75, 89]
        with pytest.raises(VideoError, match="frame 55 of 90 can't be decoded, the file is damaged"):
            video.get_frames([0, 55, 70])
        assert numbers(video.get_frames([75])) == [75]  # an error changes nothing


def test_lost_packets_in_a_transport_stream_are_no_silent_repeats(folder: Path) -> None:
    data = write_numbered_video(folder / "whole.ts", 60, options=X264 | {"g": "30", "bf": "0"}).read_bytes()
    path = folder / "hole.ts"
    path.write_bytes(data[: 188 * 60] + data[188 * 70 :])
    with open_video(path) as video:
        for index in range(video.num_frames):
            try:
                (number,) = numbers(video.get_frames([index]))
            except VideoError:
                continue
            assert number in (index, index + 60 - video.num_frames)


def test_the_last_frame_of_a_file_that_ends_early_is_not_painted_over(folder: Path) -> None:
    path = write_numbered_video(folder / "whole.avi", 60, codec="mpeg4")
    data = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place, size = packets[30].pos, packets[30].size
    path.write_bytes(data[: place + 8 + size // 10])
    with open_video(path) as video:
        assert video.num_frames == 31
        assert numbers(video.get_frames([29])) == [29]
        with pytest.raises(VideoError, match="frame 30 of 31 can't be decoded, the file is damaged"):
            video.get_frames([30])


@pytest.mark.parametrize("name", ["h264_short_gop.mp4", "mpeg4_bframes.avi", "h264_stream.ts", "mjpeg.avi"])
def test_random_damage_gives_frames_or_a_video_error(folder: Path, name: str) -> None:
    path = write_numbered_video(folder / name, **({"num_frames": 30} | FILES[name]))
    sound = path.read_bytes()
    for seed in range(12):
        some = random.Random(seed)
        data = bytearray(sound)
        place = some.randrange(len(data))
        data[place : place + 40] = some.randbytes(len(data[place : place + 40]))
        path.write_bytes(data)
        try:
            with open_video(path) as video:
                video.get_frames(range(0, video.num_frames, 3))
        except VideoError:
            continue


@pytest.mark.parametrize("index", [-1, 40, 1000])
def test_index_out_of_range_is_the_callers_mistake(folder: Path, index: int) -> None:
    with open_video(write_numbered_video(folder / "range.mp4", 40)) as video:
        with pytest.raises(ValueError, match=f"frame {index} was asked of .*, which has 40"):
            video.get_frames([0, index])
        with pytest.raises(ValueError, match="which has 40"):
            video.frame_time(index)


@pytest.mark.parametrize("device", ["gpu", "mps", "cpu:0:0", ""])
def test_impossible_device_says_what_is_possible(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"'{device}' is not possible, choose 'auto', 'cpu' or 'cuda'"):
        open_video(folder / "any.mp4", device=device)


def test_impossible_backend_says_what_is_possible(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'opencv' is not possible, choose one of: auto, pyav, torchcodec"):
        open_video(folder / "any.mp4", backend="opencv")
    with pytest.raises(ConfigError, match="decord decodes on the CPU only"):
        open_video(folder / "any.mp4", backend="decord", device="cuda")


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "http:x.mp4", "100% ? #1 [é] 'q'.mp4", "-i.mp4", "webm named.mp4"]
)
def test_odd_names_are_files(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    codec = {"codec": "libvpx-vp9", "options": VP9} if "webm" in name else {}
    source = write_numbered_video(folder / ("plain.webm" if codec else "plain.mp4"), 5, **codec)
    (folder / name).write_bytes(source.read_bytes())
    monkeypatch.chdir(folder)
    with open_video(name) as video:
        assert numbers(video.get_frames([4])) == [4]


def test_a_path_never_opens_the_network() -> None:
    with pytest.raises(VideoError, match="live=true"):
        open_video("http://127.0.0.1:1/a.mp4")


# Cost


class CountingCodec:
    """Stands in for a decoder and counts the packets given to it and the pictures it gives."""

    def __init__(self, codec: Any) -> None:
        self.__dict__.update(codec=codec, packets=0, pictures=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.codec, name, value)

    def decode(self, packet: Any) -> Any:
        frames = self.codec.decode(packet)
        self.__dict__["packets"] += packet is not None
        self.__dict__["pictures"] += len(frames)
        return frames


def _cost(path: Path, indices: list[int]) -> CountingCodec:
    with open_video(path) as video:
        assert isinstance(video, PyAVVideo)
        counter: Any = CountingCodec(video.reader.codec)
        video.reader.codec = counter
        assert numbers(video.get_frames(indices)) == indices
        assert video.reader.codec is counter
        return counter  # type: ignore[no-any-return]


def test_only_what_is_needed_is_decoded(folder: Path) -> None:
    options = X264 | {"g": "30", "keyint_min": "30", "sc_threshold": "0", "bf": "2"}
    path = write_numbered_video(folder / "cost.mp4", 300, options=options)
    assert _cost(path, [275, 279]).packets <= 15
    assert _cost(path, [0, 275]).packets <= 10
    assert _cost(path, [10, 279]).packets <= 30
    views = [start + 4 * i for start in (0, 60, 120, 180, 239) for i in range(16)]
    whole = _cost(path, sorted(set(views)))
    assert whole.packets <= 305
    assert whole.pictures < 0.8 * 300  # pictures that nobody refers to are dropped


def test_pictures_between_are_not_kept(folder: Path) -> None:
    """Decoding from the front goes through the whole file with two pictures in memory, not all."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("needs Linux to measure the peak of memory")
    frames = (numbered_frame(i, 480, 640) for i in range(200))  # 92 MB as YUV
    path = write_video(folder / "large.avi", frames, codec="mpeg4", options={"bf": "2"})
    with open_video(path) as video:
        video.get_frames([199])
        try:
            peak.write_text("5")
        except OSError:
            pytest.skip("the peak of memory can't be reset here")
        before = _peak_kilobytes()
        video.get_frames([0, 199])
        assert _peak_kilobytes() - before < 20_000


def _peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_structure_and_any_request(folder: Path, data: st.DataObject) -> None:
    num_frames = data.draw(st.integers(8, 50), "frames")  # FFmpeg knows no shorter .ts
    gop, b_frames = data.draw(st.integers(1, 25), "gop"), data.draw(st.integers(0, 4), "b-frames")
    open_gop, pyramid = (
        data.draw(st.booleans(), "open"),
        data.draw(st.sampled_from(["none", "normal"]), "pyramid"),
    )
    path = write_numbered_video(
        folder / f"any{data.draw(st.sampled_from(['.mp4', '.mkv', '.ts', '.avi']), 'container')}",
        num_frames,
        height=64,
        width=80,
        fps=data.draw(st.sampled_from([10, 24, 50]), "fps"),
        options=X264
        | {
            "g": str(gop),
            "bf": str(b_frames),
            "x264-params": f"open-gop={int(open_gop)}:b-pyramid={pyramid}",
        },
    )
    with open_video(path) as video:
        assert video.num_frames == num_frames
        for _ in range(3):
            indices = data.draw(st.lists(st.integers(0, num_frames - 1), max_size=12), "indices")
            assert numbers(video.get_frames(indices)) == indices
