"""From decoded frames to RGB tensors: by swscale on the CPU, or from their planes on any device.

Planes give the same on every device, close to what swscale makes of them: chroma is repeated, not
interpolated, and an unspecified matrix is BT.601 at any size. So swscale made the pictures that the published
weights were trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from torch import Tensor

from mvit_video.data.timing import stage

# uint8 (n, 3, H, W) -> (n, ...): what is made of some frames, each by itself.
Transform: TypeAlias = Callable[[Tensor], Tensor]

BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # red and blue in the luma
_MATRICES = {1: BT709, 4: (0.30, 0.11), 7: (0.212, 0.087), 9: BT2020, 10: BT2020}  # by ISO/IEC 23091-2

# Layouts that are converted from planes, and the step of a sample that is one 8-bit level.
_UNITS = {
    **dict.fromkeys(("gray", "nv12", "yuv420p", "yuv422p", "yuv444p"), 1),
    **dict.fromkeys(("yuvj420p", "yuvj422p", "yuvj444p"), 1),
    **dict.fromkeys(("gray10le", "yuv420p10le", "yuv422p10le", "yuv444p10le"), 4),
    "p010le": 256,
}
_PIXELS_AT_ONCE = 1 << 22  # of frames converted together: as floats they take much more memory than as bytes


class NotOnHardware(Exception):  # noqa: N818 (never leaves this package)
    """The GPU's decoder can't give this file's frames."""


@dataclass(frozen=True)
class FrameFormat:
    """What a file's frames look like, from one that was decoded on the CPU.

    Kept decoders may carry a former file's colour range along, so it is never asked of their frames.
    """

    height: int  # as stored, before turning
    width: int
    transpose: bool  # to become upright
    flips: tuple[int, ...]  # then; axes of (N, 3, H, W)
    pix_fmt: str
    matrix: tuple[float, float]
    full_range: bool
    has_planes: bool  # whether the planes can be converted without swscale
    cuts_chroma: bool  # whether a chroma sample stands for pixels beyond the edge
    high_bit_depth: bool  # more than 8 bits

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width."""
        return (self.width, self.height) if self.transpose else (self.height, self.width)

    @classmethod
    def of(cls, frame: VideoFrame) -> FrameFormat:
        layout, height, width = frame.format, frame.height, frame.width
        return cls(
            height,
            width,
            *_orientation(frame),
            layout.name,
            matrix_of(frame.colorspace),
            frame.color_range == ColorRange.JPEG or layout.name.startswith("yuvj"),
            layout.name in _UNITS and all(plane.line_size > 0 for plane in frame.planes),
            layout.chroma_height(height) == layout.chroma_height(height + 1)
            or layout.chroma_width(width) == layout.chroma_width(width + 1),
            layout.components[0].bits > 8,
        )

    def upright(self, pictures: Tensor) -> Tensor:
        """Turn (N, 3, H, W) pictures as they were stored."""
        pictures = pictures.transpose(2, 3) if self.transpose else pictures
        return pictures.flip(self.flips) if self.flips else pictures


def matrix_of(colorspace: int) -> tuple[float, float]:
    """The matrix of a stream's `matrix_coefficients`; BT.601 where they say nothing."""
    return _MATRICES.get(colorspace, BT601)


def _orientation(frame: VideoFrame) -> tuple[bool, tuple[int, ...]]:
    """See `FrameFormat`: the display matrix, by its signs."""
    data = cast(Any, frame.side_data).get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return False, ()
    # x' = a x + c y and y' = b x + d y
    a, b, _, c, d = np.frombuffer(memoryview(data), np.int32)[:5].tolist()
    transpose = abs(b) > abs(a)
    x, y = (c, b) if transpose else (a, d)
    return transpose, tuple(axis for axis, scale in ((2, y), (3, x)) if scale < 0)


@stage("convert")
def convert(
    frames: Sequence[VideoFrame], fmt: FrameFormat, reformatter: VideoReformatter, device: torch.device
) -> Tensor:
    """Frames -> uint8 (N, 3, H, W), RGB, upright and of one size, on a device.

    swscale is the fastest way on the CPU. Where a size cuts chroma samples in two, it would stretch the
    chroma, or leave the last column black (it depends on the processor), so such frames are converted from
    their planes, as those for a GPU are: these take half of the memory on the way.

    Raises `NotOnHardware` for frames of a GPU's decoder that only swscale could convert.
    """
    on_gpu = frames[0].format.name == "cuda"
    if on_gpu or (fmt.has_planes and (fmt.cuts_chroma or device.type != "cpu")):
        pictures = _from_planes(frames, fmt, reformatter, device)
    else:
        pictures = _by_swscale(frames, fmt, reformatter)
    return fmt.upright(pictures).to(device)


