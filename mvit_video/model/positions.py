"""Relative positions, which depend on the query (MViTv2 paper, arXiv 2112.01526, eq. 3 and 4), and absolute
ones, which are added to the tokens before the first block (MViT paper, arXiv 2104.11227).

What depends on sizes alone is made by the device itself, without copies from the host, and kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mvit_video.model.config import Grid, MViTConfig
from mvit_video.model.kernels import is_tracing, is_transformed

Constant = TypeVar("Constant")

ABSOLUTE_TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class")


def relative_terms(tables: dict[str, Tensor], q: Tensor, q_grid: Grid, k_grid: Grid) -> tuple[Tensor, Tensor]:
    """What queries have to say of relative positions, and of which keys: (B, N, n, e) and (M, e).

    The product of the two is ``q R_t + q R_h + q R_w`` (eq. 3 and 4), so no (N, M) bias exists. For each
    table the first holds the products of q with the positions of all key coordinates, the second the one-hot
    coordinate of each key. The rows of prefix tokens are zeros, and zeros make c + e a multiple of 8.

    Args:
        tables: by the axes that they are over, "t", "h", "w" or "hw"; see ``relative_positions``.
        q: (B, N, n, c), prefix tokens first, behind them the queries of ``q_grid``.
    """
    prefix = q.shape[1] - math.prod(q_grid)
    if not tables:
        return q[..., :0], q.new_empty(prefix + math.prod(k_grid), 0)
    cells = q[:, prefix:].unflatten(1, q_grid)  # (B, T, H, W, n, c)
    products = []
    for axes, table in tables.items():
        lengths = ([grid["thw".index(axis)] for axis in axes] for grid in (q_grid, k_grid))
        positions = relative_positions(table, *lengths).flatten(len(axes) + 1)  # (queries of axes..., c, K)
        products.append(torch.einsum(f"bthwnc,{axes}ck->bthwnk", cells, positions))
    width = sum(x.shape[-1] for x in products)
    padding = -(q.shape[-1] + width) % 8
    q_positions = torch.cat(products, -1).flatten(1, 3)
    if prefix or padding:
        q_positions = F.pad(q_positions, (0, padding, 0, 0, prefix, 0))
    return q_positions, constant(one_hot_keys, tuple(tables), k_grid, prefix, width + padding, like=q)


def relative_positions(table: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """The position of every key relative to every query, keys of each axis from the last to the first.

    Args:
        table: (L of each axis..., c). Where an L is not 2 * max(queries, keys) - 1 the table is interpolated
            linearly to that.

    Returns:
        (queries of each axis..., c, keys of each axis...), a view of the table where one length of an axis is
        a multiple of the other.
    """
    table = _resize_relative(table, [2 * max(q, k) - 1 for q, k in zip(q_lengths, k_lengths, strict=True)])
    for axis, (q, k) in enumerate(zip(q_lengths, k_lengths, strict=True)):
        if q % k and k % q:
            index = constant(relative_index, q, k, like=table).flip(1)
            table = table.index_select(axis, index.flatten()).unflatten(axis, (q, k)).movedim(axis + 1, -1)
        else:  # row i * q_step + (k - 1 - j) * k_step for query i and key j
            q_step, k_step = max(k // q, 1), max(q // k, 1)
            table = table.unfold(axis, (k - 1) * k_step + 1, q_step).narrow(axis, 0, q)[..., ::k_step]
    return table


def relative_index(q_length: int, k_length: int, *, device: Any = None, dtype: Any = None) -> Tensor:
    """Row of the table for (query i, key j) along one axis, int64 (q_length, k_length).

    Coordinates are stretched to the finer of the two axes. float32, this order of operations and truncation
    are part of the definition: for ratios such as 78 / 10 the rounding decides the row (PySlowFast,
    ``cal_rel_pos_spatial`` in slowfast/models/attention.py at 287ec007). Products are rounded to float32 as
    integers are, and then multiplied by a power of two, which is exact: compilers fuse multiplication and
    addition, which would round otherwise.
    """

    def coordinates(length: int, step: float) -> Tensor:
        mantissa, exponent = math.frexp(step)
        scaled = torch.arange(length, device=device) * round(mantissa * 2**24)
        return scaled.float() * 2.0 ** (exponent - 24)

    k_step = max(q_length / k_length, 1.0)
    q, k = coordinates(q_length, max(k_length / q_length, 1.0)), coordinates(k_length, k_step)
    return (q[:, None] - k[None, :] + (k_length - 1) * k_step).long()


def one_hot_keys(
    tables: tuple[str, ...], k_grid: Grid, prefix: int, width: int, *, device: Any, dtype: Any
) -> Tensor:
    """(prefix + T*H*W, width): each key's coordinates, one-hot for every table, last to first."""
    parts = []
    for axes in tables:
        shape = [length if axis in axes else 1 for axis, length in zip("thw", k_grid, strict=True)]
        one_hot = torch.eye(math.prod(shape), dtype=dtype, device=device).flip(1)
        parts.append(one_hot.reshape(*shape, -1).expand(*k_grid, -1).flatten(0, 2))
    keys = torch.cat(parts, 1)
    return F.pad(keys, (0, width - keys.shape[1], prefix, 0))


