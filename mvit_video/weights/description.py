"""What a file says about its model: believed only where the shapes of its tensors bear it out."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvit_video.errors import CheckpointError, refusing
from mvit_video.io.fingerprint import file_sha256
from mvit_video.model.base import VideoModel
from mvit_video.model.baselines import Baseline, BaselineConfig
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import MAX_TOKENS, MViTConfig, floor_divide
from mvit_video.model.fields import check_types
from mvit_video.model.mvit import MViT
from mvit_video.model.variants import VARIANTS
from mvit_video.weights.reading import METADATA_KEY, distinct_names, is_plain, require_bounded

# Far above any model's, far below what would fill a machine's memory.
MAX_BLOCKS = 1000
MAX_PARAMETERS = 10**10
_MAX_PIXELS = 2**30  # of all views of a video

# Fields of a config that weights fit whatever they are, or that follow from the data.
NOT_ARCHITECTURE = {
    "num_classes",
    "dropout",
    "drop_path",
    "head_dropout",
    "head_init_scale",
    "checkpoint_blocks",
}


@dataclass(frozen=True)
class Description:
    """What builds a model again: all that a checkpoint of this toolkit holds beside the weights.

    Raises ValueError for what no video model is like, or would fill a machine's memory.
    """

    config: MViTConfig | BaselineConfig
    protocol: ClipSpec
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        config, spec = self.config, self.protocol
        blocks, tokens = 0, 0
        if isinstance(config, MViTConfig):
            grid = floor_divide((spec.clip_frames, spec.crop, spec.crop), config.patch_stride)
            blocks, tokens = sum(config.stages), math.prod(grid)
        pixels = spec.num_clips * spec.num_crops * spec.clip_frames * spec.short_side**2
        for what, count, most in (
            ("blocks of the model", blocks, MAX_BLOCKS),
            ("tokens of a clip", tokens, MAX_TOKENS),
            ("pixels of all views", pixels, _MAX_PIXELS),
        ):
            if count > most:
                raise ValueError(f"{count} {what}, at most {most} are possible")
        if self.class_names is not None and len(self.class_names) != config.num_classes:
            raise ValueError(f"{len(self.class_names)} class_names for num_classes {config.num_classes}")


def model_metadata(model: VideoModel) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build ``model`` again: plain dicts and lists."""
    return {
        "config": asdict(model.config),
        "protocol": asdict(model.protocol),
        "class_names": list(model.class_names) if model.class_names else None,
        **({"multi_label": True} if model.multi_label else {}),
    }


def describing(name: str, what: str = "model") -> AbstractContextManager[None]:
    """Whatever the description in a file makes go wrong becomes a CheckpointError, which names the file."""
    return refusing(CheckpointError, f"{name}: its description of the {what} can't be used")


def plain_metadata(metadata: Any, name: str, *tasks: str) -> dict[str, Any]:
    """What a file says of its model, as it is or as JSON text. Raises CheckpointError for other tasks."""
    with describing(name):
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        require_bounded(metadata)
        if (task := metadata.get("task", "classification")) not in tasks:
            raise CheckpointError(f"{name}: a checkpoint of the task {task}, not of {tasks[-1]}")
        return dict(metadata)


def own_metadata(checkpoint: Mapping[str, Any], name: str, task: str, example: str) -> dict[str, Any]:
    """The same of a checkpoint that must be of a task; ``example`` is the name of a model of it."""
    if METADATA_KEY not in checkpoint:
        raise CheckpointError(
            f"{name}: holds weights but not which model they belong to; name it too, for example "
            f"model={example}"
        )
    return plain_metadata(checkpoint[METADATA_KEY], name, task)


def parse_metadata(metadata: Any, name: str, *tasks: str) -> Description:
    """``model_metadata``, or its JSON text, read back from the file ``name``. Raises CheckpointError.

    Args:
        tasks: that the file may be of; without any, "classification".
    """
    metadata = plain_metadata(metadata, name, *tasks or ["classification"])
    with describing(name):
        names, kind = metadata["class_names"], BaselineConfig if "name" in metadata["config"] else MViTConfig
        names = (distinct_names(names) or None) if isinstance(names, list) else names
        spec = ClipSpec(**metadata["protocol"])
        return Description(kind(**metadata["config"]), spec, names, metadata.get("multi_label", False))


def build_empty(description: Description, weights: Mapping[str, Tensor] | None, name: str) -> VideoModel:
    """The described model without memory for its parameters, on the meta device.

    Raises:
        CheckpointError: it can't be built, or ``weights``, unless None, hold another number of blocks.
    """
    config, spec = description.config, description.protocol
    with describing(name):  # sizes that overflow, factors that leave nothing
        if isinstance(config, MViTConfig):
            depth = sum(config.stages)
            found = {match[1] for key in weights or () if (match := re.match(r"blocks\.(\d+)\.", key))}
            if weights is not None and depth != len(found):
                raise ValueError(f"stages have {depth} blocks, the weights {len(found)}")
        elif weights is not None:  # some of its tables are made on the CPU even here
            sizes = {len(value) for value in weights.values() if is_plain(value) and value.ndim}
            if config.num_classes not in sizes:
                raise ValueError(f"num_classes is {config.num_classes}, which no tensor has")
        with torch.device("meta"):
            return MViT(config, spec) if isinstance(config, MViTConfig) else Baseline(config, spec)


def as_overrides(config: MViTConfig | BaselineConfig) -> str:
    """What to type for a model of the same shape: ``"model=mvitv2_s_16x4 model.stages=[1,2]"``."""
    if isinstance(config, BaselineConfig):
        return f"model={config.name}"
    values = {field: value for field, value in asdict(config).items() if field not in NOT_ARCHITECTURE}
    changes = {
        name: {field: value for field, value in values.items() if value != getattr(variant.config, field)}
        for name, variant in VARIANTS.items()
    }
    nearest = min(changes, key=lambda name: len(changes[name]))
    texts = {
        field: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for field, value in changes[nearest].items()
    }
    return " ".join([f"model={nearest}", *(f"model.{field}={text}" for field, text in texts.items())])[:500]


def guess_variant(weights: Mapping[str, Tensor]) -> str:
    """The named model that bare weights with PySlowFast's names are most likely of."""
    shape = tuple(getattr(weights.get("patch_embed.proj.weight"), "shape", ()))
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    for name, variant in VARIANTS.items():
        config = variant.config
        if (sum(config.stages), config.embed_dim, 5 - config.patch_2d) == (depth, *shape[:1], len(shape)):
            return name
    return "mvitv2_s_16x4"


def weights_sha256(model: nn.Module) -> str:
    """The hexadecimal SHA-256 of a model's weights, whatever file they came from.

    Names, shapes and values count, so ask before the model is cast to another precision. An exported model is
    known by the content of its file.
    """
    if isinstance(path := getattr(model, "path", None), str):
        return file_sha256(path)
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name.replace('_orig_mod.', '')} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
