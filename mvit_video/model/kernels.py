"""The operations that one device computes otherwise than another; the model itself asks for no device.

Each function says in its docstring which plain expression of torch it equals, in value and gradient. On CPUs
the kernels of ``cpu_kernels`` compute it, everywhere else (other devices and dtypes, exported and traced
programs, ``torch.func`` transforms, forward-mode differentiation, tensor subclasses) that expression does.
Modules that somebody replaced, or hung hooks on, are called as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from mvit_video.model import cpu_kernels

Kind = TypeVar("Kind", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FAST = (torch.float32, torch.bfloat16)
_is_plain = False


@contextmanager
def plain() -> Iterator[None]:
    """Inside, torch's own operations take the place of the CPU kernels, to compare with."""
    global _is_plain
    before, _is_plain = _is_plain, True
    try:
        yield
    finally:
        _is_plain = before


class Linear(nn.Linear):
    """torch's own, (..., i) -> (..., o)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu_input: bool = False) -> Tensor:
    """``F.linear(x, weight, bias)``, or of ``F.gelu(x)``; only x is kept for the backward pass."""
    if not _has_cpu_kernels(x, weight, bias):
        return cpu_kernels.plain_linear(x, weight, bias, gelu_input)
    return cpu_kernels.linear(*_autocast(x, weight, bias), gelu_input)


def qkv(layer: nn.Module, x: Tensor, kv: Tensor) -> Iterable[Tensor]:
    """``layer(x).chunk(3, dim=-1)``, where it is faster each part by itself, once it is asked for.

    ``kv`` are the tokens that keys and values are wanted of: all of x, unless kernels ``replace`` the layer.
    """
    if not (_is_unmodified(layer, Linear) and replace(x, layer)):
        return cast(Tensor, layer(x)).chunk(3, dim=-1)
    biases = [None] * 3 if layer.bias is None else layer.bias.chunk(3)
    return map(linear, (x, kv, kv), layer.weight.chunk(3), biases)


def mlp(fc1: nn.Module, fc2: nn.Module, x: Tensor) -> Tensor:
    """``fc2(F.gelu(fc1(x)))``."""
    if not (_is_unmodified(fc1, Linear) and _is_unmodified(fc2, Linear)):
        return fc2(F.gelu(fc1(x)))
    tensors = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    if _has_cpu_kernels(*tensors) and not torch.is_grad_enabled():
        return cpu_kernels.mlp(*_autocast(*tensors))
    return linear(linear(x, fc1.weight, fc1.bias), fc2.weight, fc2.bias, gelu_input=True)


def pool_heads(pool: nn.Module, x: Tensor, stride: Sequence[int] | None = None) -> Tensor:
    """``pool`` each head's (B, c, T, H, W) volume: (B, T, H, W, n, c) -> (B, T', H', W', n, c).

    ``stride`` is that of a volume without the cells that the pooling doesn't read.

    Tokens are a channels-last volume of all heads already, which CPUs pool fastest. torch's depthwise kernels
    for CUDA take contiguous volumes; channels-last ones go to a slow grouped convolution of cuDNN.
    """
    batch, heads, width = x.shape[0], x.shape[-2], x.shape[-1]
    if x.device.type == "cpu" and _is_unmodified(pool, nn.Conv3d) and pool.weight.shape[1] == 1:
        volume, weight = x.flatten(-2).permute(0, 4, 1, 2, 3), pool.weight.repeat(heads, 1, 1, 1, 1)
        convolve: Any = cpu_kernels.plain_depthwise_conv3d
        if torch.is_grad_enabled() and _has_cpu_kernels(x, weight, dtypes=(*_FAST, torch.float64)):
            convolve, (volume, weight) = cpu_kernels.depthwise_conv3d, _autocast(volume, weight)
        volume = convolve(volume, weight, stride or pool.stride, pool.padding)
        return volume.permute(0, 2, 3, 4, 1).unflatten(-1, (heads, width))
    volume = pool(x.permute(0, 4, 5, 1, 2, 3).flatten(0, 1).contiguous())  # (B * n, c, T, H, W)
    return volume.unflatten(0, (batch, heads)).permute(0, 3, 4, 5, 1, 2)


def norm_pooled(pool: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, which may take the place of x (B, N, n, c), made by ``pool`` and known to nobody else."""
    if not (saves_memory(x, pool, norm) and x.is_contiguous()):
        return norm(x)
    for part in x.flatten(0, 1).split(4096):
        part.copy_(norm(part))
    return x


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    *,
    scale: float = 1.0,
    num_prefix_tokens: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q kᵀ + q_positions k_positionsᵀ + mask) v``, plus q behind the prefix tokens.

    Args:
        q: (B, N, n, c), queries of n heads.
        k, v: (B, M, n, c); v may have another width if q isn't added to it.
        q_positions, k_positions: (B, N, n, e) and (M, e). No gradient of the latter is computed.
        num_prefix_tokens: queries in front to which q isn't added; None: it is added to none.
        mask: (B, n, N, M), a boolean one says which keys count, a float one is added.

    Returns:
        (B, N, n, c)
    """
    if q_positions is None or k_positions is None:
        q_positions, k_positions = q[..., :0], q.new_empty(k.shape[1], 0)
    tensors = (q, k, v, q_positions, k_positions.detach())
    if mask is None and _has_cpu_kernels(*tensors, dtypes=(*_FAST, torch.float64)):
        return cpu_kernels.attention(*_autocast(*tensors), scale, num_prefix_tokens)
    if is_transformed():  # torch's fused attention has no derivatives of these kinds
        return cpu_kernels.plain_attention(*tensors, scale, num_prefix_tokens, mask)
    q_aug, k_aug = augment_qk(q, k, q_positions, k_positions, scale)
    # Fused kernels want q, k and v of one width that is a multiple of 8.
    width = math.ceil(max(q_aug.shape[-1], v.shape[-1]) / 8) * 8
    q_aug, k_aug, v_aug = (
        x.transpose(1, 2) if x.shape[-1] == width else F.pad(x.transpose(1, 2), (0, width - x.shape[-1]))
        for x in (q_aug, k_aug, v)
    )
    x = F.scaled_dot_product_attention(q_aug, k_aug, v_aug, mask, scale=1.0)
    return cpu_kernels.add_residual(x[..., : v.shape[-1]].transpose(1, 2), q, num_prefix_tokens)


def augment_qk(
    q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Extend q and k so that their product alone is ``scale q kᵀ + q_positions k_positionsᵀ``.

    (B, N, n, c), (B, M, n, c), (B, N, n, e), (M, e) -> (B, N, n, c + e), (B, M, n, c + e). Note that the
    relative terms take the unscaled q.
    """
    if q_positions.shape[-1] == 0:
        return q, k * scale
    k_positions = k_positions[:, None].expand(*k.shape[:-1], -1)
    # In memory head by head, as fused kernels read them.
    q_aug = torch.cat([q.transpose(1, 2), q_positions.transpose(1, 2)], -1)
    k_aug = torch.cat([k.transpose(1, 2) * scale, k_positions.transpose(1, 2)], -1)
    return q_aug.transpose(1, 2), k_aug.transpose(1, 2)


