"""Multiscale Vision Transformer v2 for clips; an image is a clip of one frame (arXiv 2112.01526)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.model.attention import NORM_EPS, Grid, PoolingAttention, half
from mvit_video.model.protocol import Protocol


@dataclass(frozen=True)
class MViTConfig:
    """Everything that shapes an MViTv2. Sizes are in input frames and pixels, strides in tokens.

    ``stages`` counts the blocks of each stage. The first block of every stage but the first doubles channels
    and heads inside its attention and pools its queries by ``q_stride``; keys and values start with
    ``kv_stride``, which is divided by every query stride on the way (paper, section 3 and table 1).
    ``num_frames`` and ``crop_size`` say which input the relative-position tables are made for; other inputs
    work and interpolate them.
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
    pool_kernel: Grid = (3, 3, 3)
    q_stride: Grid = (1, 2, 2)
    kv_stride: Grid = (1, 8, 8)
    class_token: bool = True
    residual_pooling: bool = True
    rel_pos_temporal: bool = True
    rel_pos_spatial: bool = True
    drop_path: float = 0.2
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_frames", "crop_size", "embed_dim", "num_heads", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("drop_path", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("patch_kernel", "patch_stride", "pool_kernel", "q_stride", "kv_stride"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"{name} must be three positive numbers (T, H, W), got {value}")
        if not self.stages or min(self.stages) < 1:
            raise ValueError(
                f"stages must list the blocks of each stage, at least one each, got {self.stages}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")


@dataclass(frozen=True)
class BlockPlan:
    """One block as ``plan_blocks`` lays it out; ``grid`` is the grid of its input tokens (T, H, W)."""

    dim: int
    dim_out: int
    num_heads: int
    grid: Grid
    q_stride: Grid
    kv_stride: Grid
    drop_path: float


def plan_blocks(config: MViTConfig) -> Iterator[BlockPlan]:
    """Lay the stages of ``config`` out as blocks."""
    depth = sum(config.stages)
    stage_starts = {sum(config.stages[:stage]) for stage in range(1, len(config.stages))}
    dim, num_heads, kv_stride = config.embed_dim, config.num_heads, config.kv_stride
    size = (config.num_frames, config.crop_size, config.crop_size)
    grid = _divide(size, config.patch_stride)
    for index in range(depth):
        dim_out, q_stride = dim, (1, 1, 1)
        if index in stage_starts:
            dim_out, num_heads, q_stride = 2 * dim, 2 * num_heads, config.q_stride
            kv_stride = _divide(kv_stride, q_stride)
        # Drop path grows linearly over the depth (paper, appendix).
        drop_path = config.drop_path * index / max(depth - 1, 1)
        yield BlockPlan(dim, dim_out, num_heads, grid, q_stride, kv_stride, drop_path)
        dim, grid = dim_out, _divide(grid, q_stride)


