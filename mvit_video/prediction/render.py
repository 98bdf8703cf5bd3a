"""Timelines to look at: a picture, and a copy of the video with labels drawn in."""

from __future__ import annotations

import bisect
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from mvit_video.data.decode.frames import FrameFormat
from mvit_video.errors import VideoError
from mvit_video.io.console import printable
from mvit_video.io.writing import replacing
from mvit_video.prediction.prediction import Segment
from mvit_video.prediction.stream import open_stream
from mvit_video.prediction.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = npt.NDArray[np.uint8]

MAX_CURVES, MAX_LEGEND = 8, 16
_FORMATS = {".mp4": "mp4", ".mkv": "matroska"}
_MP4_AUDIO = {"aac", "mp3", "mp2", "opus", "ac3", "eac3", "flac", "alac", "vorbis"}


@contextmanager
def new_figure(path: Path, size: tuple[float, float], dpi: int) -> Iterator[Figure]:
    """A figure that is written as PNG when the block ends well; names in it may hold a "$"."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=dpi)


def plot_timeline(timeline: Timeline, segments: Sequence[Segment], path: Path) -> None:
    """The likeliest classes' scores against time, and the segments as bars below."""
    with new_figure(path, (12, 5), 120) as figure:
        _draw_timeline(timeline, segments, figure)


def _draw_timeline(timeline: Timeline, segments: Sequence[Segment], figure: Figure) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    curves, bars = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    names, in_segments = timeline.class_names, {segment.class_name for segment in segments}
    shown = timeline.scores.amax(0).argsort(descending=True)[:MAX_CURVES].tolist()
    shown += [index for index, name in enumerate(names) if index not in shown and name in in_segments]
    palette = [f"C{i}" for i in range(10)]
    if len(shown) > len(palette):  # which would begin anew
        palette = list(colormaps["turbo"](np.linspace(0.02, 0.98, len(shown))))
    colours = {names[index]: colour for index, colour in zip(shown, palette, strict=False)}
    centres = [(start + end) / 2 for start, end in timeline.spans]
    style: dict[str, Any] = {"marker": "."} if len(centres) < 50 else {}
    for index in shown:
        label = textwrap.shorten(printable(names[index]), 40, placeholder=" ...")
        curves.plot(
            centres, timeline.scores[:, index].numpy(), color=colours[names[index]], label=label, **style
        )
    curves.set(ylabel="score", ylim=(0, 1.02), title=printable(Path(timeline.path).name))
    curves.grid(alpha=0.3)
    handles, labels = curves.get_legend_handles_labels()
    more = len(labels) - MAX_LEGEND
    title = f"and {more} more classes" if more > 0 else None
    figure.legend(handles[:MAX_LEGEND], labels[:MAX_LEGEND], loc="outside right upper", title=title)
    for segment in segments:
        extent = [(segment.start, segment.end - segment.start)]
        bars.broken_barh(extent, (0, 1), color=colours[segment.class_name], alpha=0.3 + 0.7 * segment.score)
    begin, end = timeline.spans[0][0], timeline.spans[-1][1]
    bars.set(yticks=[], xlabel="seconds", ylim=(0, 1), xlim=(begin, end))
    if end - begin > 180:
        bars.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 1.5, 3, 6, 10]))  # 1, 5, 10 minutes
        bars.xaxis.set_major_formatter(lambda second, _: str(timedelta(seconds=round(second))))
        bars.set(xlabel="h:mm:ss")


def annotate_video(source: str, segments: Sequence[Segment], path: Path) -> Path:
    """A copy of a video with each segment's label and a bar of its score drawn in; audio is copied as it is.

    Args:
        path: of the copy; an audio codec that MP4 can't hold makes it a ``.mkv``.

    Returns:
        the path that was written.

    Raises:
        VideoError: the source can't be read, or the copy can't be written; nothing is left of it then.
    """
    try:
        with open_stream(source) as (container, stream, _):
            audio = next(iter(container.streams.audio), None)
            if audio is not None and audio.codec_context.name not in _MP4_AUDIO:
                path = path.with_suffix(".mkv")
            with replacing(path) as file, av.open(file, "w", format=_FORMATS[path.suffix]) as copy:
                if not _copy_with_labels(container, (stream, audio), copy, segments):
                    raise VideoError(source, "no frame can be decoded")
    except (FFmpegError, OSError) as error:
        raise VideoError(source, f"no annotated copy could be written ({error})") from None
    return path


