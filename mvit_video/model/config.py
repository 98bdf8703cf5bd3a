"""What shapes a model: the configuration, and the blocks that it lays out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mvit_video.model.fields import check_types

# Far above any model's, far below what would fill a machine's memory.
MAX_TOKENS = 2**22  # of a clip, or of a window of it
_MAX_KERNEL = 2**16  # tokens that are pooled into one

Grid = tuple[int, int, int]  # (T, H, W): tokens, frames and pixels, or strides along time, height and width
_AttentionKind = Literal[
    "pooling",
    "pooling_shifted_window",
    "pooling_hybrid_window",
    "full",
    "window",
    "shifted_window",
    "hybrid_window",
]


@dataclass(frozen=True)
class MViTConfig:
    """Everything that shapes a model; the defaults are MViTv2's.

    Sizes are in input frames and pixels, strides in tokens. ``stages`` counts the blocks of each stage. The
    first block of every stage but the first doubles channels and heads and pools its queries by ``q_stride``;
    keys and values start with ``kv_stride``, which is divided by every query stride on the way (paper,
    section 3 and table 1). ``num_frames`` and ``crop_size`` say which input the position tables are made for;
    other inputs work and interpolate them.

    Attributes:
        patch_padding: None: half of ``patch_kernel``.
        patch_2d: hold the patch embedding's weights without a time axis, as official image models do;
            ``patch_kernel`` and ``patch_stride`` must be 1 in time.
        pool_kernel: "stride": stride + 1 where strided, else 1.
        pool_mode: "conv": depthwise convolutions, shared by the heads, and LayerNorm; "conv_unshared": a
            kernel for every channel, needs ``pool_first``; "max" and "avg" have neither weights nor norm.
        pool_first: pool the tokens before they are projected to queries, keys and values.
        separate_qkv: three projections instead of one, as with ``pool_first``.
        pool_q_every_block: pool queries in every block, not only where a stage begins.
        attention: "pooling", or without pooled keys and values: "full". "window": inside windows;
            "shifted_window": every second block of a stage moves them by half; "hybrid_window": except in the
            last block of the last three stages (Hwin). "pooling_..." does both. Without pooling, queries are
            pooled only where a stage begins.
        window: tokens of the first stage (T, H, W), divided by every query stride like ``kv_stride``.
        window_padding: cut the pooled maps into windows, fill the last ones up with zeros that take part in
            the softmax, and look positions up inside the window, as detectron2 does; else the last windows
            are smaller, and positions are those of the whole map.
        mean_pooling: the head reads the norm of the mean of the grid, not the class token. Without a class
            token it reads the mean, or with ``mean_pooling`` the norm of the mean.
        abs_pos: absolute positions: "joint": a row for every token; "separable": one for every place and one
            for every time, summed.
        residual_pooling: add the pooled queries to the attention's output (paper, eq. 5).
        rel_pos_temporal, rel_pos_spatial: which axes have relative positions.
        rel_pos_joint: "none": a table per axis (decomposed, paper, eq. 4); "space": one table over height and
            width together; "space_time": one over all three axes.
        rel_pos_zero_init: tables start at zero.
        norm_stem: LayerNorm before the first block.
        dim_mul_in_attention: the attention of a stage's first block doubles the channels; False: the MLP of
            the block before does, as in MViTv1.
        dim_mul, head_mul: (block, factor) pairs in place of what ``stages`` says.
        q_strides, kv_strides: (block, T, H, W) of all blocks that pool queries, or keys and values, in place
            of what the strides above say.
        dropout: of positions, attention outputs and MLPs.
        drop_path: probability that the last block's branches are dropped; grows linearly over the blocks.
        head_init_scale: factor on the head's first weights.
        checkpoint_blocks: recompute blocks in the backward pass instead of keeping their activations.
    """

    num_classes: int = 400
    num_frames: int = 16
    crop_size: int = 224
    embed_dim: int = 96
    num_heads: int = 1
    stages: tuple[int, ...] = (1, 2, 11, 2)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_kernel: Grid = (3, 7, 7)
    patch_stride: Grid = (2, 4, 4)
    patch_padding: Grid | None = None
    patch_2d: bool = False
    pool_kernel: Grid | Literal["stride"] = (3, 3, 3)
    pool_mode: Literal["conv", "conv_unshared", "max", "avg"] = "conv"
    pool_first: bool = False
    pool_q_every_block: bool = True
    separate_qkv: bool = False
    q_stride: Grid = (1, 2, 2)
    kv_stride: Grid = (1, 8, 8)
    attention: _AttentionKind = "pooling"
    window: Grid = (8, 28, 28)
    window_padding: bool = False
    class_token: bool = True
    mean_pooling: bool = False
    residual_pooling: bool = True
    abs_pos: Literal["none", "joint", "separable"] = "none"
    rel_pos_temporal: bool = True
    rel_pos_spatial: bool = True
    rel_pos_joint: Literal["none", "space", "space_time"] = "none"
    rel_pos_zero_init: bool = False
    norm_stem: bool = False
    dim_mul_in_attention: bool = True
    dim_mul: tuple[tuple[int, float], ...] | None = None
    head_mul: tuple[tuple[int, float], ...] | None = None
    q_strides: tuple[tuple[int, int, int, int], ...] | None = None
    kv_strides: tuple[tuple[int, int, int, int], ...] | None = None
    dropout: float = 0.0
    drop_path: float = 0.2
    head_dropout: float = 0.5
    head_init_scale: float = 1.0
    checkpoint_blocks: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        depth, kernel, stride = sum(self.stages), self.patch_kernel, self.patch_stride
        limits = [n + 2 * pad for n, pad in zip(self.input_size, self.patch_pad, strict=True)]

        def require(name: str, is_right: bool, what: str) -> None:
            if not is_right:
                raise ValueError(f"{name} must {what}, got {getattr(self, name)!r}")

        for name in ("num_classes", "num_frames", "crop_size", "embed_dim", "num_heads", "mlp_ratio"):
            require(name, getattr(self, name) > 0, "be positive")
        for name in ("dropout", "drop_path", "head_dropout"):
            require(name, 0 <= getattr(self, name) < 1, "be in [0, 1)")
        for name in ("stages", "patch_kernel", "patch_stride", "q_stride", "kv_stride", "window"):
            require(name, min(getattr(self, name), default=0) > 0, "list positive numbers")
        require("window", math.prod(self.window) <= MAX_TOKENS, f"have at most {MAX_TOKENS} tokens")
        require("pool_kernel", self.pool_kernel == "stride" or min(self.pool_kernel) > 0, "be positive")
        for name in ("dim_mul", "head_mul", "q_strides", "kv_strides"):
            rows = getattr(self, name) or ()
            is_right = all(0 <= block < depth and min(values) > 0 for block, *values in rows)
            require(name, is_right, f"list blocks from 0 to {depth - 1} with positive numbers")
        is_padding = all(0 <= pad <= k for pad, k in zip(self.patch_pad, kernel, strict=True))
        require("patch_padding", is_padding, f"be from 0 to patch_kernel {kernel}")
        fits = all(k <= limit for k, limit in zip(kernel, limits, strict=True))
        require("patch_kernel", fits, f"be at most {tuple(limits)}, the padded clip")
        require("num_heads", self.embed_dim % self.num_heads == 0, f"divide embed_dim {self.embed_dim}")
        is_2d = kernel[0] == stride[0] == 1
        require("patch_2d", is_2d or not self.patch_2d, f"be false with {kernel=} and {stride=} over time")
        shared = self.pool_first or self.pool_mode != "conv_unshared"
        require("pool_mode", shared, "be another one without pool_first")
        space, time = self.rel_pos_spatial, self.rel_pos_spatial and self.rel_pos_temporal
        has_axes = {"none": True, "space": space, "space_time": time}[self.rel_pos_joint]
        require("rel_pos_joint", has_axes, "be none without rel_pos_spatial, or over time rel_pos_temporal")
        goes = not (self.window_padding and self.class_token and "window" in self.attention)
        require("window_padding", goes, "be false with a class token")
        goes = self.rel_pos_joint != "space_time" or "window" not in self.attention
        require("rel_pos_joint", goes, f"be none or space with attention {self.attention!r}")

    @property
    def input_size(self) -> Grid:
        """Frames, height and width that the position tables are made for."""
        return self.num_frames, self.crop_size, self.crop_size

    @property
    def stage_starts(self) -> tuple[int, ...]:
        """Index of the first block of every stage."""
        return tuple(itertools.accumulate(self.stages[:-1], initial=0))

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Index of the last block of every stage."""
        return tuple(start - 1 for start in (*self.stage_starts[1:], sum(self.stages)))

    @property
    def rel_pos_tables(self) -> tuple[str, ...]:
        """The axes of each table of relative positions."""
        if self.rel_pos_joint == "space_time":
            return ("thw",)
        spatial = ("hw",) if self.rel_pos_joint == "space" else ("h", "w")
        return ("t",) * self.rel_pos_temporal + spatial * self.rel_pos_spatial

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of the grid."""
        return int(self.class_token)

    @property
    def patch_pad(self) -> Grid:
        """The patch embedding's padding (T, H, W)."""
        return same_padding(self.patch_kernel) if self.patch_padding is None else self.patch_padding

    def pooling_kernel(self, stride: Grid) -> Grid:
        """The kernel (T, H, W) of a pooling with this stride."""
        return overlapping_kernel(stride) if self.pool_kernel == "stride" else self.pool_kernel


