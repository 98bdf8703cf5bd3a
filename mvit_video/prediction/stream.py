"""Long videos and live ones: read once from front to back, through windows, in bounded memory.

The CPU decodes them, with all cores, whatever the decoder: every frame in its turn is what frame threads are
made for, and broken streams have to be read on. Only what a window's clips show is converted to RGB, on the
decoder's device.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from av.container import InputContainer
from av.error import ExitError, FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from mvit_video.data.decode.container import (
    MAX_PIXELS,
    Origin,
    best_video_stream,
    check_file,
    open_container,
    why_not_opened,
)
from mvit_video.data.decode.frames import FrameCollector, FrameFormat, Transform, make_buffer
from mvit_video.data.decode.video import Video
from mvit_video.data.loader import memory_limit
from mvit_video.errors import ConfigError, VideoError

log = logging.getLogger(__name__)

Source: TypeAlias = "str | Path | IO[bytes]"

_TIMEOUT = 10.0  # seconds without an answer, of streams (FFmpeg's RTSP reader waits twice)
_SILENCE = f"there was no answer for {_TIMEOUT:g} seconds"
_PAUSE = 1.0  # seconds between two attempts to reach a stream again
_RECONNECTED = ("rtsp://", "rtsps://", "rtmp://", "tcp://", "udp://", "srt://", "http://", "https://")
_SLACK = 1e-6  # seconds: a frame that is this early belongs to the next window


class _Source(NamedTuple):
    """What is known of a source besides its frames."""

    name: str
    rate: float
    codec: str


class _TimedFrame(NamedTuple):
    second: float  # since the first frame
    frame: VideoFrame
    source: _Source


class Window(Video):
    """The frames that a source shows within some seconds, in memory.

    Attributes:
        start, end: seconds from the first frame of the source; the last window may end early.
    """

    def __init__(
        self,
        frames: Sequence[_TimedFrame],
        span: tuple[float, float],
        *,
        fmt: FrameFormat,
        reformatter: VideoReformatter,
        device: torch.device,
    ) -> None:
        self.path, rate, self.codec = frames[-1].source
        self.start, self.end = span
        self._frames, self._format, self._reformatter, self.device = frames, fmt, reformatter, device
        self.num_frames = len(frames)
        first, last = frames[0].second, frames[-1].second
        self.fps = (len(frames) - 1) / (last - first) if last > first else rate
        self.times = np.array([frame.second - first for frame in frames])
        self.size = fmt.upright_size

    def close(self) -> None:
        """Let go of the frames."""
        self._frames = ()

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        make = partial(make_buffer, fmt=self._format, reformatter=self._reformatter, device=self.device)
        frames: FrameCollector[VideoFrame] = FrameCollector(
            len(wanted), make, size=self.size, transform=transform
        )
        for slot, index in enumerate(wanted):
            frames.write(slot, self._frames[index].frame)
        return frames.to_tensor().to(self.device)


def iter_windows(
    source: Source,
    *,
    length: float,
    stride: float,
    follow: float | None = None,
    device: torch.device | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Window]:
    """Windows [0, length), [stride, stride + length), ... of a video as it is read, in seconds.

    Only the frames of one window are held. Windows in which nothing is shown are left out; the last one is
    shorter where frames would be left over. A window's frames, and so its scores, are those of a file into
    which exactly these frames were cut.

    Args:
        source: a file; a stream's address (``rtsp://...``, ``http://...``); a camera (``/dev/video0``);
            ``-``, standard input; or an open binary file.
        follow: seconds to wait for more, each time that an end is reached: for a file to grow, or for a
            stream that broke off or ended to be there again; over HTTP a stream is what doesn't say how long
            it is. The time that passes without frames counts. None: the first end is the end.
        device: where the frames end up; None: the CPU.
        max_pixels: of a frame; a source with larger ones is refused.

    Raises:
        VideoError: nothing can be read, or the frames of a window would fill half of the memory.
        ConfigError: a number isn't positive.
    """
    for name, value in (("length", length), ("stride", stride), ("follow", follow)):
        if value is not None and not (0 < value < math.inf or (name == "follow" and value == 0)):
            raise ConfigError(f"windows need a positive, finite {name} in seconds, got {value:g}")
    reformatter = VideoReformatter()
    fmt: FrameFormat | None = None
    for span, frames in _slide(_timed_frames_of(source, follow, max_pixels), length, stride):
        fmt = fmt or FrameFormat.of(frames[0].frame)
        yield Window(frames, span, fmt=fmt, reformatter=reformatter, device=device or torch.device("cpu"))
    if fmt is None:
        raise VideoError(redact_credentials(source), "no frame can be decoded")


def _slide(
    frames: Iterable[_TimedFrame], length: float, stride: float
) -> Iterator[tuple[tuple[float, float], list[_TimedFrame]]]:
    """The span and the frames of each window, as soon as a frame behind its end is there.

    Raises VideoError before the frames of a window fill half of the memory.
    """
    held: deque[_TimedFrame] = deque()
    most = memory_limit() // 2
    number, seen = 0, 0.0  # seen: seconds that earlier windows reached to
    for frame in frames:
        while frame.second >= number * stride + length - _SLACK:
            if held:
                seen = number * stride + length
                yield (number * stride, seen), [f for f in held if f.second < seen - _SLACK]
                number += 1
            else:  # nothing was shown for long
                number = max(number + 1, math.ceil((frame.second - length) / stride))
            while held and held[0].second < number * stride - _SLACK:
                held.popleft()
        if frame.second >= number * stride - _SLACK:
            held.append(frame)
            if len(held) * sum(plane.buffer_size for plane in frame.frame.planes) > most:
                raise VideoError(
                    frame.source.name,
                    f"{len(held)} frames of {frame.frame.width} x {frame.frame.height} pixels in a window of "
                    f"{length:g} s fill half of the memory; choose a shorter window",
                )
    if held and (number == 0 or held[-1].second >= seen - _SLACK):
        last = held[-1]
        yield (number * stride, last.second + 1 / last.source.rate), list(held)


def _timed_frames_of(source: Source, follow: float | None, max_pixels: int) -> Iterator[_TimedFrame]:
    """The frames with seconds since the first; a stream that broke off is opened again."""
    again = follow is not None and str(source).startswith(_RECONNECTED)
    started, last, step = math.nan, -math.inf, 0.0  # by the clock of the wall; by that of the stream
    alive = time.monotonic()
    while True:
        try:
            with open_stream(source, follow=follow, max_pixels=max_pixels) as (container, stream, name):
                rate = float(stream.average_rate or stream.guessed_rate or 25)
                about = _Source(name, rate, stream.codec_context.name)
                again = again and not (name.startswith("http") and _has_an_end(container))
                offset: float | None = None
                for second, frame in timed_frames(container, stream, name):
                    alive = time.monotonic()
                    if offset is None:  # the first frame of all is second 0
                        started = alive if math.isnan(started) else started
                        offset = max(last + step, alive - started) - second if last >= 0 else 0.0
                    last, step = second + offset, 1 / rate
                    yield _TimedFrame(last, frame, about)
        except VideoError as error:
            if not again or last < 0:
                raise
            log.info("%s", error)
        if not again or last < 0 or time.monotonic() - alive > (follow or 0):
            return
        log.warning("%s: no more frames; trying to reach it again", redact_credentials(source))
        time.sleep(_PAUSE)


def _has_an_end(container: InputContainer) -> bool:
    """Whether it is known how long a source is: asked again, it would begin at its front, unlike a camera."""
    return container.size > 0 or container.duration is not None


def timed_frames(
    container: InputContainer, stream: VideoStream, name: str
) -> Iterator[tuple[float, VideoFrame]]:
    """The frames as they are shown, with seconds since the first; damaged ones are left out.

    A clock that jumps back, as a stream's may when it is interrupted, goes on from the last frame.
    """
    tick = float(stream.time_base or 0)
    step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    origin: int | None = None
    offset, second, count = 0.0, -math.inf, 0
    for frame in _decoded(container, stream, name):
        if frame.is_corrupt:
            continue
        if frame.pts is None:
            now = count * step
        else:
            origin = frame.pts if origin is None else origin
            now = (frame.pts - origin) * tick + offset
        if now <= second:
            offset += second + step - now
            now = second + step
        second = now
        count += 1
        yield second, frame


def _decoded(container: InputContainer, stream: VideoStream, name: str) -> Iterator[VideoFrame]:
    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer, None)
        except (FFmpegError, OSError) as error:
            log.warning("%s: reading ended early (%s)", name, _reason(error))
            packet = None
        if packet is None:  # what the decoder still holds
            with suppress(FFmpegError, OSError):
                yield from stream.decode(None)
            return
        try:
            yield from packet.decode()
        except FFmpegError:
            continue


@contextmanager
def open_stream(
    source: Source, *, follow: float | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[InputContainer, VideoStream, str]]:
    """A container to be read from front to back, its video stream and a name for errors."""
    name = redact_credentials(source)
    place: Any = source
    options: dict[str, Any] = {}
    file: IO[bytes] | None = None
    origin: Origin = "pipe"
    if isinstance(source, str | Path):
        if str(source) == "-":
            name, place = "standard input", "pipe:0"
        elif "://" in name:
            origin = "address"
            options["timeout"] = _TIMEOUT
            if name.startswith("rtsp"):
                options["options"] = {"rtsp_transport": "tcp"}  # UDP loses packets
            elif name.startswith("http") and follow is not None:
                # A file goes on where it broke off; what has no end is opened again, see ``_shown``.
                options["options"] = {"reconnect": "1", "reconnect_delay_max": str(math.ceil(follow))}
        elif name.startswith("/dev/video"):
            origin, options["format"] = "camera", "v4l2"
        else:
            check_file(name)
            origin, place = "file", f"file:{name}"
            if follow is not None:
                file = Path(name).open("rb", buffering=0)  # noqa: SIM115 (closed below)
                origin, place = "pipe", _Growing(file, follow)
    elif not source.seekable():
        place = _OnlyRead(source)
    asked = time.monotonic()
    try:
        container = open_container(place, origin, **options)
    except (FFmpegError, OSError, ValueError) as error:
        if file is not None:
            file.close()
        plain = isinstance(source, str | Path) and Path(name).is_file()
        if plain:
            raise VideoError(name, why_not_opened(name, error)) from None
        silent = time.monotonic() - asked > _TIMEOUT - 1  # RTSP's reader then calls it invalid data
        hint = "; is the address right, and is something sent there?" if "://" in name else ""
        raise VideoError(name, f"can't be opened: {_SILENCE if silent else _reason(error)}{hint}") from None
    try:
        stream = best_video_stream(container, name, max_pixels)
        stream.thread_type = "AUTO"
        yield container, stream, name
    finally:
        container.close()
        if file is not None:
            file.close()


def redact_credentials(source: Source) -> str:
    """What a source is called in messages: an address without the user's name and password."""
    name = source if isinstance(source, str | Path) else getattr(source, "name", source)
    return re.sub(r"(?<=://)[^/]*@", "", str(name))


def _reason(error: Exception) -> str:
    if isinstance(error, ExitError):  # PyAV's timeout
        return _SILENCE
    return str(getattr(error, "strerror", None) or error)


class _OnlyRead:
    """A pipe: FFmpeg must not find out that it has a ``seek``."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size) or b""


class _Growing(_OnlyRead):
    """A file that someone is still writing: its end is where nothing came for ``patience`` seconds."""

    def __init__(self, file: IO[bytes], patience: float) -> None:
        super().__init__(file)
        self._patience = patience

    def read(self, size: int) -> bytes:
        waited_since = time.monotonic()
        while not (data := super().read(size)):
            if time.monotonic() - waited_since > self._patience:
                return b""
            time.sleep(0.05)
        return data
