"""Exact frames out of video files: `open_video`, and the class that all engines share.

PyAV is the engine that is right on every file and needs nothing installed; torchcodec and decord are there
to be compared with it. All of them take number, times and identity of the frames from the same index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvit_video.data.decode import choice, engines
from mvit_video.data.decode.container import MAX_PIXELS
from mvit_video.data.decode.images import ImageSequence, is_images
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.data.decode.video import CPU, Video
from mvit_video.errors import ConfigError

__all__ = ["BACKENDS", "FREE_KEYS", "Decoder", "Video", "device_of", "open_video"]

BACKENDS = ("auto", "pyav", "torchcodec", "decord")
FREE_KEYS = ("decoder.index_cache", "decoder.max_pixels")  # which files can be read, not what they give


@dataclass(frozen=True)
class Decoder:
    """Opens video files, all in one way: `Decoder(device="cuda")("a.mp4")`. Arguments: see `open_video`."""

    backend: str = "auto"
    device: str = "cpu"
    frame_rate: float = 30.0
    max_pixels: int = MAX_PIXELS
    index_cache: str | Path | None = None

    def __call__(self, path: str | Path) -> Video:
        """Open a file."""
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"decoder backend {self.backend!r} is not possible, choose one of: {', '.join(BACKENDS)}"
            )
        device, nvdec = self._resolve(images=is_images(path))
        options: dict[str, Any] = {"device": device, "max_pixels": self.max_pixels}
        if is_images(path):
            return ImageSequence(path, frame_rate=self.frame_rate, **options)
        options["index_cache"] = self.index_cache
        if self.backend in engines.ENGINES:
            return engines.EngineVideo(path, self.backend, **options)
        return PyAVVideo(path, nvdec=nvdec, **options)

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
            return CPU, False
        return choice.resolve(self.device, nvdec_possible=self.backend != "torchcodec" and not images)


def open_video(
    path: str | Path,
    *,
    device: str = "cpu",
    backend: str = "auto",
    frame_rate: float = 30.0,
    max_pixels: int = MAX_PIXELS,
    index_cache: str | Path | None = None,
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
    with open_file(str(choice.SAMPLE)) as video:
        return video.device
