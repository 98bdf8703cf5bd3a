"""How the commands run a model: in which precision, and compiled or not."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mvit_video.errors import ConfigError
from mvit_video.model import MViT

log = logging.getLogger(__name__)

_PRECISIONS = ("auto", "bf16", "fp32")
Model = TypeVar("Model", bound=nn.Module)


def prepare(
    model: Model,
    device: str,
    *,
    precision: str = "auto",
    compiled: bool | Literal["auto"] = False,
    batch_size: int = 1,
) -> Model:
    """Move a model to a device and make it fast there; it is changed in place.

    Args:
        precision: of weights and activations: "bf16", "fp32", or "auto": bf16 for MViT where the hardware
            multiplies in it. Scores then differ in the third digit, answers as good as never.
        compiled: compile on the first call, an MViT block by block; other models on GPUs with CUDA graphs.
            "auto": an MViT on a GPU, where that is found to be faster.
        batch_size: clips at once, for "auto".

    Raises:
        ConfigError: for another precision.
    """
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        bf16 = isinstance(model, MViT) and multiplies_bf16(torch.device(device))
        precision = "bf16" if bf16 else "fp32"
    if precision == "bf16":
        model.to(device, torch.bfloat16).register_forward_pre_hook(
            lambda _, arguments: tuple(clips.bfloat16() for clips in arguments)
        )
    else:
        model.to(device)
    if compiled == "auto":
        compiled = is_faster_compiled(model, batch_size)
    if compiled:
        graphs = torch.device(device).type == "cuda" and not isinstance(model, MViT)
        model.compile(mode="reduce-overhead" if graphs else None)
    return model


def is_faster_compiled(model: nn.Module, batch_size: int) -> bool:
    """Whether a copy of an MViT on a GPU takes less time once it is compiled, which takes about a minute.

    In training mode forward and backward passes count. On CPUs, whose kernels are compiled already, and for
    other models the answer is no without a try; so it is where compiling fails.
    """
    if type(model) is not MViT or next(model.parameters()).device.type == "cpu":
        return False
    copied = copy.deepcopy(model)
    like = next(copied.parameters())
    clips = like.new_zeros(batch_size, 3, model.protocol.clip_frames, *[model.protocol.crop] * 2)
    try:
        eager = _seconds(copied, clips)
        copied.compile()
        compiled = _seconds(copied, clips)
    except Exception as error:  # of many kinds: no compiler, no memory
        log.info("not compiled: %s", str(error).strip().partition("\n")[0])
        return False
    log.info("%.4f s a step of %d clips, compiled %.4f s", eager, batch_size, compiled)
    return compiled < eager


def _seconds(model: nn.Module, clips: Tensor) -> float:
    """The median of some steps."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        with torch.set_grad_enabled(model.training):
            out = model(clips)
        if model.training:
            out.float().sum().backward()
            model.zero_grad()
        if clips.is_cuda:
            torch.cuda.synchronize(clips.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def autocast(device: str, precision: str, *, on_cpus: bool = True) -> Any:
    """The context in which a detector computes with a precision, again and again.

    Args:
        precision: "bf16", "fp32", or "auto": bf16 where the hardware multiplies in it.
        on_cpus: "auto" may be bf16 on them.
    """
    kind = torch.device(device)
    is_auto = precision == "auto" and (on_cpus or kind.type == "cuda")
    bf16 = precision == "bf16" or (is_auto and multiplies_bf16(kind))
    return torch.autocast(kind.type, torch.bfloat16, enabled=bf16)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Private, but there is no other name for it in all versions of torch that we support.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
