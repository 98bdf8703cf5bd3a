"""From decoded frames to tensors: as RGB on the CPU, or as planes that become RGB on their device.

A caller's transform is applied to a few frames at a time while others are still to be decoded, so that a clip
takes the memory of what the transform leaves and not of its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from torch import Tensor

from mvit_video.data.decode.colour import Colour, matrix_of, to_rgb
from mvit_video.data.timing import stage

# uint8 (n, 3, H, W) -> (n, ...): what is made of some frames, each by itself.
Transform: TypeAlias = Callable[[Tensor], Tensor]

# Layouts that are converted from planes, and the step of a sample that is one 8-bit level.
_UNITS = {
    **dict.fromkeys(("gray", "nv12", "yuv420p", "yuv422p", "yuv444p"), 1),
    **dict.fromkeys(("yuvj420p", "yuvj422p", "yuvj444p"), 1),
    **dict.fromkeys(("gray10le", "yuv420p10le", "yuv422p10le", "yuv444p10le"), 4),
    "p010le": 256,
}
_CONVERTED_AT_ONCE = 16  # frames: as floats they take much more memory than as bytes
_PIXELS_AT_ONCE = 1 << 23  # of frames transformed together
_ANY_SIZE = 16  # pixels, which all kinds of chroma divide


Frame_contra = TypeVar("Frame_contra", contravariant=True)


class FrameBuffer(Protocol[Frame_contra]):
    """A place for some frames of one kind."""

    def write(self, row: int, frame: Frame_contra) -> None:
        """Keep a frame as the row-th."""

    def to_tensor(self) -> Tensor:
        """uint8 (N, 3, H, W), upright."""


class NotOnHardware(Exception):  # noqa: N818 (never leaves this package)
    """The GPU's decoder can't give this file's frames."""


