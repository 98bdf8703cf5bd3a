"""What a model is made of and what a view costs, worked out from its config without running it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mvit_video.model.attention import Grid, half, pool_kernel_for
from mvit_video.model.config import BlockPlan, MViTConfig, plan_blocks
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


@dataclass(frozen=True)
class BlockSizes:
    """Tokens around one block's attention: the class token counts in numbers, not in grids."""

    grid: Grid
    q_grid: Grid
    k_grid: Grid
    tokens: int
    queries: int
    keys: int


def describe(config: MViTConfig) -> Description:
    """Count stages, parameters and multiply-adds of one clip of ``num_frames`` and ``crop_size``.

    Multiply-adds are counted as in the published figures: convolutions, linear layers, the products of
    attention and of relative positions, and five for every value that a LayerNorm reads; not softmax,
    activations, maximum and average poolings.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MViT(config).parameters())
    padding = half(config.patch_kernel) if config.patch_padding is None else config.patch_padding
    grid = _conv_grid(config.input_size, config.patch_kernel, config.patch_stride, padding)
    first = int(config.class_token)
    total = math.prod(grid) * config.embed_dim * 3 * math.prod(config.patch_kernel)
    if config.norm_stem:
        total += 5 * (math.prod(grid) + first) * config.embed_dim

    stages: list[Stage] = []
    plans = list(plan_blocks(config))
    for index, plan in enumerate(plans):
        sizes = _block_sizes(plan, config, grid)
        macs = _block_macs(plan, config, sizes)
        grid = sizes.q_grid
        total += macs
        if index in config.stage_starts:
            stages.append(
                Stage(0, grid, plan.attention_dim, plan.num_heads, plan.q_stride, plan.kv_stride, 0.0)
            )
        stage = stages[-1]
        stages[-1] = replace(stage, blocks=stage.blocks + 1, gmacs=stage.gmacs + macs / 1e9)
    normed = 1 if config.mean_pooling else math.prod(grid) + first
    total += plans[-1].dim_out * (5 * normed + config.num_classes)
    return Description(tuple(stages), parameters, total / 1e9)


def _block_sizes(plan: BlockPlan, config: MViTConfig, grid: Grid) -> BlockSizes:
    q_grid = _pooled_grid(grid, config, plan.q_stride, plan.pools_q)
    k_grid = _pooled_grid(grid, config, plan.kv_stride, plan.pools_kv)
    first = int(config.class_token)
    tokens, queries, keys = (math.prod(g) + first for g in (grid, q_grid, k_grid))
    return BlockSizes(grid, q_grid, k_grid, tokens, queries, keys)


def _block_macs(plan: BlockPlan, config: MViTConfig, sizes: BlockSizes) -> int:
    tokens, queries, keys = sizes.tokens, sizes.queries, sizes.keys
    dim, width, dim_out = plan.dim, plan.attention_dim, plan.dim_out
    hidden = int(width * config.mlp_ratio)

    norms = 5 * (tokens * dim + queries * width)
    projected = queries + 2 * keys if config.pool_first else 3 * tokens
    linear = projected * dim * width + queries * width * width
    linear += queries * hidden * (width + dim_out)
    if dim != dim_out:
        linear += dim * dim_out * (tokens if config.dim_mul_in_attention else queries)
    return norms + linear + _pooling_macs(plan, config, sizes) + _attention_macs(plan, config, sizes)


def _pooling_macs(plan: BlockPlan, config: MViTConfig, sizes: BlockSizes) -> int:
    if not config.pool_mode.startswith("conv"):
        return 0
    channels = plan.dim if config.pool_first else plan.attention_dim
    first = int(config.class_token)
    macs = 0
    for present, stride, count, times in (
        (plan.pools_q, plan.q_stride, sizes.queries, 1),
        (plan.pools_kv, plan.kv_stride, sizes.keys, 2),
    ):
        kernel = _kernel(config, stride)
        if present and not max(kernel) == max(stride) == 1:
            macs += times * channels * ((count - first) * math.prod(kernel) + 5 * count)
    return macs


def _attention_macs(plan: BlockPlan, config: MViTConfig, sizes: BlockSizes) -> int:
    width, first = plan.attention_dim, int(config.class_token)
    pairs = sizes.queries * sizes.keys
    if plan.window is not None and any(w < n for w, n in zip(plan.window, sizes.grid, strict=True)):
        pairs = (
            first * sizes.keys
        )  # the class token sees everything, each query its window and the class token
        pairs += _window_pairs(plan, plan.window, sizes) + first * (sizes.queries - first)
    cells = sizes.queries - first
    t, h, w = sizes.k_grid
    positions = 0
    if config.rel_pos_joint == "space_time":
        positions = t * h * w
    else:
        positions += t if config.rel_pos_temporal else 0
        if config.rel_pos_spatial:
            positions += h * w if config.rel_pos_joint == "space" else h + w
    return width * (2 * pairs + cells * positions)


def _window_pairs(plan: BlockPlan, window: Grid, sizes: BlockSizes) -> int:
    """Pairs of a query and a key that share a window."""
    pairs = 1
    for axis in range(3):
        spans = axis_windows(
            sizes.grid[axis],
            window[axis],
            shifted=plan.shifted,
            q_stride=plan.q_stride[axis],
            kv_stride=plan.kv_stride[axis],
            q_length=sizes.q_grid[axis],
            k_length=sizes.k_grid[axis],
        )
        pairs *= sum((s.queries[1] - s.queries[0]) * (s.keys[1] - s.keys[0]) for s in spans)
    return pairs


def _kernel(config: MViTConfig, stride: Grid) -> Grid:
    return pool_kernel_for(stride) if config.pool_kernel == "stride" else config.pool_kernel


def _pooled_grid(grid: Grid, config: MViTConfig, stride: Grid, present: bool) -> Grid:
    if not present:
        return grid
    kernel = _kernel(config, stride)
    return _conv_grid(grid, kernel, stride, half(kernel))


def _conv_grid(size: Grid, kernel: Grid, stride: Grid, padding: Grid) -> Grid:
    t, h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))
    return t, h, w
