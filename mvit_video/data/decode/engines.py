"""torchcodec and decord behind the same protocol, each refused for the files that it gets wrong.

Our own index says how many frames there are and when each is shown. An engine whose own count, size or times
differ is refused, and so are the kinds of file on which it is known to give other frames without a word.
These engines are for comparison: damage inside a file they paint over, and nothing tells.
"""

from __future__ import annotations

import bisect
import ctypes.util
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mvit_video.data.decode.cuda import SAMPLE
from mvit_video.data.decode.frames import Transform
from mvit_video.data.decode.pyav import PyAVVideo
from mvit_video.data.timing import timed
from mvit_video.errors import ConfigError, VideoError

_Read = Callable[[list[int]], Tensor]  # rising frame indices -> uint8 (T, 3, H, W)
_SAME_TIME = 1e-3  # seconds
_FFMPEG_LIBRARIES = ("avcodec", "avdevice", "avfilter", "avformat", "avutil", "swresample", "swscale")


class EngineVideo:
    """An open video file whose frames another library reads; see `Video`."""

    def __init__(self, indexed: PyAVVideo, read: _Read, device: torch.device) -> None:
        self._indexed, self._read, self.device = indexed, read, device
        self.path, self.num_frames = indexed.path, indexed.num_frames
        self.fps, self.duration = indexed.fps, indexed.duration
        self.height, self.width, self.codec = indexed.height, indexed.width, indexed.codec

    def __enter__(self) -> EngineVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoder."""
        self._read = _closed

    def frame_time(self, index: int) -> float:
        """See `Video.frame_time`."""
        return self._indexed.frame_time(index)

    @timed("decode")
    def get_frames(self, indices: Sequence[int], *, transform: Transform | None = None) -> Tensor:
        """See `Video.get_frames`; here all frames are decoded before any is transformed."""
        asked = list(indices)
        self._indexed.check_range(asked)
        if not asked:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        wanted = sorted(set(asked))
        frames = self._read(wanted)
        if frames.shape != (len(wanted), 3, self.height, self.width):
            raise VideoError(self.path, f"frames of shape {tuple(frames.shape)}; decode it with PyAV")
        frames = frames if transform is None else transform(frames)
        return frames if wanted == asked else frames[[bisect.bisect_left(wanted, index) for index in asked]]


def open_with_torchcodec(path: str | Path, device: torch.device, **options: Any) -> EngineVideo:
    """Raises `ConfigError` where torchcodec can't be used, `VideoError` for a file that it gets wrong.

    Args:
        options: as of `PyAVVideo`.
    """
    decoders = import_torchcodec()
    with PyAVVideo(path, **options) as indexed:
        _refuse_guessed_order(indexed, "torchcodec")
        try:
            decoder = decoders.VideoDecoder(
                str(Path(path).absolute()), device=str(device), num_ffmpeg_threads=1
            )
        except (RuntimeError, ValueError) as error:
            raise VideoError(indexed.path, f"torchcodec can't read it ({_first_line(error)})") from error
        if decoder.metadata.num_frames != indexed.num_frames:
            raise _refusal(indexed, "torchcodec", f"counts {decoder.metadata.num_frames} frames")

        def read(wanted: list[int]) -> Tensor:
            try:
                batch = decoder.get_frames_at(wanted)
            except (RuntimeError, ValueError, IndexError) as error:
                raise VideoError(indexed.path, f"torchcodec can't read it ({_first_line(error)})") from error
            # These are the times of the pictures that were decoded, not of those that were asked for.
            for index, seconds in zip(wanted, batch.pts_seconds.tolist(), strict=True):
                if abs(seconds - indexed.start - indexed.frame_time(index)) > _SAME_TIME:
                    raise _refusal(indexed, "torchcodec", f"gives another picture as frame {index}")
            return batch.data

        return EngineVideo(indexed, read, device)


def open_with_decord(path: str | Path, device: torch.device, **options: Any) -> EngineVideo:
    """Raises `ConfigError` where decord can't be used, `VideoError` for a file that it gets wrong.

    Args:
        device: the CPU.
        options: as of `PyAVVideo`.
    """
    decord = import_decord()
    with PyAVVideo(path, **options) as indexed:
        _refuse_guessed_order(indexed, "decord")
        problem = _decord_problem(indexed)
        if problem is not None:
            raise _refusal(indexed, "decord", problem)
        try:
            reader = decord.VideoReader(str(Path(path).absolute()), num_threads=1)
        except (decord.DECORDError, RuntimeError) as error:
            raise VideoError(indexed.path, f"decord can't read it ({_first_line(error)})") from error
        if len(reader) != indexed.num_frames:
            raise _refusal(indexed, "decord", f"counts {len(reader)} frames")

        def read(wanted: list[int]) -> Tensor:
            try:
                batch = reader.get_batch(wanted)  # torch's, if somebody has set decord's bridge so
            except (decord.DECORDError, RuntimeError) as error:
                raise VideoError(indexed.path, f"decord can't read it ({_first_line(error)})") from error
            frames = batch if isinstance(batch, Tensor) else torch.from_numpy(batch.asnumpy())
            return frames.permute(0, 3, 1, 2)

        return EngineVideo(indexed, read, device)


def _decord_problem(indexed: PyAVVideo) -> str | None:
    """Why decord, which doesn't tell the times of what it decoded, would give other frames."""
    index = indexed.index
    assert index is not None
    if index.hides_frames:
        return "does not follow its edit list"
    if index.has_open_gops:
        return "is a frame late after a seek in open groups of pictures"
    if indexed.start_ticks != 0:
        return "loses frames of a clock that doesn't start at 0"
    if indexed.container_format not in ("mp4", "matroska"):
        return f"seeks badly in this container ({indexed.container_format})"
    if indexed.has_false_keys:
        return "seeks to pictures that are wrongly marked as key frames"
    if indexed.lost_packets:
        return "repeats pictures where packets are lost"
    return None


def _refuse_guessed_order(indexed: PyAVVideo, engine: str) -> None:
    if indexed.index is not None:
        indexed.get_frames([0])  # a decoder knows whether it reorders once it has decoded
    if indexed.index is None or indexed.has_guessed_times or indexed.needs_reordering:
        raise _refusal(indexed, engine, "relies on its timestamps, which are wrong or missing")


def _refusal(indexed: PyAVVideo, engine: str, problem: str) -> VideoError:
    return VideoError(indexed.path, f"{engine} {problem}; decode it with decoder=pyav")


@functools.cache
def import_torchcodec() -> Any:
    """Its `decoders`. Raises `ConfigError` where it or the FFmpeg libraries that it needs are missing."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
        decoders.VideoDecoder(str(SAMPLE))  # FFmpeg may be loaded only now
    except ImportError as error:
        raise ConfigError("torchcodec isn't installed: pip install 'mvit-video[torchcodec]'") from error
    except RuntimeError as error:
        missing = [name for name in _FFMPEG_LIBRARIES if ctypes.util.find_library(name) is None]
        raise ConfigError(
            f"torchcodec finds no FFmpeg of version 4 to 9 (not installed: {', '.join(missing) or 'none'}); "
            "try: apt-get install ffmpeg"
        ) from error
    return decoders


def import_decord() -> Any:
    """The module. Raises `ConfigError` where it is missing."""
    try:
        return importlib.import_module("decord")
    except ImportError as error:
        raise ConfigError("decord isn't installed: pip install 'mvit-video[decord]'") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _closed(wanted: list[int]) -> Tensor:
    raise ValueError("the video is closed")
