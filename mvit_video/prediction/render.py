"""Timelines to look at: a picture, and a copy of the video with labels drawn in."""

from __future__ import annotations

import bisect
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from PIL import Image, ImageDraw, ImageFont

from mvit_video.data.decode.container import MAX_PIXELS, declared_rate
from mvit_video.errors import VideoError
from mvit_video.io.clips import add_picture
from mvit_video.io.console import printable
from mvit_video.io.figures import new_figure
from mvit_video.io.writing import replacing
from mvit_video.prediction.prediction import Segment
from mvit_video.prediction.stream import RgbConverter, open_stream
from mvit_video.prediction.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Picture = npt.NDArray[np.uint8]
Paint = Callable[[Picture, float], Picture]

MAX_CURVES, MAX_LEGEND = 8, 16
_FORMATS = {".mp4": "mp4", ".mkv": "matroska"}
_OF_BROWSERS = ("h264", "vp8", "vp9", "av1")
_MP4_AUDIO = {"aac", "mp3", "mp2", "opus", "ac3", "eac3", "flac", "alac", "vorbis"}


def plot_timeline(timeline: Timeline, segments: Sequence[Segment], path: Path) -> None:
    """The likeliest classes' scores against time, and the segments as bars below.

    Where windows may be of several classes, each class has a row of bars.
    """
    from matplotlib import colormaps

    names, in_segments = timeline.class_names, {segment.class_name for segment in segments}
    shown = timeline.scores.amax(0).argsort(descending=True)[:MAX_CURVES].tolist()
    shown += [index for index, name in enumerate(names) if index not in shown and name in in_segments]
    palette: Sequence[Any] = [f"C{i}" for i in range(10)]
    if len(shown) > len(palette):  # which would begin anew
        palette = list(colormaps["turbo"](np.linspace(0.02, 0.98, len(shown))))
    colours = {names[index]: colour for index, colour in zip(shown, palette, strict=False)}
    centres = [(start + end) / 2 for start, end in timeline.spans]
    rows = sorted(in_segments, key=list(colours).index, reverse=True) if timeline.multi_label else []
    tall = max(1.0, 0.3 * len(rows))
    with new_figure(path, (12, 4 + tall), 120, keep=True) as figure:
        curves, bars = figure.subplots(2, 1, sharex=True, height_ratios=(4, tall))
        for index in shown:
            label = textwrap.shorten(printable(names[index]), 40, placeholder=" ...")
            marker = "." if len(centres) < 50 else ""
            scores = timeline.scores[:, index].numpy()
            curves.plot(centres, scores, color=colours[names[index]], label=label, marker=marker)
        curves.set(ylabel="score", ylim=(0, 1.02), title=printable(Path(timeline.path).name))
        curves.grid(alpha=0.3)
        handles, labels = curves.get_legend_handles_labels()
        more = len(labels) - MAX_LEGEND
        title = f"and {more} more classes" if more > 0 else None
        figure.legend(handles[:MAX_LEGEND], labels[:MAX_LEGEND], loc="outside right center", title=title)
        for segment in segments:
            extent, alpha = (segment.start, segment.end - segment.start), 0.3 + 0.7 * segment.score
            row = rows.index(segment.class_name) if rows else 0
            bars.broken_barh([extent], (row, 1), color=colours[segment.class_name], alpha=alpha)
        bars.set(yticks=[], xlabel="seconds", ylim=(0, len(rows) or 1))
        _set_times(bars, timeline.spans[0][0], timeline.spans[-1][1])


def _set_times(axes: Axes, begin: float, end: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=(begin, end))
    if end - begin > 180:
        axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 1.5, 3, 6, 10]))  # 1, 5, 10 minutes
        axes.xaxis.set_major_formatter(lambda second, _: str(timedelta(seconds=round(second))))
        axes.set(xlabel="h:mm:ss")


def is_playable(source: str) -> bool:
    """Whether every browser of today plays a file. Raises VideoError if it can't be read."""
    if Path(source).suffix.lower() not in (".mp4", ".webm"):
        return False
    with open_stream(source) as (_, stream):
        context = stream.codec_context
        return context.codec.canonical_name in _OF_BROWSERS and context.pix_fmt in ("yuv420p", "yuvj420p")


def playable_copy(source: str, path: Path) -> None:
    """An MP4 of a video for browsers, without sound; see ``redraw_video``."""
    redraw_video(source, lambda picture, _: picture, path, sound=False)


def annotate_video(source: str, segments: Sequence[Segment], path: Path, **options: Any) -> Path:
    """A copy of a video with each segment's label and a bar of its score drawn in, see ``redraw_video``."""
    return redraw_video(source, _Painter(segments), path, **options)


