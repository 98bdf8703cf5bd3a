"""What a file says about its model: believed only where the shapes of its tensors bear it out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mvit_video.errors import CheckpointError, brief
from mvit_video.model.base import VideoModel
from mvit_video.model.baselines import Baseline, BaselineConfig
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import MViTConfig
from mvit_video.model.mvit import MViT
from mvit_video.model.variants import VARIANTS, replace_fields
from mvit_video.weights.reading import is_plain, require_bounded

# Far above any model's, far below what would fill a machine's memory.
MAX_BLOCKS = 1000
MAX_PARAMETERS = 10**10
_MOST = {
    "clip_frames": 4096,
    "stride": 4096,
    "target_fps": 1000,
    "num_clips": 4096,
    "short_side": 4096,
    "crop": 4096,
}
_MAX_PIXELS = 2**30  # of all views of a video
_MAX_TOKENS = 2**22  # of a clip

# Fields of a config that weights fit whatever they are, or that follow from the data.
_FREE = {"num_classes", "dropout", "drop_path", "head_dropout", "head_init_scale", "checkpoint_blocks"}


@dataclass(frozen=True)
class Description:
    """What builds a model again: all that a checkpoint of this toolkit holds beside the weights."""

    config: MViTConfig | BaselineConfig
    protocol: ClipSpec
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what no video model is like."""
        check_clip_spec(self.protocol)
        config, names = self.config, self.class_names
        if isinstance(config, MViTConfig):
            spec, stride = self.protocol, config.patch_stride
            tokens = spec.clip_frames // stride[0] * (spec.crop // stride[1]) * (spec.crop // stride[2])
            if tokens > _MAX_TOKENS:
                raise ValueError(f"a clip has {tokens} tokens, at most {_MAX_TOKENS} are possible")
            if sum(config.stages) > MAX_BLOCKS:
                raise ValueError(f"{sum(config.stages)} blocks, at most {MAX_BLOCKS} are possible")
        else:
            for field in ("num_classes", "num_frames", "crop_size"):
                value = getattr(config, field)
                if type(value) is not int or (field != "num_classes" and value > _MOST["crop"]):
                    raise ValueError(f"{field} must be a whole number up to {_MOST['crop']}, got {value}")
        if names is None:
            return
        if not all(isinstance(name, str) for name in names):
            raise ValueError("class_names must be a list of texts")
        if len(names) != config.num_classes:
            raise ValueError(f"{len(names)} class_names for num_classes {config.num_classes}")


def check_clip_spec(spec: ClipSpec) -> None:
    """Raises ValueError for views that no model is tested with, or that would fill a machine's memory."""
    for field, most in _MOST.items():
        value = getattr(spec, field)
        kinds = (int, float) if field == "target_fps" else (int,)
        if type(value) not in kinds or not 0 < value <= most:
            raise ValueError(f"{field} must be a number from 1 to {most}, got {value}")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (*spec.mean, *spec.std)):
        raise ValueError(f"mean and std must be finite numbers, got {spec.mean} and {spec.std}")
    pixels = spec.num_clips * spec.num_crops * spec.clip_frames * spec.short_side**2
    if pixels > _MAX_PIXELS:
        raise ValueError(f"the views of a video have {pixels} pixels, at most {_MAX_PIXELS} are possible")


def model_metadata(model: VideoModel) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build ``model`` again: plain dicts and lists."""
    return {
        "config": asdict(model.config),
        "protocol": asdict(model.protocol),
        "class_names": list(model.class_names) if model.class_names else None,
    }


def parse_metadata(metadata: Any, name: str) -> Description:
    """``model_metadata``, or its JSON text, read back from the file ``name``. Raises CheckpointError."""
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        require_bounded(metadata)
        values, names = dict(metadata["config"]), metadata["class_names"]
        if not isinstance(names, list | tuple | None):
            raise TypeError(f"class_names are a {type(names).__name__}")
        config = BaselineConfig(**values) if "name" in values else replace_fields(MViTConfig(), values)
        spec = replace_fields(ClipSpec(), dict(metadata["protocol"]))
        return Description(config, spec, tuple(names) if names else None)
    except Exception as error:  # a file can hold anything in the place of anything
        raise CheckpointError(
            f"{name}: its description of the model can't be used ({brief(error)})"
        ) from None


def build_empty(description: Description, weights: Mapping[str, Tensor] | None, name: str) -> VideoModel:
    """The described model without memory for its parameters, on the meta device.

    Raises:
        CheckpointError: it can't be built, or ``weights``, unless None, hold another number of blocks.
    """
    config, spec = description.config, description.protocol
    try:
        if isinstance(config, BaselineConfig):
            # Some of its tables are made on the CPU even here.
            if weights is not None and not any(
                is_plain(v) and v.ndim and len(v) == config.num_classes for v in weights.values()
            ):
                raise ValueError(f"num_classes is {config.num_classes}, which no tensor has")
            with torch.device("meta"):
                return Baseline(config, spec)
        depth = sum(config.stages)
        found = {match[1] for key in weights or () if (match := re.match(r"blocks\.(\d+)\.", key))}
        if weights is not None and depth != len(found):
            raise ValueError(f"stages have {depth} blocks, the weights {len(found)}")
        with torch.device("meta"):
            return MViT(config, spec)
    except Exception as error:  # sizes that overflow, factors that leave nothing
        raise CheckpointError(
            f"{name}: its description of the model can't be used ({brief(error)})"
        ) from None


def as_overrides(config: MViTConfig | BaselineConfig) -> str:
    """What to type for a model of the same shape: ``"model=mvitv2_s_16x4 model.stages=[1,2]"``."""
    if isinstance(config, BaselineConfig):
        return f"model={config.name}"
    values = {field: value for field, value in asdict(config).items() if field not in _FREE}
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
    return next(
        (
            name
            for name, variant in VARIANTS.items()
            if (sum(variant.config.stages), variant.config.embed_dim) == (depth, *shape[:1])
            and variant.config.patch_2d == (len(shape) == 4)
        ),
        "mvitv2_s_16x4",
    )
