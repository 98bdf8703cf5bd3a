"""How the commands run a model: in which precision, and compiled or not."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from mvit_video.errors import ConfigError
from mvit_video.model import MViT

PRECISIONS = ("auto", "bf16", "fp32")
Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, device: str, *, precision: str = "auto", compiled: bool = False) -> Model:
    """Move a model to a device and make it fast there; it is changed in place.

    Args:
        precision: of weights and activations: "bf16", "fp32", or "auto": bf16 for MViT where the hardware
            multiplies in it. Scores then differ in the third digit, answers as good as never.
        compiled: compile on the first call, an MViT block by block; other models on GPUs with CUDA graphs.

    Raises:
        ConfigError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        bf16 = isinstance(model, MViT) and multiplies_bf16(torch.device(device))
        precision = "bf16" if bf16 else "fp32"
    if precision == "bf16":
        model.to(device, torch.bfloat16).register_forward_pre_hook(_clips_in_bf16)
    else:
        model.to(device)
    if compiled:
        graphs = torch.device(device).type == "cuda" and not isinstance(model, MViT)
        model.compile(mode="reduce-overhead" if graphs else None)
    return model


def _clips_in_bf16(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(clips.bfloat16() for clips in arguments)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Private, but there is no other name for it in all versions of torch that we support.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
