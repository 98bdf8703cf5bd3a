"""What pools queries, keys and values: depthwise convolutions, or as in the ablations maxima and means."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mvit_video.model.config import Grid, MViTConfig, same_padding


def make_pool(config: MViTConfig, width: int, stride: Grid) -> nn.Module | None:
    """A pooling over (B, width, T, H, W), padded by half its kernel; None where it would change nothing."""
    kernel = config.pooling_kernel(stride)
    if max(kernel) == max(stride) == 1:
        return None
    if config.pool_mode == "max":
        return nn.MaxPool3d(kernel, stride, same_padding(kernel))
    if config.pool_mode == "avg":
        return AveragePool(kernel, stride)
    return nn.Conv3d(width, width, kernel, stride, same_padding(kernel), groups=width, bias=False)


class AveragePool(nn.Module):
    """Mean over windows of a (B, C, T, H, W) volume, in which padding counts as zeros.

    torch's own has no half precision on CPUs, and takes no volume smaller than its kernel.
    """

    def __init__(self, kernel: Grid, stride: Grid) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_full((x.shape[1], 1, *self.kernel), 1 / math.prod(self.kernel))
        return F.conv3d(x, weight, None, self.stride, same_padding(self.kernel), groups=x.shape[1])
