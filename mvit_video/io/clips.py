"""Short MP4 files of pictures that are already there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.video.frame import VideoFrame

_TICK = Fraction(1, 90_000)  # seconds, of pictures that say when they are shown


def write_clip(file: IO[bytes], pictures: Iterable[Any], rate: float, **options: str) -> None:
    """Encode uint8 pictures (H, W, 3), so many a second, see ``clip_writer``."""
    with clip_writer(file, rate, **options) as add:
        for picture in pictures:
            add(picture, None)


@contextmanager
def clip_writer(
    file: IO[bytes], rate: float | None = None, **options: str
) -> Iterator[Callable[[Any, float | None], None]]:
    """A function that encodes an uint8 picture (H, W, 3) as h264; yuv420p takes an even part of it.

    Args:
        rate: pictures a second; None: the function is told the second of each.
        options: of the encoder.
    """
    with av.open(file, "w", format="mp4") as container:
        fps = None if rate is None else Fraction(rate).limit_denominator(1000)
        stream: Any = container.add_stream("libx264", rate=fps, options=options)
        stream.pix_fmt = "yuv420p"
        if rate is None:
            stream.codec_context.time_base = _TICK

        def add(picture: Any, second: float | None) -> None:
            add_picture(container, stream, picture, None if second is None else round(second / _TICK), _TICK)

        yield add
        container.mux(stream.encode(None))


def add_picture(container: Any, stream: Any, picture: Any, pts: int | None, tick: Fraction) -> None:
    """Encode an uint8 picture (H, W, 3), or an even part of it as yuv420p is; the first gives the size."""
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    if not stream.codec_context.is_open:
        stream.height, stream.width = height, width
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
    if pts is not None:
        frame.pts, frame.time_base = pts, tick
    container.mux(stream.encode(frame))
