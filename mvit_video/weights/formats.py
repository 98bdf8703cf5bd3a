"""Names and shapes of other implementations' weights, brought to those of PySlowFast's checkpoints."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch.nn.functional as F
from torch import Tensor

from mvit_video.errors import CheckpointError
from mvit_video.model.config import Grid
from mvit_video.model.positions import resize_table

# torchvision's mvit_v1_b and mvit_v2_s.
_TORCHVISION = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^pos_encoding\.class_token$", "cls_token"),
    (r"^pos_encoding\.(spatial|temporal|class)_pos$", r"pos_embed_\1"),
    (r"\.attn\.project\.0\.", ".attn.proj."),
    (r"\.attn\.pool_([qkv])\.pool\.", r".attn.pool_\1."),
    (r"\.attn\.pool_([qkv])\.norm_act\.0\.", r".attn.norm_\1."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^(blocks\.\d+)\.project\.", r"\1.proj."),
    (r"^head\.1\.", "head.projection."),
)
# timm's mvitv2_*; blocks are numbered within stages there.
_TIMM = (
    (r"\.shortcut_proj_(attn|mlp)\.", ".proj."),
    (r"^head\.fc\.", "head.projection."),
)

# What a pre-training has that a classifier doesn't; officially, the constants of its features too.
PRETRAINING_ONLY = ("mask_token", "hogs.", "pred_head.")


def is_pretraining(weights: Collection[str]) -> bool:
    """Whether these are the names of a model that was pre-trained without labels."""
    return "mask_token" in weights


def to_pyslowfast_keys(weights: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """The same weights by the names of PySlowFast, from torchvision's, timm's or these names themselves.

    Raises CheckpointError, which names ``source``, for timm's models with a class token: they compute
    something else.
    """
    if "conv_proj.weight" in weights:
        return {_renamed(name, _TORCHVISION): value for name, value in weights.items()}
    if "stages.0.blocks.0.norm1.weight" in weights:
        if "cls_token" in weights:
            raise CheckpointError(
                f"{source}: weights of a timm model with a class token can't be used: timm adds the pooled "
                "queries to it, the official code doesn't; use the file of facebookresearch/mvit"
            )
        first = _first_blocks(weights)

        def numbered(match: re.Match[str]) -> str:
            return f"blocks.{first[int(match[1])] + int(match[2])}"

        stages = re.compile(r"^stages\.(\d+)\.blocks\.(\d+)")
        return {_renamed(stages.sub(numbered, name), _TIMM): value for name, value in weights.items()}
    return dict(weights)


def adapt_shape(name: str, value: Tensor, shape: tuple[int, ...], grid: Grid) -> tuple[Tensor, str] | None:
    """A weight in another shape, and how that was done; None where there is no sound way.

    ``grid`` is the one of tokens (T, H, W) that the model's absolute positions are made for.

    - "reshaped": the same numbers, with or without axes of length one.
    - "inflated": from images to clips, by repeating kernels over time, as PySlowFast initialises video models
      (not divided by the number of repeats).
    - "interpolated": position tables of another length or grid (spatial ones bicubically, as PySlowFast loads
      them, all others linearly).
    """
    if [n for n in value.shape if n != 1] == [n for n in shape if n != 1]:
        return value.reshape(shape), "reshaped"
    if name == "patch_embed.proj.weight" or ".attn.pool_" in name:
        return _inflated(value, shape)
    if ".attn.rel_pos_" in name and value.ndim == len(shape) and value.shape[-1] == shape[-1]:
        mode = ("linear", "bilinear", "trilinear")[value.ndim - 2]  # over (lengths of the axes..., c)
        table = F.interpolate(value.movedim(-1, 0)[None], size=shape[:-1], mode=mode)[0].movedim(0, -1)
        return table.contiguous(), "interpolated"
    if name == "pos_embed" and value.ndim == 3 and value.shape[-1] == shape[-1]:
        made_for = _joint_grid(value.shape[1] - (shape[1] - math.prod(grid)), grid)
        return None if made_for is None else (resize_table(value, made_for, grid), "interpolated")
    if name in ("pos_embed_temporal", "pos_embed_spatial") and value.shape[-1] == shape[-1]:
        return _resized_positions(name, value.reshape(1, -1, shape[-1]), shape[1])
    return None


def _inflated(value: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, str] | None:
    if len(shape) != 5:
        return None
    if value.ndim == 4:
        value = value.unsqueeze(2)
    if value.shape != (*shape[:2], 1, *shape[3:]):
        return None
    return value.repeat(1, 1, shape[2], 1, 1), "inflated"


def _resized_positions(name: str, table: Tensor, length: int) -> tuple[Tensor, str] | None:
    """(1, N, C) rows for places or times -> (1, length, C)."""
    if name == "pos_embed_temporal":
        rows = F.interpolate(table.transpose(1, 2), size=length, mode="linear").transpose(1, 2)
        return rows.contiguous(), "interpolated"
    old, new = round(table.shape[1] ** 0.5), round(length**0.5)
    if old**2 != table.shape[1] or new**2 != length:  # which sides a grid has can't be told from its area
        return None
    grid = table.transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(new, new), mode="bicubic")
    return grid.flatten(2).transpose(1, 2).contiguous(), "interpolated"


def _joint_grid(num_tokens: int, grid: Grid) -> Grid | None:
    """The grid of a table with ``num_tokens`` rows: as many frames as in ``grid``, but square ones of another
    size, or more or fewer frames of its size. None where neither or both are possible.
    """
    t, h, w = grid
    side = math.isqrt(max(num_tokens, 0) // t)
    possible = {c for c in ((t, side, side), (num_tokens // (h * w), h, w)) if math.prod(c) == num_tokens > 0}
    return possible.pop() if len(possible) == 1 else None


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _first_blocks(weights: Mapping[str, Tensor]) -> list[int]:
    """For each stage of timm's names, how many blocks come before it."""
    blocks: dict[int, set[int]] = defaultdict(set)
    for name in weights:
        if found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            blocks[int(found[1])].add(int(found[2]))
    return [sum(len(blocks[s]) for s in range(stage)) for stage in range(len(blocks))]
