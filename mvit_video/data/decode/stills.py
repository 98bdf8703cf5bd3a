"""Pictures as videos: an image file is a video of one frame, a folder of extracted frames one of many."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mvit_video.data.files import IMAGE_EXTENSIONS
from mvit_video.errors import VideoError

# "clip_[000001-000042].jpg": pictures numbered from the first to the last, both included.
_RUN = re.compile(r"(?P<start>.*)\[(?P<first>\d+)-(?P<last>\d+)\](?P<suffix>\.\w+)$", re.DOTALL)


def is_stills(path: str | Path) -> bool:
    """Whether a path means pictures: an image file, a run of them, or a folder."""
    return str(path).lower().endswith(IMAGE_EXTENSIONS) or Path(path).is_dir()


def run_of_pictures(first: str, last: str) -> str | None:
    """The path that means all pictures from `first` to `last`, or None: they differ by more than a number."""
    one, other = re.search(r"(\d+)(\.\w+)$", first), re.search(r"(\d+)(\.\w+)$", last)
    if one is None or other is None or one[2] != other[2] or first[: one.start()] != last[: other.start()]:
        return None
    return f"{first[: one.start()]}[{one[1]}-{other[1]}]{one[2]}"


def entry_on_disk(path: str) -> str:
    """What has to exist where a path says so: the folder of a run of pictures, else the path itself."""
    return os.path.dirname(path) if _RUN.match(path) else path  # noqa: PTH120 (240,000 a second)


def pictures_of(path: str) -> list[str]:
    """The files that a path means, in the order of their numbers.

    Raises:
        VideoError: a folder has no pictures, or a number between two of them is missing.
    """
    run = None if Path(path).exists() else _RUN.match(path)
    if run is not None:
        # Zero-padded numbers are as wide as the first one.
        first, last, width = int(run["first"]), int(run["last"]), len(run["first"])
        return [f"{run['start']}{i:0{width}}{run['suffix']}" for i in range(first, last + 1)]
    if not Path(path).is_dir():
        return [path]
    try:
        names = os.listdir(path)  # noqa: PTH208 (names are all that is needed)
    except OSError as error:
        raise VideoError(path, f"the folder can't be read ({error.strerror})") from error
    names = [name for name in names if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
    if not names:
        raise VideoError(path, "this is a directory, not a video file, and has no pictures either")
    numbered = sorted((_number(name), name) for name in names)
    for (before, _), (number, name) in itertools.pairwise(numbered):
        if number == before:
            raise VideoError(path, f"two of its pictures have the number of {name}")
        if number != before + 1:
            raise VideoError(path, f"picture {before + 1} is missing before {name}")
    return [os.path.join(path, name) for _, name in numbered]  # noqa: PTH118


class StillsVideo:
    """Pictures as an open video; see `Video`. Frame i is the i-th picture, whatever the rate.

    `frame_rate` is the rate at which they were extracted, which pictures don't tell.
    """

    def __init__(
        self, path: str | Path, *, device: torch.device | None = None, frame_rate: float = 30.0
    ) -> None:
        self.path = str(path)
        self._device = device or torch.device("cpu")
        self._files = pictures_of(self.path)
        self.num_frames, self.fps = len(self._files), float(frame_rate)
        self.duration = self.num_frames / self.fps
        first = _open(self._files[0], self.path)
        with first:
            self.codec = (first.format or "").lower()
            self.height, self.width = _upright_size(first)

    def __enter__(self) -> StillsVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open."""

    def frame_time(self, index: int) -> float:
        """See `Video.frame_time`."""
        self._check_range([index])
        return index / self.fps

    def get_frames(self, indices: Sequence[int]) -> Tensor:
        """See `Video.get_frames`; each picture is decoded once."""
        asked = list(indices)
        self._check_range(asked)
        slots = {index: slot for slot, index in enumerate(dict.fromkeys(asked))}
        frames = torch.empty(len(slots), self.height, self.width, 3, dtype=torch.uint8)
        for index, slot in slots.items():
            frames[slot] = torch.from_numpy(self._decode(index))
        if len(slots) != len(asked):
            frames = frames[[slots[index] for index in asked]]
        return frames.permute(0, 3, 1, 2).to(self._device)

    def _decode(self, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        file = self._files[index]
        with _open(file, self.path) as image:
            try:
                rgb = np.array(ImageOps.exif_transpose(image).convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise VideoError(self.path, f"{_named(file, self.path)}is damaged ({error})") from error
        if rgb.shape[:2] != (self.height, self.width):
            size = f"{rgb.shape[1]}x{rgb.shape[0]}, the first picture {self.width}x{self.height}"
            raise VideoError(self.path, f"{_named(file, self.path)}is {size}")
        return rgb

    def _check_range(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"frame {index} was asked of {self.path}, which has {self.num_frames}")


def _open(file: str, path: str) -> Image.Image:
    try:
        if not os.path.getsize(file):  # noqa: PTH202 (thousands a second)
            raise VideoError(path, f"{_named(file, path)}is empty")
        return Image.open(file)
    except FileNotFoundError as error:
        missing = "no such file" if file == path else f"{Path(file).name} is missing"
        raise VideoError(path, missing) from error
    except (UnidentifiedImageError, SyntaxError) as error:
        raise VideoError(path, f"{_named(file, path)}is no picture, or a damaged one") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(path, f"{_named(file, path)}can't be read ({error})") from error


def _named(file: str, path: str) -> str:
    return "the file " if file == path else f"{Path(file).name} "


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the EXIF orientation
    return (image.width, image.height) if turned else (image.height, image.width)


def _number(name: str) -> int:
    """The number that a name ends with; an unnumbered picture counts as 0."""
    found = re.search(r"(\d+)\D*$", Path(name).stem)
    return int(found[1]) if found else 0
