"""Exact frames out of video files: `open_video`, and the protocol that all engines share.

PyAV is the engine that is right on every file and needs nothing installed; torchcodec and decord are there
to be compared with it. All of them take number, times and identity of the frames from the same index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from mvit_video.data.decode import choice, engines
from mvit_video.data.decode.container import MAX_PIXELS
from mvit_video.data.decode.cuda import SAMPLE
from mvit_video.data.decode.frames import Transform
from mvit_video.data.decode.images import ImageSequence, is_images
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.errors import ConfigError

BACKENDS = ("auto", "pyav", "torchcodec", "decord")


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
    duration: float
    codec: str

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def __enter__(self) -> Video: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

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


@dataclass(frozen=True)
class Decoder:
    """Opens video files, all in one way: `Decoder(device="cuda")("a.mp4")`. Arguments: see `open_video`."""

    backend: str = "auto"
    device: str = "cpu"
    frame_rate: float = 30.0
    max_pixels: int = MAX_PIXELS
    index_cache: str | None = None

    def __call__(self, path: str | Path) -> Video:
        """Open a file."""
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"decoder backend {self.backend!r} is not possible, choose one of: {', '.join(BACKENDS)}"
            )
        device, nvdec = self._resolve(images=is_images(path))
        if is_images(path):
            return ImageSequence(path, device=device, frame_rate=self.frame_rate, max_pixels=self.max_pixels)
        if self.backend in ("decord", "torchcodec"):
            open_with = engines.open_with_decord if self.backend == "decord" else engines.open_with_torchcodec
            return open_with(path, device, max_pixels=self.max_pixels, index_cache=self.index_cache)
        return PyAVVideo(
            path, device=device, nvdec=nvdec, max_pixels=self.max_pixels, index_cache=self.index_cache
        )

    @property
    def target(self) -> torch.device:
        """Where the frames end up. Raises `ConfigError` for what is not possible on this machine."""
        return self._resolve(images=False)[0]

    def _resolve(self, *, images: bool) -> tuple[torch.device, bool]:
        if self.backend == "decord" and not images:
            if self.device not in ("auto", "cpu"):
                raise ConfigError(
                    "decord decodes on the CPU only: decoder.device=cpu, or decoder.backend=pyav"
                )
            return torch.device("cpu"), False
        return choice.resolve(self.device, nvdec_possible=self.backend != "torchcodec" and not images)


def open_video(
    path: str | Path,
    *,
    device: str = "cpu",
    backend: str = "auto",
    frame_rate: float = 30.0,
    max_pixels: int = MAX_PIXELS,
    index_cache: str | None = None,
) -> Video:
    """Open a video file; use it as a context manager or `close()` it.

    An image file is a video of one frame, or of those of its animation; a folder of numbered pictures, or a
    run of them written as "folder/name_[000001-000120].jpg", is one of many. Playlists and other files that
    refer to files or hosts are refused.

    Args:
        device: where the frames end up: "cpu", "cuda", "cuda:1" or so, or "auto", the GPU where it is faster.
            With "cuda" PyAV decodes on the GPU (codecs that NVDEC lacks on the CPU); with "auto" it does so
            where that is faster, which is measured once.
        backend: "pyav", "torchcodec", "decord" or "auto", which is PyAV: the others are for comparison. They
            refuse files that they are known to get wrong, and may paint over damage. Pictures are read by
            Pillow, whatever the backend.
        frame_rate: of pictures, which don't tell theirs; PySlowFast extracts 30 a second.
        max_pixels: of a frame; files with larger ones are refused, since a small file may unpack to any size.
        index_cache: folder where the indices of files are kept, so that no file is read whole twice; this
            process remembers those it used last anyway.

    Raises `ConfigError` for what is not possible on this machine, `VideoError` with the reason for a file
    that can't be used.
    """
    return Decoder(backend, device, frame_rate, max_pixels, index_cache)(path)


def device_of(open_file: Callable[[str], Video]) -> torch.device:
    """Where the frames of what `open_file` opens end up."""
    if isinstance(open_file, Decoder):
        return open_file.target
    with open_file(str(SAMPLE)) as video:
        return video.device