@dataclass(frozen=True)
class Orientation:
    """How the stored picture becomes upright: the display matrix, by its signs."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, frame: VideoFrame) -> Orientation:
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
class FrameFormat:
    """What a file's frames look like, from one that was decoded on the CPU.

    Kept decoders may carry a former file's colour range along, so it is never asked of their frames.
    """

    height: int  # as stored, before turning
    width: int
    orientation: Orientation
    pix_fmt: str
    matrix: tuple[float, float]
    full_range: bool
    has_planes: bool  # whether the planes can be converted without swscale
    chroma_subsampling: tuple[int, int]  # rows and columns that a chroma sample stands for
    high_bit_depth: bool  # more than 8 bits

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.width, self.height) if self.orientation.transpose else (self.height, self.width)

    @classmethod
    def of(cls, frame: VideoFrame) -> FrameFormat:
        pix_fmt = frame.format.name
        return cls(
            frame.height,
            frame.width,
            Orientation.of(frame),
            pix_fmt,
            matrix_of(frame.colorspace),
            frame.color_range == ColorRange.JPEG or pix_fmt.startswith("yuvj"),
            pix_fmt in _UNITS and all(plane.line_size > 0 for plane in frame.planes),
            (
                _ANY_SIZE // frame.format.chroma_height(_ANY_SIZE),
                _ANY_SIZE // frame.format.chroma_width(_ANY_SIZE),
            ),
            frame.format.components[0].bits > 8,
        )


class RgbBuffer:
    """Frames converted one by one by swscale: on the CPU that is the fastest way."""

    def __init__(self, count: int, fmt: FrameFormat, reformatter: VideoReformatter) -> None:
        self._format, self._reformatter = fmt, reformatter
        self._frames = torch.empty(count, *fmt.upright_size, 3, dtype=torch.uint8)
        self._rows = self._frames.numpy()

    @stage("convert")
    def write(self, row: int, frame: VideoFrame) -> None:
        """Keep a frame as the row-th."""
        fmt = self._format
        # swscale's defaults are what the published weights were trained on; of deep chroma they interpolate.
        same = (frame.height, frame.width) == (fmt.height, fmt.width)
        rgb = self._reformatter.reformat(
            frame,
            width=fmt.width,
            height=fmt.height,
            format="rgb24",
            interpolation="POINT" if fmt.high_bit_depth and same else None,
            threads=1,
        )
        plane = rgb.planes[0]
        rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(-1, plane.line_size)[: fmt.height]
        self._rows[row] = fmt.orientation.apply(rows[:, : fmt.width * 3].reshape(fmt.height, fmt.width, 3))

    @stage("convert")
    def to_tensor(self) -> Tensor:
        """uint8 (N, 3, H, W), upright."""
        return self._frames.permute(0, 3, 1, 2)


class PlaneBuffer:
    """Frames kept as YUV planes, 1.5 bytes a pixel, and converted together on `device` at the end.

    They come from NVDEC, and stay on the GPU, or from a CPU decoder, and travel through pinned memory.
    """

    def __init__(
        self, count: int, fmt: FrameFormat, reformatter: VideoReformatter, device: torch.device
    ) -> None:
        self._count, self._format, self._reformatter, self._device = count, fmt, reformatter, device
        self._planes: list[Tensor] = []  # each (N, h, w) or, with U and V in turn, (N, h, w, 2)
        self._pix_fmt = fmt.pix_fmt
        self._on_gpu = False

    @stage("convert")
    def write(self, row: int, frame: VideoFrame) -> None:
        """Keep a frame as the row-th.

        Raises `NotOnHardware` for one of another size than the first, which only swscale resizes.
        """
        fmt = self._format
        self._on_gpu = frame.format.name == "cuda"
        if self._on_gpu:
            if (frame.height, frame.width) != (fmt.height, fmt.width):
                raise NotOnHardware("its pictures change size")
            assert frame.sw_format is not None
            self._pix_fmt = frame.sw_format.name
            if self._pix_fmt not in _UNITS:
                raise NotOnHardware(f"NVDEC gives {self._pix_fmt}")
        else:
            frame = self._reformatter.reformat(  # the same one where it is in the format of the first
                frame, width=fmt.width, height=fmt.height, format=fmt.pix_fmt, threads=1
            )
        planes = _planes_of(frame)
        with self._decoding_stream():
            if not self._planes:
                self._planes = [self._empty(plane) for plane in planes]
            for all_planes, plane in zip(self._planes, planes, strict=True):
                all_planes[row].copy_(plane)  # now, since the decoder will use its surface again

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

    @stage("convert")
    def to_tensor(self) -> Tensor:
        """uint8 (N, 3, H, W) on the device, upright, ordered after what its current stream holds."""
        if self._on_gpu:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(torch.cuda.default_stream(self._device))
            for plane in self._planes:
                plane.record_stream(current)
        moved = [plane.to(self._device, non_blocking=True) for plane in self._planes]
        parts = zip(*(plane.split(_CONVERTED_AT_ONCE) for plane in moved), strict=True)
        frames = torch.cat([_rgb_of(list(part), self._format, self._pix_fmt) for part in parts])
        return self._format.orientation.apply_all(frames)


def make_buffer(
    count: int, fmt: FrameFormat, reformatter: VideoReformatter, device: torch.device
) -> FrameBuffer[VideoFrame]:
    """A place for so many frames of a CPU decoder that are to be on a device.

    Where a size cuts chroma samples in two, swscale would stretch the chroma, or leave the last column black
    (it depends on the processor), so such pictures are converted from their planes.
    """
    cuts_chroma = fmt.height % fmt.chroma_subsampling[0] or fmt.width % fmt.chroma_subsampling[1]
    if fmt.has_planes and (cuts_chroma or device.type != "cpu"):
        return PlaneBuffer(count, fmt, reformatter, device)
    return RgbBuffer(count, fmt, reformatter)


class FrameCollector(Generic[Frame_contra]):
    """Takes the frames of a request as they are decoded, in any order, and transforms some at a time.

    Args:
        count: how many frames the request has, at least one.
        make: gives a buffer for so many frames.
        size: height and width of the upright frames.
        transform: None leaves them as they are, in one buffer.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int], FrameBuffer[Frame_contra]],
        *,
        size: tuple[int, int],
        transform: Transform | None = None,
    ) -> None:
        self._count, self._make, self._transform = count, make, transform
        self._at_once = count if transform is None else max(1, _PIXELS_AT_ONCE // math.prod(size))
        self._rows: dict[int, int] = {}  # of each frame of the request, among all that were transformed
        self._done: list[Tensor] = []
        self._num_done = self._num_held = 0
        self._begin()

    def _begin(self) -> None:
        # Frames that are decoded a second time may make it more than were asked for.
        self._capacity = min(self._at_once, max(self._count - self._num_done, 1))
        self._buffer = self._make(self._capacity)

    def write(self, slot: int, frame: Frame_contra) -> None:
        """Take the slot-th frame of the request; one that comes again replaces the former."""
        row = self._rows.get(slot, -1)
        if row < self._num_done:
            if self._num_held == self._capacity:
                self._finish_buffer()
                self._begin()
            row = self._rows[slot] = self._num_done + self._num_held
            self._num_held += 1
        self._buffer.write(row - self._num_done, frame)

    def _finish_buffer(self) -> None:
        frames = self._buffer.to_tensor()
        if self._transform is not None:
            with stage("transform"):
                frames = self._transform(frames[: self._num_held])
        self._done.append(frames)
        self._num_done, self._num_held = self._num_done + self._num_held, 0

    def to_tensor(self) -> Tensor:
        """(N, ...), in the order of the request, all of which must have come."""
        self._finish_buffer()
        frames = self._done[0] if len(self._done) == 1 else torch.cat(self._done)
        rows = [self._rows[slot] for slot in range(self._count)]
        return frames if rows == list(range(len(frames))) else frames[rows]


def _planes_of(frame: VideoFrame) -> list[Tensor]:
    """The frame's own memory, each plane (h, w) or, with U and V in turn, (h, w, 2)."""
    # A capsule: handed the plane itself, torch passes a stream along, which PyAV refuses.
    return [torch.utils.dlpack.from_dlpack(plane.__dlpack__()) for plane in frame.planes]


def _rgb_of(planes: list[Tensor], fmt: FrameFormat, pix_fmt: str) -> Tensor:
    """uint8 (N, 3, H, W), not turned yet, of planes (N, h, w[, 2])."""
    luma, *rest = planes
    chroma = rest[0].unbind(-1) if len(rest) == 1 else tuple(rest)
    return to_rgb(luma, cast(Any, chroma or None), Colour(fmt.matrix, fmt.full_range, _UNITS[pix_fmt]))
