"""Weights into models, and models into files."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import safetensors.torch
import torch
import yaml
from torch import Tensor

from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.io.writing import interrupts_deferred, replacing
from mvit_video.model.base import VideoModel
from mvit_video.model.baselines import Baseline
from mvit_video.model.config import Grid
from mvit_video.model.mvit import MViT
from mvit_video.weights.description import (
    MAX_PARAMETERS,
    Description,
    as_overrides,
    build_empty,
    guess_variant,
    model_metadata,
    parse_metadata,
)
from mvit_video.weights.formats import PRETRAINING_ONLY, adapt_shape, is_pretraining, to_pyslowfast_keys
from mvit_video.weights.pyslowfast import infer_layout, make_cfg, parse_cfg, read_cfg
from mvit_video.weights.reading import METADATA_KEY, find_weights, is_plain, read_checkpoint

log = logging.getLogger(__name__)


@runtime_checkable
class LoadsWeights(Protocol):
    """A model of another task, which reads its own files."""

    def load_weights(self, source: Any, *, head: Literal["strict", "new"]) -> LoadReport: ...


@dataclass(frozen=True)
class LoadReport:
    """What became of each of the model's tensors, by name.

    Attributes:
        loaded: copied as they were.
        reshaped, inflated, interpolated: copied in another shape, see ``formats.adapt_shape``.
        fresh: not in the source, and left as they were initialised.
        prefix: what was removed in front of the source's names, such as ``"module."``.
    """

    loaded: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    inflated: tuple[str, ...] = ()
    interpolated: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    prefix: str = ""

    def __str__(self) -> str:
        """A line for each way, with the number of tensors and, where something happened to them, names."""
        lines = [f"{len(self.loaded)} tensors loaded"]
        if self.prefix:
            lines[0] += f", without the prefix {self.prefix}"
        for how in ("reshaped", "inflated", "interpolated", "fresh"):
            groups = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in getattr(self, how))
            names = [f"{name} (x{count})" if count > 1 else name for name, count in groups.items()]
            if names:
                lines.append(f"{groups.total()} {how}: {', '.join(names)}")
        return "\n".join(lines)


def load_model(path: str | Path) -> VideoModel:
    """Build the model that a checkpoint describes and load its weights, in eval mode on the CPU.

    Reads checkpoints of ``mvit-train``, files of ``save_weights`` and PySlowFast's ``.pyth`` files. Raises
    CheckpointError for a file that can't be read, holds weights alone, doesn't fit its own description, or
    holds NaN or infinity.
    """
    name, checkpoint = str(path), read_checkpoint(path)
    _require_classes(checkpoint, name)
    if METADATA_KEY in checkpoint:
        return _build(parse_metadata(checkpoint[METADATA_KEY], name), checkpoint, name)
    if "model_state" in checkpoint and "cfg" in checkpoint:
        return _from_pyslowfast(checkpoint, name)
    weights = to_pyslowfast_keys(find_weights(checkpoint, name)[0], name)
    raise CheckpointError(
        f"{name}: holds weights but not which model they belong to; name the model too, "
        f"for example model={guess_variant(weights)}"
    )


def load_weights(
    model: VideoModel | LoadsWeights,
    source: str | Path | Mapping[str, Any],
    *,
    head: Literal["strict", "new"] = "strict",
    fresh: Sequence[str] = (),
) -> LoadReport:
    """Load weights into ``model``, strictly; the format is found out from the file.

    Position tables of another resolution or clip length are interpolated, and weights of an image model are
    inflated to a video model, where the class token and the temporal tables then stay as initialised. Weights
    of a pre-training need ``head="new"`` and leave the last norm as initialised too. Any other difference in
    names or shapes is an error, and so is a NaN or an infinity.

    Args:
        model: with the architecture of the weights.
        source: a file or what is in one: a checkpoint of ``mvit-train``, of PySlowFast or of the official
            image code, a state dict with their names, torchvision's or timm's, or a safetensors file. Names
            may have the prefixes of DistributedDataParallel, ``torch.compile`` or a class around the model.
        head: "new" keeps the model's own head, as for other classes.
        fresh: further parts that stay as initialised, such as ``("blocks.14", "blocks.15")``: the last blocks
            may know too much of what they were trained for (arXiv 2006.05987).

    Raises:
        CheckpointError: the file can't be read, or names or shapes differ; the text lists which, and names
            the model that the file describes.
        ConfigError: the model has no such part.
    """
    require_head(head)
    if isinstance(model, LoadsWeights):
        if fresh:
            raise ConfigError("fresh: only a classifier can leave parts out")
        return model.load_weights(source, head=head)
    if isinstance(source, Mapping):
        return _load(model, source, "state dict", head, fresh)
    return _load(model, read_checkpoint(source), str(source), head, fresh)


def require_head(head: str) -> None:
    """Raises ConfigError for what isn't possible with the head of a model that takes weights."""
    if head not in ("strict", "new"):
        raise ConfigError(f"head must be 'strict' or 'new', got {head!r}")