def _resize_relative(table: Tensor, lengths: Sequence[int]) -> Tensor:
    """Interpolate a table (L of each axis..., c) linearly to other lengths."""
    if list(table.shape[:-1]) == list(lengths):
        return table
    mode = ("linear", "bilinear", "trilinear")[len(lengths) - 1]
    return F.interpolate(table.movedim(-1, 0)[None], size=list(lengths), mode=mode)[0].movedim(0, -1)


def constant(make: Callable[..., Constant], *sizes: Any, like: Tensor) -> Constant:
    """``make(*sizes, device=, dtype=)`` as for ``like``, made once where what is made can be kept.

    While programs are recorded or transformed, and for tensors of unknown kinds, it is made anew: what comes
    out then belongs to that program. Nor may it be made inside a CUDA graph, where it isn't computed yet.
    """
    fake = like.fake_mode if isinstance(like, FakeTensor) else None
    if (
        torch.compiler.is_compiling()
        or is_tracing()
        or is_transformed()
        or (fake is None and type(like) not in (Tensor, nn.Parameter))
        or (fake is None and like.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return make(*sizes, device=like.device, dtype=like.dtype)
    return _kept(make, sizes, like.device, like.dtype, fake)


@functools.lru_cache(maxsize=256)
def _kept(make: Callable[..., Constant], sizes: Any, device: Any, dtype: Any, fake_mode: Any) -> Constant:
    with fake_mode or nullcontext(), torch.inference_mode(False):  # its tensors couldn't be trained with
        return make(*sizes, device=device, dtype=dtype)


def absolute_lengths(config: MViTConfig, grid: Grid) -> dict[str, int]:
    """Rows of the tables of absolute positions, by their official names, for tokens on ``grid``."""
    t, h, w = grid
    if config.abs_pos == "joint":
        return {"pos_embed": t * h * w + config.num_prefix_tokens}
    if config.abs_pos == "separable":
        lengths = {"pos_embed_spatial": h * w, "pos_embed_temporal": t}
        return {**lengths, "pos_embed_class": 1} if config.class_token else lengths
    return {}


def joint_table(spatial: Tensor, temporal: Tensor, for_class: Tensor | None) -> Tensor:
    """Sum separable tables (1, H*W, C) and (1, T, C) to one over all tokens, the class token's row first."""
    table = (temporal[:, :, None] + spatial[:, None]).flatten(1, 2)  # (1, T*H*W, C)
    return table if for_class is None else torch.cat([for_class, table], dim=1)


def resize_table(table: Tensor, made_for: Grid, grid: Grid) -> Tensor:
    """Interpolate (1, [1 +] T*H*W, C) positions to another grid, trilinearly; the class token's row stays."""
    if made_for == grid:
        return table
    prefix = table.shape[1] - math.prod(made_for)
    volume = table[:, prefix:].unflatten(1, made_for).permute(0, 4, 1, 2, 3)  # (1, C, T, H, W)
    resized = F.interpolate(volume, size=grid, mode="trilinear").flatten(2).transpose(1, 2)
    return torch.cat([table[:, :prefix], resized], dim=1)
