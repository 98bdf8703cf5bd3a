"""MViTv2 with a feature pyramid: maps of strides 4 to 64 from one image.

As in detectron2's ``modeling/backbone/mvit.py`` and ``fpn.py`` at 02b5c4e2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork

from mvit_video.model import MViT, MViTConfig, kernels
from mvit_video.model.attention import NORM_EPS
from mvit_video.model.config import plan_blocks

CHANNELS = 256  # of every map of the pyramid, in all published models
STRIP = 32  # rows of the finest map that are computed at once
DIVISOR = 32  # of heights and widths: the coarsest map of the backbone has this stride


class MultiscaleViT(MViT):
    """An MViT without head: image (B, 3, H, W) -> its four scales (B, C, H / s, W / s), s = 4, 8, 16, 32."""

    def __init__(self, config: MViTConfig) -> None:
        super().__init__(replace(config, num_classes=1))
        del self.norm, self.head
        plans = list(plan_blocks(config))
        ends = [start - 1 for start in (*config.stage_starts[1:], len(plans))]
        self.channels = [plans[end].dim_out for end in ends]
        for number, channels in enumerate(self.channels, start=2):
            self.add_module(f"scale{number}_norm", nn.LayerNorm(channels, eps=NORM_EPS))

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        maps = self.forward_stages(images.unsqueeze(2))
        norms = [self.get_submodule(f"scale{number}_norm") for number in range(2, 2 + len(maps))]
        return [
            norm(level.squeeze(2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, level in zip(norms, maps, strict=True)
        ]


class Pyramid(FeaturePyramidNetwork):  # type: ignore[misc]
    """torchvision's, which holds less at once; on CPUs in inference no two maps of the finest size."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps, the finest first, which are taken out of ``x``, and the coarsest one halved as "p6"."""
        names, coarser = list(x), None
        found: dict[str, Tensor] = {}
        for name, inner, layer in reversed([*zip(names, self.inner_blocks, self.layer_blocks, strict=True)]):
            if name == names[0] and coarser is not None and kernels.saves_memory(coarser, inner, layer):
                found[name] = _in_strips(inner, layer, x.pop(name), coarser)
                continue
            merged = inner(x.pop(name))
            if coarser is not None:
                merged = merged + F.interpolate(coarser, size=merged.shape[-2:])
            found[name], coarser = layer(merged), merged
        return {name: found[name] for name in names} | {"p6": F.max_pool2d(found[names[-1]], 1, 2)}


def _in_strips(inner: nn.Module, layer: nn.Sequential, x: Tensor, coarser: Tensor) -> Tensor:
    """``layer(inner(x) + coarser)``, 3 x 3 and 1 x 1 convolutions, of rows and their neighbours at a time."""
    height, convolution = x.shape[2], cast(nn.Conv2d, layer[0])
    found = coarser.new_empty(len(x), height, x.shape[3], coarser.shape[1]).permute(0, 3, 1, 2)
    for top in range(0, height, STRIP):
        low, high = max(top - 1, 0), min(top + STRIP + 1, height)
        merged = inner(x[:, :, low:high])
        above = F.interpolate(coarser[:, :, low // 2 : (high + 1) // 2], scale_factor=2)
        merged += above[:, :, low % 2 :][:, :, : high - low]
        edge = int(top == 0 or high == height)  # elsewhere the neighbours are the padding
        rows = F.conv2d(merged, convolution.weight, convolution.bias, padding=(edge, 1))
        found[:, :, top : top + STRIP] = rows[:, :, edge * (top - low) :][:, :, :STRIP]
    return found


class Projections(nn.ModuleDict):
    """Each map by its own 1x1 convolution, without a way from coarse to fine, and the coarsest halved.

    The paper's model without FPN isn't public; the operations that its table counts (276 G, with FPN 326 G)
    are about those of this one.
    """

    def __init__(self, channels: list[int], out_channels: int) -> None:
        super().__init__(
            {f"p{number}": nn.Conv2d(dim, out_channels, 1) for number, dim in enumerate(channels, start=2)}
        )

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        projected = {name: self[name](level) for name, level in maps.items()}
        return projected | {"p6": F.max_pool2d(projected["p5"], 1, 2)}


class Backbone(nn.Module):
    """Normalised images (B, 3, H, W), sides multiples of 32 -> {"p2": (B, C, H / 4, W / 4), ..., "p6"}.

    Args:
        channels: C, of every map.
        top_down: with the feature pyramid, else ``Projections``.
    """

    def __init__(self, config: MViTConfig, channels: int = CHANNELS, *, top_down: bool = True) -> None:
        super().__init__()
        self.bottom_up = MultiscaleViT(config)
        self.fpn: nn.Module = (Pyramid if top_down else Projections)(self.bottom_up.channels, channels)
        for module in self.fpn.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn({f"p{number}": level for number, level in enumerate(self.bottom_up(images), start=2)})
