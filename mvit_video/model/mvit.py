"""Multiscale Vision Transformers for clips; an image is a clip of one frame.

MViTv2: arXiv 2112.01526. MViT: arXiv 2104.11227.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvit_video.model import kernels
from mvit_video.model.ablations import make_attention
from mvit_video.model.attention import NORM_EPS
from mvit_video.model.base import VideoModel, require_clips
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import (
    BlockPlan,
    Grid,
    MViTConfig,
    floor_divide,
    overlapping_kernel,
    plan_blocks,
    same_padding,
)
from mvit_video.model.kernels import Linear
from mvit_video.model.positions import ABSOLUTE_TABLES, absolute_lengths, joint_table, resize_table

_MAX_KINDS = 64  # of blocks that are compiled: by sizes, in training or not, for one clip or several


class MViT(VideoModel):
    """MViT from a config: float clips (B, 3, T, H, W) -> logits (B, num_classes).

    Parameter names are those of the official PySlowFast checkpoints. ``protocol`` says how clips for this
    model are cut and normalised; ``class_names`` (None: unknown) what its outputs mean.

    Raises:
        ValueError: the channels of a block can't be shared evenly by its heads.
    """

    config: MViTConfig
    classifier = "head.projection"
    is_compiled = False
    pos_embed: nn.Parameter | None
    pos_embed_spatial: nn.Parameter | None
    pos_embed_temporal: nn.Parameter | None
    pos_embed_class: nn.Parameter | None

    def __init__(self, config: MViTConfig, protocol: ClipSpec | None = None) -> None:
        super().__init__()
        self.config = config
        self.protocol = protocol or ClipSpec(
            clip_frames=config.num_frames, short_side=config.crop_size, crop=config.crop_size
        )
        self.class_names = None
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim)) if config.class_token else None
        self.grid = floor_divide(config.input_size, config.patch_stride)  # of the absolute positions
        lengths = absolute_lengths(config, self.grid)
        for name in ABSOLUTE_TABLES:
            table = nn.Parameter(torch.zeros(1, lengths[name], config.embed_dim)) if name in lengths else None
            self.register_parameter(name, table)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_stem = nn.LayerNorm(config.embed_dim, eps=NORM_EPS) if config.norm_stem else None

        plans = list(plan_blocks(config))
        self.blocks = nn.ModuleList(Block(plan, config) for plan in plans)
        self.norm = nn.LayerNorm(plans[-1].dim_out, eps=NORM_EPS)
        self.head = Head(plans[-1].dim_out, config.num_classes, config.head_dropout)

        self.apply(_init_module)
        for name, parameter in self.named_parameters():
            if name == "cls_token" or name.startswith("pos_embed"):
                nn.init.trunc_normal_(parameter, std=0.02)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(config.head_init_scale)

    def forward(self, clips: Tensor) -> Tensor:
        """Float clips (B, 3, T, H, W) -> logits (B, num_classes). Raises ValueError for another shape."""
        return self.head(self.forward_features(clips))

    def forward_features(self, clips: Tensor) -> Tensor:
        """Float clips (B, 3, T, H, W) -> what the head reads, (B, C): the class token or the mean token."""
        return self.pool_tokens(self.run_blocks(clips, after=())[0])

    def forward_stages(self, clips: Tensor) -> list[Tensor]:
        """Float clips (B, 3, T, H, W) -> the grid of tokens that leaves each stage, (B, C, T', H', W').

        The maps are neither normalised nor hold the class token.
        """
        return self.run_blocks(clips, after=self.config.stage_ends)[1]

    def run_blocks(self, clips: Tensor, after: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """Float clips (B, 3, T, H, W) -> tokens of the last block (B, N, C), and maps (B, C, T', H', W').

        Args:
            after: indices of the blocks whose patch tokens are given as maps.
        """
        x, grid = self.embed(clips)
        maps = []
        for index, block in enumerate(self.blocks):
            x, grid = self._run(block, x, grid)
            if index in after:
                patch_tokens = x[:, self.config.num_prefix_tokens :]
                maps.append(patch_tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3))
        return x, maps

    def pool_tokens(self, x: Tensor) -> Tensor:
        """Tokens of the last block (B, N, C) -> what the head reads, (B, C)."""
        if self.config.mean_pooling:
            return self.norm(x[:, self.config.num_prefix_tokens :].mean(1))
        x = self.norm(x)
        return x.mean(1) if self.cls_token is None else x[:, 0]

    def embed(self, clips: Tensor) -> tuple[Tensor, Grid]:
        """Float clips (B, 3, T, H, W) -> tokens (B, N, C), class token first, and their grid (T', H', W')."""
        x, grid = self.patch_embed(clips)
        return self.add_positions(x, grid), grid

    def add_positions(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens of patches (B, N, C) -> tokens as the first block takes them, class token first."""
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        table: Tensor | None = self.pos_embed
        if self.pos_embed_spatial is not None and self.pos_embed_temporal is not None:
            table = joint_table(self.pos_embed_spatial, self.pos_embed_temporal, self.pos_embed_class)
        if table is not None:
            x = x + resize_table(table, self.grid, grid)
        x = self.dropout(x)
        return x if self.norm_stem is None else self.norm_stem(x)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block on its first call, with the arguments of ``torch.compile``.

        Blocks of one kind share what is compiled, whatever the batch (of two and more); in a model that is
        compiled whole, each has code of its own.
        """
        from torch import _dynamo  # takes two seconds

        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, _MAX_KINDS)
        for block in self.blocks:
            block.compile(*args, **{"dynamic": False, **kwargs})
        self.is_compiled = True

    # What timm's users expect of a model, by timm's names.

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of what the head reads, ``forward_features``."""
        return self.norm.normalized_shape[0]

    def get_classifier(self) -> nn.Linear:
        return self.head.projection

    def reset_classifier(self, num_classes: int) -> None:
        """Give the model a new head, initialised as ever, for other classes; their names are unknown."""
        old = self.head.projection
        new = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        self.head.projection = new.apply(_init_module)
        self.config, self.class_names = replace(self.config, num_classes=num_classes), None

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers leave without decay. (The official video recipe decays them.)"""
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name.startswith(("pos_embed", "cls_token")) or "rel_pos" in name}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks alone for the backward pass, which computes the rest again."""
        self.config = replace(self.config, checkpoint_blocks=enable)

    def forward_intermediates(
        self,
        clips: Tensor,
        indices: Sequence[int] | int | None = None,
        *,
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages, (B, C, T', H', W') each, and what the head reads, (B, C).

        Args:
            clips: float (B, 3, T, H, W).
            indices: of the stages, from 0; a number n: the last n; None: all.
            intermediates_only: give the maps alone.

        Raises:
            IndexError: there is no such stage.
        """
        tokens, maps = self.run_blocks(clips, after=self.config.stage_ends)
        if isinstance(indices, int):
            maps = maps[-indices:]
        elif indices is not None:
            maps = [maps[index] for index in indices]
        return maps if intermediates_only else (self.pool_tokens(tokens), maps)

    def _run(self, block: nn.Module, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        if self.is_compiled and not torch.compiler.is_compiling():
            from torch import _dynamo

            _dynamo.maybe_mark_dynamic(x, 0)
        if self.config.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)


def layer_groups(model: MViT) -> list[list[str]]:
    """Parameter names by depth, for layer-wise decay: what feeds the first block, each block, norm and head.

    The last of ``len(model.blocks) + 2`` groups is the one nearest to the output.
    """
    depth = len(model.blocks)
    groups: list[list[str]] = [[] for _ in range(depth + 2)]
    for name, _ in model.named_parameters():
        part, _, rest = name.partition(".")
        if part == "blocks":
            groups[int(rest.partition(".")[0]) + 1].append(name)
        else:
            groups[depth + 1 if part in ("norm", "head", "pred_head") else 0].append(name)
    return groups


class StageFeatures(nn.Module):
    """A model without its head: float clips (B, 3, T, H, W) -> the maps of stages, (B, C, T', H', W') each.

    Attributes:
        feature_info: of each map, the channels ("num_chs") and the stride in frames and pixels ("reduction").

    Raises:
        IndexError: ``out_indices`` (None: all) names a stage that isn't there.
    """

    def __init__(self, model: MViT, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        model.head = cast(Any, nn.Identity())
        self.model = model
        info: list[dict[str, Any]] = []
        stride = model.config.patch_stride
        for index, plan in enumerate(plan_blocks(model.config)):
            t, h, w = (a * b for a, b in zip(stride, plan.q_stride, strict=True))
            stride = (t, h, w)
            if index in model.config.stage_ends:
                info.append({"num_chs": plan.dim_out, "reduction": stride, "module": f"blocks.{index}"})
        self.out_indices = tuple(range(len(info)) if out_indices is None else out_indices)
        self.feature_info = [info[index] for index in self.out_indices]

    def forward(self, clips: Tensor) -> list[Tensor]:
        maps = self.model.forward_stages(clips)
        return [maps[index] for index in self.out_indices]


class PatchEmbed(nn.Module):
    """Cut a clip into overlapping space-time patches: one strided convolution."""

    def __init__(self, config: MViTConfig) -> None:
        super().__init__()
        self.is_2d, self.kernel, self.padding = config.patch_2d, config.patch_kernel, config.patch_pad
        axes = slice(int(self.is_2d), None)
        convolution = nn.Conv2d if self.is_2d else nn.Conv3d
        sizes = self.kernel[axes], config.patch_stride[axes], self.padding[axes]
        self.proj = convolution(3, config.embed_dim, *sizes)

    def forward(self, clips: Tensor) -> tuple[Tensor, Grid]:
        """(B, 3, T, H, W) -> tokens (B, T'*H'*W', C) and their grid.

        Raises ValueError for another shape, and for clips that are smaller than a patch.
        """
        require_clips(clips)
        size = zip(clips.shape[2:], self.kernel, self.padding, strict=True)
        if any(length + 2 * pad < kernel for length, kernel, pad in size):
            raise ValueError(
                f"clips of {tuple(clips.shape[2:])} frames and pixels are smaller than patch_kernel "
                f"{self.kernel}, with patch_padding {self.padding}"
            )
        if self.is_2d:  # frame by frame
            frames = self.proj(clips.transpose(1, 2).flatten(0, 1))  # (B * T, C, H', W')
            x = frames.unflatten(0, (-1, clips.shape[2])).transpose(1, 2)
        else:
            x = self.proj(clips)  # (B, C, T', H', W')
        _, _, t, h, w = x.shape
        return x.flatten(2).transpose(1, 2), (t, h, w)


class Block(nn.Module):
    """LayerNorm -> pooling attention -> residual; LayerNorm -> MLP -> residual."""

    def __init__(self, plan: BlockPlan, config: MViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(plan.dim, eps=NORM_EPS)
        self.attn = make_attention(plan, config)
        self.norm2 = nn.LayerNorm(plan.attention_dim, eps=NORM_EPS)
        hidden_dim = int(plan.attention_dim * config.mlp_ratio)
        self.mlp = Mlp(plan.attention_dim, hidden_dim, plan.dim_out, config.dropout)
        self.proj = Linear(plan.dim, plan.dim_out) if plan.dim != plan.dim_out else None
        self.widens_in_attention = config.dim_mul_in_attention
        self.q_stride = plan.q_stride
        self.num_prefix_tokens = config.num_prefix_tokens
        self.drop_path, self.has_drop_path = plan.drop_path, plan.drop_path > 0
        # Compiled, a tensor is an input, while a number would make each block a kind of its own.
        self.keep = torch.tensor(1 - plan.drop_path, device="cpu")

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, C) tokens -> (B, N', C') tokens on the pooled grid, and that grid.

        Args:
            x: tokens in any floating-point type, the class token (if any) first.
            grid: tokens along time, height and width; T * H * W of the N tokens are on it.
        """
        normed = self.norm1(x)
        attended, out_grid = self.attn(normed, grid)
        # Where the width changes, the skip path starts from the normalised tokens.
        if self.proj is not None and self.widens_in_attention:
            x = self.proj(normed)
        x = self._pool_skip(x, grid) + self._drop(attended)
        del attended  # the MLP is what needs most
        normed = self.norm2(x)
        if self.proj is not None and not self.widens_in_attention:
            x = self.proj(normed)
        x = x + self._drop(self.mlp(normed))
        return x, out_grid

    def _pool_skip(self, x: Tensor, grid: Grid) -> Tensor:
        """Max-pool the grid of (B, N, C) tokens as the queries are pooled; the class token stays."""
        if self.q_stride == (1, 1, 1):
            return x
        kernel, prefix = overlapping_kernel(self.q_stride), self.num_prefix_tokens
        prefix_tokens, patch_tokens = x.split((prefix, x.shape[1] - prefix), 1)
        volume = patch_tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
        pooled = F.max_pool3d(volume, kernel, self.q_stride, same_padding(kernel)).flatten(2).transpose(1, 2)
        return torch.cat([prefix_tokens, pooled], dim=1) if prefix else pooled

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: drop the branch for a sample with probability ``drop_path`` in training."""
        if not self.training or not self.has_drop_path:
            return x
        if torch.compiler.is_compiling():
            mask = torch.rand(x.shape[0], 1, 1, device=x.device) < self.keep
            return x * (mask / self.keep).to(x.dtype)
        keep = 1 - self.drop_path
        mask = x.new_empty(x.shape[0], 1, 1).bernoulli_(keep)
        return x * (mask / keep)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU (not tanh's) between them; what comes out is of the type of x."""

    def __init__(self, dim: int, hidden_dim: int, dim_out: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C')"""
        if self.training and self.dropout.p:
            return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))
        return kernels.mlp(self.fc1, self.fc2, x)


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
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.constant_(module.bias, 0.02)
