"""MViTv2 with a feature pyramid: maps of strides 4 to 64 from one image.

As in detectron2's ``modeling/backbone/mvit.py`` and ``fpn.py`` at 02b5c4e2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mvit_video.model import MViT, MViTConfig
from mvit_video.model.attention import NORM_EPS, Grid, PoolingAttention, fold_positions, fused_attention
from mvit_video.model.config import plan_blocks

CHANNELS = 256  # of every map of the pyramid
DIVISOR = 32  # of heights and widths: the coarsest map of the backbone has this stride


class MultiscaleViT(MViT):
    """An MViT without head: image (B, 3, H, W) -> its four scales (B, C, H / s, W / s), s = 4, 8, 16, 32."""

    def __init__(self, config: MViTConfig) -> None:
        super().__init__(config)
        del self.norm, self.head
        plans = list(plan_blocks(config))
        ends = [start - 1 for start in (*config.stage_starts[1:], len(plans))]
        self.channels = [plans[end].dim_out for end in ends]
        for number, channels in enumerate(self.channels, start=2):
            self.add_module(f"scale{number}_norm", nn.LayerNorm(channels, eps=NORM_EPS))
        for block in self.blocks:
            block.attn.__class__ = PaddedWindowAttention

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps = self.forward_stages(images.unsqueeze(2))
        norms = [self.get_submodule(f"scale{number}_norm") for number in range(2, 2 + len(maps))]
        return [
            norm(level.squeeze(2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, level in zip(norms, maps, strict=True)
        ]


class Backbone(nn.Module):
    """Normalised images (B, 3, H, W), sides multiples of 32 -> {"p2": (B, 256, H / 4, W / 4), ..., "p6"}."""

    def __init__(self, config: MViTConfig) -> None:
        super().__init__()
        self.bottom_up = MultiscaleViT(config)
        self.fpn = FeaturePyramidNetwork(self.bottom_up.channels, CHANNELS, LastLevelMaxPool())
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        scales = {f"p{number}": level for number, level in enumerate(self.bottom_up(images), start=2)}
        maps = self.fpn(scales)
        maps["p6"] = maps.pop("pool")
        return maps


class PaddedWindowAttention(PoolingAttention):
    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        q, k, v, q_grid, k_grid = self._queries_keys_values(x, grid)
        if self.window is None:
            x = fused_attention(*fold_positions(q, k, *self._positions(q, q_grid, k_grid)), v)
        else:
            q_window = tuple(n // s for n, s in zip(self.window, self.q_stride, strict=True))
            k_window = tuple(n // s for n, s in zip(self.window, self.kv_stride, strict=True))
            qs, counts = cut(q, q_grid, q_window)
            ks, _ = cut(k, k_grid, k_window)
            vs, _ = cut(v, k_grid, k_window)
            x = fused_attention(*fold_positions(qs, ks, *self._positions(qs, q_window, k_window)), vs)
            x = uncut(x, counts, q_window, q_grid)
        x = x + q
        return self.proj(x.flatten(2)), q_grid


def cut(x: Tensor, grid: Grid, window: Grid) -> tuple[Tensor, tuple[int, int]]:
    _, h, w = grid
    _, wh, ww = window
    down, right = -h % wh, -w % ww
    x = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, 0, 0, right, 0, down))  # (B, H, W, n, c)
    counts = (h + down) // wh, (w + right) // ww
    x = x.unflatten(2, (counts[1], ww)).unflatten(1, (counts[0], wh))  # (B, I, wh, J, ww, n, c)
    return x.permute(0, 1, 3, 2, 4, 5, 6).flatten(3, 4).flatten(0, 2), counts


def uncut(x: Tensor, counts: tuple[int, int], window: Grid, grid: Grid) -> Tensor:
    _, h, w = grid
    _, wh, ww = window
    x = x.unflatten(0, (-1, *counts)).unflatten(3, (wh, ww))  # (B, I, J, wh, ww, n, c)
    return x.permute(0, 1, 3, 2, 4, 5, 6).flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)
