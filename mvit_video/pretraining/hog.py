"""Histograms of oriented gradients, the features that MaskFeat predicts (arXiv 2112.09133, section 3.2).

As in facebookresearch/SlowFast at 287ec007 (``models/operators.py`` and ``models/masked.py``): of each colour
channel, without interpolation between bins or cells, each cell normalised on its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.model.config import Grid

CELL, BINS = 8, 9  # pixels along the side of a cell, orientations in half a turn


def hog(frames: Tensor, *, cell: int = CELL, bins: int = BINS) -> Tensor:
    """How strong the gradients of each orientation are in each cell of a picture.

    An affine change of a channel's values, such as a normalisation, changes nothing but rounding.

    Args:
        frames: float (N, C, H, W); H and W are multiples of ``cell``.
        cell: pixels along its side.
        bins: orientations in half a turn, the first from the y axis on; a gradient and its opposite are one.

    Returns:
        float32 (N, C, bins, H / cell, W / cell) of norm 1 over the bins, or 0 in a cell without gradients;
        computed in float32 even under autocast.

    Raises:
        ValueError: for another shape.
    """
    if frames.ndim != 4 or frames.shape[-2] % cell or frames.shape[-1] % cell:
        raise ValueError(
            f"expected frames (N, C, H, W) of sides that are multiples of {cell}, got {tuple(frames.shape)}"
        )
    with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
        # Differences and sums by hand: convolutions on a GPU may round to TF32, which moves orientations
        # to other bins.
        x = F.pad(frames.float(), (1, 1, 1, 1), mode="reflect")
        down = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
        across = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
        gx = down[..., :-2] - down[..., 2:]
        gy = across[..., :-2, :] - across[..., 2:, :]
        strength = torch.hypot(gx, gy)
        # From 0 to below bins; half a turn further is the same orientation.
        orientation = (torch.atan2(gx, gy) / math.pi * bins).floor_().remainder_(bins)
        histogram = [
            F.avg_pool2d(strength.where(orientation == number, 0.0), cell, divisor_override=1)
            for number in range(bins)
        ]
        return F.normalize(torch.stack(histogram, dim=2), dim=2)


def hog_targets(clips: Tensor, grid: Grid) -> Tensor:
    """The histograms of each token's patch, in its middle frame.

    Args:
        clips: float (B, 3, T, H, W).
        grid: tokens (T', H', W'); a token of more than one cell takes all of them.

    Returns:
        float32 (B, T' * H' * W', 3 * 9 * cells), of a token by channel, bin, and its cells row by row.

    Raises:
        ValueError: the tokens don't cover whole cells.
    """
    stride = patch_stride(clips, grid)
    if stride[1] % CELL or stride[2] % CELL:
        raise ValueError(f"tokens of {stride[1]} x {stride[2]} pixels hold no whole cells of {CELL} pixels")
    frames = clips[:, :, :: stride[0]].transpose(1, 2)  # (B, T', 3, H, W)
    cells = hog(frames.flatten(0, 1)).flatten(1, 2)  # (B * T', 3 * bins, H / cell, W / cell)
    a_token = (stride[1] // CELL, stride[2] // CELL)
    tokens = F.unfold(cells, a_token, stride=a_token)
    return tokens.transpose(1, 2).reshape(len(clips), math.prod(grid), -1)


def cells_of(tokens: Tensor, grid: Grid) -> Tensor:
    """``hog_targets`` (B, N, features) back as a picture of cells, (B, T', 3, 9, H, W)."""
    side = math.isqrt(tokens.shape[-1] // (3 * BINS))  # cells of a token
    of_frames = tokens.unflatten(1, (grid[0], -1)).flatten(0, 1).transpose(1, 2)
    cells = F.fold(of_frames, (grid[1] * side, grid[2] * side), (side, side), stride=(side, side))
    return cells.unflatten(0, (len(tokens), -1)).unflatten(2, (3, BINS))


def pixel_targets(clips: Tensor, grid: Grid) -> Tensor:
    """The pixels of each token's patch in its middle frame, to mean 0 and variance 1 (paper, table 2).

    Args:
        clips, grid: as of ``hog_targets``.

    Returns:
        float32 (B, T' * H' * W', pixels * 3), row by row, channels together.
    """
    stride = patch_stride(clips, grid)
    frames = clips[:, :, :: stride[0]].float().unflatten(-1, (grid[2], -1)).unflatten(-3, (grid[1], -1))
    patches = frames.permute(0, 2, 3, 5, 4, 6, 1)  # (B, 3, T', H', h, W', w) -> (B, T', H', W', h, w, 3)
    tokens = patches.reshape(len(clips), math.prod(grid), -1)
    variance, mean = torch.var_mean(tokens, -1, keepdim=True)
    return (tokens - mean) / (variance + 1e-6).sqrt()


def patch_stride(clips: Tensor, grid: Grid) -> Grid:
    """Frames and pixels (T, H, W) from token to token. Raises ValueError where they aren't whole."""
    sizes = tuple(clips.shape[2:])
    if len(sizes) != 3 or any(size % tokens for size, tokens in zip(sizes, grid, strict=True)):
        raise ValueError(
            f"clips (B, 3, T, H, W) of shape {tuple(clips.shape)} don't divide evenly into {grid} tokens"
        )
    t, h, w = (size // tokens for size, tokens in zip(sizes, grid, strict=True))
    return t, h, w
