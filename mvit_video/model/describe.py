"""What a model is made of and what a view costs, worked out from its config without running it.

By hand, as ``FlopCounterMode`` gives other figures than the published ones: it counts attention with the
columns that positions add to queries and keys, and leaves out LayerNorm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

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
class Description:
    """A model's stages, its number of parameters and billions of multiply-adds per view."""

    stages: tuple[Stage, ...]
    parameters: int
    gmacs: float


def describe(config: MViTConfig) -> Description:
    """Count stages, parameters and multiply-adds of one clip of ``num_frames`` and ``crop_size``.

    Multiply-adds are counted as in the published figures (by fvcore): convolutions, linear layers, the
    products of attention and of relative positions, and five for every value that a LayerNorm reads; not
    softmax, activations, maximum and average poolings.
    """
    with torch.device("meta"):
        model = MViT(config)
    grid = conv_grid(config.input_size, config.patch_kernel, config.patch_stride, config.patch_pad)
    total = math.prod(grid) * config.embed_dim * 3 * math.prod(config.patch_kernel)
    if config.norm_stem:
        total += 5 * (math.prod(grid) + config.num_prefix_tokens) * config.embed_dim

    stages: list[Stage] = []
    plans = list(plan_blocks(config))
    for index, plan in enumerate(plans):
        macs = block_macs(plan, config, grid)
        grid, _ = pooled_grids(plan, config, grid)
        total += macs
        if index in config.stage_starts:
            strides = plan.q_stride, plan.kv_stride
            stages.append(Stage(0, grid, plan.attention_dim, plan.num_heads, *strides, 0.0))
        stage = stages[-1]
        stages[-1] = replace(stage, blocks=stage.blocks + 1, gmacs=stage.gmacs + macs / 1e9)
    normed = 1 if config.mean_pooling else math.prod(grid) + config.num_prefix_tokens
    total += plans[-1].dim_out * (5 * normed + config.num_classes)
    return Description(tuple(stages), sum(p.numel() for p in model.parameters()), total / 1e9)


def block_macs(plan: BlockPlan, config: MViTConfig, grid: Grid) -> int:
    """Multiply-adds of one block whose tokens come in on ``grid``."""
    q_grid, k_grid = pooled_grids(plan, config, grid)
    tokens, queries, keys = (math.prod(g) + config.num_prefix_tokens for g in (grid, q_grid, k_grid))
    width, hidden = plan.attention_dim, int(plan.attention_dim * config.mlp_ratio)
    macs = 5 * (tokens * plan.dim + queries * width)
    projected = queries + 2 * keys if config.pool_first else 3 * tokens
    macs += projected * plan.dim * width + queries * width * width
    macs += queries * hidden * (width + plan.dim_out)
    if plan.dim != plan.dim_out:
        macs += plan.dim * plan.dim_out * (tokens if config.dim_mul_in_attention else queries)
    return macs + _pooling_macs(plan, config, queries, keys) + attention_macs(plan, config, grid)


def _pooling_macs(plan: BlockPlan, config: MViTConfig, queries: int, keys: int) -> int:
    if not config.pool_mode.startswith("conv"):
        return 0
    channels = plan.dim if config.pool_first else plan.attention_dim
    macs = 0
    for present, stride, count, times in (
        (plan.pools_q, plan.q_stride, queries, 1),
        (plan.pools_kv, plan.kv_stride, keys, 2),
    ):
        kernel = config.pooling_kernel(stride)
        if present and not max(kernel) == max(stride) == 1:
            cells = count - config.num_prefix_tokens
            macs += times * channels * (cells * math.prod(kernel) + 5 * count)
    return macs


def attention_macs(plan: BlockPlan, config: MViTConfig, grid: Grid) -> int:
    """Multiply-adds of the products of queries with keys, positions and of weights with values."""
    (q_grid, k_grid), prefix = pooled_grids(plan, config, grid), config.num_prefix_tokens
    cells, keys = math.prod(q_grid), math.prod(k_grid) + prefix
    pairs = (cells + prefix) * keys
    if plan.window is not None and any(w < n for w, n in zip(plan.window, grid, strict=True)):
        # The class token meets everything, each query its window and the class token.
        pairs = prefix * (keys + cells) + window_pairs(plan, grid, q_grid, k_grid)
    lengths = dict(zip("thw", k_grid, strict=True))
    positions = sum(math.prod(lengths[axis] for axis in axes) for axes in config.rel_pos_tables)
    return plan.attention_dim * (2 * pairs + cells * positions)


def window_pairs(plan: BlockPlan, grid: Grid, q_grid: Grid, k_grid: Grid) -> int:
    """Pairs of a query and a key that share a window."""
    pairs = 1
    for axis in range(3):
        windows = axis_windows(plan, axis, grid, q_grid, k_grid)
        pairs *= sum((w.queries[1] - w.queries[0]) * (w.keys[1] - w.keys[0]) for w in windows)
    return pairs


def pooled_grids(plan: BlockPlan, config: MViTConfig, grid: Grid) -> tuple[Grid, Grid]:
    """The grids of queries and keys of a block whose tokens come in on ``grid``."""
    q_kernel, kv_kernel = config.pooling_kernel(plan.q_stride), config.pooling_kernel(plan.kv_stride)
    q_grid = conv_grid(grid, q_kernel, plan.q_stride, same_padding(q_kernel))
    k_grid = conv_grid(grid, kv_kernel, plan.kv_stride, same_padding(kv_kernel))
    return q_grid if plan.pools_q else grid, k_grid if plan.pools_kv else grid


def conv_grid(size: Grid, kernel: Grid, stride: Grid, padding: Grid) -> Grid:
    """The grid that a convolution gives."""
    t, h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))
    return t, h, w
