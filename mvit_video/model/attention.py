"""Pooling attention with decomposed relative positions (MViTv2 paper, section 3; arXiv 2112.01526).

Axis letters: B clips, N queries, M keys, T, H, W grid of tokens, n heads, C channels, c channels of a head.
Tokens are (B, N, C), the class token (if any) first, the grid behind it in t-major order.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.model import kernels
from mvit_video.model.windows import axis_windows, cut_windows, gather_windows

Grid = tuple[int, int, int]  # (T, H, W): tokens along time, height and width
PoolMode = Literal["conv", "conv_unshared", "max", "avg"]
JointPositions = Literal["none", "space", "space_time"]
Pool: TypeAlias = "nn.Conv3d | nn.MaxPool3d | AveragePool | None"

NORM_EPS = 1e-6


class PoolingAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are pooled over the grid before they meet.

    Args:
        dim, dim_out: channels of the tokens that come in and go out.
        num_heads: heads; each has ``dim_out / num_heads`` channels.
        grid: the grid (T, H, W) that the relative-position tables are made for. Other grids work: the
            tables are then interpolated.
        kernel: size of the poolings (tokens); "stride": stride + 1 where strided, else 1.
        q_stride, kv_stride: strides of the poolings (tokens). Nothing is pooled by a kernel and stride of 1.
        pools_q, pools_kv: whether queries, and keys and values, are pooled at all.
        pool_mode: "conv": depthwise convolutions, shared by the heads, and LayerNorm; "conv_unshared": a
            kernel for every channel, needs ``pool_first``; "max" and "avg" have neither weights nor norm.
        pool_first: pool the tokens before they are projected to queries, keys and values.
        separate_qkv: three projections instead of one, as with ``pool_first``.
        class_token: whether the first token lies outside the grid.
        residual_pooling: add the pooled queries to the attention's output (paper, eq. 5).
        rel_pos_temporal, rel_pos_spatial: which axes have relative positions.
        rel_pos_joint: "none": a table per axis (decomposed, paper, eq. 4); "space": one table over height and
            width together; "space_time": one over all three axes.
        rel_pos_zero_init: tables start at zero.
        window: attend only inside windows of this many tokens (T, H, W) of the grid that comes in; the class
            token sees and is seen by everything.
        shifted: move the windows' edges by half a window.
        dropout: of the output, in training.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    pool_q: Pool
    pool_k: Pool
    pool_v: Pool
    norm_q: nn.LayerNorm | None
    norm_k: nn.LayerNorm | None
    norm_v: nn.LayerNorm | None

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        *,
        grid: Grid,
        kernel: Grid | Literal["stride"] = (3, 3, 3),
        q_stride: Grid = (1, 1, 1),
        kv_stride: Grid = (1, 1, 1),
        pools_q: bool = True,
        pools_kv: bool = True,
        pool_mode: PoolMode = "conv",
        pool_first: bool = False,
        separate_qkv: bool = False,
        qkv_bias: bool = True,
        class_token: bool = True,
        residual_pooling: bool = True,
        rel_pos_temporal: bool = True,
        rel_pos_spatial: bool = True,
        rel_pos_joint: JointPositions = "none",
        rel_pos_zero_init: bool = False,
        window: Grid | None = None,
        shifted: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.class_token = class_token
        self.residual_pooling = residual_pooling
        self.pool_first = pool_first
        self.q_stride, self.kv_stride = q_stride, kv_stride
        self.window, self.shifted = window, shifted
        head_dim = dim_out // num_heads

        names = ("q", "k", "v") if separate_qkv or pool_first else ()
        for name in names:
            setattr(self, name, Linear(dim, dim_out, bias=qkv_bias))
        self.qkv = None if names else Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = Linear(dim_out, dim_out)
        self.dropout = nn.Dropout(dropout)

        pooled_dim = dim if pool_first else dim_out
        width = pooled_dim if pool_mode == "conv_unshared" else pooled_dim // num_heads
        for name, stride, present in (
            ("q", q_stride, pools_q),
            ("k", kv_stride, pools_kv),
            ("v", kv_stride, pools_kv),
        ):
            pool = make_pool(pool_mode, width, kernel, stride) if present else None
            setattr(self, f"pool_{name}", pool)
            norm = nn.LayerNorm(width, eps=NORM_EPS) if isinstance(pool, nn.Conv3d) else None
            setattr(self, f"norm_{name}", norm)

        # The official tables count strides by floor division, although the convolutions round up; where the
        # two differ (312 pixels) they are interpolated like tables of another input size. In time, strides
        # don't count.
        t, h, w = (
            2 * max(n // s, n // r) - 1
            for n, s, r in zip(grid, (1, *q_stride[1:]), (1, *kv_stride[1:]), strict=True)
        )
        joint = rel_pos_joint if rel_pos_spatial else "none"

        def table(*lengths: int, present: bool) -> nn.Parameter | None:
            if not present:
                return None
            values = torch.zeros(*lengths, head_dim)
            return nn.Parameter(values if rel_pos_zero_init else nn.init.trunc_normal_(values, std=0.02))

        decomposed = rel_pos_spatial and joint == "none"
        self.rel_pos_h = table(h, present=decomposed)
        self.rel_pos_w = table(w, present=decomposed)
        self.rel_pos_hw = table(h, w, present=joint == "space")
        self.rel_pos_t = table(t, present=rel_pos_temporal and joint != "space_time")
        self.rel_pos_thw = table(t, h, w, present=joint == "space_time")

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, C) tokens on ``grid`` -> (B, N', C') tokens on the pooled grid, and that grid."""
        q, k, v, q_grid, k_grid = self._queries_keys_values(x, grid)
        q_positions, k_positions = self._positions(q, q_grid, k_grid)
        first = int(self.class_token)
        windowed = self.window is not None and any(w < n for w, n in zip(self.window, grid, strict=True))
        if kernels.has_attention(q) and not windowed and self.rel_pos_thw is None:  # all in one kernel
            residual_from = first if self.residual_pooling else None
            x = kernels.attention(q, k, v, q.shape[-1] ** -0.5, q_positions, k_positions, residual_from)
        else:
            q_folded, k_folded = fold_positions(q, k, q_positions, k_positions)
            if windowed:
                x = self._attend_in_windows(q_folded, k_folded, v, grid, q_grid, k_grid)
            else:
                x = fused_attention(q_folded, k_folded, v, self._joint_bias(q, q_grid, k_grid))
            if self.residual_pooling:
                # The class token isn't pooled, so it gets no residual.
                x = x + F.pad(q[:, first:], (0, 0, 0, 0, first, 0))
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
        if self.window is not None and any(w < n for w, n in zip(self.window, grid, strict=True)):
            raise NotImplementedError("attention inside windows has no weights over all keys")
        q, k, _, q_grid, k_grid = self._queries_keys_values(x, grid)
        q_folded, k_folded = fold_positions(q, k, *self._positions(q, q_grid, k_grid))
        logits = q_folded.transpose(1, 2) @ k_folded.permute(0, 2, 3, 1)  # (B, n, N', M)
        bias = self._joint_bias(q, q_grid, k_grid)
        logits = logits if bias is None else logits + bias
        return logits.softmax(-1).mean(1), q_grid, k_grid

    def _queries_keys_values(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Grid, Grid]:
        """Pooled q (B, N', n, c), k and v (B, M, n, c), and the grids of queries and keys."""
        if self.qkv is not None:
            if type(self.qkv) is Linear:  # parts that lie apart needn't be copied to be pooled
                q, k, v = kernels.linear_parts(x, self.qkv.weight, self.qkv.bias, 3)
            else:
                q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = (x, x, x) if self.pool_first else (self.q(x), self.k(x), self.v(x))
        q, q_grid = self._pool(q, grid, self.pool_q, self.norm_q)
        k, k_grid = self._pool(k, grid, self.pool_k, self.norm_k)
        v, _ = self._pool(v, grid, self.pool_v, self.norm_v)
        if self.pool_first:
            q, k, v = self.q(q), self.k(k), self.v(v)
        heads = (self.num_heads, -1)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), q_grid, k_grid

    def _pool(self, x: Tensor, grid: Grid, pool: Pool, norm: nn.LayerNorm | None) -> tuple[Tensor, Grid]:
        """(B, N, C) -> (B, N', C), normalised by heads, and its grid; the class token is only normalised."""
        if pool is None:
            return x, grid
        batch, _, channels = x.shape
        first = int(self.class_token)
        # Tokens are a channels-last picture already: only the view changes.
        class_token, cells = x.split((first, x.shape[1] - first), 1)
        volume = cells.reshape(batch, *grid, channels).permute(0, 4, 1, 2, 3)
        if isinstance(pool, nn.Conv3d):  # all heads share one kernel
            weight = pool.weight.repeat(channels // pool.in_channels, 1, 1, 1, 1)
            stride, padding = cast(Grid, pool.stride), cast(Grid, pool.padding)
            volume = kernels.depthwise_conv3d(volume, weight, stride, padding)
        else:
            volume = pool(volume)
        _, _, t, h, w = volume.shape
        pooled = volume.permute(0, 2, 3, 4, 1).flatten(1, 3)  # (B, T'*H'*W', C)
        if first:
            pooled = torch.cat([class_token, pooled], dim=1)
        if norm is not None:
            pooled = norm(pooled.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)
        return pooled, (t, h, w)

    def _positions(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> tuple[Tensor, Tensor]:
        """What q of shape (B, N, n, c) has to say of relative positions: (B, N, n, e) and (M, e).

        The product of the two is ``q R_t + q R_h + q R_w`` (paper, eq. 3 and 4), so no (N, M) bias exists.
        Per axis, the first holds the products of q with the positions of all key coordinates, the second
        the one-hot coordinate of each key. The rows of class tokens are zeros.
        """
        first = int(self.class_token)
        cells = q.split((first, q.shape[1] - first), 1)[1].unflatten(1, q_grid)  # (B, T, H, W, n, c)
        of_q, of_k = [], []
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        for axis, (name, table) in enumerate(zip("thw", tables, strict=True)):
            if table is None:
                continue
            positions = relative_positions(table, q_grid[axis], k_grid[axis])
            of_q.append(torch.einsum(f"bthwnc,{name}kc->bthwnk", cells, positions))
            of_k.append(one_hot_coordinates(k_grid, axis, q))
        if self.rel_pos_hw is not None:
            positions = joint_positions(self.rel_pos_hw, q_grid[1:], k_grid[1:])  # (H, W, h, w, c)
            of_q.append(torch.einsum("bthwnc,hwkc->bthwnk", cells, positions.flatten(2, 3)))
            plane = torch.eye(k_grid[1] * k_grid[2], dtype=q.dtype, device=q.device)
            of_k.append(plane.repeat(k_grid[0], 1))
        if not of_q:
            return q[..., :0], q.new_empty(first + math.prod(k_grid), 0)
        q_positions = F.pad(torch.cat(of_q, -1).flatten(1, 3), (0, 0, 0, 0, first, 0))
        return q_positions, F.pad(torch.cat(of_k, -1), (0, 0, first, 0))

    def _joint_bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor | None:
        """q R_thw as the (B, n, N, M) bias that it is: one table over all axes leaves nothing to fold."""
        if self.rel_pos_thw is None:
            return None
        first = int(self.class_token)
        q_cells = q[:, first:].unflatten(1, q_grid)  # (B, T, H, W, n, c)
        frames = []
        for time in range(q_grid[0]):  # one by one: positions for all of them would be (N, M, c)
            now = slice(time, time + 1)
            positions = joint_positions(self.rel_pos_thw, q_grid, k_grid, first=now)[0]  # (H, W, t, h, w, c)
            frames.append(torch.einsum("bhwnc,hwkc->bnhwk", q_cells[:, time], positions.flatten(2, 4)))
        return F.pad(torch.stack(frames, 2).flatten(2, 4), (first, 0, first, 0))

    def _attend_in_windows(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, q_grid: Grid, k_grid: Grid
    ) -> Tensor:
        """Attention of (B, N, n, d) queries to the keys of their window and to the class token."""
        assert self.window is not None
        axes = [
            axis_windows(
                grid[axis],
                self.window[axis],
                shifted=self.shifted,
                q_stride=self.q_stride[axis],
                kv_stride=self.kv_stride[axis],
                q_length=q_grid[axis],
                k_length=k_grid[axis],
            )
            for axis in range(3)
        ]
        windows = cut_windows(axes, q_grid, k_grid, q.device)
        count, first = len(windows.k_cells), int(self.class_token)

        def cut(x: Tensor) -> Tensor:  # keys or values of all windows, each with the class token
            cells = gather_windows(x[:, first:], windows.k_cells)
            return torch.cat([x[:, :first].repeat_interleave(count, dim=0), cells], dim=1)

        mask = windows.k_valid
        if mask is not None:
            mask = F.pad(mask, (first, 0), value=True).repeat(q.shape[0], 1)[:, None, None]  # (B*W, 1, 1, K)
        q_windows = gather_windows(q[:, first:], windows.q_cells)
        x = fused_attention(q_windows, cut(k), cut(v), mask)  # (B * windows, Q, n, c)
        x = x.unflatten(0, (-1, count)).flatten(1, 2)[:, windows.q_slots]
        if first:
            x = torch.cat([fused_attention(q[:, :first], k, v), x], dim=1)
        return x


class AveragePool(nn.Module):
    """Mean over windows of a (B, C, T, H, W) volume, in which padding counts as zeros.

    torch's own has no half precision on CPUs, and takes no volume smaller than its kernel.
    """

    def __init__(self, kernel: Grid, stride: Grid) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_full((x.shape[1], 1, *self.kernel), 1 / math.prod(self.kernel))
        return F.conv3d(x, weight, None, self.stride, half(self.kernel), groups=x.shape[1])


class Linear(nn.Linear):
    """torch's own, computed by a faster kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


def make_pool(mode: PoolMode, width: int, kernel: Grid | Literal["stride"], stride: Grid) -> Pool:
    """A pooling over (B, C, T, H, W), padded by half its kernel; None where it would change nothing."""
    if kernel == "stride":
        kernel = pool_kernel_for(stride)
    if max(kernel) == max(stride) == 1:
        return None
    if mode == "max":
        return nn.MaxPool3d(kernel, stride, half(kernel))
    if mode == "avg":
        return AveragePool(kernel, stride)
    return nn.Conv3d(width, width, kernel, stride, half(kernel), groups=width, bias=False)


def pool_kernel_for(stride: Grid) -> Grid:
    """The smallest kernel by which strided windows overlap: stride + 1, and 1 where nothing is strided."""
    t, h, w = (s + 1 if s > 1 else 1 for s in stride)
    return t, h, w


def half(kernel: Grid) -> Grid:
    """The padding that centres a kernel."""
    t, h, w = kernel
    return t // 2, h // 2, w // 2


def fold_positions(q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
    """Extend q and k so that their product alone is ``scale q kᵀ + q_positions k_positionsᵀ``.

    (B, N, n, c), (B, M, n, c), (B, N, n, e), (M, e) -> (B, N, n, c + e), (B, M, n, c + e). Note that the
    relative terms take the unscaled q.
    """
    k_positions = k_positions[:, None].expand(*k.shape[:-1], -1)
    return torch.cat([q, q_positions], -1), torch.cat([k * q.shape[-1] ** -0.5, k_positions], -1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ + mask) v for q (B, N, n, d), k (B, M, n, d), v (B, M, n, c), c <= d -> (B, N, n, c).

    A boolean (B, n, N, M) mask says which keys count, a float one is added. The head widths are padded to one
    common multiple of 16: fused kernels ask for q, k and v of one width, and are fastest on such widths.
    """
    if mask is None and kernels.has_attention(q):
        return kernels.attention(q, k, v)
    width = math.ceil(q.shape[-1] / 16) * 16
    q, k, padded = (F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, padded, mask, scale=1.0)
    return x[..., : v.shape[-1]].transpose(1, 2)


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


def joint_positions(
    table: Tensor, q_grid: tuple[int, ...], k_grid: tuple[int, ...], first: slice = slice(None)
) -> Tensor:
    """Look up the position of every key relative to every query in a table over two or three axes.

    Args:
        table: (2 * max(q, k) - 1 of each axis..., c), interpolated to these lengths where it has others.
        first: which queries of the first axis.

    Returns:
        (queries of each axis..., keys of each axis..., c)
    """
    axes = len(q_grid)
    lengths = [2 * max(q, k) - 1 for q, k in zip(q_grid, k_grid, strict=True)]
    if list(table.shape[:-1]) != lengths:
        mode = "bilinear" if axes == 2 else "trilinear"
        table = F.interpolate(table.movedim(-1, 0)[None], size=lengths, mode=mode)[0].movedim(0, -1)
    indices = []
    for axis, (q_length, k_length) in enumerate(zip(q_grid, k_grid, strict=True)):
        index = relative_index(q_length, k_length).to(table.device)
        index = index[first] if axis == 0 else index
        shape = [1] * (2 * axes)
        shape[axis], shape[axes + axis] = index.shape
        indices.append(index.reshape(shape))
    return table[tuple(indices)]


def relative_index(q_length: int, k_length: int) -> Tensor:
    """Row of the table for (query i, key j) along one axis, int64 (q_length, k_length).

    Coordinates are stretched to the finer of the two axes. float32, this order of operations and truncation
    are part of the definition: for ratios such as 78 / 10 the rounding decides the row. The products are
    rounded before torch sees them: compilers fuse multiplication and addition, which rounds otherwise.
    """
    q_step = max(k_length / q_length, 1.0)
    k_step = max(q_length / k_length, 1.0)
    q_coordinates = torch.tensor([i * _float32(q_step) for i in range(q_length)], dtype=torch.float32)
    k_coordinates = torch.tensor([j * _float32(k_step) for j in range(k_length)], dtype=torch.float32)
    return (q_coordinates[:, None] - k_coordinates[None, :] + (k_length - 1) * k_step).long()


def _float32(value: float) -> float:
    """Round to the 24 bits of a float32: adding and taking away a large multiple drops the others."""
    large = value * (2**29 + 1)
    return large - (large - value)


def one_hot_coordinates(grid: Grid, axis: int, like: Tensor) -> Tensor:
    """(T*H*W, length of the axis): row i is one-hot at the coordinate of cell i along ``axis``."""
    shape = [1, 1, 1, grid[axis]]
    shape[axis] = grid[axis]
    eye = torch.eye(grid[axis], dtype=like.dtype, device=like.device)
    return eye.reshape(shape).expand(*grid, -1).flatten(0, 2)
