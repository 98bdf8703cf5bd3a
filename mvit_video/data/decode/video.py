"""What an open video is, whatever reads it."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mvit_video.data.decode.frames import Transform
from mvit_video.data.timing import stage

CPU = torch.device("cpu")

_Video = TypeVar("_Video", bound="Video")


class Video:
    """An open video file. Not thread-safe: each thread opens its own.

    Attributes:
        path: as given, as a string.
        device: where the frames end up.
        num_frames: how many frames the file shows.
        fps: frames a second, measured: (num_frames - 1) / (time of the last - time of the first frame); where
            the file's clock restarts or has gaps, by the usual distance of two frames.
        times: seconds from the first frame to each; they rise.
        size: height and width in pixels of the upright picture (after rotation) of the first frame.
        codec: FFmpeg's name for how it is compressed, such as "h264".
    """

    path: str
    device: torch.device
    num_frames: int
    fps: float
    times: npt.NDArray[np.float64]
    size: tuple[int, int]
    codec: str

    def __enter__(self: _Video) -> _Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoder."""

    @property
    def duration(self) -> float:
        """Seconds, num_frames / fps."""
        return self.num_frames / self.fps

    @property
    def height(self) -> int:
        """Pixels of the upright picture."""
        return self.size[0]

    @property
    def width(self) -> int:
        """Pixels of the upright picture."""
        return self.size[1]

    def frame_time(self, index: int) -> float:
        """Seconds from the first frame to frame `index`."""
        self._check_range([index])
        return float(self.times[index])

    @stage("decode")
    def get_frames(self, indices: Sequence[int], *, transform: Transform | None = None) -> Tensor:
        """Decode frames: uint8 (T, 3, H, W), RGB, upright, in the order asked; indices may repeat.

        Args:
            transform: makes what is returned instead, (T, ...). It is given some of the frames at a time as
                they are decoded, uint8 (n, 3, H, W), and returns (n, ...), in new memory, each frame by
                itself. So no more than a few whole frames are held.

        Raises `VideoError` when the file can't give one of the frames, `ValueError` for an index outside of
        0 <= index < num_frames.
        """
        asked = [operator.index(index) for index in indices]
        self._check_range(asked)
        if not asked:
            return torch.empty(0, 3, *self.size, dtype=torch.uint8, device=self.device)
        wanted = sorted(set(asked))
        frames = self._decode(wanted, transform)
        return frames if wanted == asked else frames[[bisect.bisect_left(wanted, index) for index in asked]]

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        """As `get_frames`, of rising indices."""
        raise NotImplementedError

    def _check_range(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"frame {index} was asked of {self.path}, which has {self.num_frames}")
