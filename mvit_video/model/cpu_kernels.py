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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

Sizes = Sequence[int]  # (T, H, W)

# Bytes of scores that a chunk of attention holds, and of hidden layer that a chunk of the MLP does, for each
# thread. Of 256 kB to 8 MB with 1 MB of L2 a core, Zen 5 is as fast with 1 as with 4 MB, and up to a third
# slower at the ends; on Zen 4 a training step in bfloat16 takes 8 % less with 4 than with 1 MB.
CHUNK = 2**22
# Queries that a thread should have of a product; of smaller heads several are multiplied at once.
ROWS = 128


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


def plain_depthwise_conv3d(x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes) -> Tensor:
    return F.conv3d(x, weight, None, stride, padding, groups=x.shape[1])


def add_residual(x: Tensor, q: Tensor, num_prefix_tokens: int | None) -> Tensor:
    """Add q to x, both (B, N, n, c), behind the prefix tokens; None: nowhere."""
    if num_prefix_tokens is None:
        return x
    rest = x[:, num_prefix_tokens:] + q[:, num_prefix_tokens:]
    return torch.cat([x[:, :num_prefix_tokens], rest], 1) if num_prefix_tokens else rest


# As torch.library.custom_op does it, whose operators import TorchDynamo (two seconds) with their first call.
_LIBRARY = torch.library.Library("mvit_video", "DEF")


