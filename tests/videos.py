"""Real encoded files for the tests, whose frames show their own number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np

# A frame is a grid of black and white cells: 14 bits of the number, then 6 check bits.
_ROWS, _COLUMNS, _CHECK_BITS = 4, 5, 6
_TICKS = 90_000  # of the clock that frame times are written with, a second
_AUDIO_CODECS = {".webm": "libopus", ".avi": "mp2", ".ts": "mp2"}


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float | Fraction = 25,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    audio_seconds: float = 0.0,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode uint8 (H, W, 3) frames; the container goes by the suffix of `path`.

    `times` gives each frame's second (variable rate); `rotation` is written as a display matrix that turns
    the picture counterclockwise by so many degrees when it is shown.
    """
    rate = Fraction(fps).limit_denominator(1001)
    frames = iter(frames)
    first = next(frames)  # gives the size
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1  # reproducible, and kind to the machine
        if times is not None:
            stream.codec_context.time_base = Fraction(1, _TICKS)
        if rotation:
            stream.set_display_rotation(rotation)
        audio = _add_audio(container, Path(path).suffix) if audio_seconds else None
        for number, pixels in enumerate(chain([first], frames)):
            _encode(container, stream, pixels, number, rate, times)
        container.mux(stream.encode(None))
        if audio is not None:
            write_silence(container, audio, audio_seconds)
    return Path(path)


def _encode(
    container: Any,
    stream: Any,
    pixels: np.ndarray,
    number: int,
    rate: Fraction,
    times: Sequence[float] | None,
) -> None:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame.time_base = 1 / rate if times is None else Fraction(1, _TICKS)
    frame.pts = number if times is None else round(times[number] * _TICKS)
    container.mux(stream.encode(frame))


def _add_audio(container: Any, suffix: str) -> Any:
    return container.add_stream(_AUDIO_CODECS.get(suffix, "aac"), rate=48_000, layout="mono")


def write_silence(container: Any, stream: Any, seconds: float) -> None:
    """Encode and mux so many seconds of a mono stream of 48 kHz."""
    size = stream.codec_context.frame_size or 960
    for start in range(0, int(seconds * 48_000), size):
        frame = av.AudioFrame(format=stream.codec_context.format.name, layout="mono", samples=size)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def remux(
    source: Path, path: Path, change: Callable[[Iterator[Any]], Iterable[Any]], **metadata: str
) -> Path:
    """Copy a video's packets to another file, as ``change`` gives them, without coding them anew."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.metadata.update(metadata)
        for packet in change(packet for packet in old.demux(video=0) if packet.size):
            packet.stream = stream
            new.mux(packet)
    return path


def copy_packet(packet: Any, data: bytes | None = None, **changed: Any) -> Any:
    copy = av.Packet(bytes(packet) if data is None else data)
    for name in ("pts", "dts", "time_base", "is_keyframe"):
        setattr(copy, name, changed.get(name, getattr(packet, name)))
    return copy


def repeat(packets: Iterable[Any], times: int) -> Iterator[Any]:
    """For `remux`: the same packets of equal duration again and again."""
    kept = list(packets)
    length = len(kept) * kept[0].duration
    for shift in range(0, times * length, length):
        for p in kept:
            yield copy_packet(p, pts=p.pts + shift, dts=p.dts + shift)


def numbered_frame(number: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Uint8 (height, width, 3) picture of a number below 2**14, in blocks that survive coding and scaling."""
    code = number << _CHECK_BITS | _check(number)
    cells = np.array([code >> bit & 1 for bit in range(_ROWS * _COLUMNS)], bool).reshape(_ROWS, _COLUMNS)
    rows = np.arange(height) * _ROWS // height
    columns = np.arange(width) * _COLUMNS // width
    gray = np.where(cells[rows][:, columns], 235, 20).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


def read_number(frame: Any) -> int | None:
    """The number that an (H, W, 3) or (3, H, W) picture shows, numpy or torch; None if it can't be read."""
    picture = np.asarray(frame).astype(np.float32)
    gray = picture.mean(axis=2 if picture.shape[2] == 3 else 0)
    cells = np.array([_middle(cell) for row in np.array_split(gray, _ROWS) for cell in _split(row)])
    low, high = cells.min(), cells.max()
    level = (cells - low) / max(high - low, 1)
    if high - low < 60 or np.any(np.abs(level - 0.5) < 0.2):
        return None
    code = sum(1 << bit for bit, value in enumerate(level) if value > 0.5)
    number = code >> _CHECK_BITS
    return number if code & (1 << _CHECK_BITS) - 1 == _check(number) else None


def _split(row: np.ndarray) -> list[np.ndarray]:
    return np.array_split(row, _COLUMNS, axis=1)


def _middle(cell: np.ndarray) -> float:
    height, width = cell.shape
    return float(cell[height // 4 : -height // 4, width // 4 : -width // 4].mean())


def _check(number: int) -> int:
    return (number * 2_654_435_761 >> 11 ^ 45) & (1 << _CHECK_BITS) - 1


def write_numbered_video(
    path: str | Path, num_frames: int, *, height: int = 120, width: int = 160, **kwargs: Any
) -> Path:
    """A video whose frame i shows the number i; further arguments as of `write_video`."""
    return write_video(path, (numbered_frame(i, height, width) for i in range(num_frames)), **kwargs)