def build_for_weights(
    build: Callable[..., VideoModel],
    path: str | Path,
    num_classes: int | None = None,
    *,
    head: Literal["strict", "new"] = "strict",
    fresh: Sequence[str] = (),
) -> tuple[VideoModel, LoadReport]:
    """The model that ``build(num_classes=...)`` gives, with the weights of a file.

    For those of a pre-training, ``build`` is also told where their channels double, ``dim_mul_in_attention``.

    Args:
        num_classes: of the model; None: as many as the weights have.
        head, fresh: as of ``load_weights``.

    Raises:
        CheckpointError: as ``load_weights``.
    """
    checkpoint, name = read_checkpoint(path), str(path)
    pretraining = is_pretraining(find_weights(checkpoint, name)[0])
    layout: dict[str, Any] = {}
    if num_classes is None or pretraining:
        with torch.device("meta"):
            empty = build(num_classes=num_classes)
        weights = _named_weights(empty, checkpoint, name)[0]
        if pretraining and isinstance(empty, MViT):
            config = infer_layout(empty.config, set(weights))
            layout = {"dim_mul_in_attention": config.dim_mul_in_attention}
        found = weights.get(f"{empty.classifier}.weight")
        if num_classes is None and found is not None and found.ndim and is_plain(found):
            num_classes = len(found)
    model = build(num_classes=num_classes, **layout)
    return model, _load(model, checkpoint, name, head, fresh)


def _load(
    model: VideoModel,
    checkpoint: Mapping[str, Any],
    name: str,
    head: Literal["strict", "new"],
    fresh: Sequence[str] = (),
) -> LoadReport:
    described = None
    if METADATA_KEY in checkpoint:
        described = parse_metadata(checkpoint[METADATA_KEY], name, model.task, "classification")
    weights, prefix = _named_weights(model, checkpoint, name)
    pretraining = is_pretraining(weights)
    if pretraining:
        if head == "strict":
            _require_classes(checkpoint, name)
        weights = {key: value for key, value in weights.items() if not key.startswith(PRETRAINING_ONLY)}

    def hint() -> str:
        with contextlib.suppress(CheckpointError, KeyError):
            config: Any = model.config
            if pretraining and isinstance(model, MViT):
                config = infer_layout(config, set(weights))
            else:
                config = described.config if described else read_cfg(checkpoint, name).config
            if (own := as_overrides(config)) != as_overrides(model.config):
                return f"; the file describes another model: {own}"
        return ""

    grid = model.grid if isinstance(model, MViT) else None
    for part in fresh:
        if part not in dict(model.named_modules()):
            modules = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"fresh: the model has no {part!r}; it has: {modules}")
    parts = [model.classifier] * (head == "new") + ["norm"] * pretraining + list(fresh)
    kept = [f"{part}." for part in parts]
    fitted, report = _fit(model, weights, name, grid=grid, own=tuple(kept), hint=hint)
    model.load_state_dict(fitted, strict=False)
    if described:
        trained, own = described.protocol, model.protocol
        if (trained.mean, trained.std) != (own.mean, own.std):
            log.warning(
                "%s: the weights were trained with mean %s and std %s, "
                "the model normalises with mean %s and std %s",
                *(name, trained.mean, trained.std, own.mean, own.std),
            )
        if described.class_names and head == "strict":
            model.class_names = described.class_names
        if head == "strict":
            model.multi_label = described.multi_label
    return replace(report, prefix="" if described else prefix)


