"""Attention inside windows of the grid, plain and shifted: which queries and keys meet."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.model.config import BlockPlan, Grid

_Span = tuple[int, int]  # first cell and the one behind the last


def axis_windows(
    plan: BlockPlan, axis: int, grid: Grid, q_grid: Grid, k_grid: Grid
) -> list[tuple[_Span, _Span]]:
    """Cut one axis of the grid before pooling into windows: spans of query cells and of key cells.

    The last window is smaller where they don't divide the axis. Shifted windows have their edges half a
    window further; the first and the last are smaller then, which is what a cyclic shift with masks computes.
    Every query is in one window. A key whose cells straddle an edge is in both, so no window lacks keys.
    """
    assert plan.window is not None
    length, window, q_stride, kv_stride, q_length, k_length = (
        x[axis] for x in (grid, plan.window, plan.q_stride, plan.kv_stride, q_grid, k_grid)
    )
    shift = window // 2 if plan.shifted and window < length else 0
    edges = [0, *range(shift or window, length, window), length]
    windows = []
    for start, stop in itertools.pairwise(edges):
        q_stop, k_stop = -(-stop // q_stride), min(-(-stop // kv_stride), k_length)
        if stop == length:
            q_stop, k_stop = q_length, k_length
        windows.append(((-(-start // q_stride), q_stop), (min(start // kv_stride, k_length - 1), k_stop)))
    return windows


class Windows(NamedTuple):
    """Which cells meet: row indices of the flat query and key grids, windows padded to one size.

    Attributes:
        q_cells: (windows, Q) queries of each window.
        q_slots: (N,) where in the flattened ``q_cells`` each query is.
        k_cells: (windows, K) keys of each window.
        k_valid: (windows, K) False for padding; None where there is none.
    """

    q_cells: Tensor
    q_slots: Tensor
    k_cells: Tensor
    k_valid: Tensor | None


def cut_windows(
    plan: BlockPlan, grid: Grid, q_grid: Grid, k_grid: Grid, *, device: torch.device, dtype: Any = None
) -> Windows:
    """The windows of a block whose tokens come in on ``grid``."""
    axes = [axis_windows(plan, axis, grid, q_grid, k_grid) for axis in range(3)]
    q_cells, q_valid = _cells([[queries for queries, _ in axis] for axis in axes], q_grid, device)
    k_cells, k_valid = _cells([[keys for _, keys in axis] for axis in axes], k_grid, device)
    count = math.prod(q_grid)
    order = q_cells if q_valid is None else q_cells.masked_fill(~q_valid, count)
    q_slots = order.flatten().argsort()[:count]  # padding sorts behind all cells
    return Windows(q_cells, q_slots, k_cells, k_valid)


def _cells(axes: list[list[_Span]], grid: Grid, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Flat cells (windows, size) of the boxes that the spans of three axes make, and which aren't padding."""
    cells = torch.zeros((), dtype=torch.int64, device=device)
    valid = torch.ones((), dtype=torch.bool, device=device)
    padded = False
    for axis, (spans, length) in enumerate(zip(axes, grid, strict=True)):
        size = max(stop - start for start, stop in spans)
        padded |= any(stop - start < size for start, stop in spans)
        shape = [1] * 6  # windows along T, H, W, then cells along T, H, W
        shape[axis], shape[3 + axis] = len(spans), size
        # Made by the device: a tensor of the numbers in a list would be copied to it.
        along = torch.stack([torch.arange(start, start + size, device=device) for start, _ in spans])
        inside = [torch.arange(start - stop, start - stop + size, device=device) < 0 for start, stop in spans]
        cells = cells * length + along.clamp(max=length - 1).reshape(shape)
        valid = valid & torch.stack(inside).reshape(shape)
    return cells.flatten(3).flatten(0, 2), valid.flatten(3).flatten(0, 2) if padded else None


def gather_windows(x: Tensor, cells: Tensor) -> Tensor:
    """(B, N, n, d) cells of the grid -> (B * windows, size, n, d)."""
    return x[:, cells.flatten()].unflatten(1, cells.shape).flatten(0, 1)


def pad_and_cut(x: Tensor, grid: Grid, window: Grid) -> Tensor:
    """(B, T*H*W, n, c) -> (B * windows, size, n, c), the last windows of each axis filled up with zeros."""
    counts = [-(-length // size) for length, size in zip(grid, window, strict=True)]
    t, h, w = (count * size - n for count, size, n in zip(counts, window, grid, strict=True))
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, 0, 0, w, 0, h, 0, t))
    for axis, (count, size) in enumerate(zip(counts, window, strict=True)):
        x = x.unflatten(1 + 2 * axis, (count, size))  # (B, I, t, J, h, K, w, n, c) in the end
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(4, 6).flatten(0, 3)


def join_and_crop(x: Tensor, grid: Grid, window: Grid) -> Tensor:
    """What ``pad_and_cut`` has cut, without the zeros: (B * windows, size, n, c) -> (B, T*H*W, n, c)."""
    counts = [-(-length // size) for length, size in zip(grid, window, strict=True)]
    x = x.unflatten(0, (-1, *counts)).unflatten(4, window)  # (B, I, J, K, t, h, w, n, c)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    t, h, w = grid
    return x[:, :t, :h, :w].flatten(1, 3)
