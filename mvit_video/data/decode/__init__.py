"""Exact frames out of video files: `open_video`, and the protocol that all engines share.

PyAV is the engine that is right on every file and needs nothing installed; torchcodec and decord are there
to be compared with it. All of them take number, times and identity of the frames from the same index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from mvit_video.data.decode import choice, engines
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.data.decode.stills import StillsVideo, is_stills
from mvit_video.errors import ConfigError

BACKENDS = ("auto", "pyav", "torchcodec", "decord")


class Video(Protocol):
    """An open video file. Not thread-safe: each thread opens its own.

    Attributes:
        path: as given, as a string.
        num_frames: how many frames the file shows.
        fps: frames a second, measured: (num_frames - 1) / (time of the last - time of the first frame).
        duration: seconds, num_frames / fps.
        height, width: pixels of the upright picture (after rotation) of the first frame.
        codec: FFmpeg's name for how it is compressed, such as "h264".
    """

    path: str
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
        """Seconds from the first frame to frame `index`."""

    def get_frames(self, indices: Sequence[int]) -> Tensor:
        """Decode frames: uint8 (T, 3, H, W), RGB, upright, in the order asked; indices may repeat.

        Raises `VideoError` when the file can't give one of the frames, `ValueError` for an index outside of
        0 <= index < num_frames.
        """


def open_video(
    path: str | Path, *, device: str = "cpu", backend: str = "auto", frame_rate: float = 30.0
) -> Video:
    """Open a video file; use it as a context manager or `close()` it.

    An image file is a video of one frame; a folder of numbered pictures, or a run of them written as
    "folder/name_[000001-000120].jpg", is one of many.

    Args:
        device: where the frames end up: "cpu", "cuda", "cuda:1" or so, or "auto", the GPU where there is one.
            With "cuda" PyAV decodes on the GPU (codecs that NVDEC lacks on the CPU); with "auto" it does so
            where that is faster, which is measured once.
        backend: "pyav", "torchcodec", "decord" or "auto", which is PyAV: the others refuse files that they
            get wrong. Pictures are read by Pillow, whatever the backend.
        frame_rate: of pictures, which don't tell theirs; PySlowFast extracts 30 a second.

    Raises `ConfigError` for what is not possible on this machine, `VideoError` with the reason for a file
    that can't be used.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"decoder backend {backend!r} is not possible, choose one of: {', '.join(BACKENDS)}"
        )
    if is_stills(path):
        return StillsVideo(
            path, device=choice.resolve(device, nvdec_possible=False)[0], frame_rate=frame_rate
        )
    if backend == "decord":
        if device not in ("auto", "cpu"):
            raise ConfigError("decord decodes on the CPU only: decoder.device=cpu, or decoder.backend=pyav")
        return engines.open_with_decord(path)
    target, nvdec = choice.resolve(device, nvdec_possible=backend != "torchcodec")
    if backend == "torchcodec":
        return engines.open_with_torchcodec(path, target)
    return PyAVVideo(path, device=target, nvdec=nvdec)