def save_weights(model: VideoModel, path: str | Path) -> None:
    """Save weights with what ``load_model`` needs: config, protocol and class names.

    ``.safetensors`` gives a safetensors file, anything else a file that PySlowFast reads as well
    ("model_state", its names; and "cfg", its configuration, unless its options can't express the model).
    What the path held before stays if this fails.
    """
    metadata = model_metadata(model)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    content: dict[str, Any] = {"epoch": 0, "model_state": weights, METADATA_KEY: metadata}
    with contextlib.suppress(CheckpointError):
        if isinstance(model, MViT):
            content["cfg"] = yaml.safe_dump(make_cfg(model.config, model.protocol))
    if Path(path).suffix == ".safetensors":
        with replacing(path) as file:
            file.write(safetensors.torch.save(weights, {METADATA_KEY: json.dumps(metadata)}))
    else:
        write_checkpoint(content, path)


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """``torch.save`` in one step, and to its end where Ctrl-C comes."""
    with interrupts_deferred(), replacing(path) as file:
        torch.save(content, file)


def from_slowfast(source: str | Path | Mapping[str, Any]) -> MViT:
    """Build the MViT that a PySlowFast checkpoint describes and load its weights, in eval mode.

    Args:
        source: a ``.pyth`` file or a dict with "model_state" and "cfg" (yaml text or a nested dict). A
            configuration alone, as a ``.yaml`` file or a dict with "MVIT", gives a model with fresh weights.

    Raises:
        CheckpointError: the file can't be read, its configuration uses an option that this model doesn't
            have (named in the text), or the weights don't fit.
    """
    name = "checkpoint" if isinstance(source, Mapping) else str(source)
    path = Path(name)
    if isinstance(source, Mapping) and "MVIT" in source:
        return _from_configuration(source, name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _from_configuration(path.read_text(encoding="utf-8", errors="replace"), name)
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    if missing := {"model_state", "cfg"} - set(checkpoint):
        absent = " and no ".join(sorted(missing))
        raise CheckpointError(f"{name}: not a PySlowFast checkpoint, it has no {absent}")
    return _from_pyslowfast(checkpoint, name)


def _from_configuration(cfg: Any, name: str) -> MViT:
    description = parse_cfg(cfg, name)
    empty = build_empty(description, None, name)
    if (count := sum(parameter.numel() for parameter in empty.parameters())) > MAX_PARAMETERS:
        raise CheckpointError(f"{name}: describes a model of {count} parameters, too many to build")
    return MViT(empty.config, description.protocol).eval()


def _from_pyslowfast(checkpoint: Mapping[str, Any], name: str) -> MViT:
    _require_classes(checkpoint, name)
    model = _build(read_cfg(checkpoint, name), {"model_state": checkpoint["model_state"]}, name)
    assert isinstance(model, MViT)
    return model


def _build(description: Description, checkpoint: Mapping[str, Any], name: str) -> VideoModel:
    """The described model with the checkpoint's weights; memory is taken once both fit together."""
    weights = find_weights(checkpoint, name)[0]
    model = build_empty(description, weights, name)
    fitted, _ = _fit(model, _named_weights(model, checkpoint, name)[0], name)
    if isinstance(model, MViT):  # the tensors become the model's, so none may be the caller's
        model.load_state_dict(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in fitted.items()},
            assign=True,
        )
    else:  # other libraries' models hold more than their weights
        model = type(model)(description.config, description.protocol)
        model.load_state_dict(fitted)
    model.class_names, model.multi_label = description.class_names, description.multi_label
    return model.eval()


def _named_weights(
    model: VideoModel, checkpoint: Mapping[str, Any], name: str
) -> tuple[dict[str, Tensor], str]:
    """The checkpoint's weights by the names of ``model``, and the prefix that was removed."""
    weights, prefix = find_weights(checkpoint, name)
    if isinstance(model, Baseline):
        return {f"net.{key}": value for key, value in weights.items()}, prefix.removesuffix("net.")
    return to_pyslowfast_keys(weights, name), prefix


