"""Weights from files: the toolkit's own checkpoints and those of the official PySlowFast code.

Files are data: they are read with ``weights_only=True``, so nothing in them is executed, and configs found in
them are read as values, never instantiated.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.model.config import MViTConfig
from mvit_video.model.mvit import MViT
from mvit_video.model.protocol import Protocol
from mvit_video.model.slowfast import translate_config
from mvit_video.model.variants import replace_fields

METADATA_KEY = "mvit_video"  # in our checkpoints: config, protocol and class names beside the weights


def model_metadata(model: MViT) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build ``model`` again: plain dicts and lists."""
    return {
        "config": asdict(model.config),
        "protocol": asdict(model.protocol),
        "class_names": list(model.class_names) if model.class_names else None,
    }


def load_model(path: str | Path) -> MViT:
    """Build the model that a checkpoint describes and load its weights, in eval mode on the CPU.

    Reads checkpoints of ``mvit-train`` and PySlowFast's ``.pyth`` files. Raises CheckpointError for a file
    that can't be read, holds weights alone, or doesn't fit its own description.
    """
    checkpoint = read_checkpoint(path)
    if "model_state" in checkpoint and "cfg" in checkpoint:
        return _built_from_slowfast(checkpoint, str(path))
    if METADATA_KEY not in checkpoint:
        raise CheckpointError(
            f"{path}: holds weights but not which model they belong to; name the model too, "
            "for example model=mvitv2_s_16x4"
        )
    metadata = checkpoint[METADATA_KEY]
    try:
        config = replace_fields(MViTConfig(), metadata["config"])
        model = MViT(config, replace_fields(Protocol(), metadata["protocol"]))
        if metadata["class_names"]:
            model.class_names = tuple(metadata["class_names"])
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the model can't be used ({error!r})") from None
    _load_strictly(model, _state_dict(checkpoint, str(path)), str(path))
    return model.eval()


def load_weights(model: MViT, source: str | Path | Mapping[str, Any]) -> None:
    """Load weights into ``model``, strictly; the format is found out from the file.

    Args:
        model: with the architecture of the weights.
        source: a file or what is in one: a checkpoint of ``mvit-train``, of PySlowFast, or a state dict.

    Raises:
        CheckpointError: the file can't be read, or names or shapes differ; the text lists which.
    """
    name, checkpoint = (
        ("state dict", source) if isinstance(source, Mapping) else (str(source), read_checkpoint(source))
    )
    _load_strictly(model, _state_dict(checkpoint, name), name)
    class_names = (checkpoint.get(METADATA_KEY) or {}).get("class_names")
    if class_names:
        model.class_names = tuple(class_names)


def from_slowfast(source: str | Path | Mapping[str, Any]) -> MViT:
    """Build the MViT that a PySlowFast checkpoint describes and load its weights, in eval mode.

    Args:
        source: a ``.pyth`` file or a dict with "model_state" and "cfg" (yaml text or a nested dict). A
            configuration alone, as a ``.yaml`` file or a dict with "MVIT", gives a model with fresh weights.

    Raises:
        CheckpointError: the file can't be read, its configuration uses an option that this model doesn't
            have (named in the text), or the weights don't fit.
    """
    if isinstance(source, Mapping):
        name, checkpoint = "checkpoint", source
    else:
        name, path = str(source), Path(source)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            checkpoint = _parse_yaml(path.read_text(encoding="utf-8"), name)
        else:
            checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, Mapping) and "MVIT" in checkpoint:
        checkpoint = {"cfg": checkpoint}  # a configuration without weights
    elif missing := {"model_state", "cfg"} - set(checkpoint or ()):
        raise CheckpointError(
            f"{name}: not a PySlowFast checkpoint, it has no {' and no '.join(sorted(missing))}"
        )
    return _built_from_slowfast(checkpoint, name)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file as plain data onto the CPU. Raises CheckpointError where that fails."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(f"{path}: not a checkpoint file, or damaged") from None
        raise CheckpointError(
            f"{path}: refused, it is no file of plain weights: loading it could run code ({found[1]})"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise CheckpointError(f"{path}: not a checkpoint file, or damaged ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"{path}: expected a checkpoint or a state dict, found {type(checkpoint).__name__}"
        )
    return checkpoint


def _state_dict(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The model's weights inside a checkpoint of any known kind."""
    if "model_state" in checkpoint:  # PySlowFast
        return dict(checkpoint["model_state"])
    if "state_dict" in checkpoint:  # Lightning: the model is a member of the training module
        weights = checkpoint["state_dict"]
        return {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return dict(checkpoint)
    raise CheckpointError(
        f"{name}: no weights found; its keys are {', '.join(map(str, list(checkpoint)[:8]))}"
    )


def _load_strictly(model: MViT, weights: Mapping[str, Tensor], name: str) -> None:
    expected = model.state_dict()
    head = "head.projection.weight"
    if head in weights and weights[head].shape[0] != expected[head].shape[0]:
        raise CheckpointError(
            f"{name}: its head has {weights[head].shape[0]} classes, the model has {expected[head].shape[0]}"
        )
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    problems += [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{name}: doesn't fit the model: {'; '.join(problems[:6])}{more}")
    model.load_state_dict(weights)


def _built_from_slowfast(checkpoint: Mapping[str, Any], name: str) -> MViT:
    cfg, weights = checkpoint["cfg"], checkpoint.get("model_state")
    if isinstance(cfg, str):
        cfg = _parse_yaml(cfg, name)
    config, protocol = translate_config(cfg, name, weights or ())
    model = MViT(config, protocol)
    if weights is not None:
        _load_strictly(model, weights, name)
    return model.eval()


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{name}: its cfg is no plain yaml ({error})".replace("\n", " ")) from None