def saves_memory(x: Tensor, *modules: nn.Module) -> bool:
    """Whether less memory is worth more calls, as in inference on a CPU, where calls cost nothing.

    Not where somebody might look at what ``modules`` compute, nor in compiled code, which has no loops.
    """
    parts = (part for module in modules for part in module.modules())
    is_inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _has_cpu_kernels(x)
    return is_inference and all(_is_unmodified(part, type(part)) for part in parts)


def replace(x: Tensor, *modules: nn.Module) -> bool:
    """Whether CPU kernels take the place of these linear layers and convolutions, of x."""
    unmodified = all(_is_unmodified(m, Linear) or _is_unmodified(m, nn.Conv3d) for m in modules)
    return unmodified and _has_cpu_kernels(x, *(p for m in modules for p in m.parameters()))


def is_tracing() -> bool:
    """Whether a program is being recorded that must run without this package, and on other devices."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks into every operation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_cpu_kernels(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = _FAST) -> bool:
    given = [x for x in tensors if x is not None]
    autocast = torch.is_autocast_enabled("cpu")
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in given)
        and all(x.dtype in dtypes and (autocast or x.dtype == given[0].dtype) for x in given)
        and not _is_plain
        and not is_tracing()
        and not is_transformed()
    )


def _is_unmodified(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether nobody would miss the call of ``module`` if a kernel read its weights instead."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
    )


def _autocast(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Autocast reaches neither into own kernels nor into backward passes: cast what comes in."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        tensors = tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
    return cast(tuple[Tensor, ...], tensors)
