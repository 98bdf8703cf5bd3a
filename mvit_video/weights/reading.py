"""Checkpoint files as plain data: nothing in them is executed, and what isn't weights is refused by name."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mvit_video.errors import CheckpointError, brief, refusing
from mvit_video.weights import hub

METADATA_KEY = "mvit_video"  # in our checkpoints: config, protocol and class names beside the weights
EXPORTED = (".onnx", ".pt2")
_MAX_VALUES = 10**5  # of a description, class names included

# Averages over the last steps, as timm and others name them; the weights themselves count where both are.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
# Where weights lie: PySlowFast; Lightning and most others; what people write themselves.
_CONTAINERS = ("model_state", "state_dict", "model_state_dict", "model", "net", *_AVERAGED)
# What DistributedDataParallel, a training module or a class of one's own puts in front of all names.
_PREFIXES = ("module.", "model.", "net.")
# What torch.compile, FSDP and activation checkpointing put anywhere in a name.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file as plain data onto the CPU. Raises CheckpointError where that fails."""
    if str(path).startswith(hub.PREFIX):
        path = hub.download(str(path))
    elif "://" in str(path):
        raise CheckpointError(f"{path}: an address; download the file and give its path")
    path = Path(path)
    try:
        _require_file(path)
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    # Those start with the length of a JSON header and that header.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(f"{path}: not a checkpoint file, or damaged") from None
        raise CheckpointError(
            f"{path}: refused, it is no file of plain weights: loading it could run code ({found[1][:80]})"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint file, or damaged ({brief(error)})") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise CheckpointError(f"{path}: expected a checkpoint or a state dict, found {kind}")
    return checkpoint


def read_task(path: str | Path | None) -> str:
    """The task that a checkpoint says it is of; "classification" for everything else, readable or not."""
    try:
        checkpoint = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)
        return str(checkpoint[METADATA_KEY]["task"])
    except Exception:  # whoever loads it tells what is wrong
        return "classification"


def _require_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".ckpt", ".pyth", ".pth", ".pt"))
        example = f", such as {path / inside[0]}" if inside else ""
        raise CheckpointError(f"{path}: a folder; give a checkpoint file{example}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix in EXPORTED:
        raise CheckpointError(f"{path}: an exported model, which only mvit-predict takes, without model=")


def _read_safetensors(path: Path) -> dict[str, Any]:
    with (
        refusing(CheckpointError, f"{path}: not a safetensors file, or damaged"),
        safe_open(path, framework="pt") as file,
    ):
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        metadata = (file.metadata() or {}).get(METADATA_KEY)
    return {"model_state": weights} | ({METADATA_KEY: metadata} if metadata else {})


def find_weights(checkpoint: Mapping[str, Any], name: str) -> tuple[dict[str, Tensor], str]:
    """The weights in a checkpoint of any known kind, by the model's own names.

    Returns:
        The state dict without the prefixes of wrappers, and these, such as ``"module._orig_mod."``.

    Raises:
        CheckpointError: there are none; names what is there instead. ``name`` stands for the file.
    """
    weights: Any = checkpoint
    container = None
    for _ in range(3):
        found = [key for key in _CONTAINERS if key in weights and not isinstance(weights[key], Tensor)]
        if not found:
            break
        container = found[0]
        weights = weights[container]
        if not isinstance(weights, Mapping):
            break
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        keys = ", ".join(str(key)[:80] for key in list(checkpoint)[:8])
        raise CheckpointError(f"{name}: no weights found; its keys are {keys}")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(f"{name}: no weights: {str(key)[:80]!r} is a {kind}, not a tensor")
    return _without_prefixes(weights, name, partly=container == "state_dict")


def _without_prefixes(
    weights: Mapping[str, Tensor], name: str, *, partly: bool
) -> tuple[dict[str, Tensor], str]:
    """Args: partly: the model is one member of a training module; the other members' tensors are left out."""
    names = {key: _WRAPPERS.sub("", key) for key in weights}
    removed: list[str] = []

    def in_front(prefix: str) -> bool:
        count = sum(key.startswith(prefix) for key in names.values())
        # torch's AveragedModel counts its updates beside its module.
        return count > 0 and (partly or count + ("n_averaged" in names) == len(names))

    while prefix := next(filter(in_front, _PREFIXES), ""):
        names = {key: own.removeprefix(prefix) for key, own in names.items() if own.startswith(prefix)}
        removed.append(prefix)
    removed += sorted({match[0] for key in names for match in _WRAPPERS.finditer(key)})
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{name}: holds a name twice, with and without {' '.join(removed)}")
    return {own: weights[key] for key, own in names.items()}, "".join(removed)


def is_plain(value: Tensor) -> bool:
    """Dense, with memory behind each number: a view can claim a huge shape out of a single one."""
    if value.layout is not torch.strided or value.is_meta or value.is_nested:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def distinct_names(names: Iterable[str]) -> tuple[str, ...]:
    """Class names, with its number behind each one that is blank or that other classes have too.

    So no answer is ambiguous. (Of ImageNet's 1000 names, two are those of two classes each.)

    Raises ValueError where that doesn't help.
    """
    names = tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise ValueError("class_names must be text")
    counts = Counter(map(str.strip, names))
    found = tuple(
        name if name.strip() and counts[name.strip()] == 1 else f"{name.strip() or 'class'} ({label})"
        for label, name in enumerate(names)
    )
    if len(set(found)) < len(found):
        raise ValueError("class_names come twice")
    return found


def require_bounded(values: Any, most: int = _MAX_VALUES) -> None:
    """Raises ValueError for lists that hold one another so often that nothing could print or copy them."""
    remaining: list[Any] = [(values,)]
    count = 0
    while remaining:
        item = remaining.pop()
        parts = item.values() if isinstance(item, dict) else item
        count += len(parts)
        if count > most:
            raise ValueError(f"more than {most} values")
        remaining.extend(part for part in parts if isinstance(part, dict | list | tuple))
