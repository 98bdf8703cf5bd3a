"""Pooling attention with decomposed relative positions (MViTv2 paper, section 3; arXiv 2112.01526).

Axis letters: B clips, N tokens, T, H, W grid of tokens, n heads, C channels, c channels of a head.
Tokens are (B, N, C), the class token (if any) first, the grid behind it in t-major order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int, int]  # (T, H, W): tokens along time, height and width

NORM_EPS = 1e-6


class PoolingAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are pooled over the grid before they meet.

    Args:
        dim, dim_out: channels of the tokens that come in and go out.
        num_heads: heads; each has ``dim_out / num_heads`` channels.
        grid: the grid (T, H, W) that the relative-position tables are made for. Other grids work: the
            tables are then interpolated.
        kernel: size of the pooling convolutions (tokens).
        q_stride, kv_stride: strides of the poolings (tokens).
        class_token: whether the first token lies outside the grid.
        residual_pooling: add the pooled queries to the attention's output (paper, eq. 5).
        rel_pos_temporal, rel_pos_spatial: which axes have relative positions.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        *,
        grid: Grid,
        kernel: Grid = (3, 3, 3),
        q_stride: Grid = (1, 1, 1),
        kv_stride: Grid = (1, 1, 1),
        qkv_bias: bool = True,
        class_token: bool = True,
        residual_pooling: bool = True,
        rel_pos_temporal: bool = True,
        rel_pos_spatial: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.class_token = class_token
        self.residual_pooling = residual_pooling
        head_dim = dim_out // num_heads

        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)

        def pool(stride: Grid) -> nn.Conv3d:
            return nn.Conv3d(head_dim, head_dim, kernel, stride, half(kernel), groups=head_dim, bias=False)

        self.pool_q, self.norm_q = pool(q_stride), nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.pool_k, self.norm_k = pool(kv_stride), nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.pool_v, self.norm_v = pool(kv_stride), nn.LayerNorm(head_dim, eps=NORM_EPS)

        def table(axis: int, present: bool) -> nn.Parameter | None:
            # The official tables count strides by floor division, although the convolutions round up; where
            # the two differ (312 pixels) they are interpolated like tables of another input size.
            longest = max(grid[axis] // q_stride[axis], grid[axis] // kv_stride[axis])
            return nn.Parameter(torch.zeros(2 * longest - 1, head_dim)) if present else None

        self.rel_pos_t = table(0, rel_pos_temporal)
        self.rel_pos_h = table(1, rel_pos_spatial)
        self.rel_pos_w = table(2, rel_pos_spatial)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, C) tokens on ``grid`` -> (B, N', C') tokens on the pooled grid, and that grid."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, q_grid = self._pool(q, grid, self.pool_q, self.norm_q)  # (B, N', n, c)
        k, k_grid = self._pool(k, grid, self.pool_k, self.norm_k)
        v, _ = self._pool(v, grid, self.pool_v, self.norm_v)

        q_folded, k_folded = self._fold_positions(q, k, q_grid, k_grid)
        x = fused_attention(q_folded.transpose(1, 2), k_folded.transpose(1, 2), v.transpose(1, 2))
        x = x.transpose(1, 2)  # (B, N', n, c)

        if self.residual_pooling:
            # The class token isn't pooled, so it gets no residual.
            first = int(self.class_token)
            x = torch.cat([x[:, :first], x[:, first:] + q[:, first:]], dim=1) if first else x + q
        return self.proj(x.flatten(2)), q_grid

    def _pool(self, x: Tensor, grid: Grid, conv: nn.Conv3d, norm: nn.LayerNorm) -> tuple[Tensor, Grid]:
        """(B, N, C) -> normalised (B, N', n, c) and the pooled grid; the class token is only normalised."""
        batch, _, channels = x.shape
        first = int(self.class_token)
        # Tokens are a channels-last picture already: only the view changes. All heads share one kernel.
        volume = x[:, first:].reshape(batch, *grid, channels).permute(0, 4, 1, 2, 3)
        weight = conv.weight.repeat(self.num_heads, 1, 1, 1, 1)
        volume = F.conv3d(volume, weight, None, conv.stride, conv.padding, groups=channels)
        pooled = volume.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (B, T'*H'*W', C)
        if first:
            pooled = torch.cat([x[:, :first], pooled], dim=1)
        _, _, t, h, w = volume.shape
        return norm(pooled.unflatten(-1, (self.num_heads, -1))), (t, h, w)

    def _fold_positions(self, q: Tensor, k: Tensor, q_grid: Grid, k_grid: Grid) -> tuple[Tensor, Tensor]:
        """Extend q and k so that their product alone is ``scale * q k + q R_t + q R_h + q R_w``.

        (Paper, eq. 3 and 4.) Per axis, q is extended by its products with the positions of all key
        coordinates, and k by a one-hot vector of its coordinate, so no (N, M) bias exists. Class tokens are
        extended by zeros. Note that the relative terms take the unscaled q.
        """
        first = int(self.class_token)
        q_cells = q[:, first:].unflatten(1, q_grid)  # (B, T, H, W, n, c)
        extra_q, extra_k = [], []
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        for axis, (name, table) in enumerate(zip("thw", tables, strict=True)):
            if table is None:
                continue
            positions = relative_positions(table, q_grid[axis], k_grid[axis])
            extra_q.append(torch.einsum(f"bthwnc,{name}kc->bthwnk", q_cells, positions))
            extra_k.append(one_hot_coordinates(k_grid, axis, k))

        scaled = q * q.shape[-1] ** -0.5
        if not extra_q:
            return scaled, k
        q_positions = F.pad(torch.cat(extra_q, -1).flatten(1, 3), (0, 0, 0, 0, first, 0))
        k_positions = F.pad(torch.cat(extra_k, -1), (0, 0, first, 0))[None, :, None]
        k_positions = k_positions.expand(k.shape[0], -1, self.num_heads, -1)
        return torch.cat([scaled, q_positions], -1), torch.cat([k, k_positions], -1)


def half(kernel: Grid) -> Grid:
    """The padding that centres a kernel."""
    t, h, w = kernel
    return t // 2, h // 2, w // 2


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v for q (B, n, N, d), k (B, n, M, d), v (B, n, M, c) with c <= d -> (B, n, N, c).

    The head widths are padded to one common multiple of 16: fused kernels ask for q, k and v of one width,
    and are fastest on such widths.
    """
    width = math.ceil(q.shape[-1] / 16) * 16
    q, k, padded_v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, padded_v, scale=1.0)[..., : v.shape[-1]]


def relative_positions(table: Tensor, q_length: int, k_length: int) -> Tensor:
    """Look up the position of every key relative to every query along one axis.

    Args:
        table: (L, c). Where L is not 2 * max(q_length, k_length) - 1 it is interpolated linearly to that.

    Returns:
        (q_length, k_length, c)
    """
    length = 2 * max(q_length, k_length) - 1
    if table.shape[0] != length:
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    return table[relative_index(q_length, k_length).to(table.device)]


def relative_index(q_length: int, k_length: int) -> Tensor:
    """Row of the table for (query i, key j) along one axis, int64 (q_length, k_length).

    Coordinates are stretched to the finer of the two axes. float32, this order of operations and truncation
    are part of the definition: for ratios such as 78 / 10 the rounding decides the row.
    """
    q_step = max(k_length / q_length, 1.0)
    k_step = max(q_length / k_length, 1.0)
    q_coordinates = torch.arange(q_length, dtype=torch.float32)[:, None] * q_step
    k_coordinates = torch.arange(k_length, dtype=torch.float32)[None, :] * k_step
    return (q_coordinates - k_coordinates + (k_length - 1) * k_step).long()


def one_hot_coordinates(grid: Grid, axis: int, like: Tensor) -> Tensor:
    """(T*H*W, length of the axis): row i is one-hot at the coordinate of cell i along ``axis``."""
    shape = [1, 1, 1, grid[axis]]
    shape[axis] = grid[axis]
    eye = torch.eye(grid[axis], dtype=like.dtype, device=like.device)
    return eye.reshape(shape).expand(*grid, -1).flatten(0, 2)
