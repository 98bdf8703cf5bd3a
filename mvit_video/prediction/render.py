"""Timelines to look at: a picture, and a copy of the video with labels drawn in."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Sequence
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
from PIL import Image, ImageDraw, ImageFont

from mvit_video.data.decode.pictures import Look
from mvit_video.errors import VideoError
from mvit_video.prediction.prediction import Segment, printable
from mvit_video.prediction.stream import open_stream
from mvit_video.prediction.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = npt.NDArray[np.uint8]

MAX_CURVES = 8
_MP4_AUDIO = {"aac", "mp3", "mp2", "opus", "ac3", "eac3", "flac", "alac", "vorbis"}


def plot_timeline(timeline: Timeline, segments: Sequence[Segment], path: Path) -> None:
    """The likeliest classes' scores against time, and the segments as bars below."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():  # names may hold a "$"
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(12, 5), layout="constrained")
        _draw_timeline(timeline, segments, figure)
        figure.savefig(path, dpi=120)


def _draw_timeline(timeline: Timeline, segments: Sequence[Segment], figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    curves, bars = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    shown = timeline.scores.amax(0).argsort(descending=True)[:MAX_CURVES].tolist()
    shown += [i for i, name in enumerate(timeline.class_names) if i not in shown and _has(segments, name)]
    colours = {timeline.class_names[index]: f"C{rank}" for rank, index in enumerate(shown)}
    centres = [(start + end) / 2 for start, end in timeline.spans]
    style = {"marker": "."} if len(centres) < 50 else {}
    for index in shown:
        name = timeline.class_names[index]
        curves.plot(centres, timeline.scores[:, index].numpy(), color=colours[name], label=name, **style)
    curves.set(ylabel="score", ylim=(0, 1.02), title=printable(Path(timeline.path).name))
    curves.grid(alpha=0.3)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper")
    for segment in segments:
        extent = [(segment.start, segment.end - segment.start)]
        bars.broken_barh(extent, (0, 1), color=colours[segment.class_name], alpha=0.3 + 0.7 * segment.score)
    begin, end = timeline.spans[0][0], timeline.spans[-1][1]
    bars.set(yticks=[], xlabel="seconds", ylim=(0, 1), xlim=(begin, end))
    if end - begin > 180:
        bars.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 1.5, 3, 6, 10]))  # 1, 5, 10 minutes
        bars.xaxis.set_major_formatter(lambda second, _: str(timedelta(seconds=round(second))))
        bars.set(xlabel="h:mm:ss")


def _has(segments: Sequence[Segment], name: str) -> bool:
    return any(segment.class_name == name for segment in segments)


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
        return _annotate(source, segments, path)
    except FFmpegError as error:
        for copy in (path, path.with_suffix(".mkv")):
            copy.unlink(missing_ok=True)
        raise VideoError(source, f"no annotated copy could be written ({error})") from None


def _annotate(source: str, segments: Sequence[Segment], path: Path) -> Path:
    starts = [segment.start for segment in segments]
    with open_stream(source) as (container, stream, name):
        audio = next((a for a in container.streams.audio), None)
        if audio is not None and audio.codec_context.name not in _MP4_AUDIO:
            path = path.with_suffix(".mkv")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        tick = stream.time_base or 1 / rate
        labels = _Labels()
        reformatter = VideoReformatter()
        with av.open(str(path), "w") as copy:
            video: Any = copy.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
            video.pix_fmt = "yuv420p"
            video.codec_context.time_base = tick
            sound: Any = None
            if audio is not None:
                sound = copy.add_stream_from_template(audio)
            look: Look | None = None
            early: list[Any] = []
            first, last = 0, -1
            for packet in container.demux([s for s in (stream, audio) if s is not None]):
                if packet.stream is audio:
                    if packet.dts is not None:
                        packet.stream = sound
                        early.append(packet)
                    if look is not None:  # only then the size is known, and the file can begin
                        copy.mux(early)
                        early = []
                    continue
                try:
                    frames = packet.decode()
                except FFmpegError:
                    continue
                for frame in frames:
                    assert isinstance(frame, VideoFrame)
                    pts = last + int(1 / rate / tick) if frame.pts is None else frame.pts
                    if look is None:
                        look = Look.of(frame)
                        first = pts
                        height, width = look.upright_size
                        video.height, video.width = height // 2 * 2, width // 2 * 2  # yuv420p is even
                    if pts <= last and last >= first:
                        continue
                    last = pts
                    picture = _upright(frame, look, reformatter)[: video.height, : video.width]
                    second = float((pts - first) * tick)
                    index = bisect.bisect_right(starts, second + 1e-6) - 1
                    if index >= 0 and second < segments[index].end:
                        picture = labels.draw(picture, segments[index])
                    drawn = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                    drawn.pts, drawn.time_base = pts, tick
                    copy.mux(video.encode(drawn))
            if look is None:
                raise VideoError(name, "no frame can be decoded")
            copy.mux(early)
            copy.mux(video.encode(None))
    return path


def _upright(frame: VideoFrame, look: Look, reformatter: VideoReformatter) -> Picture:
    rgb = reformatter.reformat(frame, width=look.width, height=look.height, format="rgb24", threads=1)
    return look.turn.apply(cast(Picture, rgb.to_ndarray()))


class _Labels:
    """Strips with a class name, its score and a bar, drawn once for each segment."""

    def __init__(self) -> None:
        self._segment: Segment | None = None
        self._strip: Picture = np.empty((0, 0, 3), np.uint8)

    def draw(self, picture: Picture, segment: Segment) -> Picture:
        """A copy of an (H, W, 3) picture with the segment's strip along its lower edge."""
        height, width = picture.shape[:2]
        if segment != self._segment or self._strip.shape[1] != width:
            self._segment, self._strip = segment, _strip(segment, height, width)
        strip = self._strip
        picture = np.array(picture)
        lower = picture[-len(strip) :]
        lower[:] = lower // 4 + strip // 4 * 3  # the picture shines through
        return picture


def _strip(segment: Segment, height: int, width: int) -> Picture:
    size = max(10, height // 16)
    text = f"{segment.class_name}  {segment.score:.0%}"
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
