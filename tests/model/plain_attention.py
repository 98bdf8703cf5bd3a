"""MViTv2's pooling attention as the paper writes it, to hold the fast form against.

Nothing here is shared with ``mvit_video.model.attention`` but the parameters: heads are folded into the batch
before pooling, the bias of every (query, key) pair exists, and tables are indexed cell by cell.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.model.attention import PoolingAttention

Grid = tuple[int, int, int]


def plain_attention(attention: PoolingAttention, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """What ``attention(x, grid)`` must return: softmax(scale q kᵀ + E) v + q, projected."""
    heads, first = attention.num_heads, attention.num_prefix_tokens
    batch, _, _ = x.shape
    qkv = attention.qkv(x)
    qkv = qkv.reshape(batch, -1, 3, heads, qkv.shape[-1] // (3 * heads))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n, N, c)

    q, q_grid = pool(q, grid, first, attention.pool_q, attention.norm_q)
    k, k_grid = pool(k, grid, first, attention.pool_k, attention.norm_k)
    v, _ = pool(v, grid, first, attention.pool_v, attention.norm_v)

    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, n, N, M)
    bias = position_bias(attention, q[:, :, first:], q_grid, k_grid)
    logits = logits + F.pad(bias, (first, 0, first, 0))  # nothing for class tokens
    out = logits.softmax(-1) @ v  # (B, n, N, c)

    if attention.residual_pooling:
        out = out + F.pad(q[:, :, first:], (0, 0, first, 0))
    return attention.proj(out.transpose(1, 2).flatten(2)), q_grid


def pool(x: Tensor, grid: Grid, first: int, conv: nn.Conv3d, norm: nn.LayerNorm) -> tuple[Tensor, Grid]:
    """(B, n, N, c) -> convolved head by head and normalised; the class token is normalised only."""
    batch, heads, _, width = x.shape
    volume = x[:, :, first:].reshape(batch * heads, *grid, width).permute(0, 4, 1, 2, 3)
    volume = conv(volume)
    t, h, w = (int(length) for length in volume.shape[2:])
    cells = volume.permute(0, 2, 3, 4, 1).reshape(batch, heads, t * h * w, width)
    return norm(torch.cat([x[:, :, :first], cells], dim=2)), (t, h, w)


def position_bias(attention: PoolingAttention, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor:
    """E, the relative positions, for q (B, n, T*H*W, c) without class token: (B, n, T*H*W, t*h*w)."""
    batch, heads, _, width = q.shape
    cells = q.reshape(batch, heads, *q_grid, width)
    bias = q.new_zeros(batch, heads, *q_grid, *k_grid)
    if attention.rel_pos_h is not None:
        rows = positions(attention.rel_pos_h, q_grid[1], k_grid[1])
        bias = bias + torch.einsum("bnthwc,hkc->bnthwk", cells, rows)[..., None, :, None]
    if attention.rel_pos_w is not None:
        columns = positions(attention.rel_pos_w, q_grid[2], k_grid[2])
        bias = bias + torch.einsum("bnthwc,wkc->bnthwk", cells, columns)[..., None, None, :]
    if attention.rel_pos_t is not None:
        times = positions(attention.rel_pos_t, q_grid[0], k_grid[0])  # (T, t, c)
        # The official code multiplies matrices here; the tally of operations depends on it.
        by_time = cells.permute(2, 0, 1, 3, 4, 5).flatten(1, 4) @ times.transpose(1, 2)
        by_time = by_time.reshape(q_grid[0], batch, heads, *q_grid[1:], k_grid[0])
        bias = bias + by_time.permute(1, 2, 0, 3, 4, 5)[..., :, None, None]
    return bias.reshape(batch, heads, np.prod(q_grid), np.prod(k_grid))


def positions(table: Tensor, q_length: int, k_length: int) -> Tensor:
    """(q_length, k_length, c): the table's row for every query and key coordinate of one axis."""
    table = resample(table, 2 * max(q_length, k_length) - 1)
    rows = [[row_index(i, j, q_length, k_length) for j in range(k_length)] for i in range(q_length)]
    return table[torch.tensor(rows, device=table.device)]


def row_index(i: int, j: int, q_length: int, k_length: int) -> int:
    """Row for query i and key j, in float32 and truncated, as the official code computes it."""
    q_step = np.float32(max(k_length / q_length, 1.0))
    k_step = np.float32(max(q_length / k_length, 1.0))
    offset = np.float32((k_length - 1) * max(q_length / k_length, 1.0))
    return int((np.float32(i) * q_step - np.float32(j) * k_step) + offset)


def resample(table: Tensor, length: int) -> Tensor:
    """Linear interpolation of (L, c) to (length, c), cell centres on cell centres, ends repeated."""
    source = table.shape[0]
    if source == length:
        return table
    rows = []
    for i in range(length):
        position = max((i + 0.5) * source / length - 0.5, 0.0)
        low = int(position)
        high = min(low + 1, source - 1)
        rows.append(table[low] * (1 - (position - low)) + table[high] * (position - low))
    return torch.stack(rows)


class PlainAttention(nn.Module):
    """A stand-in for a model's attention that computes the plain form with the same parameters."""

    def __init__(self, attention: PoolingAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        t, h, w = (int(length) for length in grid)  # ints also while being traced
        return plain_attention(self.attention, x, (t, h, w))
