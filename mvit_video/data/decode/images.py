"""Pictures as videos: an image file is a video of one frame, or of those of an animation; a folder or a
numbered run of extracted frames is one of many.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from mvit_video.data.decode.container import MAX_PIXELS, open_picture
from mvit_video.data.decode.frames import FrameBuffer, FrameFormat, Transform, convert
from mvit_video.data.decode.video import CPU, Video
from mvit_video.data.files import IMAGE_EXTENSIONS
from mvit_video.errors import VideoError

if TYPE_CHECKING:  # at run time where a picture is opened: videos need no Pillow
    from PIL import Image

MAX_FRAMES = 1_000_000  # of a numbered run: more than nine hours at 30 a second

# "clip_[000001-000042].jpg": pictures numbered from the first to the last, both included.
_PATTERN = re.compile(r"(?P<start>.*)\[(?P<first>\d{1,18})-(?P<last>\d{1,18})\](?P<suffix>\.\w+)$", re.DOTALL)

_ANIMATED = ("WEBP", "PNG")  # formats whose further pictures are shown after the first; a TIFF's are pages
_DEFAULT_SECONDS = 0.1  # that a frame of an animation is shown which doesn't say it, as browsers have it


def is_images(path: str | Path) -> bool:
    """Whether a path means pictures: an image file, a numbered run of them, or a folder."""
    return str(path).lower().endswith(IMAGE_EXTENSIONS) or os.path.isdir(path)  # noqa: PTH112 (False for any odd name)


def frame_pattern(first: str, last: str) -> str | None:
    """The path that means all pictures from `first` to `last`, or None: they differ by more than a number."""
    one, other = re.search(r"(\d+)(\.\w+)$", first), re.search(r"(\d+)(\.\w+)$", last)
    if one is None or other is None or one[2] != other[2] or first[: one.start()] != last[: other.start()]:
        return None
    return f"{first[: one.start()]}[{one[1]}-{other[1]}]{one[2]}"


def entry_on_disk(path: str) -> str:
    """What has to exist where a path says so: the folder of a numbered run, else the path itself."""
    return os.path.dirname(path) if _PATTERN.match(path) else path  # noqa: PTH120 (240,000 a second)


def image_files(path: str) -> list[str]:
    """The files that a path means, in the order of their numbers.

    Raises:
        VideoError: a folder has no pictures, a number between two of them is missing, or a numbered run has
            more than `MAX_FRAMES`.
    """
    run = None if os.path.exists(path) else _PATTERN.match(path)  # noqa: PTH110
    if run is not None:
        # Zero-padded numbers are as wide as the first one.
        first, last, width = int(run["first"]), int(run["last"]), len(run["first"])
        if not 0 <= last - first < MAX_FRAMES:
            raise VideoError(path, f"a numbered run is of 1 to {MAX_FRAMES} pictures, not {last - first + 1}")
        return [f"{run['start']}{i:0{width}}{run['suffix']}" for i in range(first, last + 1)]
    if not os.path.isdir(path):  # noqa: PTH112 (False for any odd name)
        return [path]
    try:
        names = os.listdir(path)  # noqa: PTH208 (names are all that is needed)
    except OSError as error:
        raise VideoError(path, f"the folder can't be read ({error.strerror})") from error
    names = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
    if not names:
        raise VideoError(path, "this is a directory, not a video file, and has no pictures either")
    # An unnumbered picture counts as 0.
    ends = [(re.search(r"(\d{1,18})\D*$", Path(name).stem), name) for name in names]
    numbered = sorted((int(end[1]) if end else 0, name) for end, name in ends)
    for (before, _), (number, name) in itertools.pairwise(numbered):
        if number == before:
            raise VideoError(path, f"two of its pictures have the number of {name}")
        if number != before + 1:
            raise VideoError(path, f"picture {before + 1} is missing before {name}")
    return [os.path.join(path, name) for _, name in numbered]  # noqa: PTH118


class ImageSequence(Video):
    """Pictures as an open video; see `Video`.

    Frame i is the i-th picture, whatever the rate, or the i-th of an animation (WebP, APNG), which tells how
    long each of its frames is shown.

    Args:
        frame_rate: at which pictures were extracted, which they don't tell.
        max_pixels: of a picture.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: torch.device = CPU,
        frame_rate: float = 30.0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path, self.device = str(path), device
        self._max_pixels = max_pixels
        self._files = image_files(self.path)
        self.num_frames, self.fps = len(self._files), float(frame_rate)
        self.times = np.arange(self.num_frames) / self.fps
        self._hidden: int | None = None  # pictures of an animation before its first frame
        with self._open(self._files[0]) as first:
            self.codec = (first.format or "").lower()
            turned = first.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the EXIF orientation
            self.size = (first.width, first.height) if turned else (first.height, first.width)
            if first.format in _ANIMATED and getattr(first, "n_frames", 1) > 1 and self.num_frames == 1:
                self._begin_animation(first)

    def _begin_animation(self, image: Image.Image) -> None:
        # What a PNG shows where animations aren't known need not be a frame of it.
        self._hidden = int(bool(image.info.get("default_image")))
        ends = [0.0]
        for index in range(self._hidden, cast(Any, image).n_frames):
            _go_to(image, index)
            ends.append(ends[-1] + (image.info.get("duration", 0) / 1000 or _DEFAULT_SECONDS))
        self.num_frames = len(ends) - 1
        self.times = np.array(ends[:-1])
        distances = max(self.num_frames - 1, 1)
        self.fps = distances / ends[distances]

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        fmt = FrameFormat.of(VideoFrame(self.width, self.height, "rgb24"))
        to_tensor = partial(convert, fmt=fmt, reformatter=VideoReformatter(), device=self.device)
        frames = FrameBuffer(wanted, to_tensor, transform)
        for index in wanted if self._hidden is None else ():
            with self._open(self._files[index]) as image:
                frames.write(index, self._frame_of(image, self._files[index]))
        if self._hidden is not None:
            with self._open(self.path) as image:
                for index in wanted:
                    _go_to(image, index + self._hidden)
                    frames.write(index, self._frame_of(image, self.path))
        return frames.to_tensor()

    def _frame_of(self, image: Image.Image, file: str) -> VideoFrame:
        from PIL import ImageOps

        picture = to_rgb(ImageOps.exif_transpose(image))
        if picture.shape[:2] != self.size:
            size = f"{picture.shape[1]}x{picture.shape[0]}, the first picture {self.width}x{self.height}"
            raise VideoError(self.path, f"{self._named(file)} is {size}")
        return VideoFrame.from_ndarray(picture, format="rgb24")

    @contextmanager
    def _open(self, file: str) -> Iterator[Image.Image]:
        """Whatever is done with the picture, an error that it causes becomes a `VideoError`."""
        from PIL import UnidentifiedImageError

        name = self._named(file)
        try:
            if not os.path.getsize(file):  # noqa: PTH202 (thousands a second)
                raise VideoError(self.path, f"{name} is empty")
            with open_picture(file, self._max_pixels, self.path) as image:
                yield image
        except VideoError:
            raise
        except FileNotFoundError as error:
            missing = "no such file" if file == self.path else f"{name} is missing"
            raise VideoError(self.path, missing) from error
        except UnidentifiedImageError as error:
            raise VideoError(self.path, f"{name} is no picture, or a damaged one") from error
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise VideoError(self.path, f"{name} is damaged or can't be read ({error})") from error

    def _named(self, file: str) -> str:
        return "the file" if file == self.path else Path(file).name


def _go_to(image: Image.Image, index: int) -> None:
    image.seek(index)
    image.load()


def to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(H, W, 3). Pillow clips what has more than 8 bits: 16 bits are scaled here, and floats in [0, 1]."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return np.array(image.convert("RGB"))
    samples = np.asarray(image, np.float64)
    scale = 1 / 257 if image.mode != "F" else 255 if samples.max(initial=0) <= 1 else 1
    gray = np.nan_to_num(samples * scale).round().clip(0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)
