"""What an open video is: the protocol of all, and what those that read files share."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mvit_video.data.decode.frames import Transform
from mvit_video.data.timing import timed

_VideoFile = TypeVar("_VideoFile", bound="VideoFile")


class Video(Protocol):
    """An open video file. Not thread-safe: each thread opens its own.

    Attributes:
        path: as given, as a string.
        device: where the frames end up.
        num_frames: how many frames the file shows.
        fps: frames a second, measured: (num_frames - 1) / (time of the last - time of the first frame); where
            the file's clock restarts or has gaps, by the usual distance of two frames.
        duration: seconds, num_frames / fps.
        height, width: pixels of the upright picture (after rotation) of the first frame.
        codec: FFmpeg's name for how it is compressed, such as "h264".
    """

    path: str
    device: torch.device
    num_frames: int
    fps: float
    codec: str

    @property
    def duration(self) -> float: ...

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def __enter__(self) -> Video: ...

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Release the file and the decoder."""

    def frame_time(self, index: int) -> float:
        """Seconds from the first frame to frame `index`; they rise."""

    def get_frames(self, indices: Sequence[int], *, transform: Transform | None = None) -> Tensor:
        """Decode frames: uint8 (T, 3, H, W), RGB, upright, in the order asked; indices may repeat.

        Args:
            transform: makes what is returned instead, (T, ...). It is given some of the frames at a time as
                they are decoded, uint8 (n, 3, H, W), and returns (n, ...), in new memory, each frame by
                itself. So no more than a few whole frames are held.

        Raises `VideoError` when the file can't give one of the frames, `ValueError` for an index outside of
        0 <= index < num_frames.
        """


class VideoFile:
    """A `Video` whose frames lie in a file: each that is asked for is decoded once."""

    path: str
    device: torch.device
    num_frames: int
    fps: float
    times: npt.NDArray[np.float64]  # of the frames: seconds from the first one

    def __enter__(self: _VideoFile) -> _VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoder."""

    @property
    def duration(self) -> float:
        """See `Video`."""
        return self.num_frames / self.fps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        raise NotImplementedError

    @property
    def height(self) -> int:
        """See `Video`."""
        return self.size[0]

    @property
    def width(self) -> int:
        """See `Video`."""
        return self.size[1]

    def frame_time(self, index: int) -> float:
        """See `Video`."""
        self._check_range([index])
        return float(self.times[index])

    @timed("decode")
    def get_frames(self, indices: Sequence[int], *, transform: Transform | None = None) -> Tensor:
        """See `Video`."""
        asked = [operator.index(index) for index in indices]
        self._check_range(asked)
        if not asked:
            return torch.empty(0, 3, *self.size, dtype=torch.uint8, device=self.device)
        wanted = sorted(set(asked))
        frames = self._decode(wanted, transform)
        return frames if wanted == asked else frames[[bisect.bisect_left(wanted, index) for index in asked]]

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        """Frames of rising indices; the rest is as of `get_frames`."""
        raise NotImplementedError

    def _check_range(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"frame {index} was asked of {self.path}, which has {self.num_frames}")
