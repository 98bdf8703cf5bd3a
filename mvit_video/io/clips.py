"""Short MP4 files of pictures that are already there."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np
from av.video.frame import VideoFrame


def write_clip(file: IO[bytes], pictures: Iterable[Any], rate: float, **options: str) -> None:
    """Encode uint8 pictures (H, W, 3), so many a second, as h264; yuv420p takes an even part of them.

    Args:
        options: of the encoder.
    """
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000), options=options)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            height, width = (side // 2 * 2 for side in picture.shape[:2])
            if not stream.codec_context.is_open:
                stream.height, stream.width = height, width
            pixels = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
