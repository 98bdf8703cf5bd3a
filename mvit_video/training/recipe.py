"""Which parameters are trained, and at which rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from mvit_video.errors import ConfigError
from mvit_video.model import MViT, VideoModel, layer_groups


def learning_rate(
    epoch: float, *, lr: float, epochs: float, warmup_epochs: float, warmup_start_lr: float, end_lr: float
) -> float:
    """Linear warm-up, then half a cosine, at a fractional epoch; the official schedule.

    ``lr`` is reached at ``warmup_epochs`` and ``end_lr`` at ``epochs``.
    """
    if epoch < warmup_epochs:
        return warmup_start_lr + (lr - warmup_start_lr) * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12), 1.0)
    return end_lr + (lr - end_lr) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the parameters that are trained by weight decay, and with layer decay by depth.

    Biases and everything one-dimensional (norms) don't decay. As in the official recipe, the class token,
    position tables and pooling kernels do. ``lr_scale`` of a group is ``layer_decay`` to the power of its
    distance from the head. Raises ConfigError for layer decay of a model without known layers.
    """
    layers = [[name for name, _ in model.named_parameters()]]
    if layer_decay != 1:
        if not isinstance(model, MViT):
            raise ConfigError(f"layer_decay needs an MViT, {type(model).__name__} has no known layers")
        layers = layer_groups(model)
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    for depth, names in enumerate(layers):
        scale = layer_decay ** (len(layers) - 1 - depth)
        trained = [name for name in names if parameters[name].requires_grad]
        plain = [name for name in trained if parameters[name].ndim <= 1 or name.endswith(".bias")]
        decayed = [name for name in trained if name not in plain]
        groups += [
            {"params": [parameters[name] for name in chosen], "weight_decay": decay, "lr_scale": scale}
            for chosen, decay in ((decayed, weight_decay), (plain, 0.0))
            if chosen
        ]
    return groups


def freeze(model: VideoModel, parts: Sequence[str]) -> None:
    """Keep parts of a model as they are, without dropout or drop path in them.

    Args:
        parts: names of modules or parameters, such as "blocks.0"; "backbone" is everything but the head.

    Raises:
        ConfigError: nothing has such a name, or nothing is left to train.
    """
    known = [name for name, _ in [*model.named_modules(), *model.named_parameters()] if name]
    if list(parts) == ["backbone"]:
        head = f"{model.classifier}."
        around = [name for name in known if head.startswith(f"{name}.") or f"{name}.".startswith(head)]
        parts = [name for name in known if name not in around]
    for part in parts:
        if part not in known:
            modules = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"freeze: the model has no {part!r}; it has: backbone, {modules}")

    def chosen(name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in parts)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not chosen(name))
    for name, module in model.named_modules():
        if chosen(name):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: nothing is left to train")