@dataclass(frozen=True)
class BlockPlan:
    """One block as ``plan_blocks`` lays it out.

    Attributes:
        dim, attention_dim, dim_out: channels that come in, leave the attention and leave the block.
        grid: the grid (T, H, W) of the tokens that come in.
        q_stride, kv_stride: 1 where the block doesn't pool.
        window: tokens (T, H, W) of ``grid``; None: attention is global.
    """

    stage: int
    dim: int
    attention_dim: int
    dim_out: int
    num_heads: int
    grid: Grid
    q_stride: Grid
    kv_stride: Grid
    pools_q: bool
    pools_kv: bool
    window: Grid | None
    shifted: bool
    drop_path: float


def plan_blocks(config: MViTConfig) -> Iterator[BlockPlan]:
    """Lay the stages of ``config`` out as blocks."""
    depth, starts = sum(config.stages), config.stage_starts
    dim_mul, head_mul = block_factors(config)
    q_strides, kv_strides = pooling_strides(config)
    has_windows, is_hybrid = config.attention.endswith("window"), config.attention.endswith("hybrid_window")
    global_blocks = config.stage_ends[-3:] if is_hybrid else ()

    dim, num_heads, window = config.embed_dim, config.num_heads, config.window
    grid = floor_divide(config.input_size, config.patch_stride)
    stage = -1
    for index in range(depth):
        stage += index in starts
        num_heads = round_width(num_heads, head_mul.get(index, 1.0))
        widens = index if config.dim_mul_in_attention else index + 1
        divisor = round_width(num_heads, head_mul.get(widens, 1.0))
        dim_out = round_width(dim, dim_mul.get(widens, 1.0), divisor)
        attention_dim = dim_out if config.dim_mul_in_attention else dim
        if attention_dim % num_heads:
            raise ValueError(
                f"dim_mul and head_mul give block {index} {attention_dim} channels, "
                f"which {num_heads} heads can't share evenly"
            )
        q_stride, kv_stride = q_strides.get(index, (1, 1, 1)), kv_strides.get(index, (1, 1, 1))
        kernels = [overlapping_kernel(q_stride), *map(config.pooling_kernel, (q_stride, kv_stride))]
        for kernel in kernels:
            if math.prod(kernel) > _MAX_KERNEL:
                raise ValueError(f"block {index} would pool by a kernel of {kernel}")
        in_window = window if has_windows and index not in global_blocks else None
        strides = (q_stride, kv_stride) if in_window and config.window_padding else ()
        if any(side % step for stride in strides for side, step in zip(window, stride, strict=True)):
            raise ValueError(f"window {config.window} leaves block {index} {window}, not whole by {strides}")
        if any(n < min(strides) for n, *strides in zip(grid[1:], q_stride[1:], kv_stride[1:], strict=True)):
            raise ValueError(
                f"crop_size {config.crop_size} is too small: block {index} would pool {grid} tokens"
            )
        yield BlockPlan(
            stage=stage,
            dim=dim,
            attention_dim=attention_dim,
            dim_out=dim_out,
            num_heads=num_heads,
            grid=grid,
            q_stride=q_stride,
            kv_stride=kv_stride,
            pools_q=index in q_strides,
            pools_kv=index in kv_strides,
            window=in_window,
            shifted=config.attention.endswith("shifted_window") and (index - starts[stage]) % 2 == 1,
            # Drop path grows linearly over the depth (paper, appendix).
            drop_path=config.drop_path * index / max(depth - 1, 1),
        )
        dim, grid, window = dim_out, floor_divide(grid, q_stride), floor_divide(window, q_stride)


