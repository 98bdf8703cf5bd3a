"""Attention inside windows of the grid, plain and shifted (MViTv2 paper, hybrid window attention)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # (T, H, W)
Span = tuple[int, int]  # first cell and the one behind the last


@dataclass(frozen=True)
class AxisWindow:
    """What one window holds along one axis: a span of query cells and a span of key cells."""

    queries: Span
    keys: Span


def axis_windows(
    length: int,
    window: int,
    *,
    shifted: bool,
    q_stride: int,
    kv_stride: int,
    q_length: int,
    k_length: int,
) -> list[AxisWindow]:
    """Cut one axis into windows of ``window`` cells; where it doesn't divide, the last one is smaller.

    Args:
        length: cells before the pooling; ``window`` counts these too.
        shifted: move all edges by half a window. The first and the last window are smaller then, which is
            what a cyclic shift with masks computes.
        q_stride, kv_stride: of the poolings that made ``q_length`` queries and ``k_length`` keys of them.

    Every query is in one window. A key whose cells straddle an edge is in both, so no window lacks keys.
    """
    shift = window // 2 if shifted and window < length else 0
    edges = [0, *range(shift or window, length, window), length]
    windows = []
    for start, stop in itertools.pairwise(edges):
        last = stop == length
        queries = (math.ceil(start / q_stride), q_length if last else math.ceil(stop / q_stride))
        keys = (
            min(start // kv_stride, k_length - 1),
            k_length if last else min(math.ceil(stop / kv_stride), k_length),
        )
        windows.append(AxisWindow(queries, keys))
    return windows


@dataclass(frozen=True)
class Windows:
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


def cut_windows(axes: list[list[AxisWindow]], q_grid: Grid, k_grid: Grid, device: torch.device) -> Windows:
    """Combine the windows of the axes T, H and W."""
    q_cells, q_valid = _cells([[w.queries for w in axis] for axis in axes], q_grid, device)
    k_cells, k_valid = _cells([[w.keys for w in axis] for axis in axes], k_grid, device)
    count = math.prod(q_grid)
    order = q_cells if q_valid is None else q_cells.masked_fill(~q_valid, count)
    q_slots = order.flatten().argsort()[:count]  # padding sorts behind all cells
    return Windows(q_cells, q_slots, k_cells, k_valid)


def _cells(axes: list[list[Span]], grid: Grid, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Flat cells (windows, size) of the boxes that the spans of three axes make, and which aren't padding."""
    cells = torch.zeros((), dtype=torch.int64, device=device)
    valid = torch.ones((), dtype=torch.bool, device=device)
    padded = False
    for axis, (spans, length) in enumerate(zip(axes, grid, strict=True)):
        size = max(stop - start for start, stop in spans)
        padded |= any(stop - start < size for start, stop in spans)
        shape = [1] * 6  # windows along T, H, W, then cells along T, H, W
        shape[axis], shape[3 + axis] = len(spans), size
        starts = torch.tensor([start for start, _ in spans], device=device)[:, None]
        stops = torch.tensor([stop for _, stop in spans], device=device)[:, None]
        along = starts + torch.arange(size, device=device)
        cells = cells * length + along.clamp(max=length - 1).reshape(shape)
        valid = valid & (along < stops).reshape(shape)
    return cells.flatten(3).flatten(0, 2), valid.flatten(3).flatten(0, 2) if padded else None


def gather_windows(x: Tensor, cells: Tensor) -> Tensor:
    """(B, N, n, d) cells of the grid -> (B * windows, size, n, d)."""
    return x[:, cells.flatten()].unflatten(1, cells.shape).flatten(0, 1)
