"""What torch computes slowly on CPUs, computed faster: linear layers, the MLP, attention, depthwise pooling.

Two things make the difference. torch hands float32 products to MKL, which runs at half speed on AMD's cores;
its oneDNN, which already multiplies in bfloat16, doesn't. And large intermediate tensors cost more than what
is computed from them (memory fresh from the system is cleared page by page), so the kernels work through the
tokens in chunks whose intermediates stay in the cache.

To ``torch.compile`` the kernels are opaque operations, so compiled models are as fast. The plain expressions,
``plain_...``, are what they equal, and what is differentiated where gradients must have gradients themselves.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Size = tuple[int, int, int]
Sizes = Sequence[int]

# Bytes of scores that a chunk of attention holds, and of hidden layer that a chunk of the MLP does, for each
# thread. Timed on Zen 5 (1 MB of L2 a core) from 256 kB to 8 MB: flat from 1 to 4 MB, up to a third slower at
# the ends.
CHUNK = 2**20


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu_input: bool) -> Tensor:
    return F.linear(F.gelu(x) if gelu_input else x, weight, bias)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    num_prefix_tokens: int | None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale q kᵀ + q_positions k_positionsᵀ + mask) v, plus q behind the prefix tokens."""
    scores = q.transpose(1, 2) @ (k * scale).permute(0, 2, 3, 1)  # (B, n, N, M)
    scores = scores + q_positions.transpose(1, 2) @ k_positions.t()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    x = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    return add_residual(x, q, num_prefix_tokens)


def plain_depthwise_conv3d(x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    return F.conv3d(x, weight, None, stride, padding, groups=x.shape[1])


def add_residual(x: Tensor, q: Tensor, num_prefix_tokens: int | None) -> Tensor:
    """Add q to x, both (B, N, n, c), behind the prefix tokens; None: nowhere."""
    if num_prefix_tokens is None:
        return x
    rest = x[:, num_prefix_tokens:] + q[:, num_prefix_tokens:]
    return torch.cat([x[:, :num_prefix_tokens], rest], 1) if num_prefix_tokens else rest


def _plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``plain(*inputs)`` that have gradients themselves."""
    wanted = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    # Views, as one input may have been computed from another: its gradient must end here.
    inputs = [x.view_as(x) if is_wanted else x for x, is_wanted in zip(inputs, wanted, strict=True)]
    leaves = [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    grads = iter(torch.autograd.grad(plain(*inputs), leaves, grad, create_graph=True))
    return tuple(next(grads) if is_wanted else None for is_wanted in wanted)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x (N, i), weight (o, i) -> x weightᵀ + bias (N, o), and its GELU; by oneDNN where torch has it."""
    if torch.backends.mkldnn.enabled and _has_onednn(x.dtype):
        return _onednn_product(x, weight, bias, gelu)
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    then, form = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], form)