def block_factors(config: MViTConfig) -> tuple[dict[int, float], dict[int, float]]:
    """Factors on channels and on heads, of the blocks that have any."""
    doubled = tuple((start, 2.0) for start in config.stage_starts[1:])
    return (
        dict(doubled if config.dim_mul is None else config.dim_mul),
        dict(doubled if config.head_mul is None else config.head_mul),
    )


def pooling_strides(config: MViTConfig) -> tuple[dict[int, Grid], dict[int, Grid]]:
    """Strides of the blocks that pool queries, and of those that pool keys and values."""
    blocks, one = range(sum(config.stages)), (1, 1, 1)
    q_strides = dict.fromkeys(blocks, one) if config.pool_q_every_block else {}
    q_strides |= dict.fromkeys(config.stage_starts[1:], config.q_stride)
    if config.q_strides is not None:
        q_strides = {index: (t, h, w) for index, t, h, w in config.q_strides}
    kv_strides, stride = {}, config.kv_stride
    for index in blocks:
        stride = floor_divide(stride, q_strides.get(index, one))
        kv_strides[index] = stride
    if config.kv_strides is not None:
        kv_strides = {index: (t, h, w) for index, t, h, w in config.kv_strides}
    if config.attention.startswith("pooling"):
        return q_strides, kv_strides
    return {index: stride for index, stride in q_strides.items() if stride != one}, {}


def floor_divide(size: Grid, stride: Grid) -> Grid:
    """Floor division per axis, but at least 1."""
    t, h, w = (max(n // s, 1) for n, s in zip(size, stride, strict=True))
    return t, h, w


def overlapping_kernel(stride: Grid) -> Grid:
    """The smallest kernel by which strided windows overlap: stride + 1, and 1 where nothing is strided."""
    t, h, w = (s + 1 if s > 1 else 1 for s in stride)
    return t, h, w


def same_padding(kernel: Grid) -> Grid:
    """The padding that centres a kernel."""
    t, h, w = kernel
    return t // 2, h // 2, w // 2


def round_width(width: int, factor: float, divisor: int = 1) -> int:
    """``width * factor``, rounded to a multiple of ``divisor`` but not to less than nine tenths of it."""
    scaled = width * factor
    rounded = max(int(scaled + divisor / 2) // divisor * divisor, 1)
    return rounded if rounded >= 0.9 * scaled else rounded + divisor
