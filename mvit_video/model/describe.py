"""What a model is made of and what a view costs.

By hand, as ``FlopCounterMode`` gives other figures than the published ones: it counts attention with the
columns that positions add to queries and keys, and leaves out LayerNorm.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mvit_video.model.config import BlockPlan, Grid, MViTConfig, plan_blocks, same_padding
from mvit_video.model.mvit import MViT
from mvit_video.model.windows import axis_windows


@dataclass(frozen=True)
class Stage:
    """One stage: blocks, the grid of tokens (T, H, W), channels and heads behind its first block.

    Strides are those of the stage's first block (T, H, W). ``gmacs`` is in billions.
    """

    blocks: int
    tokens: Grid
    channels: int
    num_heads: int
    q_stride: Grid
    kv_stride: Grid
    gmacs: float


@dataclass(frozen=True)
class Summary:
    """A model's stages, its number of parameters and billions of multiply-adds per view."""

    stages: tuple[Stage, ...]
    parameters: int
    gmacs: float


@torch.no_grad()
def describe(config: MViTConfig) -> Summary:
    """Count stages, parameters and multiply-adds of one clip of ``num_frames`` and ``crop_size``.

    Multiply-adds are counted as in the published figures (by fvcore): convolutions, linear layers, the
    products of attention and of relative positions, and five for every value that a LayerNorm reads; not
    softmax, activations, maximum and average poolings.
    """
    with torch.device("meta"):
        model, clip = MViT(config).eval(), torch.empty(1, 3, *config.input_size)
    macs: Counter[int | None] = Counter()  # by block; None: before and behind the blocks
    grids: list[Grid] = []  # that come in

    def count(block: int | None, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        each = 5 if isinstance(layer, nn.LayerNorm) else layer.get_parameter("weight")[0].numel()
        macs[block] += output.numel() * each

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d | nn.LayerNorm):
            part, _, rest = name.partition(".")
            block = int(rest.partition(".")[0]) if part == "blocks" else None
            layer.register_forward_hook(partial(count, block))
    for module in model.blocks:
        module.register_forward_pre_hook(lambda _, inputs: grids.append(inputs[1]))
    model(clip)

    plans = list(plan_blocks(config))
    for index, (plan, grid) in enumerate(zip(plans, grids, strict=True)):
        macs[index] += attention_macs(plan, config, grid)
    stages = []
    for start, blocks in zip(config.stage_starts, config.stages, strict=True):
        plan, tokens = plans[start], pooled_grids(plans[start], config, grids[start])[0]
        gmacs = sum(macs[index] for index in range(start, start + blocks)) / 1e9
        strides = plan.q_stride, plan.kv_stride
        stages.append(Stage(blocks, tokens, plan.attention_dim, plan.num_heads, *strides, gmacs))
    return Summary(tuple(stages), sum(p.numel() for p in model.parameters()), macs.total() / 1e9)


def attention_macs(plan: BlockPlan, config: MViTConfig, grid: Grid) -> int:
    """Multiply-adds of the products of queries with keys, positions and of weights with values."""
    (q_grid, k_grid), prefix = pooled_grids(plan, config, grid), config.num_prefix_tokens
    cells, keys = math.prod(q_grid), math.prod(k_grid) + prefix
    pairs = (cells + prefix) * keys
    if plan.window is not None and any(w < n for w, n in zip(plan.window, grid, strict=True)):
        # The class token meets everything, each query its window and the class token.
        pairs = prefix * (keys + cells) + window_pairs(plan, grid, q_grid, k_grid)
    positions = sum(math.prod(k_grid["thw".index(axis)] for axis in axes) for axes in config.rel_pos_tables)
    return plan.attention_dim * (2 * pairs + cells * positions)


def window_pairs(plan: BlockPlan, grid: Grid, q_grid: Grid, k_grid: Grid) -> int:
    """Pairs of a query and a key that share a window."""
    axes = (axis_windows(plan, axis, grid, q_grid, k_grid) for axis in range(3))
    return math.prod(sum((q[1] - q[0]) * (k[1] - k[0]) for q, k in windows) for windows in axes)


def pooled_grids(plan: BlockPlan, config: MViTConfig, grid: Grid) -> tuple[Grid, Grid]:
    """The grids of queries and keys of a block whose tokens come in on ``grid``."""

    def pooled(stride: Grid) -> Grid:
        kernel = config.pooling_kernel(stride)
        sizes = zip(grid, kernel, stride, same_padding(kernel), strict=True)
        t, h, w = ((n + 2 * pad - k) // s + 1 for n, k, s, pad in sizes)
        return t, h, w

    return pooled(plan.q_stride) if plan.pools_q else grid, pooled(plan.kv_stride) if plan.pools_kv else grid