def _by_swscale(frames: Sequence[VideoFrame], fmt: FrameFormat, reformatter: VideoReformatter) -> Tensor:
    pictures = np.empty((len(frames), fmt.height, fmt.width, 3), np.uint8)
    size: dict[str, Any] = {"width": fmt.width, "height": fmt.height}
    for row, frame in enumerate(frames):
        # swscale's defaults are what the published weights were trained on; of deep chroma they interpolate.
        same = (frame.height, frame.width) == (fmt.height, fmt.width)
        method = "POINT" if fmt.high_bit_depth and same else None
        rgb = reformatter.reformat(frame, format="rgb24", interpolation=method, threads=1, **size)
        pictures[row] = rgb.to_ndarray()
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def _from_planes(
    frames: Sequence[VideoFrame], fmt: FrameFormat, reformatter: VideoReformatter, device: torch.device
) -> Tensor:
    on_gpu, pix_fmt = frames[0].format.name == "cuda", fmt.pix_fmt
    if on_gpu:
        pix_fmt = str(frames[0].sw_format and frames[0].sw_format.name)
        if any((frame.height, frame.width) != (fmt.height, fmt.width) for frame in frames):
            raise NotOnHardware("its pictures change size")
        if pix_fmt not in _UNITS:
            raise NotOnHardware(f"NVDEC gives {pix_fmt}")
    else:  # the same ones where they are in the format of the first
        size: dict[str, Any] = {"width": fmt.width, "height": fmt.height}
        frames = [reformatter.reformat(frame, format=fmt.pix_fmt, threads=1, **size) for frame in frames]
    # Capsules: handed the planes themselves, torch passes a stream along, which PyAV refuses.
    stored = [
        [torch.utils.dlpack.from_dlpack(plane.__dlpack__()) for plane in frame.planes] for frame in frames
    ]
    # FFmpeg decodes on the default stream: what is queued there next sees finished pictures, and its decoder
    # uses their memory again only after that.
    default = torch.cuda.default_stream(device) if on_gpu else None
    with torch.cuda.stream(default) if default else nullcontext():
        planes = [torch.stack(same) for same in zip(*stored, strict=True)]
    if default is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(default)
        for plane in planes:
            plane.record_stream(current)
    elif device.type == "cuda":  # pinned memory travels beside the GPU's work
        planes = [plane.pin_memory().to(device, non_blocking=True) for plane in planes]
    luma, *rest = planes
    chroma = rest[0].unbind(-1) if len(rest) == 1 else tuple(rest)  # U and V in turn, or by themselves
    kind: dict[str, Any] = {"matrix": fmt.matrix, "full_range": fmt.full_range, "unit": _UNITS[pix_fmt]}
    return to_rgb(luma, cast(Any, chroma or None), **kind)


def to_rgb(
    luma: Tensor,
    chroma: tuple[Tensor, Tensor] | None,
    *,
    matrix: tuple[float, float] = BT601,
    full_range: bool = False,
    unit: int = 1,
) -> Tensor:
    """Planes of N pictures -> uint8 (N, 3, H, W).

    Args:
        luma: (N, H, W), any integer type.
        chroma: U and V (N, h, w), of the same height and width as the luma or half of it, halves rounded
            either way; None for gray, which is of full range whatever the stream says, as in swscale.
        matrix: weights of red and blue in the luma.
        full_range: luma is 0..255 and chroma 1..255, not 16..235 and 16..240, at 8 bits.
        unit: how much a sample grows for one 8-bit level: 1 at 8 bits, 4 at 10 bits, 256 for P010.
    """
    y = luma.to(torch.float32).div_(unit)
    if chroma is None:
        return _to_uint8(y.round_())[:, None].expand(-1, 3, -1, -1).contiguous()
    if not full_range:
        y.sub_(16).mul_(255 / 219)
    red, blue = matrix
    green = 1 - red - blue
    scale = 1.0 if full_range else 255 / 224
    u, v = (c.to(torch.float32).div_(unit).sub_(128).mul_(2 * scale) for c in chroma)
    of_green = u * (-blue * (1 - blue) / green) + v * (-red * (1 - red) / green)
    offsets = torch.stack([v * (1 - red), of_green, u * (1 - blue)], dim=1)  # from the luma, at chroma's size
    if offsets.shape[-2:] == y.shape[-2:]:
        return _to_uint8(offsets.add_(y[:, None]).round_())
    # swscale rounds down where it repeats chroma.
    for axis in (-2, -1):
        offsets = offsets.index_select(axis, _sources(offsets.shape[axis], y.shape[axis], y.device))
    return _to_uint8(offsets.add_(y[:, None]))


def _sources(size: int, repeated: int, device: torch.device) -> Tensor:
    """For each place in the luma, its place in the chroma; the last one again where NVDEC cut it off."""
    step = max(1, round(repeated / size))
    return torch.arange(repeated, device=device).div_(step, rounding_mode="floor").clamp_(max=size - 1)


def _to_uint8(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


class FrameBuffer:
    """Takes the frames of a request as they are decoded, in any order, and converts some at a time.

    So a clip takes the memory of what its transform leaves, and not of its pictures.

    Args:
        wanted: numbers of the frames, each once.
        to_tensor: frames -> uint8 (n, 3, H, W).
        transform: as of `Video.get_frames`.
    """

    def __init__(
        self,
        wanted: Sequence[int],
        to_tensor: Callable[[list[VideoFrame]], Tensor],
        transform: Transform | None,
    ) -> None:
        self.rows = {index: row for row, index in enumerate(wanted)}
        self._convert, self._transform = to_tensor, transform
        self._held: dict[int, VideoFrame] = {}
        self._done: Tensor | None = None

    def write(self, index: int, frame: VideoFrame) -> None:
        """Take a frame that is wanted; one that comes again replaces the former."""
        self._held[self.rows[index]] = frame
        if (len(self._held) + 1) * frame.width * frame.height > _PIXELS_AT_ONCE:
            self._finish_held()

    def _finish_held(self) -> None:
        rows = list(self._held)
        frames = self._convert(list(self._held.values()))
        self._held.clear()
        if self._transform is not None:
            with stage("transform"):
                frames = self._transform(frames)
        if rows == list(range(len(self.rows))):
            self._done = frames
            return
        if self._done is None:
            rgb = self._transform is None  # with the channels last in memory, as they come
            like: dict[str, Any] = {"memory_format": torch.channels_last} if rgb else {}
            size = (len(self.rows), *frames.shape[1:])
            self._done = torch.empty(size, dtype=frames.dtype, device=frames.device, **like)
        self._done[rows] = frames

    def to_tensor(self) -> Tensor:
        """(N, ...), in the order of `wanted`; all must have come."""
        if self._held:
            self._finish_held()
        assert self._done is not None
        return self._done
