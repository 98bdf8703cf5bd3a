"""Weights from files: the toolkit's own, PySlowFast's, torchvision's, timm's and safetensors.

Files are data: they are read with ``weights_only=True``, so nothing in them is executed, and configs found in
them are read as values, never instantiated.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.model.base import VideoModel
from mvit_video.model.baselines import Baseline, BaselineConfig
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import MViTConfig
from mvit_video.model.mvit import MViT
from mvit_video.model.variants import replace_fields
from mvit_video.weights.formats import adapted, official_names
from mvit_video.weights.slowfast import slowfast_config, translate_config

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

METADATA_KEY = "mvit_video"  # in our checkpoints: config, protocol and class names beside the weights


def model_metadata(model: VideoModel) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build ``model`` again: plain dicts and lists."""
    return {
        "config": asdict(model.config),
        "protocol": asdict(model.protocol),
        "class_names": list(model.class_names) if model.class_names else None,
    }


def load_model(path: str | Path) -> VideoModel:
    """Build the model that a checkpoint describes and load its weights, in eval mode on the CPU.

    Reads checkpoints of ``mvit-train``, files of ``save_weights`` and PySlowFast's ``.pyth`` files. Raises
    CheckpointError for a file that can't be read, holds weights alone, or doesn't fit its own description.
    """
    checkpoint = read_checkpoint(path)
    if METADATA_KEY not in checkpoint and "model_state" in checkpoint and "cfg" in checkpoint:
        return _built_from_slowfast(checkpoint, str(path))
    if METADATA_KEY not in checkpoint:
        raise CheckpointError(
            f"{path}: holds weights but not which model they belong to; name the model too, "
            "for example model=mvitv2_s_16x4"
        )
    metadata = checkpoint[METADATA_KEY]
    try:
        protocol = replace_fields(ClipSpec(), metadata["protocol"])
        model: VideoModel
        if "name" in metadata["config"]:
            model = Baseline(BaselineConfig(**metadata["config"]), protocol)
        else:
            model = MViT(replace_fields(MViTConfig(), metadata["config"]), protocol)
        if metadata["class_names"]:
            model.class_names = tuple(metadata["class_names"])
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the model can't be used ({error!r})") from None
    _load(model, _state_dict(checkpoint, str(path)), str(path), adapt=False)
    return model.eval()


@dataclass(frozen=True)
class LoadReport:
    """What became of each of the model's tensors, by name.

    Attributes:
        loaded: taken over as they were.
        reshaped, inflated, interpolated: taken over in another shape, see ``formats.adapted``.
        fresh: not in the source, and left as they were initialised.
    """

    loaded: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    inflated: tuple[str, ...] = ()
    interpolated: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A line for each way, with the number of tensors and, where something happened to them, names."""
        lines = [f"{len(self.loaded)} tensors loaded"]
        for how, groups in self._groups():
            names = [f"{name} (x{count})" if count > 1 else name for name, count in groups.items()]
            lines.append(f"{groups.total()} {how}: {', '.join(names)}")
        return "\n".join(lines)

    def __rich__(self) -> Table:
        """For rich's ``print``: a table with a row for each kind of tensor that something happened to."""
        from rich.table import Table

        table = Table(title=f"{len(self.loaded)} tensors loaded", title_justify="left")
        for column in ("what", "tensors", "count"):
            table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
        for how, groups in self._groups():
            for name, count in groups.items():
                table.add_row(how, name, str(count))
        return table

    def _groups(self) -> Iterator[tuple[str, Counter[str]]]:
        """The ways in which anything came but as it was, with names; those of all blocks are one."""
        for how in ("reshaped", "inflated", "interpolated", "fresh"):
            groups = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in getattr(self, how))
            if groups:
                yield how, groups


def load_weights(
    model: VideoModel, source: str | Path | Mapping[str, Any], *, head: Literal["strict", "new"] = "strict"
) -> LoadReport:
    """Load weights into ``model``, strictly; the format is found out from the file.

    Position tables of another resolution or clip length are interpolated, and weights of an image model are
    inflated to a video model, where the class token and the temporal tables then stay as initialised. Any
    other difference in names or shapes is an error.

    Args:
        model: with the architecture of the weights.
        source: a file or what is in one: a checkpoint of ``mvit-train``, of PySlowFast or of the official
            image code, a state dict with their names, torchvision's or timm's, or a safetensors file.
        head: "new" keeps the model's own head, as for other classes.

    Raises:
        CheckpointError: the file can't be read, or names or shapes differ; the text lists which.
    """
    if head not in ("strict", "new"):
        raise ConfigError(f"head must be 'strict' or 'new', got {head!r}")
    name, checkpoint = (
        ("state dict", source) if isinstance(source, Mapping) else (str(source), read_checkpoint(source))
    )
    weights = _state_dict(checkpoint, name)
    if isinstance(model, Baseline):
        weights = {key if key.startswith("net.") else f"net.{key}": value for key, value in weights.items()}
    else:
        weights = official_names(weights, name)
    report = _load(model, weights, name, adapt=isinstance(model, MViT), new_head=head == "new")
    metadata = checkpoint.get(METADATA_KEY) or {}
    trained = metadata.get("protocol") or {}
    known = tuple(tuple(trained.get(key) or getattr(model.protocol, key)) for key in ("mean", "std"))
    if known != (model.protocol.mean, model.protocol.std):
        log.warning(
            "%s: the weights were trained with mean %s and std %s, "
            "the model normalises with mean %s and std %s",
            name,
            *known,
            model.protocol.mean,
            model.protocol.std,
        )
    class_names = metadata.get("class_names")
    if class_names and head == "strict":
        model.class_names = tuple(class_names)
    return report


