"""torchcodec and decord as other videos, each refused for the files that it gets wrong.

Our own index says how many frames there are and when each is shown. An engine whose own count, size or times
differ is refused, and so are the kinds of file on which it is known to give other frames without a word.
These engines are for comparison: damage inside a file they paint over, and nothing tells.
"""

from __future__ import annotations

import ctypes.util
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mvit_video.data.decode.choice import SAMPLE
from mvit_video.data.decode.frames import Transform
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.data.decode.video import Video
from mvit_video.errors import ConfigError, VideoError, brief, import_extra

# Rising frame indices -> uint8 (T, 3, H, W), and the seconds of what was decoded, if the library tells them.
_Read: TypeAlias = Callable[[list[int]], tuple[Tensor, list[float]]]

_SAME_TIME = 1e-3  # seconds
_FFMPEG_LIBRARIES = ("avcodec", "avdevice", "avfilter", "avformat", "avutil", "swresample", "swscale")


class EngineVideo(Video):
    """An open video file whose frames another library reads; see `Video`.

    Args:
        engine: one of `ENGINES`.
        options: as of `PyAVVideo`, which indexes the file.

    Raises `ConfigError` where the library can't be used, `VideoError` for a file that it gets wrong.
    """

    def __init__(self, path: str | Path, engine: str, *, device: torch.device, **options: Any) -> None:
        self._engine, self.device = engine, device
        import_library, open_with = ENGINES[engine]
        library = import_library()
        self._errors = (RuntimeError, ValueError, IndexError, getattr(library, "DECORDError", RuntimeError))
        with PyAVVideo(path, **options) as indexed:
            self.path, self.codec, self.size = indexed.path, indexed.codec, indexed.size
            self.num_frames, self.fps, self.times = indexed.num_frames, indexed.fps, indexed.times
            self.start = indexed.start
            self._refuse(_why_wrong(indexed, engine))
        try:
            count, self._read = open_with(library, self)
        except self._errors as error:
            raise self._unreadable(error) from error
        self._refuse(None if count == self.num_frames else f"counts {count} frames")

    def close(self) -> None:
        """Release the file and the decoder."""
        self._read = _closed

    def _decode(self, wanted: list[int], transform: Transform | None) -> Tensor:
        """Here all frames are decoded before any is transformed."""
        try:
            frames, seconds = self._read(wanted)
        except self._errors as error:
            raise self._unreadable(error) from error
        for index, second in zip(wanted, seconds, strict=False):
            if abs(second - self.start - self.times[index]) > _SAME_TIME:
                self._refuse(f"gives another picture as frame {index}")
        if frames.shape != (len(wanted), 3, *self.size):
            self._refuse(f"gives frames of shape {tuple(frames.shape)}")
        return frames if transform is None else transform(frames)

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise VideoError(self.path, f"{self._engine} {problem}; decode it with decoder=pyav")

    def _unreadable(self, error: Exception) -> VideoError:
        return VideoError(self.path, f"{self._engine} can't read it ({brief(error)})")


def _open_with_torchcodec(decoders: Any, video: EngineVideo) -> tuple[int, _Read]:
    decoder = decoders.VideoDecoder(
        str(Path(video.path).absolute()), device=str(video.device), num_ffmpeg_threads=1
    )

    def read(wanted: list[int]) -> tuple[Tensor, list[float]]:
        batch = decoder.get_frames_at(wanted)
        return batch.data, batch.pts_seconds.tolist()

    return decoder.metadata.num_frames, read


def _open_with_decord(decord: Any, video: EngineVideo) -> tuple[int, _Read]:
    reader = decord.VideoReader(str(Path(video.path).absolute()), num_threads=1)

    def read(wanted: list[int]) -> tuple[Tensor, list[float]]:
        batch = reader.get_batch(wanted)  # torch's, if somebody has set decord's bridge so
        frames = batch if isinstance(batch, Tensor) else torch.from_numpy(batch.asnumpy())
        return frames.permute(0, 3, 1, 2), []

    return len(reader), read


def _closed(wanted: list[int]) -> tuple[Tensor, list[float]]:
    raise ValueError("the video is closed")


def _why_wrong(indexed: PyAVVideo, engine: str) -> str | None:
    """Why an engine would give other frames; decord doesn't even tell the times of those that it gives."""
    index, reader = indexed.index, indexed.reader
    if index is not None:
        indexed.get_frames([0])  # a decoder knows whether it reorders once it has decoded
    if index is None or index.guesses_times or indexed.needs_reordering:
        return "relies on its timestamps, which are wrong or missing"
    reasons = {
        "does not follow its edit list": index.hides_frames,
        "is a frame late after a seek in open groups of pictures": index.has_open_gops,
        "loses frames of a clock that doesn't start at 0": indexed.start != 0,
        f"seeks badly in this container ({reader.format})": reader.format not in ("mp4", "matroska"),
        "seeks to pictures that are wrongly marked as key frames": (
            sum(entry.is_keyframe for entry in reader.listed) > len(index.key_positions)
        ),
        "repeats pictures where packets are lost": bool(index.lost_packets),
    }
    return next((reason for reason, holds in reasons.items() if holds and engine == "decord"), None)


@functools.cache
def import_torchcodec() -> Any:
    """Its `decoders`. Raises `ConfigError` where it or the FFmpeg libraries that it needs are missing."""
    try:
        decoders = import_extra("torchcodec.decoders", "torchcodec", "decoder=torchcodec")
        decoders.VideoDecoder(str(SAMPLE))  # FFmpeg may be loaded only now
    except RuntimeError as error:
        missing = [name for name in _FFMPEG_LIBRARIES if ctypes.util.find_library(name) is None]
        raise ConfigError(
            f"torchcodec finds no FFmpeg of version 4 to 9 (not installed: {', '.join(missing) or 'none'}); "
            "try: apt-get install ffmpeg"
        ) from error
    return decoders


def import_decord() -> Any:
    """The module. Raises `ConfigError` where it is missing."""
    return import_extra("decord", "decord", "decoder=decord")


ENGINES: dict[str, tuple[Callable[[], Any], Callable[[Any, EngineVideo], tuple[int, _Read]]]] = {
    "torchcodec": (import_torchcodec, _open_with_torchcodec),
    "decord": (import_decord, _open_with_decord),
}
