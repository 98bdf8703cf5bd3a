"""Long videos and live ones: read once from front to back, through windows, in bounded memory.

The CPU decodes them, with all cores, whatever the decoder: every frame in its turn is what frame threads are
made for, and broken streams have to be read on. Only what a window's clips show is converted to RGB, on the
decoder's device, unless whole frames would fill the memory.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
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
    declared_rate,
    decoder_limit,
    open_container,
    unreadable,
    why_not_opened,
)
from mvit_video.data.decode.frames import FrameFormat, Transform, convert
from mvit_video.data.decode.video import CPU, Video
from mvit_video.data.loader import memory_limit
from mvit_video.errors import ConfigError, VideoError

log = logging.getLogger(__name__)

Source: TypeAlias = "str | Path | IO[bytes]"

_TIMEOUT = 10.0  # seconds without an answer, of streams (FFmpeg's RTSP reader waits twice)
_SILENCE = f"there was no answer for {_TIMEOUT:g} seconds"
_PAUSE = 1.0  # seconds between two attempts to reach a stream again
_RECONNECTED = ("rtsp://", "rtsps://", "rtmp://", "tcp://", "udp://", "srt://", "http://", "https://")
_SLACK = 1e-6  # seconds: a frame that is this early belongs to the next window
_SHORTEST = 1e-4  # seconds of a window or a stride: far above _SLACK, where windows would have no end
_WHOLE_BYTES = 1 << 28  # of a window's frames as they were decoded: 2.9 s of 1080p at 30 a second


class RgbConverter:
    """Makes RGB of a source's frames, all in the format of the first."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device, self._reformatter = device, VideoReformatter()
        self.fmt: FrameFormat | None = None

    def __call__(self, frame: VideoFrame) -> Tensor:
        """uint8 (1, 3, H, W), upright, on the device."""
        self.fmt = self.fmt or FrameFormat.of(frame)
        return convert([frame], self.fmt, self._reformatter, self.device)


class _Frame(NamedTuple):
    """What a source shows from a moment on."""

    second: float  # since the first frame
    picture: VideoFrame | Tensor  # as it was decoded, or transformed (1, ...)
    rate: float  # frames a second, as its container says
    codec: str

    @property
    def nbytes(self) -> int:
        picture = self.picture
        return picture.nbytes if isinstance(picture, Tensor) else sum(p.buffer_size for p in picture.planes)


class Window(Video):
    """The frames that a source shows within some seconds, in memory.

    Attributes:
        start, end: seconds from the first frame of the source; the last window may end early.
    """

    def __init__(
        self, name: str, frames: Sequence[_Frame], span: tuple[float, float], to_rgb: RgbConverter
    ) -> None:
        assert to_rgb.fmt is not None
        self.path, self.device, self.size = name, to_rgb.device, to_rgb.fmt.upright_size
        self.start, self.end = span
        self._pictures, self._to_rgb = [frame.picture for frame in frames], to_rgb
        self.num_frames, self.codec = len(frames), frames[-1].codec
        self.times = np.array([frame.second - frames[0].second for frame in frames])
        seconds = float(self.times[-1])
        self.fps = (len(frames) - 1) / seconds if seconds > 0 else frames[-1].rate

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        return torch.cat([self._picture(self._pictures[index], transform) for index in wanted])

    def _picture(self, picture: VideoFrame | Tensor, transform: Transform | None) -> Tensor:
        if isinstance(picture, Tensor):
            return picture.to(self.device)
        frames = self._to_rgb(picture)
        return frames if transform is None else transform(frames)