@functools.cache
def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in ``dtype`` here: bfloat16 needs AVX-512, some builds have no oneDNN."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode():
        x, weight = torch.ones(17, 24, dtype=dtype), torch.ones(40, 24, dtype=dtype)
        try:
            _onednn_product(x, weight, weight[:, 0].contiguous(), True)
            _onednn_product(x, weight, None, False)
        except (RuntimeError, AttributeError):
            return False
    return True


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a (N, o), b (N, i) -> aᵀ b (o, i). oneDNN copies the left factor if it is transposed: the narrower."""
    if a.dtype == torch.bfloat16:
        return a.t() @ b  # copies neither
    return _product(a.t(), b.t()) if a.shape[1] < b.shape[1] else _product(b.t(), a.t()).t().contiguous()


def _chunks(rows: int, width: int, itemsize: int) -> list[slice]:
    """Cut rows of ``width`` elements so that every thread's share of a chunk fits into its cache."""
    step = max(CHUNK * torch.get_num_threads() // (width * itemsize), 16)
    return [slice(start, start + step) for start in range(0, rows, step)]


Function = TypeVar("Function", bound=Callable[..., Any])
# As torch.library.custom_op does it, whose operators import TorchDynamo (two seconds) with their first call.
_LIBRARY = torch.library.Library("mvit_video", "DEF")


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function of CPU tensors, which tracing then takes as one step."""

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CPU")
        return getattr(torch.ops.mvit_video, name).default

    return register


def _shapes_of(operator: Any) -> Callable[[Function], Function]:
    """What tracing takes for the operator's results."""
    register: Callable[[Function], Function] = torch.library.register_fake(operator, lib=_LIBRARY)
    return register


@_operator("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu_input: bool) -> Tensor:
    rows = x.flatten(0, -2)
    if not gelu_input:
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)
    out = x.new_empty(len(rows), len(weight))
    for chunk in _chunks(len(rows), rows.shape[1], rows.itemsize):
        out[chunk] = _product(F.gelu(rows[chunk]), weight, bias)
    return out.view(*x.shape[:-1], -1)


@_shapes_of(linear)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu_input: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_operator("linear_backward")
def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gelu_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads, rows = grad.flatten(0, -2), x.flatten(0, -2)
    grad_bias = grads.sum(0)
    if not gelu_input:
        return _product(grads, weight.t()).view(x.shape), _outer(grads, rows), grad_bias
    grad_x = torch.empty_like(rows)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # the sum over chunks
    for chunk in _chunks(len(rows), rows.shape[1], rows.itemsize):
        grad_weight += _outer(grads[chunk], F.gelu(rows[chunk]))
        grad_x[chunk] = torch.ops.aten.gelu_backward(_product(grads[chunk], weight.t()), rows[chunk])
    return grad_x.view(x.shape), grad_weight.to(weight.dtype), grad_bias


@_shapes_of(_linear_backward)
def _(grad: Tensor, x: Tensor, weight: Tensor, gelu_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _linear_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.gelu_input = inputs
    ctx.save_for_backward(*tensors)


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _plain_gradients(plain_linear, (x, weight, bias, ctx.gelu_input), grad)
    grad_x, grad_weight, grad_bias = _linear_backward(grad.contiguous(), x, weight, ctx.gelu_input)
    return grad_x, grad_weight, None if bias is None else grad_bias, None


torch.library.register_autograd(linear, _linear_gradients, setup_context=_linear_setup_context, lib=_LIBRARY)


@_operator("mlp")
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    out = x.new_empty(len(rows), len(weight2))
    for chunk in _chunks(len(rows), len(weight1), rows.itemsize):
        out[chunk] = _product(_product(rows[chunk], weight1, bias1, gelu=True), weight2, bias2)
    return out.view(*x.shape[:-1], -1)


@_shapes_of(mlp)
def _(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight2.shape[0])


@_operator("attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    num_prefix_tokens: int | None,
) -> Tensor:
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    for q_, e_, k_, v_, out_ in _heads(q, q_positions, k, v, out):
        keys, values = torch.cat([k_ * scale, k_positions], 1), v_.t().contiguous()
        for chunk in _chunks(len(q_), len(k_), q.itemsize):
            queries = torch.cat([q_[chunk], e_[chunk]], 1)
            out_[chunk] = _product(_product(queries, keys).softmax(-1), values)
            if num_prefix_tokens is not None:
                added = slice(max(chunk.start, num_prefix_tokens), chunk.stop)
                out_[added] += q_[added]
    return out


@_shapes_of(attention)
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


@_operator("attention_backward")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    scale: float,
    num_prefix_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = q.shape[-1]
    grads = [x.new_empty(x.shape) for x in (q, k, v, q_positions)]
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32  # of chunks
    for out, q_, e_, k_, v_, grad_q, grad_k, grad_v, grad_e in _heads(grad, q, q_positions, k, v, *grads):
        keys, values = torch.cat([k_ * scale, k_positions], 1), v_.contiguous()
        keys_t = keys.t().contiguous()
        grad_k_sum, grad_v_sum = torch.zeros_like(k_, dtype=sums), torch.zeros_like(v_, dtype=sums)
        for chunk in _chunks(len(q_), len(k_), q.itemsize):
            outs = out[chunk].contiguous()
            queries = torch.cat([q_[chunk], e_[chunk]], 1)
            weights = _product(queries, keys).softmax(-1)
            scores = torch.ops.aten._softmax_backward_data(_product(outs, values), weights, -1, q.dtype)
            grad_queries = _product(scores, keys_t)
            grad_q[chunk], grad_e[chunk] = grad_queries[:, :width], grad_queries[:, width:]
            grad_k_sum += _outer(scores, queries[:, :width])
            grad_v_sum += _outer(weights, outs)
            if num_prefix_tokens is not None:
                added = slice(max(chunk.start, num_prefix_tokens), chunk.stop)
                grad_q[added] += out[added]
        grad_k.copy_(grad_k_sum.mul_(scale))
        grad_v.copy_(grad_v_sum)
    return grads[0], grads[1], grads[2], grads[3]


@_shapes_of(_attention_backward)
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, q_positions))


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(B, N, n, c) tensors, head by head: (N, c) views of them."""
    return zip(*([head for clip in x.unbind() for head in clip.unbind(1)] for x in tensors), strict=True)


def _attention_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.num_prefix_tokens = inputs
    ctx.save_for_backward(*tensors)


def _attention_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = (*ctx.saved_tensors, ctx.scale, ctx.num_prefix_tokens)
    if torch.is_grad_enabled():
        return _plain_gradients(plain_attention, inputs, grad)
    return *_attention_backward(grad, *inputs), None, None, None


torch.library.register_autograd(
    attention, _attention_gradients, setup_context=_attention_setup_context, lib=_LIBRARY
)


def depthwise_conv3d(x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
    """``plain_depthwise_conv3d``, one kernel per channel, over channels-last volumes.

    torch's own forward pass is fast on these, but its backward pass isn't (in bf16 it is ten times slower
    than everything else in a block together). The same gradients come from fast kernels: that of the input is
    a forward convolution with the flipped kernel, that of the weight is one 2D problem per tap in time.

    Args:
        x: (B, C, T, H, W), best in channels-last memory.
        weight: (C, 1, kt, kh, kw).
        stride, padding: (T, H, W).

    Returns:
        (B, C, T', H', W')
    """
    return _DepthwiseConv3d.apply(x, weight, stride, padding)


class _DepthwiseConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return plain_depthwise_conv3d(x, weight, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (x, weight, ctx.stride, ctx.padding)
            return _plain_gradients(plain_depthwise_conv3d, inputs, grad)
        needed = ctx.needs_input_grad[:2]
        grads = _depthwise_backward(grad, x, weight, ctx.stride, ctx.padding, needed)
        grad_x, grad_weight = (x if is_needed else None for x, is_needed in zip(grads, needed, strict=True))
        return grad_x, grad_weight, None, None


@_operator("depthwise_backward")
def _depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Sizes,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    if max(stride) > 2:  # few outputs: tap by tap is least work
        return _gradients_by_taps(grad, x, weight, stride, padding)
    return (
        _input_gradient(grad, x.shape, weight, stride, padding) if needed[0] else x.new_empty(0),
        _weight_gradient(grad, x, weight, stride, padding) if needed[1] else weight.new_empty(0),
    )


@_shapes_of(_depthwise_backward)
def _(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, needed: Any
) -> tuple[Tensor, Tensor]:
    both = max(stride) > 2
    grad_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (
        grad_x if both or needed[0] else x.new_empty(0),
        grad_weight if both or needed[1] else weight.new_empty(0),
    )


def _input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, stride: Sizes, padding: Sizes) -> Tensor:
    """Correlate the gradient, spread out by the stride, with the flipped kernel."""
    kernel = weight.shape[2:]
    before = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    if max(stride) > 1:
        size = [n + k - 1 for n, k in zip(shape[2:], kernel, strict=True)]
        batch, channels = shape[:2]
        spread = grad.new_zeros(batch, *size, channels).permute(0, 4, 1, 2, 3)  # channels last
        t, h, w = (slice(b, b + s * n, s) for b, s, n in zip(before, stride, grad.shape[2:], strict=True))
        spread[:, :, t, h, w] = grad
        grad, before = spread, [0, 0, 0]
    grad_x = F.conv3d(grad, weight.flip(2, 3, 4), None, 1, before, groups=grad.shape[1])
    return grad_x.contiguous(memory_format=torch.channels_last_3d)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes) -> Tensor:
    """The taps in time one by one: each is the weight gradient of a 2D convolution over all frames."""
    taps = []
    for tap in range(weight.shape[2]):
        outputs, inputs = _meeting(tap, x.shape[2], grad.shape[2], stride[0], padding[0])
        frames = (volume.transpose(1, 2).flatten(0, 1) for volume in (x[:, :, inputs], grad[:, :, outputs]))
        size = weight[:, :, 0].shape
        gradient = conv2d_weight(next(frames), size, next(frames), stride[1:], padding[1:], 1, x.shape[1])
        taps.append(gradient)
    return torch.stack(taps, 2)


def _gradients_by_taps(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes
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
