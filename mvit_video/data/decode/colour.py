"""Decoded planes -> RGB, the same on every device, and close to what swscale makes of the same planes.

Chroma is repeated, not interpolated, and an unspecified matrix is BT.601 at any size: that is how swscale
made the pictures that the published weights were trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor

BT601 = (0.299, 0.114)
BT709 = (0.2126, 0.0722)
BT2020 = (0.2627, 0.0593)

_MATRICES = {1: BT709, 4: (0.30, 0.11), 7: (0.212, 0.087), 9: BT2020, 10: BT2020}  # by ISO/IEC 23091-2


def matrix_of(colorspace: int) -> tuple[float, float]:
    """The matrix of a stream's `matrix_coefficients`; BT.601 where they say nothing."""
    return _MATRICES.get(colorspace, BT601)


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
