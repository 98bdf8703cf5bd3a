"""Depthwise 3D convolution over channels-last tokens, with a backward pass that suits CPUs.

torch's own forward pass is fast on channels-last volumes, but its backward pass isn't (in bf16 it is ten
times slower than everything else in a block together). The same gradients come from fast kernels: that of the
input is a forward convolution with the mirrored kernel, that of the weight is one 2D problem per tap in time.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Size = tuple[int, int, int]


def depthwise_conv3d(x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    """``F.conv3d`` with one kernel per channel.

    Args:
        x: (B, C, T, H, W), best in channels-last memory.
        weight: (C, 1, kt, kh, kw).
        stride, padding: (T, H, W).

    Returns:
        (B, C, T', H', W')
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if torch.is_autocast_enabled("cpu"):  # which doesn't reach into a backward pass
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        return _DepthwiseConv3d.apply(x, weight, stride, padding)
    return F.conv3d(x, weight, None, stride, padding, groups=x.shape[1])


class _DepthwiseConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv3d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        if max(ctx.stride) > 2:  # few outputs: tap by tap is least work
            return *_gradients_by_taps(ctx, grad, x, weight), None, None
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient(grad, x.shape, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, weight, ctx.stride, ctx.padding)
        return grad_x, grad_weight, None, None


def _input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    """Correlate the gradient, spread out by the stride, with the mirrored kernel."""
    kernel = weight.shape[2:]
    before = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    if stride == (1, 1, 1):
        spread = grad
    else:
        size = [n + k - 1 for n, k in zip(shape[2:], kernel, strict=True)]
        spread = torch.empty(
            *shape[:2], *size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last_3d
        ).zero_()
        t, h, w = (slice(b, b + s * n, s) for b, s, n in zip(before, stride, grad.shape[2:], strict=True))
        spread[:, :, t, h, w] = grad
        before = [0, 0, 0]
    return F.conv3d(spread, weight.flip(2, 3, 4), None, 1, before, groups=grad.shape[1])


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    """The taps in time one by one: each is the weight gradient of a 2D convolution over all frames."""
    taps = []
    for tap in range(weight.shape[2]):
        outputs, inputs = _meeting(tap, x.shape[2], grad.shape[2], stride[0], padding[0])
        taps.append(_weight_gradient_2d(grad[:, :, outputs], x[:, :, inputs], weight, stride, padding))
    return torch.stack(taps, 2)


def _gradients_by_taps(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients as sums over the cells that each tap of the kernel connects."""
    grad_x = torch.zeros_like(x)
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32 if x.itemsize < 4 else x.dtype)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        meetings = [
            _meeting(*sizes)
            for sizes in zip(tap, x.shape[2:], grad.shape[2:], ctx.stride, ctx.padding, strict=True)
        ]
        outputs, inputs = ((slice(None), slice(None), *cells) for cells in zip(*meetings, strict=True))
        t, h, w = tap
        grad_x[inputs] += grad[outputs] * weight[:, 0, t, h, w].view(-1, 1, 1, 1)
        products = grad[outputs] * x[inputs]
        grad_weight[:, 0, t, h, w] = products.sum((0, 2, 3, 4), dtype=grad_weight.dtype)
    return grad_x, grad_weight.to(weight.dtype)


def _meeting(tap: int, n_inputs: int, n_outputs: int, stride: int, padding: int) -> tuple[slice, slice]:
    """The outputs along one axis that read an input through this tap, and the inputs that they read."""
    shift = tap - padding  # output i reads input i * stride + shift
    first = max(-(shift // stride), 0)
    last = min((n_inputs - 1 - shift) // stride, n_outputs - 1)
    if last < first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(first * stride + shift, last * stride + shift + 1, stride)


def _weight_gradient_2d(grad: Tensor, x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    """(C, 1, kh, kw) from (B, C, T, H', W') and (B, C, T, H, W), frames taken as a batch."""
    _, gradient, _ = torch.ops.aten.convolution_backward(
        grad.transpose(1, 2).flatten(0, 1),
        x.transpose(1, 2).flatten(0, 1),
        weight[:, :, 0],
        None,
        stride[1:],
        padding[1:],
        [1, 1],
        False,
        [0, 0],
        x.shape[1],
        [False, True, False],
    )
    return gradient