def _operator(name: str, empty_results: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make an operator of a function of CPU tensors: tracing takes it as one step with ``empty_results``."""

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CPU")
        operator = getattr(torch.ops.mvit_video, name).default
        torch.library.register_fake(operator, empty_results, lib=_LIBRARY)
        return operator

    return register


def _differentiate(operator: Any, backward: Callable[..., Any], plain: Callable[..., Tensor]) -> None:
    """Give an operator the gradients ``backward(grad, *inputs)`` of its first inputs.

    Where gradients must have gradients themselves they are those of ``plain(*inputs)``.
    """

    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.others, strict=True)]
        if torch.is_grad_enabled():
            return _plain_gradients(plain, inputs, grad)
        grads = itertools.chain(backward(grad, *inputs), itertools.repeat(None))
        return tuple(g if isinstance(x, Tensor) else None for g, x in zip(grads, inputs, strict=False))

    torch.library.register_autograd(operator, gradients, setup_context=setup_context, lib=_LIBRARY)


def _plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Any], grad: Tensor
) -> tuple[Tensor | None, ...]:
    wanted = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    # Views, as one input may have been computed from another: its gradient must end here.
    inputs = [x.view_as(x) if is_wanted else x for x, is_wanted in zip(inputs, wanted, strict=True)]
    leaves = [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    grads = iter(torch.autograd.grad(plain(*inputs), leaves, grad, create_graph=True))
    return tuple(next(grads) if is_wanted else None for is_wanted in wanted)


# Products


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """x (N, i), weight (o, i) -> x weightᵀ + bias (N, o), and its GELU; by oneDNN where torch has it.

    Of several without bias, x (G, N, i) and weight (G, o, i), each is multiplied with its own.
    """
    if x.ndim == 3:
        return _product(x[0], weight[0])[None] if len(x) == 1 else x @ weight.mT
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
    """a (N, o), b (N, i) -> aᵀ b (o, i). oneDNN copies the left factor if it is transposed.

    So the product is turned round where b and the result are less to copy than a.
    """
    if a.ndim == 3:
        return _outer(a[0], b[0])[None] if len(a) == 1 else a.mT @ b
    if a.dtype == torch.bfloat16:
        return a.t() @ b  # copies neither
    if len(a) * a.shape[1] <= (len(b) + a.shape[1]) * b.shape[1]:
        return _product(a.t(), b.t())
    return _product(b.t(), a.t()).t().contiguous()


def _chunks(rows: int, bytes_of_row: int, threads: int) -> list[slice]:
    """Cut rows evenly so that every thread's share of a chunk fits into its cache."""
    count = max(-(-rows // max(CHUNK * threads // bytes_of_row, 16)), 1)
    step = -(-rows // count)
    return [slice(start, start + step) for start in range(0, rows, max(step, 1))]


# Linear layers


def _like_linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_operator("linear", _like_linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu_input: bool) -> Tensor:
    rows = x.flatten(0, -2)
    if not gelu_input:
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)
    out = x.new_empty(len(rows), len(weight))
    for chunk in _chunks(len(rows), rows.shape[1] * rows.itemsize, torch.get_num_threads()):
        out[chunk] = _product(F.gelu(rows[chunk]), weight, bias)
    return out.view(*x.shape[:-1], -1)


def _like_linear_inputs(
    _grad: Tensor, x: Tensor, weight: Tensor, _bias: Tensor | None, _gelu_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])


@_operator("linear_backward", _like_linear_inputs)
def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads, rows = grad.contiguous().flatten(0, -2), x.flatten(0, -2)
    grad_bias = grads.sum(0)
    if not gelu_input:
        return _product(grads, weight.t()).view(x.shape), _outer(grads, rows), grad_bias
    grad_x = torch.empty_like(rows)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # the sum over chunks
    for chunk in _chunks(len(rows), rows.shape[1] * rows.itemsize, torch.get_num_threads()):
        grad_weight += _outer(grads[chunk], F.gelu(rows[chunk]))
        grad_gelu = _product(grads[chunk], weight.t())
        torch.ops.aten.gelu_backward.grad_input(grad_gelu, rows[chunk], grad_input=grad_x[chunk])
    return grad_x.view(x.shape), grad_weight.to(weight.dtype), grad_bias


_differentiate(linear, _linear_backward, plain_linear)


@_operator("mlp", lambda x, weight1, bias1, weight2, bias2: _like_linear(x, weight2))
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    out = x.new_empty(len(rows), len(weight2))
    for chunk in _chunks(len(rows), len(weight1) * rows.itemsize, torch.get_num_threads()):
        out[chunk] = _product(_product(rows[chunk], weight1, bias1, gelu=True), weight2, bias2)
    return out.view(*x.shape[:-1], -1)


# Attention


def partition(
    clips: int, heads: int, queries: int, bytes_of_row: int, threads: int
) -> list[tuple[slice, slice, list[slice]]]:
    """Cut the work of attention into groups of clips and heads, and the queries of each group into chunks.

    A group has one head where its queries keep all threads busy, else so many heads, and clips, that each
    thread has ``ROWS`` queries. A chunk's scores fit into the threads' caches.
    """
    wanted = -(-ROWS * threads // queries)  # heads that are multiplied at once
    group_heads = min(wanted, heads)
    group_clips = min(wanted // heads, clips) if wanted > heads else 1
    chunks = _chunks(queries, bytes_of_row * group_heads * group_clips, threads)
    return [
        (slice(clip, clip + group_clips), slice(head, head + group_heads), chunks)
        for clip in range(0, clips, group_clips)
        for head in range(0, heads, group_heads)
    ]


def _groups(queries: Tensor, keys: Tensor) -> list[tuple[slice, slice, list[slice]]]:
    clips, num_queries, heads, _ = queries.shape
    return partition(clips, heads, num_queries, keys.shape[1] * keys.itemsize, torch.get_num_threads())


def _by_heads(x: Tensor, clips: slice, heads: slice) -> Tensor:
    """(B, N, n, c) -> (G, N, c), the heads of a group; a view if it is one head."""
    return x[clips, :, heads].transpose(1, 2).flatten(0, 1)


def _put(x: Tensor, part: Tensor) -> None:
    """Write (G, N, c) into a group's part of a tensor, (B, N, n, c)."""
    part.copy_(x.unflatten(0, (len(part), -1)).transpose(1, 2))


@_operator("attention", lambda q, k, v, *_: v.new_empty(*q.shape[:-1], v.shape[-1]))
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
    for clips, heads, chunks in _groups(q, k):
        q_, k_, v_, e_ = (_by_heads(x, clips, heads) for x in (q, k, v, q_positions))
        keys, values_t = torch.cat([k_ * scale, k_positions.expand(len(k_), -1, -1)], 2), v_.mT.contiguous()
        for chunk in chunks:
            weights = _product(torch.cat([q_[:, chunk], e_[:, chunk]], 2), keys).softmax(-1)
            x = _product(weights, values_t)
            if num_prefix_tokens is not None:
                behind = slice(max(num_prefix_tokens - chunk.start, 0), None)
                x[:, behind].add_(q_[:, chunk][:, behind])
            _put(x, out[clips, chunk, heads])
    return out


@_operator("attention_backward", lambda grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:4]))
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
    grad_q, grad_k, grad_v, grad_e = (x.new_empty(x.shape) for x in (q, k, v, q_positions))
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32  # of chunks

    for clips, heads, chunks in _groups(q, k):
        grad_, q_, k_, v_, e_ = (_by_heads(x, clips, heads) for x in (grad, q, k, v, q_positions))
        keys, values = torch.cat([k_ * scale, k_positions.expand(len(k_), -1, -1)], 2), v_.contiguous()
        keys_t = keys.mT.contiguous()
        # Transposed, as the products come out with the least to copy.
        grad_k_sum, grad_v_sum = (x.new_zeros(x.mT.shape, dtype=sums) for x in (k_, v_))
        for chunk in chunks:
            out_, queries = grad_[:, chunk].contiguous(), torch.cat([q_[:, chunk], e_[:, chunk]], 2)
            weights = _product(queries, keys).softmax(-1)
            scores = torch.ops.aten._softmax_backward_data(_product(out_, values), weights, -1, q.dtype)
            grad_queries = _product(scores, keys_t)
            grad_k_sum += _outer(queries[..., :width], scores)
            grad_v_sum += _outer(out_, weights)
            if num_prefix_tokens is not None:
                behind = slice(max(num_prefix_tokens - chunk.start, 0), None)
                grad_queries[:, behind, :width].add_(out_[:, behind])
            _put(grad_queries[..., :width], grad_q[clips, chunk, heads])
            _put(grad_queries[..., width:], grad_e[clips, chunk, heads])
        _put(grad_k_sum.mul_(scale).mT, grad_k[clips, :, heads])
        _put(grad_v_sum.mT, grad_v[clips, :, heads])
    return grad_q, grad_k, grad_v, grad_e


_differentiate(attention, _attention_backward, plain_attention)


# Depthwise pooling


@_operator("depthwise_conv3d", plain_depthwise_conv3d)
def depthwise_conv3d(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """One kernel per channel over channels-last volumes: (B, C, T, H, W) and (C, 1, t, h, w).

    torch's own forward pass is fast on these, but its backward pass isn't (in bf16 it is ten times slower
    than everything else in a block together). The same gradients come from fast kernels: that of the input is
    a forward convolution with the flipped kernel, that of the weight is one 2D problem per tap in time.
    """
    return plain_depthwise_conv3d(x, weight, stride, padding)


def _like_depthwise_inputs(_grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
    return grad_x, torch.empty_like(weight, memory_format=torch.contiguous_format)


@_operator("depthwise_backward", _like_depthwise_inputs)
def _depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    grad_x = _input_gradient(grad, x.shape, weight, stride, padding)
    if max(stride) > 2 and x.itemsize < 4:  # oneDNN is slow at these alone
        grad, x = grad.float(), x.float()
    return grad_x, _weight_gradient(grad, x, weight.shape, stride, padding).to(weight.dtype)


_differentiate(depthwise_conv3d, _depthwise_backward, plain_depthwise_conv3d)


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


def _weight_gradient(grad: Tensor, x: Tensor, shape: torch.Size, stride: Sizes, padding: Sizes) -> Tensor:
    """The taps in time one by one: each is the weight gradient of a 2D convolution over all frames."""
    taps = []
    for tap in range(shape[2]):
        outputs, inputs = _meeting(tap, x.shape[2], grad.shape[2], stride[0], padding[0])
        x_frames, grad_frames = (
            volume.transpose(1, 2).flatten(0, 1) for volume in (x[:, :, inputs], grad[:, :, outputs])
        )
        size = (*shape[:2], *shape[3:])
        taps.append(conv2d_weight(x_frames, size, grad_frames, stride[1:], padding[1:], 1, x.shape[1]))
    return torch.stack(taps, 2)


def _meeting(tap: int, n_inputs: int, n_outputs: int, stride: int, padding: int) -> tuple[slice, slice]:
    """The outputs along one axis that read an input through this tap, and the inputs that they read."""
    shift = tap - padding  # output i reads input i * stride + shift
    first = max(-(shift // stride), 0)
    stop = max(min((n_inputs - 1 - shift) // stride, n_outputs - 1) + 1, first)
    return slice(first, stop), slice(first * stride + shift, stop * stride + shift, stride)