def redraw_video(
    source: str,
    paint: Paint,
    path: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    sound: bool = True,
    progress: Callable[[float], None] = lambda _: None,
) -> Path:
    """A copy of a video with something drawn into every frame; audio is copied as it is, or left out.

    Args:
        paint: gives what is shown in the place of a picture, upright RGB (H, W, 3), of a second since the
            first. It may draw into the picture.
        path: of the copy; an audio codec that MP4 can't hold makes it a ``.mkv``. Another file of that name
            is kept, see ``io.writing.replacing``.
        max_pixels: of a frame; a source with larger ones is refused.
        progress: is told of each second of the video that has been reached.

    Returns:
        the path that was written.

    Raises:
        VideoError: the source can't be read, or the copy can't be written; nothing is left of it then.
    """
    try:
        with open_stream(source, max_pixels=max_pixels) as (container, stream):
            audio = next(iter(container.streams.audio), None) if sound else None
            if audio is not None and audio.codec_context.name not in _MP4_AUDIO:
                path = path.with_suffix(".mkv")
            with (
                replacing(path, keep=True) as file,
                av.open(file, "w", format=_FORMATS[path.suffix]) as copy,
            ):
                if not _copy_with_labels(container, stream, audio, copy, paint, progress):
                    raise VideoError(source, "no frame can be decoded")
    except (FFmpegError, OSError) as error:
        raise VideoError(source, f"no copy could be written ({error})") from None
    return path


def _copy_with_labels(
    container: Any, stream: Any, audio: Any, copy: Any, paint: Paint, progress: Callable[[float], None]
) -> bool:
    """Draw into every frame; False where there is none."""
    rate = declared_rate(stream)
    tick = stream.time_base or 1 / rate
    video = copy.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
    video.pix_fmt, video.codec_context.time_base = "yuv420p", tick
    copied_audio = None if audio is None else copy.add_stream_from_template(audio)
    to_rgb = RgbConverter()
    first = last = None  # times of frames, in ticks
    waiting: list[Any] = []  # audio packets, until the size is known and the file can begin
    for packet in container.demux([s for s in (stream, audio) if s is not None]):
        if packet.stream is audio:
            if packet.dts is not None:
                packet.stream = copied_audio
                waiting.append(packet)
        else:
            frames = []
            with suppress(FFmpegError):
                frames = packet.decode()
            for frame in frames:
                pts = frame.pts
                if pts is None:
                    pts = 0 if last is None else last + int(1 / rate / tick)
                if first is None or last is None:
                    first = pts
                elif pts <= last:  # its time doesn't follow
                    continue
                last = pts
                progress(second := float((pts - first) * tick))
                picture = paint(to_rgb(frame)[0].permute(1, 2, 0).numpy(), second)
                add_picture(copy, video, picture, pts, tick)
        if first is not None:
            copy.mux(waiting)
            waiting = []
    if first is not None:
        copy.mux(video.encode(None))
    return first is not None


class _Painter:
    """Draws labels into pictures: strips with a class name, its score and a bar, over the lower edge."""

    MOST = 4  # strips; the likeliest are drawn

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = sorted(segments, key=lambda segment: segment.score)
        self._changes = sorted({second for segment in segments for second in (segment.start, segment.end)})
        self._drawn: tuple[int, Picture] = (-1, np.empty((0, 0, 3), np.uint8))  # after which change

    def __call__(self, picture: Picture, second: float) -> Picture:
        height, width = picture.shape[:2]
        second += 1e-6
        change = bisect.bisect_right(self._changes, second)
        if change != self._drawn[0]:
            now = [segment for segment in self._segments if segment.start <= second < segment.end]
            strips = [_strip(segment, height, width) for segment in now[-self.MOST :]]
            self._drawn = change, np.concatenate([picture[:0], *strips])[-height:]
        strip = self._drawn[1]
        lower = picture[height - len(strip) :]
        lower[:] = lower // 4 + strip // 4 * 3  # the picture shines through
        return picture


def _strip(segment: Segment, height: int, width: int) -> Picture:
    size, name, score = max(10, height // 16), printable(segment.class_name), f"  {segment.score:.0%}"
    font = ImageFont.load_default(size)
    while size > 8 and font.getlength(name + score) > 0.96 * width:  # long names become small
        size -= 1
        font = ImageFont.load_default(size)
    while len(name) > 1 and font.getlength(name + score) > 0.96 * width:  # and then short
        name = f"{name.removesuffix('…')[:-1]}…"
    tall, bar = round(1.5 * size), max(2, size // 5)
    image = Image.new("RGB", (width, min(tall + bar, height)), "black")
    draw = ImageDraw.Draw(image)
    draw.text((0.02 * width, tall / 2), name + score, fill="white", font=font, anchor="lm")
    draw.rectangle((0, tall, max(segment.score * width - 1, 0), tall + bar), fill=(255, 190, 0))
    return np.asarray(image)