def save_weights(model: VideoModel, path: str | Path) -> None:
    """Save weights with what ``load_model`` needs: config, protocol and class names.

    ``.safetensors`` gives a safetensors file, anything else a file that PySlowFast reads as well
    ("model_state", its names; and "cfg", its configuration, unless its options can't express the model).
    """
    path, metadata = Path(path), model_metadata(model)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(weights, path, {METADATA_KEY: json.dumps(metadata)})
    else:
        content = {"epoch": 0, "model_state": weights, METADATA_KEY: metadata}
        with contextlib.suppress(CheckpointError):
            if isinstance(model, MViT):
                content["cfg"] = yaml.safe_dump(slowfast_config(model.config, model.protocol))
        torch.save(content, path)


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


def checkpoint_names(checkpoint: Mapping[str, Any], name: str) -> set[str]:
    """The official names of the weights in a checkpoint of any known kind; ``name`` is for errors."""
    return set(official_names(_state_dict(checkpoint, name), name))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file as plain data onto the CPU. Raises CheckpointError where that fails."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if _is_safetensors(path):
        return _read_safetensors(path)
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


def _is_safetensors(path: Path) -> bool:
    """Such files start with the length of a json header and that header."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = (file.metadata() or {}).get(METADATA_KEY)
        return {"model_state": weights} | ({METADATA_KEY: json.loads(metadata)} if metadata else {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged ({error})") from None


def _state_dict(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The model's weights inside a checkpoint of any known kind."""
    # "model_state": PySlowFast; "state_dict": Lightning, among others.
    key = next((key for key in ("model_state", "state_dict") if key in checkpoint), None)
    weights = checkpoint[key] if key else checkpoint
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{name}: no weights found; its keys are {', '.join(map(str, list(checkpoint)[:8]))}"
        )
    for entry, value in weights.items():
        if not isinstance(entry, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name}: no weights: {entry!r} is a {type(value).__name__}, not a tensor")
    if key == "state_dict":  # of Lightning: the model is a member of the training module
        member = {k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")}
        return member or dict(weights)
    return dict(weights)


def _load(
    model: VideoModel, weights: Mapping[str, Tensor], name: str, *, adapt: bool = True, new_head: bool = False
) -> LoadReport:
    expected = model.state_dict()
    head, head_weight = f"{model.classifier}.", f"{model.classifier}.weight"
    kept = [key for key in expected if new_head and key.startswith(head)]
    if new_head:
        weights = {key: value for key, value in weights.items() if not key.startswith(head)}
    elif head_weight in weights and len(weights[head_weight]) != len(expected[head_weight]):
        raise CheckpointError(
            f"{name}: its head has {len(weights[head_weight])} classes, "
            f"the model has {len(expected[head_weight])}; "
            "a new head can be asked for (head=new)"
        )
    fitted: dict[str, Tensor] = {}
    how: dict[str, list[str]] = {"loaded": [], "reshaped": [], "inflated": [], "interpolated": []}
    problems = []
    for key, value in expected.items():
        if key not in weights:
            continue
        found = weights[key]
        if found.is_floating_point() != value.is_floating_point() or found.layout is not torch.strided:
            problems.append(f"{key} holds {found.dtype} ({found.layout}), expected dense floats")
            continue
        result: tuple[Tensor, str] | None = (found, "loaded")
        if found.shape != value.shape:
            result = None
            if adapt and isinstance(model, MViT):
                result = adapted(key, found, tuple(value.shape), model.grid)
        if result is None:
            problems.append(f"{key} is {tuple(found.shape)}, expected {tuple(value.shape)}")
        else:
            fitted[key] = result[0]
            how[result[1]].append(key)
    if how["inflated"]:  # an image model has no time
        kept += [key for key in expected if key == "cls_token" or key.endswith("rel_pos_t")]
    fresh = [key for key in kept if key not in weights]
    problems = [
        *(f"missing {key}" for key in expected if key not in weights and key not in fresh),
        *(f"unexpected {key}" for key in weights if key not in expected),
        *problems,
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(f"{name}: doesn't fit the model: {'; '.join(problems[:6])}{more}")
    model.load_state_dict(fitted, strict=False)
    return LoadReport(**{key: tuple(names) for key, names in how.items()}, fresh=tuple(fresh))


def _built_from_slowfast(checkpoint: Mapping[str, Any], name: str) -> MViT:
    weights = checkpoint.get("model_state")
    model = MViT(*described_by(checkpoint, name))
    if weights is not None:
        _load(model, _state_dict({"model_state": weights}, name), name, adapt=False)
    return model.eval()


def described_by(checkpoint: Mapping[str, Any], name: str) -> tuple[MViTConfig, ClipSpec]:
    """The model and protocol that the cfg of a PySlowFast checkpoint describes; ``name`` is for errors."""
    cfg = checkpoint["cfg"]
    if isinstance(cfg, str):
        cfg = _parse_yaml(cfg, name)
    return translate_config(cfg, name, checkpoint.get("model_state") or ())


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{name}: its cfg is no plain yaml ({error})".replace("\n", " ")) from None
