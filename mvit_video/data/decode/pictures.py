"""Where decoded frames are gathered: as RGB on the CPU, or as planes that become RGB on their device."""

from __future__ import annotations

import math
import mmap
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, VideoReformatter
from torch import Tensor

from mvit_video.data.decode.colour import Colour, matrix_of, to_rgb
from mvit_video.data.timing import timed

# Layouts that are converted from planes, and the step of a sample that is one 8-bit level.
_UNITS = {
    **dict.fromkeys(("gray", "nv12", "yuv420p", "yuv422p", "yuv444p"), 1),
    **dict.fromkeys(("yuvj420p", "yuvj422p", "yuvj444p"), 1),
    **dict.fromkeys(("gray10le", "yuv420p10le", "yuv422p10le", "yuv444p10le"), 4),
    "p010le": 256,
}
_AT_ONCE = 16  # pictures converted together: as floats they take much more memory than as bytes
_LARGE = 1 << 25  # bytes; what is smaller, the C library gives out again without asking the system
_STEPS = 16  # a size that all kinds of chroma divide


class NotOnHardware(Exception):  # noqa: N818 (never leaves this package)
    """The GPU's decoder can't give this file's frames."""


@dataclass(frozen=True)
class Turn:
    """How the stored picture becomes upright: the display matrix, by its signs."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Turn:
        data = cast(Any, frame.side_data).get(SideDataType.DISPLAYMATRIX)
        if data is None:
            return cls()
        # x' = a x + c y and y' = b x + d y
        a, b, _, c, d = np.frombuffer(memoryview(cast(Any, data)), np.int32)[:5].tolist()
        if abs(b) > abs(a):
            return cls(transpose=True, flip_x=c < 0, flip_y=b < 0)
        return cls(flip_x=a < 0, flip_y=d < 0)

    def apply(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Turn an (H, W, 3) picture."""
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def apply_all(self, pictures: Tensor) -> Tensor:
        """Turn (N, 3, H, W) pictures."""
        if self.transpose:
            pictures = pictures.transpose(2, 3)
        axes = [axis for axis, flip in ((2, self.flip_y), (3, self.flip_x)) if flip]
        return pictures.flip(axes) if axes else pictures


