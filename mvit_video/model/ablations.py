"""The attentions that the MViTv2 paper compares its own with: in windows, and with one table of positions.

The other ablations are in place: where tokens are pooled and how (``MViTConfig``), and joint
positions in space, which are a table over two axes (``positions``).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mvit_video.model import kernels
from mvit_video.model.attention import PoolingAttention
from mvit_video.model.config import BlockPlan, Grid, MViTConfig, floor_divide
from mvit_video.model.positions import constant, relative_positions, relative_terms
from mvit_video.model.windows import cut_windows, gather_windows, join_and_crop, pad_and_cut


def make_attention(plan: BlockPlan, config: MViTConfig) -> PoolingAttention:
    """The attention of one block."""
    if plan.window is not None:
        return PaddedWindowAttention(plan, config) if config.window_padding else WindowAttention(plan, config)
    if config.rel_pos_joint == "space_time":
        return JointSpaceTimeAttention(plan, config)
    return PoolingAttention(plan, config)


class WindowAttention(PoolingAttention):
    """Attention inside windows of ``plan.window`` tokens; the class token sees and is seen by everything.

    Where the windows are shifted, their edges lie half a window further (Swin, arXiv 2103.14030).
    """

    def weights(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Grid]:
        if self._is_cut(grid):
            raise NotImplementedError("attention inside windows has no weights over all keys")
        return super().weights(x, grid)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, q_grid: Grid, k_grid: Grid) -> Tensor:
        if not self._is_cut(grid):
            return super()._attend(q, k, v, grid, q_grid, k_grid)
        windows = constant(cut_windows, self.plan, grid, q_grid, k_grid, like=q)
        count, prefix = len(windows.k_cells), self.num_prefix_tokens

        def cut(x: Tensor) -> Tensor:  # keys or values of all windows, each with the class token
            cells = gather_windows(x[:, prefix:], windows.k_cells)
            return torch.cat([x[:, :prefix].repeat_interleave(count, dim=0), cells], dim=1)

        mask = windows.k_valid
        if mask is not None:
            mask = F.pad(mask, (prefix, 0), value=True).repeat(q.shape[0], 1)[:, None, None]  # (B*W, 1, 1, K)
        positions = relative_terms(self._tables(), q, q_grid, k_grid)
        q_aug, k_aug = kernels.augment_qk(q, k, *positions, q.shape[-1] ** -0.5)
        q_windows = gather_windows(q_aug[:, prefix:], windows.q_cells)
        x = kernels.attend(q_windows, cut(k_aug), cut(v), mask=mask)  # (B * windows, Q, n, c)
        x = x.unflatten(0, (-1, count)).flatten(1, 2)[:, windows.q_slots]
        if self.residual_pooling:
            x = x + q[:, prefix:]
        if prefix:
            x = torch.cat([kernels.attend(q_aug[:, :prefix], k_aug, v), x], dim=1)
        return x

    def _is_cut(self, grid: Grid) -> bool:
        assert self.plan.window is not None
        return any(w < n for w, n in zip(self.plan.window, grid, strict=True))


class PaddedWindowAttention(PoolingAttention):
    """Attention inside windows of the pooled maps, which are filled up with zeros to whole windows.

    The zeros count as keys. Positions are those inside a window, whatever the map's size. As in detectron2's
    ``modeling/backbone/mvit.py`` at 02b5c4e2, without class token.
    """

    def weights(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid, Grid]:
        raise NotImplementedError("attention inside windows has no weights over all keys")

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, q_grid: Grid, k_grid: Grid) -> Tensor:
        window = self.plan.window
        assert window is not None
        q_window, k_window = (floor_divide(window, s) for s in (self.plan.q_stride, self.plan.kv_stride))

        def attend(q: Tensor, k: Tensor, v: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor:
            q = pad_and_cut(q, q_grid, q_window)
            k, v = pad_and_cut(k, k_grid, k_window), pad_and_cut(v, k_grid, k_window)
            x = PoolingAttention._attend(self, q, k, v, window, q_window, k_window)
            return join_and_crop(x, q_grid, q_window)

        if not kernels.saves_memory(q):
            return attend(q, k, v, q_grid, k_grid)
        # One row of windows at a time: copies of all of them would be most of what a large image takes.
        found = torch.empty_like(q)
        q_rows, found_rows = (x.unflatten(1, q_grid).split(q_window[1], 2) for x in (q, found))
        k_rows, v_rows = (x.unflatten(1, k_grid).split(k_window[1], 2) for x in (k, v))
        for q_row, k_row, v_row, row in zip(q_rows, k_rows, v_rows, found_rows, strict=True):
            q_part, k_part = (q_grid[0], q_row.shape[2], q_grid[2]), (k_grid[0], k_row.shape[2], k_grid[2])
            x = attend(q_row.flatten(1, 3), k_row.flatten(1, 3), v_row.flatten(1, 3), q_part, k_part)
            row.copy_(x.unflatten(1, q_part))
        return found


class JointSpaceTimeAttention(PoolingAttention):
    """One table of relative positions over all three axes: a bias of every query and key."""

    def _tables(self) -> dict[str, Tensor]:
        return {}

    def _bias(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor:
        prefix = self.num_prefix_tokens
        cells = q[:, prefix:].unflatten(1, q_grid)  # (B, T, H, W, n, c)
        table = cast(Tensor, self.rel_pos_thw)
        positions = relative_positions(table, q_grid, k_grid)  # (T, H, W, c, t, h, w), a view
        # Time by time: a copy of all positions would be (N, M, c).
        frames = [
            torch.einsum("bhwnc,hwck->bnhwk", tokens, rows.flatten(3))
            for tokens, rows in zip(cells.unbind(1), positions, strict=True)
        ]
        bias = torch.stack(frames, 2).flatten(2, 4).flip(-1)  # keys were from the last to the first
        return F.pad(bias, (prefix, 0, prefix, 0))