def _copy_with_labels(
    container: Any, streams: tuple[VideoStream, Any], copy: Any, segments: Sequence[Segment]
) -> bool:
    """Draw into every frame; False where there is none."""
    stream, audio = streams
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    painter = _Painter(segments, stream.time_base or 1 / rate, rate)
    video = copy.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
    video.pix_fmt, video.codec_context.time_base = "yuv420p", painter.tick
    copied_audio = None if audio is None else copy.add_stream_from_template(audio)
    is_open = False
    waiting: list[Any] = []  # audio packets, until the size is known and the file can begin
    for packet in container.demux([s for s in streams if s is not None]):
        if packet.stream is audio:
            if packet.dts is not None:
                packet.stream = copied_audio
                waiting.append(packet)
        else:
            frames = []
            with suppress(FFmpegError):
                frames = packet.decode()
            for drawn in filter(None, map(painter.paint, frames)):
                if not is_open:
                    video.height, video.width, is_open = drawn.height, drawn.width, True
                copy.mux(video.encode(drawn))
        if is_open:
            copy.mux(waiting)
            waiting = []
    if is_open:
        copy.mux(video.encode(None))
    return is_open


class _Painter:
    """Draws labels into frames as they are shown: a strip with a class name, its score and a bar.

    Args:
        tick: of the clock that the frames' times are told by, in seconds.
        rate: frames a second, where they have no times.
    """

    def __init__(self, segments: Sequence[Segment], tick: Fraction, rate: Fraction) -> None:
        self.tick, self._segments = tick, segments
        self._starts = [segment.start for segment in segments]
        self._step = int(1 / rate / tick)
        self._reformatter = VideoReformatter()
        self._format: FrameFormat | None = None
        self._first = self._last = -1
        self._strip: tuple[int, Picture] = (-1, np.empty((0, 0, 3), np.uint8))  # of which segment

    def paint(self, frame: VideoFrame) -> VideoFrame | None:
        """An upright copy of even height and width; None for a frame whose time doesn't follow."""
        pts = self._last + self._step if frame.pts is None else frame.pts
        if self._format is None:
            self._format, self._first = FrameFormat.of(frame), pts
        elif pts <= self._last:
            return None
        self._last = pts
        fmt = self._format
        rgb = self._reformatter.reformat(frame, width=fmt.width, height=fmt.height, format="rgb24", threads=1)
        picture = fmt.orientation.apply(cast(Picture, rgb.to_ndarray()))
        height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2  # yuv420p is even
        picture = np.array(picture[:height, :width], order="C")
        second = float((pts - self._first) * self.tick)
        index = bisect.bisect_right(self._starts, second + 1e-6) - 1
        if index >= 0 and second < self._segments[index].end:
            if index != self._strip[0]:
                self._strip = index, _strip(self._segments[index], height, width)
            lower = picture[-len(self._strip[1]) :]
            lower[:] = lower // 4 + self._strip[1] // 4 * 3  # the picture shines through
        drawn = VideoFrame.from_ndarray(picture, format="rgb24")
        drawn.pts, drawn.time_base = pts, self.tick
        return drawn


def _strip(segment: Segment, height: int, width: int) -> Picture:
    size = max(10, height // 16)
    text = f"{printable(segment.class_name)}  {segment.score:.0%}"
    font = ImageFont.load_default(size)
    while size > 8 and font.getlength(text) > 0.96 * width:  # long names become small
        size -= 1
        font = ImageFont.load_default(size)
    tall, bar = round(1.5 * size), max(2, size // 5)
    image = Image.new("RGB", (width, min(tall + bar, height)), "black")
    draw = ImageDraw.Draw(image)
    draw.text((0.02 * width, tall / 2), text, fill="white", font=font, anchor="lm")
    draw.rectangle((0, tall, max(segment.score * width - 1, 0), tall + bar), fill=(255, 190, 0))
    return np.asarray(image)