@dataclass(frozen=True)
class Look:
    """What a file's frames look like, from one that was decoded on the CPU.

    Kept decoders may carry a former file's colour range along, so it is never asked of their frames.
    """

    height: int  # as stored, before turning
    width: int
    turn: Turn
    pix_fmt: str
    matrix: tuple[float, float]
    full_range: bool
    as_planes: bool  # whether the planes can be converted without swscale
    step: tuple[int, int]  # rows and columns that a chroma sample stands for
    deep: bool  # more than 8 bits

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.width, self.height) if self.turn.transpose else (self.height, self.width)

    @classmethod
    def of(cls, frame: VideoFrame) -> Look:
        pix_fmt = frame.format.name
        return cls(
            frame.height,
            frame.width,
            Turn.of(frame),
            pix_fmt,
            matrix_of(frame.colorspace),
            frame.color_range == ColorRange.JPEG or pix_fmt.startswith("yuvj"),
            pix_fmt in _UNITS and all(plane.line_size > 0 for plane in frame.planes),
            (_STEPS // frame.format.chroma_height(_STEPS), _STEPS // frame.format.chroma_width(_STEPS)),
            frame.format.components[0].bits > 8,
        )


class RgbPictures:
    """Frames converted one by one by swscale: on the CPU that is the fastest way.

    Chroma is repeated, as `to_rgb` does. Where a size cuts chroma samples in two, swscale would stretch the
    chroma, or leave the last column black (it depends on the processor); so such pictures get a row or column
    more, which is cut off again.
    """

    def __init__(self, count: int, look: Look, reformatter: VideoReformatter) -> None:
        self._look, self._reformatter = look, reformatter
        self._padded: VideoFrame | None = None  # kept
        self._frames = _space_for(count, *look.upright_size, 3)
        self._slots = self._frames.numpy()

    @timed("convert")
    def put(self, slot: int, frame: VideoFrame) -> None:
        """Gather a frame."""
        look = self._look
        height, width = look.height, look.width
        if look.as_planes and (height % look.step[0] or width % look.step[1]):
            frame = self._pad(_as_first(frame, look, self._reformatter))
            height, width = frame.height, frame.width
        # swscale's defaults are what the published weights were trained on; of deep chroma they interpolate.
        same = (frame.height, frame.width) == (height, width)
        rgb = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation="POINT" if look.deep and same else None,
            threads=1,
        )
        picture = _rows(rgb.planes[0])[:height, : width * 3].reshape(height, width, 3)
        self._slots[slot] = look.turn.apply(picture[: look.height, : look.width])

    def _pad(self, frame: VideoFrame) -> VideoFrame:
        """The same picture with its last row or column repeated up to whole samples of chroma."""
        if self._padded is None:
            down, across = self._look.step
            size = -(-frame.width // across) * across, -(-frame.height // down) * down
            self._padded = VideoFrame(*size, frame.format.name)
        padded = self._padded
        padded.colorspace, padded.color_range = frame.colorspace, frame.color_range
        item = 2 if self._look.deep else 1
        for source, target in zip(frame.planes, padded.planes, strict=True):
            old, new = _rows(source), _rows(target)[: target.height]
            shared = min(old.shape[1], new.shape[1])
            new[: source.height, :shared] = old[: source.height, :shared]
            new[source.height :] = new[source.height - 1]
            end = source.width * item
            new[:, end : target.width * item] = np.tile(
                new[:, end - item : end], (1, target.width - source.width)
            )
        return padded

    @timed("convert")
    def finish(self) -> Tensor:
        """uint8 (N, 3, H, W), upright."""
        return self._frames.permute(0, 3, 1, 2)


class PlanePictures:
    """Frames kept as YUV planes, 1.5 bytes a pixel, and converted together on `device` at the end.

    They come from NVDEC, and stay on the GPU, or from a CPU decoder, and travel through pinned memory.
    """

    def __init__(self, count: int, look: Look, reformatter: VideoReformatter, device: torch.device) -> None:
        self._count, self._look, self._reformatter, self._device = count, look, reformatter, device
        self._planes: list[Tensor] = []  # each (N, h, w) or, with U and V in turn, (N, h, w, 2)
        self._pix_fmt = look.pix_fmt
        self._on_gpu = False

    @timed("convert")
    def put(self, slot: int, frame: VideoFrame) -> None:
        """Gather a frame. Raises `NotOnHardware` for one of another size, which only swscale resizes."""
        look = self._look
        self._on_gpu = frame.format.name == "cuda"
        if self._on_gpu:
            if (frame.height, frame.width) != (look.height, look.width):
                raise NotOnHardware("its pictures change size")
            assert frame.sw_format is not None
            self._pix_fmt = frame.sw_format.name
            if self._pix_fmt not in _UNITS:
                raise NotOnHardware(f"NVDEC gives {self._pix_fmt}")
        else:
            frame = _as_first(frame, look, self._reformatter)
        planes = _planes_of(frame)
        with self._decoding_stream():
            if not self._planes:
                self._planes = [self._empty(plane) for plane in planes]
            for all_planes, plane in zip(self._planes, planes, strict=True):
                all_planes[slot].copy_(plane)  # now, since the decoder will use its surface again

    def _decoding_stream(self) -> AbstractContextManager[Any]:
        # FFmpeg decodes on the default stream: what is queued there next sees the finished picture.
        if self._on_gpu:
            return torch.cuda.stream(torch.cuda.default_stream(self._device))
        return nullcontext()

    def _empty(self, plane: Tensor) -> Tensor:
        pinned = not self._on_gpu and self._device.type == "cuda"
        return torch.empty(
            self._count, *plane.shape, dtype=plane.dtype, device=plane.device, pin_memory=pinned
        )

    @timed("convert")
    def finish(self) -> Tensor:
        """uint8 (N, 3, H, W) on the device, upright, ordered after what its current stream holds."""
        if not self._planes:  # no frame was asked for
            return RgbPictures(0, self._look, self._reformatter).finish().to(self._device)
        if self._on_gpu:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(torch.cuda.default_stream(self._device))
            for plane in self._planes:
                plane.record_stream(current)
        moved = [plane.to(self._device, non_blocking=True) for plane in self._planes]
        parts = zip(*(plane.split(_AT_ONCE) for plane in moved), strict=True)
        frames = torch.cat([_rgb_of(list(part), self._look, self._pix_fmt) for part in parts])
        return self._look.turn.apply_all(frames)


Pictures: TypeAlias = RgbPictures | PlanePictures


def gather(count: int, look: Look, reformatter: VideoReformatter, device: torch.device) -> Pictures:
    """A place for so many frames of a CPU decoder that are to be on a device."""
    if device.type == "cpu" or not look.as_planes:
        return RgbPictures(count, look, reformatter)
    return PlanePictures(count, look, reformatter, device)


def _space_for(*shape: int) -> Tensor:
    """A uint8 tensor; a large one in huge pages, since fetching small ones is a sixth of decoding 1080p."""
    size = math.prod(shape)
    if size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of kernels that have none
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=torch.uint8).view(shape)
    return torch.empty(shape, dtype=torch.uint8)


def _as_first(frame: VideoFrame, look: Look, reformatter: VideoReformatter) -> VideoFrame:
    """In the size and format of the first frame: the same one where it has them."""
    return reformatter.reformat(frame, width=look.width, height=look.height, format=look.pix_fmt, threads=1)


def _rows(plane: VideoPlane) -> npt.NDArray[np.uint8]:
    """The plane's own memory in bytes, with what pads its rows."""
    return np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)


def _planes_of(frame: VideoFrame) -> list[Tensor]:
    """The frame's own memory, each plane (h, w) or, with U and V in turn, (h, w, 2)."""
    # A capsule: handed the plane itself, torch passes a stream along, which PyAV refuses.
    return [torch.utils.dlpack.from_dlpack(plane.__dlpack__()) for plane in frame.planes]


def _rgb_of(planes: list[Tensor], look: Look, pix_fmt: str) -> Tensor:
    """uint8 (N, 3, H, W), not turned yet, of planes (N, h, w[, 2])."""
    luma, *rest = planes
    chroma = rest[0].unbind(-1) if len(rest) == 1 else tuple(rest)
    return to_rgb(luma, cast(Any, chroma or None), Colour(look.matrix, look.full_range, _UNITS[pix_fmt]))