def iter_windows(
    source: Source,
    *,
    length: float,
    stride: float,
    follow: float | None = None,
    device: torch.device = CPU,
    max_pixels: int = MAX_PIXELS,
    transform: Transform | None = None,
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
        device: where the frames end up.
        max_pixels: of a frame; a source with larger ones is refused.
        transform: what ``get_frames`` of the windows will be called with. Then no more than 256 MB of whole
            frames are held: where a window has more, its frames are transformed as they come.

    Raises:
        VideoError: nothing can be read, or the frames of a window would fill half of the memory, transformed
            if there is a transform.
        ConfigError: a number is negative, not finite, or too small for a window or a stride.
    """
    for name, value in (("length", length), ("stride", stride), ("follow", follow)):
        least = 0.0 if name == "follow" else _SHORTEST
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"windows need a finite {name} of at least {least:g} seconds, got {value:g}")
    to_rgb, name = RgbConverter(device), _name_of(source)

    def shrink(frame: _Frame) -> _Frame:
        if transform is None or isinstance(frame.picture, Tensor):
            return frame
        picture = transform(to_rgb(frame.picture)).cpu()
        return frame._replace(picture=picture) if picture.nbytes < frame.nbytes else frame

    frames = _iter_frames(source, name, follow, max_pixels)
    for span, shown in _slide(name, frames, length, stride, shrink):
        if to_rgb.fmt is None and isinstance(shown[0].picture, VideoFrame):
            to_rgb.fmt = FrameFormat.of(shown[0].picture)
        yield Window(name, shown, span, to_rgb)
    if to_rgb.fmt is None:
        raise unreadable(name, "no frame can be decoded", max_pixels=max_pixels)


def _slide(
    name: str,
    frames: Iterable[_Frame],
    length: float,
    stride: float,
    shrink: Callable[[_Frame], _Frame],
) -> Iterator[tuple[tuple[float, float], list[_Frame]]]:
    """The span and the frames of each window, as soon as a frame behind its end is there.

    Raises VideoError before the frames of a window fill half of the memory.
    """
    held: deque[_Frame] = deque()
    num_bytes, memory, is_tight = 0, memory_limit(), False
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
                num_bytes -= held.popleft().nbytes
        if frame.second >= number * stride - _SLACK:
            held.append(shrink(frame) if is_tight else frame)
            num_bytes += held[-1].nbytes
            if not is_tight and num_bytes > min(_WHOLE_BYTES, memory // 8):
                is_tight, held = True, deque(map(shrink, held))
                num_bytes = sum(frame.nbytes for frame in held)
            if num_bytes > memory // 2:
                full = f"{len(held)} frames in a window of {length:g} s fill half of the memory"
                raise VideoError(name, f"{full}; choose a shorter window")
    if held and (number == 0 or held[-1].second >= seen - _SLACK):
        yield (number * stride, held[-1].second + 1 / held[-1].rate), list(held)


def _iter_frames(source: Source, name: str, follow: float | None, max_pixels: int) -> Iterator[_Frame]:
    """The frames as they are shown; a stream that broke off is opened again.

    A clock that jumps back, as a stream's may when it is interrupted, goes on from the last frame.
    """
    again = follow is not None and name.startswith(_RECONNECTED)
    last, due = -math.inf, 0.0  # seconds of the last frame; of the next one, if its time tells nothing
    alive = started = time.monotonic()
    while True:
        try:
            with open_stream(source, follow=follow, max_pixels=max_pixels) as (container, stream):
                rate, tick = float(declared_rate(stream)), float(stream.time_base or 0)
                if name.startswith("http") and (container.size > 0 or container.duration is not None):
                    again = False  # it is known how long it is: it would begin at its front, unlike a camera
                offset: float | None = None  # of this connection's clock
                for number, frame in enumerate(_decoded(container, stream, name)):
                    alive = time.monotonic()
                    if last < 0:
                        started = alive
                    elif number == 0:  # the time that it wasn't there counts
                        due = max(due, alive - started)
                    second = due
                    if frame.pts is not None:
                        if offset is None or frame.pts * tick + offset <= last:
                            offset = due - frame.pts * tick
                        second = frame.pts * tick + offset
                    last, due = second, second + 1 / rate
                    yield _Frame(second, frame, rate, stream.codec_context.name)
        except VideoError as error:
            if not again or last < 0:
                raise
            log.info("%s", error)
        if not again or last < 0 or time.monotonic() - alive > (follow or 0):
            return
        log.warning("%s: no more frames; trying to reach it again", name)
        time.sleep(_PAUSE)


def _decoded(container: InputContainer, stream: VideoStream, name: str) -> Iterator[VideoFrame]:
    """All frames but the damaged ones."""
    try:
        for packet in container.demux(stream):
            with suppress(FFmpegError, OSError):  # of a packet without its frame, the next one is read
                yield from (frame for frame in packet.decode() if not frame.is_corrupt)
    except (FFmpegError, OSError) as error:
        log.warning("%s: reading ended early (%s)", name, _reason(error))
        with suppress(FFmpegError, OSError):  # what the decoder still holds
            yield from (frame for frame in stream.decode(None) if not frame.is_corrupt)


@contextmanager
def open_stream(
    source: Source, *, follow: float | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A container to be read from front to back, and its video stream."""
    name, how, options = _name_of(source), decoder_limit(max_pixels), dict[str, Any]()
    place: Any = source
    origin: Origin = "pipe"
    file: IO[bytes] | None = None
    if not isinstance(source, str | Path):
        place = source if source.seekable() else _Pipe(source)
    elif str(source) == "-":
        place = "pipe:0"
    elif "://" in name:
        origin, options["timeout"] = "address", _TIMEOUT
        if name.startswith("rtsp"):
            how["rtsp_transport"] = "tcp"  # UDP loses packets
        elif name.startswith("http") and follow is not None:
            # A file goes on where it broke off; what has no end is opened again, see ``_iter_frames``.
            how |= {"reconnect": "1", "reconnect_delay_max": str(math.ceil(follow))}
    elif name.startswith("/dev/video"):
        origin, options["format"] = "camera", "v4l2"
    else:
        check_file(name)
        origin, place = "file", f"file:{name}"
        if follow is not None:
            file = Path(name).open("rb", buffering=0)  # noqa: SIM115 (closed below)
            origin, place = "pipe", _Pipe(file, follow)
    asked = time.monotonic()
    with file or nullcontext():
        try:
            container = open_container(place, origin, options=how, **options)
        except (FFmpegError, OSError, ValueError) as error:
            if isinstance(source, str | Path) and Path(name).is_file():
                raise VideoError(name, why_not_opened(name, error)) from None
            silent = time.monotonic() - asked > _TIMEOUT - 1  # RTSP's reader then calls it invalid data
            hint = "; is the address right, and is something sent there?" if "://" in name else ""
            reason = f"can't be opened: {_SILENCE if silent else _reason(error)}{hint}"
            raise VideoError(name, reason) from None
        with container:
            stream = best_video_stream(container, name, max_pixels)
            stream.thread_type = "AUTO"
            yield container, stream


def redact_credentials(source: Source) -> str:
    """What a source is called in messages: an address without the user's name and password."""
    name = source if isinstance(source, str | Path) else getattr(source, "name", source)
    return re.sub(r"(?<=://)[^/]*@", "", str(name))


def _name_of(source: Source) -> str:
    return "standard input" if str(source) == "-" else redact_credentials(source)


def _reason(error: Exception) -> str:
    if isinstance(error, ExitError):  # PyAV's timeout
        return _SILENCE
    return str(getattr(error, "strerror", None) or error)


class _Pipe:
    """A file that is read from front to back: FFmpeg must not find out that it has a ``seek``.

    Args:
        patience: seconds without data that are its end, where someone is still writing it.
    """

    def __init__(self, file: IO[bytes], patience: float = 0.0) -> None:
        self._file, self._patience = file, patience

    def read(self, size: int) -> bytes:
        waited_since = time.monotonic()
        while not (data := self._file.read(size)) and time.monotonic() - waited_since < self._patience:
            time.sleep(0.05)
        return data or b""
