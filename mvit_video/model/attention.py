"""Pooling attention with decomposed relative positions (MViTv2 paper, section 3; arXiv 2112.01526).

Axis letters: B clips, N queries, M keys, T, H, W grid of tokens, n heads, C channels, c channels of a head.
Tokens are (B, N, C), the class token (if any) first, the grid behind it in t-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.model import kernels
from mvit_video.model.config import BlockPlan, Grid, MViTConfig, same_padding
from mvit_video.model.kernels import Linear
from mvit_video.model.positions import constant, relative_terms

NORM_EPS = 1e-6


class PoolingAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are pooled over the grid before they meet.

    ``plan.grid`` is the grid that the tables of relative positions are made for; on others they are
    interpolated. ``ablations`` has the forms that the paper compares this one with.
    """

    q: nn.Module
    k: nn.Module
    v: nn.Module

    def __init__(self, plan: BlockPlan, config: MViTConfig) -> None:
        super().__init__()
        dim, dim_out, self.num_heads = plan.dim, plan.attention_dim, plan.num_heads
        self.plan, self.num_prefix_tokens = plan, config.num_prefix_tokens
        self.residual_pooling, self.pool_first = config.residual_pooling, config.pool_first
        names = ("q", "k", "v") if config.separate_qkv or config.pool_first else ()
        for name in names:
            setattr(self, name, Linear(dim, dim_out, bias=config.qkv_bias))
        self.qkv = None if names else Linear(dim, 3 * dim_out, bias=config.qkv_bias)
        self.proj = Linear(dim_out, dim_out)
        self.dropout = nn.Dropout(config.dropout)

        pooled_dim = dim if config.pool_first else dim_out
        self.pooled_width = pooled_dim // plan.num_heads if config.pool_mode == "conv" else pooled_dim
        for name in ("q", "k", "v"):
            present, stride = (
                (plan.pools_q, plan.q_stride) if name == "q" else (plan.pools_kv, plan.kv_stride)
            )
            pool = _make_pool(config, self.pooled_width, stride) if present else None
            norm = nn.LayerNorm(self.pooled_width, eps=NORM_EPS) if isinstance(pool, nn.Conv3d) else None
            setattr(self, f"pool_{name}", pool)
            setattr(self, f"norm_{name}", norm)

        # The official tables count strides by floor division, although the convolutions round up; where the
        # two differ (312 pixels) they are interpolated like tables of another input size. In time, strides
        # don't count.
        strides = zip((1, *plan.q_stride[1:]), (1, *plan.kv_stride[1:]), strict=True)
        sizes = [2 * max(n // s, n // r) - 1 for n, (s, r) in zip(plan.grid, strides, strict=True)]
        self.rel_pos_axes = config.rel_pos_tables
        for axes in ("h", "w", "hw", "t", "thw"):  # absent ones are None
            table = None
            if axes in self.rel_pos_axes:
                lengths = [sizes["thw".index(axis)] for axis in axes]
                table = nn.Parameter(torch.zeros(*lengths, dim_out // plan.num_heads))
                if not config.rel_pos_zero_init:
                    nn.init.trunc_normal_(table, std=0.02)
            self.register_parameter(f"rel_pos_{axes}", table)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, C) tokens on ``grid`` -> (B, N', C') tokens on the pooled grid, and that grid."""
        q, k, v, q_grid, k_grid = self._queries_keys_values(x, grid)
        x = self._attend(q, k, v, grid, q_grid, k_grid)
        return self.dropout(self.proj(x.flatten(2))), q_grid  # (B, N', n, c) -> (B, N', C')

    def weights(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Grid]:
        """How much each query takes from each key, and the grids of queries and keys.

        Args:
            x: tokens (B, N, C) on ``grid``, as ``forward`` takes them.

        Returns:
            (B, N', M), the mean over heads; rows sum to 1.

        Raises:
            NotImplementedError: attention inside windows.
        """
        q, k, _, q_grid, k_grid = self._queries_keys_values(x, grid)
        batch, keys, heads, _ = k.shape
        one_hot = torch.eye(keys, device=q.device, dtype=q.dtype)[:, None].expand(batch, -1, heads, -1)
        positions = relative_terms(self._tables(), q, q_grid, k_grid)
        bias = self._bias(q, q_grid, k_grid)
        weights = kernels.attend(q, k, one_hot, *positions, scale=q.shape[-1] ** -0.5, mask=bias)
        return weights.mean(2), q_grid, k_grid  # (B, N', n, M) -> (B, N', M)

    def _queries_keys_values(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid, Grid]:
        """Pooled q (B, N', n, c), k and v (B, M, n, c), and the grids of queries and keys."""
        kv, kv_grid, stride = self._read_by_pooling(x, grid)
        parts = (x, x, x) if self.pool_first else self._project(x, kv, kv)
        # One by one: what was pooled is free before the next part is computed.
        grids, strides = (grid, kv_grid, kv_grid), (None, stride, stride)
        (q, q_grid), (k, k_grid), (v, _) = map(self._pool, parts, grids, "qkv", strides)
        if self.pool_first:
            q, k, v = self._project(q, k, v)
        heads = (self.num_heads, -1)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), q_grid, k_grid

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> Iterable[Tensor]:
        if self.qkv is not None:
            return kernels.qkv(self.qkv, q, k)  # k and v are the same here
        return self.q(q), self.k(k), self.v(v)

    def _read_by_pooling(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Grid | None]:
        """The tokens that keys and values are pooled of, their grid, and the stride if it is another.

        A stride larger than the kernel leaves tokens out, which needn't be projected then.
        """
        pool: Any = self.pool_k
        modules: Any = (pool, self.pool_v, *([self.k, self.v] if self.qkv is None else [self.qkv]))
        if self.pool_first or type(pool) is not nn.Conv3d or not kernels.replace(x, *modules):
            return x, grid, None
        stride: Any = tuple(map(min, pool.stride, pool.kernel_size))
        if stride == pool.stride:
            return x, grid, None
        axes = (grid, pool.kernel_size, pool.stride, pool.padding)
        index, kv_grid = constant(_tokens_read, self.num_prefix_tokens, *axes, like=x)
        return x.index_select(1, index), kv_grid, stride

    def _pool(self, x: Tensor, grid: Grid, name: str, stride: Grid | None) -> tuple[Tensor, Grid]:
        """(B, N, C) -> (B, N', C), normalised by heads, and its grid; the class token is only normalised."""
        pool, norm = getattr(self, f"pool_{name}"), getattr(self, f"norm_{name}")
        if pool is None:
            return x, grid
        prefix = self.num_prefix_tokens
        by_heads = x.unflatten(-1, (-1, self.pooled_width))
        # Gradients of two splits are put together, those of two slices are filled up with zeros and added.
        prefix_tokens, patch_tokens = by_heads.split((prefix, x.shape[1] - prefix), 1)
        cells = kernels.pool_heads(pool, patch_tokens.unflatten(1, grid), stride)  # (B, T', H', W', n, c)
        t, h, w = cells.shape[1:4]
        pooled = cells.flatten(1, 3)
        if prefix:
            pooled = torch.cat([prefix_tokens, pooled], dim=1)
        if norm is not None:  # autocast norms in float32, what follows is computed in x's type
            pooled = kernels.norm_pooled(pool, norm, pooled).to(x.dtype)
        return pooled.flatten(-2), (t, h, w)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, q_grid: Grid, k_grid: Grid) -> Tensor:
        """softmax(scale q kᵀ + relative positions) v [+ q], (B, N', n, c); ``grid`` is that of x."""
        positions = relative_terms(self._tables(), q, q_grid, k_grid)
        residual_from = self.num_prefix_tokens if self.residual_pooling else None
        bias = self._bias(q, q_grid, k_grid)
        scale = q.shape[-1] ** -0.5
        return kernels.attend(q, k, v, *positions, scale=scale, num_prefix_tokens=residual_from, mask=bias)

    def _bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        """What of the positions doesn't go into q and k: (B, n, N', M) or nothing."""
        return None

    def _tables(self) -> dict[str, Tensor]:
        tables: dict[str, Any] = {axes: getattr(self, f"rel_pos_{axes}") for axes in self.rel_pos_axes}
        return tables


def _tokens_read(
    prefix: int, grid: Grid, kernel: Grid, stride: Grid, padding: Grid, *, device: Any, dtype: Any
) -> tuple[Tensor, Grid]:
    """Indices of the tokens, prefix first, that a pooling reads, and the grid that they are on."""
    rows = []
    for n, k, s, p in zip(grid, kernel, stride, padding, strict=True):
        windows = (n + 2 * p - k) // s + 1
        read = [i for i in range(n) if s <= k or ((i + p) % s < k and (i + p) // s < windows)]
        rows.append(torch.tensor(read, device=device))
    t, h, w = rows
    cells = (t[:, None, None] * grid[1] + h[:, None]) * grid[2] + w + prefix
    return torch.cat([torch.arange(prefix, device=device), cells.flatten()]), (len(t), len(h), len(w))


def _make_pool(config: MViTConfig, width: int, stride: Grid) -> nn.Module | None:
    """A pooling over (B, width, T, H, W), padded by half its kernel; None where it would change nothing."""
    kernel = config.pooling_kernel(stride)
    if max(kernel) == max(stride) == 1:
        return None
    if config.pool_mode == "max":
        return nn.MaxPool3d(kernel, stride, same_padding(kernel))
    if config.pool_mode == "avg":
        return _AveragePool(kernel, stride)
    return nn.Conv3d(width, width, kernel, stride, same_padding(kernel), groups=width, bias=False)


class _AveragePool(nn.Module):
    """Mean over windows of a (B, C, T, H, W) volume, in which padding counts as zeros.

    torch's own has no half precision on CPUs, and takes no volume smaller than its kernel.
    """

    def __init__(self, kernel: Grid, stride: Grid) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_full((x.shape[1], 1, *self.kernel), 1 / math.prod(self.kernel))
        return F.conv3d(x, weight, None, self.stride, same_padding(self.kernel), groups=x.shape[1])