def _divide(size: Grid, stride: Grid) -> Grid:
    t, h, w = (max(n // s, 1) for n, s in zip(size, stride, strict=True))
    return t, h, w


class MViT(nn.Module):
    """MViTv2 from a config: float clips (B, 3, T, H, W) -> logits (B, num_classes).

    Parameter names are those of the official PySlowFast checkpoints. ``protocol`` says how clips for this
    model are cut and normalised; ``class_names`` (None: unknown) what its outputs mean.
    """

    def __init__(self, config: MViTConfig, protocol: Protocol | None = None) -> None:
        super().__init__()
        self.config = config
        self.protocol = protocol or Protocol(
            clip_frames=config.num_frames, short_side=config.crop_size, crop=config.crop_size
        )
        self.class_names: tuple[str, ...] | None = None
        self.patch_embed = PatchEmbed(config.embed_dim, config.patch_kernel, config.patch_stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if config.class_token else None
        plans = list(plan_blocks(config))
        self.blocks = nn.ModuleList(Block(plan, config) for plan in plans)
        self.norm = nn.LayerNorm(plans[-1].dim_out, eps=NORM_EPS)
        self.head = Head(plans[-1].dim_out, config.num_classes, config.head_dropout)
        self.apply(_init_module)
        for name, parameter in self.named_parameters():
            if "rel_pos" in name or name == "cls_token":
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, clips: Tensor) -> Tensor:
        """Float clips (B, 3, T, H, W) -> logits (B, num_classes). Raises ValueError for another shape."""
        return self.head(self.forward_features(clips))

    def forward_features(self, clips: Tensor) -> Tensor:
        """Float clips (B, 3, T, H, W) -> what the head reads, (B, C): the class token or the mean token."""
        x, grid = self.embed(clips)
        for block in self.blocks:
            x, grid = block(x, grid)
        x = self.norm(x)
        return x[:, 0] if self.cls_token is not None else x.mean(1)

    def embed(self, clips: Tensor) -> tuple[Tensor, Grid]:
        """Float clips (B, 3, T, H, W) -> tokens (B, N, C), class token first, and their grid (T', H', W')."""
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(f"expected clips of shape (B, 3, T, H, W), got {tuple(clips.shape)}")
        x, grid = self.patch_embed(clips)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x, grid


class PatchEmbed(nn.Module):
    """Cut a clip into overlapping space-time patches: one strided convolution."""

    def __init__(self, dim: int, kernel: Grid, stride: Grid) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel, stride, half(kernel))

    def forward(self, clips: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(clips)  # (B, C, T', H', W')
        _, _, t, h, w = x.shape
        return x.flatten(2).transpose(1, 2), (t, h, w)


class Block(nn.Module):
    """LayerNorm -> pooling attention -> residual; LayerNorm -> MLP -> residual."""

    def __init__(self, plan: BlockPlan, config: MViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(plan.dim, eps=NORM_EPS)
        self.attn = PoolingAttention(
            plan.dim,
            plan.dim_out,
            plan.num_heads,
            grid=plan.grid,
            kernel=config.pool_kernel,
            q_stride=plan.q_stride,
            kv_stride=plan.kv_stride,
            qkv_bias=config.qkv_bias,
            class_token=config.class_token,
            residual_pooling=config.residual_pooling,
            rel_pos_temporal=config.rel_pos_temporal,
            rel_pos_spatial=config.rel_pos_spatial,
        )
        self.norm2 = nn.LayerNorm(plan.dim_out, eps=NORM_EPS)
        self.mlp = Mlp(plan.dim_out, int(plan.dim_out * config.mlp_ratio))
        self.proj = nn.Linear(plan.dim, plan.dim_out) if plan.dim != plan.dim_out else None
        self.q_stride = plan.q_stride
        self.class_token = config.class_token
        self.drop_path = plan.drop_path

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, C) tokens on ``grid`` -> (B, N', C') tokens on the pooled grid, and that grid."""
        normed = self.norm1(x)
        attended, out_grid = self.attn(normed, grid)
        # Where the width changes, the skip path starts from the normalised tokens.
        skip = x if self.proj is None else self.proj(normed)
        x = self._pool_skip(skip, grid) + self._drop(attended)
        x = x + self._drop(self.mlp(self.norm2(x)))
        return x, out_grid

    def _pool_skip(self, x: Tensor, grid: Grid) -> Tensor:
        """Max-pool the grid of (B, N, C) tokens as the queries are pooled; the class token stays."""
        if self.q_stride == (1, 1, 1):
            return x
        first = int(self.class_token)
        t, h, w = (s + 1 if s > 1 else 1 for s in self.q_stride)
        volume = x[:, first:].unflatten(1, grid).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
        pooled = F.max_pool3d(volume, (t, h, w), self.q_stride, half((t, h, w))).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :first], pooled], dim=1)

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: drop the branch for a sample with probability ``drop_path`` in training."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(keep)
        return x * (mask / keep)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Head(nn.Module):
    """Dropout and one linear layer: (B, C) -> logits (B, num_classes)."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.dropout(x))


def _init_module(module: nn.Module) -> None:
    """The official initialisation, in which biases of linear layers and norms start at 0.02 as well."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.constant_(module.bias, 0.02)