def _fit(
    model: VideoModel,
    weights: Mapping[str, Tensor],
    name: str,
    *,
    grid: Grid | None = None,
    own: tuple[str, ...] = (),
    hint: Callable[[], str] = str,
) -> tuple[dict[str, Tensor], LoadReport]:
    """See ``fit_weights``.

    Args:
        grid: of the model's tokens (T, H, W), for weights of clips of another size; None: shapes must agree.
        own: what the names begin with of tensors that stay as initialised.
    """
    expected, head = model.state_dict(), f"{model.classifier}."
    kept = [key for key in expected if key.startswith(own)]
    weights = {key: value for key, value in weights.items() if not key.startswith(own)}
    if head not in own:
        _check_head(weights.get(f"{head}weight"), expected[f"{head}weight"], name, hint)
    adapt = functools.partial(adapt_shape, grid=grid) if grid else None
    return fit_weights(expected, weights, name, kept=kept, adapt=adapt, hint=hint)


def fit_weights(
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    name: str,
    *,
    kept: Collection[str],
    adapt: Callable[[str, Tensor, tuple[int, ...]], tuple[Tensor, str] | None] | None = None,
    hint: Callable[[], str] = str,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Weights in the shapes and types of a model's state dict, which may be on the meta device.

    Args:
        expected: the state dict.
        name: of the weights' file.
        kept: names that may be missing, as their tensors stay as initialised.
        adapt: a weight in another shape and how that was done, see ``adapt_shape``; None: shapes must agree.
        hint: gives what to add to the error where names or shapes differ.

    Raises:
        CheckpointError: names or shapes differ, or a number is NaN or infinite.
    """
    fitted: dict[str, Tensor] = {}
    how: dict[str, list[str]] = {"loaded": [], "reshaped": [], "inflated": [], "interpolated": []}
    misfits = []
    for key in (key for key in expected if key in weights):
        found, value = weights[key], expected[key]
        if not found.numel() or not is_plain(found) or found.is_floating_point() != value.is_floating_point():
            misfits.append(f"{key} holds {found.dtype} ({found.layout}), expected dense floats")
        elif found.shape == value.shape:
            fitted[key] = found.to(value.dtype)
            how["loaded"].append(key)
        elif adapt and (adapted := adapt(key, found.to(value.dtype), tuple(value.shape))):
            fitted[key] = adapted[0]
            how[adapted[1]].append(key)
        else:
            misfits.append(f"{key} is {tuple(found.shape)}, expected {tuple(value.shape)}")
    if how["inflated"]:  # an image model has no time
        kept = [*kept, *(key for key in expected if key == "cls_token" or key.endswith("rel_pos_t"))]
    fresh = [key for key in kept if key not in weights]
    problems = [
        *(f"missing {key}" for key in expected if key not in weights and key not in fresh),
        *(f"unexpected {key[:80]}" for key in weights if key not in expected),
        *misfits,
    ]
    if problems:
        said = hint()
        count = 1 if said else 6  # the names of another model's weights help nobody
        more = f"; and {len(problems) - count} more" if len(problems) > count else ""
        raise CheckpointError(f"{name}: doesn't fit the model: {'; '.join(problems[:count])}{more}{said}")
    for key, value in fitted.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity: these weights give no predictions")
    ways: dict[str, Any] = {key: tuple(names) for key, names in how.items()}
    return fitted, LoadReport(**ways, fresh=tuple(fresh))


def _require_classes(checkpoint: Mapping[str, Any], name: str) -> None:
    if is_pretraining(find_weights(checkpoint, name)[0]):
        raise CheckpointError(
            f"{name}: a model pre-trained without labels, it knows no classes; fine-tune it: mvit-train "
            f"experiment=finetune head=new weights={name}"
        )


def _check_head(found: Tensor | None, expected: Tensor, name: str, hint: Callable[[], str]) -> None:
    if found is not None and found.ndim and len(found) != len(expected):
        raise CheckpointError(
            f"{name}: its head has {len(found)} classes, the model has {len(expected)}; "
            f"num_classes={len(found)} builds it with as many, mvit-train head=new trains a new head, "
            f"mvit-eval class_names=FILE class_map=names evaluates the classes that match{hint()}"
        )
