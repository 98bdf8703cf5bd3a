"""Absolute positions, which are added to the tokens before the first block (MViT paper, arXiv 2104.11227)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int, int]  # (T, H, W)
AbsolutePositions = Literal["none", "joint", "separable"]


def position_parameters(
    kind: AbsolutePositions, dim: int, grid: Grid, class_token: bool
) -> dict[str, nn.Parameter]:
    """Zero parameters by their official names, made for tokens of width ``dim`` on ``grid``."""
    t, h, w = grid
    lengths: dict[str, int] = {}
    if kind == "joint":
        lengths = {"pos_embed": t * h * w + int(class_token)}
    elif kind == "separable":
        lengths = {"pos_embed_spatial": h * w, "pos_embed_temporal": t}
        if class_token:
            lengths["pos_embed_class"] = 1
    return {name: nn.Parameter(torch.zeros(1, length, dim)) for name, length in lengths.items()}


def joint_table(spatial: Tensor, temporal: Tensor, for_class: Tensor | None) -> Tensor:
    """Sum separable tables (1, H*W, C) and (1, T, C) to one over all tokens, the class token's row first."""
    table = (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)  # (1, T*H*W, C)
    return table if for_class is None else torch.cat([for_class, table], dim=1)


def resize_table(table: Tensor, made_for: Grid, grid: Grid) -> Tensor:
    """Interpolate (1, [1 +] T*H*W, C) positions to another grid, trilinearly; the class token's row stays."""
    if made_for == grid:
        return table
    t, h, w = made_for
    first = table.shape[1] - t * h * w
    volume = table[:, first:].unflatten(1, made_for).permute(0, 4, 1, 2, 3)  # (1, C, T, H, W)
    resized = F.interpolate(volume, size=grid, mode="trilinear").flatten(2).transpose(1, 2)
    return torch.cat([table[:, :first], resized], dim=1)
