"""What torch computes slowly on CPUs, computed faster: linear layers, the MLP, attention, depthwise pooling.

Each function says in its docstring which plain expression of torch it equals, in value and gradient; that
expression is also what other devices, exported programs and dtypes other than float32 and bfloat16 get. To
``torch.compile`` the kernels are opaque operations, so compiled models are as fast.

Two things make the difference. torch hands float32 products to MKL, which runs at half speed on AMD's cores;
its oneDNN, which already multiplies in bfloat16, doesn't. And large intermediate tensors cost more than what
is computed from them (memory fresh from the system is cleared page by page), so the kernels work through the
tokens in chunks whose intermediates stay in the cache.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Size = tuple[int, int, int]

# Bytes of scores that a chunk of attention holds, and of hidden layer that a chunk of the MLP does, for each
# thread. Timed on Zen 5 (1 MB of L2 a core) from 256 kB to 8 MB: flat from 1 to 4 MB, up to a third slower at
# the ends.
CHUNK = 2**20


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, of_gelu: bool = False) -> Tensor:
    """``F.linear(x, weight, bias)``, or of ``F.gelu(x)``; only x is kept for the backward pass.

    Args:
        x: (..., i).
        weight: (o, i).
        bias: (o,).

    Returns:
        (..., o)
    """
    if not _has_kernels(x):
        return F.linear(F.gelu(x) if of_gelu else x, weight, bias)
    x, weight, bias = _autocast(x, weight, bias)
    return _linear(x, weight, bias, of_gelu)


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> tuple[Tensor, ...]:
    """``F.linear(x, weight, bias).chunk(parts, dim=-1)``, each part contiguous where it is faster."""
    if not _has_kernels(x):
        return F.linear(x, weight, bias).chunk(parts, dim=-1)
    biases = [None] * parts if bias is None else bias.chunk(parts)
    return tuple(linear(x, *part) for part in zip(weight.chunk(parts), biases, strict=True))


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """``F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)``: (..., i) -> (..., o)."""
    if _has_kernels(x) and not torch.is_grad_enabled():
        return _mlp(*_autocast(x, weight1, bias1, weight2, bias2))
    return linear(linear(x, weight1, bias1), weight2, bias2, of_gelu=True)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float = 1.0,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    residual_from: int | None = None,
) -> Tensor:
    """``softmax(scale q kᵀ + q_positions k_positionsᵀ) v``, plus q from query ``residual_from`` on.

    Computed by chunks of queries: nothing of size N x M is kept, the scores are computed again in the
    backward pass. Timed against torch's fused kernel on Zen 5 for every block of S 16x4 and
    forward/backward: 2.1/1.7 times as fast in float32, 3.0/2.0 in bfloat16, in small blocks as in large
    ones. So there is no switch by size.

    Args:
        q: (B, N, n, c), queries of n heads.
        k, v: (B, M, n, c); v may have other widths, if nothing is added to it.
        q_positions, k_positions: (B, N, n, e) and (M, e). No gradient of the latter is computed.

    Returns:
        (B, N, n, c)
    """
    if q_positions is None or k_positions is None:
        q_positions, k_positions = q[..., :0], q.new_empty(k.shape[1], 0)
    q, k, v, q_positions, k_positions = _autocast(q, k, v, q_positions, k_positions)
    return _attention(q, k, v, q_positions, k_positions.detach(), scale, residual_from)


def has_attention(q: Tensor) -> bool:
    """Whether ``attention`` is there for queries like these."""
    return _has_kernels(q, torch.float32, torch.bfloat16, torch.float64)


def _has_kernels(x: Tensor, *dtypes: torch.dtype) -> bool:
    # An exported or traced program must run without this package, and on other devices.
    leaves = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return x.device.type == "cpu" and x.dtype in (dtypes or (torch.float32, torch.bfloat16)) and not leaves


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Autocast reaches neither into own kernels nor into backward passes: cast what comes in."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(x.to(dtype) if x is not None else None for x in tensors)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x (N, i), weight (o, i) -> x weightᵀ + bias (N, o), and its GELU; by oneDNN where torch has it."""
    if x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.enabled and _has_onednn():
        then, form = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], form)
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a (N, o), b (N, i) -> aᵀ b (o, i). oneDNN copies the left factor if it is transposed: the narrower."""
    if a.dtype == torch.bfloat16:
        return a.t() @ b  # copies neither
    return _product(a.t(), b.t()) if a.shape[1] < b.shape[1] else _product(b.t(), a.t()).t().contiguous()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _chunks(rows: int, width: int, itemsize: int) -> list[slice]:
    """Cut rows of ``width`` elements so that every thread's share of a chunk fits into its cache."""
    step = max(CHUNK * torch.get_num_threads() // (width * itemsize), 16)
    return [slice(start, start + step) for start in range(0, rows, step)]


@torch.library.custom_op("mvit_video::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, of_gelu: bool) -> Tensor:
    rows = x.flatten(0, -2)
    if not of_gelu:
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)
    out = x.new_empty(len(rows), len(weight))
    for chunk in _chunks(len(rows), rows.shape[1], rows.itemsize):
        out[chunk] = _product(F.gelu(rows[chunk]), weight, bias)
    return out.view(*x.shape[:-1], -1)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, of_gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mvit_video::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, of_gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    grads, rows = grad.flatten(0, -2), x.flatten(0, -2)
    grad_bias = grads.sum(0)
    if not of_gelu:
        return _product(grads, weight.t()).view(x.shape), _outer(grads, rows), grad_bias
    grad_x = torch.empty_like(rows)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # the sum over chunks
    for chunk in _chunks(len(rows), rows.shape[1], rows.itemsize):
        grad_weight += _outer(grads[chunk], F.gelu(rows[chunk]))
        grad_x[chunk] = torch.ops.aten.gelu_backward(_product(grads[chunk], weight.t()), rows[chunk])
    return grad_x.view(x.shape), grad_weight.to(weight.dtype), grad_bias


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, of_gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _keep_for_linear(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, bias, ctx.of_gelu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _linear_backward(grad.contiguous(), x, weight, ctx.of_gelu)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


_linear.register_autograd(_differentiate_linear, setup_context=_keep_for_linear)


@torch.library.custom_op("mvit_video::mlp", mutates_args=(), device_types="cpu")
def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    out = x.new_empty(len(rows), len(weight2))
    for chunk in _chunks(len(rows), len(weight1), rows.itemsize):
        out[chunk] = _product(_product(rows[chunk], weight1, bias1, gelu=True), weight2, bias2)
    return out.view(*x.shape[:-1], -1)


@_mlp.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight2.shape[0])


@torch.library.custom_op("mvit_video::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    residual_from: int | None,
) -> Tensor:
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    for q_, e_, k_, v_, out_ in _heads(q, q_positions, k, v, out):
        keys, values = torch.cat([k_ * scale, k_positions], 1), v_.t().contiguous()
        for chunk in _chunks(len(q_), len(k_), q.itemsize):
            queries = torch.cat([q_[chunk], e_[chunk]], 1)
            out_[chunk] = _product(_product(queries, keys).softmax(-1), values)
            if residual_from is not None:
                added = slice(max(chunk.start, residual_from), chunk.stop)
                out_[added] += q_[added]
    return out


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    residual_from: int | None,
) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.custom_op("mvit_video::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    residual_from: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = q.shape[-1]
    grads = [x.new_empty(x.shape) for x in (q, k, v, q_positions)]
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32  # of chunks
    for out, q_, e_, k_, v_, grad_q, grad_k, grad_v, grad_e in _heads(grad, q, q_positions, k, v, *grads):
        keys, values = torch.cat([k_ * scale, k_positions], 1), v_.contiguous()
        mirrored = keys.t().contiguous()
        of_k, of_v = torch.zeros_like(k_, dtype=sums), torch.zeros_like(v_, dtype=sums)
        for chunk in _chunks(len(q_), len(k_), q.itemsize):
            outs = out[chunk].contiguous()
            queries = torch.cat([q_[chunk], e_[chunk]], 1)
            weights = _product(queries, keys).softmax(-1)
            scores = torch.ops.aten._softmax_backward_data(_product(outs, values), weights, -1, q.dtype)
            of_queries = _product(scores, mirrored)
            grad_q[chunk], grad_e[chunk] = of_queries[:, :width], of_queries[:, width:]
            of_k += _outer(scores, queries[:, :width])
            of_v += _outer(weights, outs)
            if residual_from is not None:
                added = slice(max(chunk.start, residual_from), chunk.stop)
                grad_q[added] += out[added]
        grad_k.copy_(of_k.mul_(scale))
        grad_v.copy_(of_v)
    return grads[0], grads[1], grads[2], grads[3]


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    residual_from: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q_positions.new_empty(q_positions.shape),
    )


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(B, N, n, c) tensors, head by head: (N, c) views of them."""
    return zip(*([head for clip in x.unbind() for head in clip.unbind(1)] for x in tensors), strict=True)


def _keep_for_attention(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.scale, ctx.residual_from = inputs[-2:]
    ctx.save_for_backward(*inputs[:-2])


def _differentiate_attention(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.residual_from)
    return *grads, None, None, None


_attention.register_autograd(_differentiate_attention, setup_context=_keep_for_attention)


def depthwise_conv3d(x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    """``F.conv3d`` with one kernel per channel, over channels-last volumes.

    torch's own forward pass is fast on these, but its backward pass isn't (in bf16 it is ten times slower
    than everything else in a block together). The same gradients come from fast kernels: that of the input is
    a forward convolution with the mirrored kernel, that of the weight is one 2D problem per tap in time.

    Args:
        x: (B, C, T, H, W), best in channels-last memory.
        weight: (C, 1, kt, kh, kw).
        stride, padding: (T, H, W).

    Returns:
        (B, C, T', H', W')
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _DepthwiseConv3d.apply(*_autocast(x, weight), stride, padding)
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
        needed = ctx.needs_input_grad[:2]
        grads = _depthwise_backward(grad, *ctx.saved_tensors, ctx.stride, ctx.padding, needed)
        grad_x, grad_weight = (x if is_needed else None for x, is_needed in zip(grads, needed, strict=True))
        return grad_x, grad_weight, None, None


@torch.library.custom_op("mvit_video::depthwise_backward", mutates_args=(), device_types="cpu")
def _depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    if max(stride) > 2:  # few outputs: tap by tap is least work
        return _gradients_by_taps(grad, x, weight, stride, padding)
    return (
        _input_gradient(grad, x.shape, weight, stride, padding) if needed[0] else x.new_empty(0),
        _weight_gradient(grad, x, weight, stride, padding) if needed[1] else weight.new_empty(0),
    )


@_depthwise_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    of_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if max(stride) > 2:
        return of_x, of_weight
    return of_x if needed[0] else x.new_empty(0), of_weight if needed[1] else weight.new_empty(0)


def _input_gradient(
    grad: Tensor, shape: torch.Size, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Correlate the gradient, spread out by the stride, with the mirrored kernel."""
    kernel = weight.shape[2:]
    before = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    if max(stride) == 1:
        spread = grad
    else:
        size = [n + k - 1 for n, k in zip(shape[2:], kernel, strict=True)]
        spread = torch.empty(
            *shape[:2], *size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last_3d
        ).zero_()
        t, h, w = (slice(b, b + s * n, s) for b, s, n in zip(before, stride, grad.shape[2:], strict=True))
        spread[:, :, t, h, w] = grad
        before = [0, 0, 0]
    grad_x = F.conv3d(spread, weight.flip(2, 3, 4), None, 1, before, groups=grad.shape[1])
    return grad_x.contiguous(memory_format=torch.channels_last_3d)


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The taps in time one by one: each is the weight gradient of a 2D convolution over all frames."""
    taps = []
    for tap in range(weight.shape[2]):
        outputs, inputs = _meeting(tap, x.shape[2], grad.shape[2], stride[0], padding[0])
        taps.append(_weight_gradient_2d(grad[:, :, outputs], x[:, :, inputs], weight, stride, padding))
    return torch.stack(taps, 2)


def _gradients_by_taps(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Both gradients as sums over the cells that each tap of the kernel connects."""
    grad_x = torch.zeros_like(x, memory_format=torch.channels_last_3d)
    grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32 if x.itemsize < 4 else x.dtype)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        meetings = [
            _meeting(*sizes) for sizes in zip(tap, x.shape[2:], grad.shape[2:], stride, padding, strict=True)
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


def _weight_gradient_2d(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
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
