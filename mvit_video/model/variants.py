"""The models that have names, each with the protocol that it is trained and tested by."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, replace
from typing import Any

from mvit_video.errors import ConfigError
from mvit_video.model.mvit import MViT, MViTConfig
from mvit_video.model.protocol import Protocol


@dataclass(frozen=True)
class Variant:
    config: MViTConfig
    protocol: Protocol


VARIANTS = {
    # Paper, table 1 and the official configuration for Kinetics-400.
    "mvitv2_s_16x4": Variant(
        MViTConfig(embed_dim=96, num_heads=1, stages=(1, 2, 11, 2), num_frames=16, crop_size=224),
        Protocol(clip_frames=16, stride=4, num_clips=5, num_crops=1, short_side=256, crop=224),
    ),
    # Not from the paper: small enough to train on two CPU cores in minutes.
    "mvitv2_nano_8x4": Variant(
        MViTConfig(
            embed_dim=32,
            num_heads=1,
            stages=(1, 2, 2),
            num_frames=8,
            crop_size=64,
            kv_stride=(1, 4, 4),
            drop_path=0.0,
            head_dropout=0.0,
        ),
        Protocol(clip_frames=8, stride=4, num_clips=5, num_crops=1, short_side=64, crop=64),
    ),
}


def list_models() -> list[str]:
    """Names that ``create_model`` knows."""
    return sorted(VARIANTS)


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> MViT:
    """Build a model by name, with fresh weights.

    Args:
        name: one of ``list_models()``.
        num_classes: outputs of the head; the variant's own where None.
        overrides: fields of ``MViTConfig`` that differ from the variant's. The model's protocol follows
            ``num_frames`` and ``crop_size``.

    Raises:
        ConfigError: for an unknown name or field.
        ValueError: for a value out of range.
    """
    if name not in VARIANTS:
        raise ConfigError(
            f"unknown model {name!r}{_did_you_mean(name, VARIANTS)}; known: {', '.join(list_models())}"
        )
    variant = VARIANTS[name]
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    config = replace_fields(variant.config, overrides)
    protocol = variant.protocol
    if config.num_frames != variant.config.num_frames or config.crop_size != variant.config.crop_size:
        short_side = round(protocol.short_side * config.crop_size / protocol.crop)
        protocol = replace(
            protocol, clip_frames=config.num_frames, crop=config.crop_size, short_side=short_side
        )
    return MViT(config, protocol)


def replace_fields(config: Any, overrides: dict[str, Any]) -> Any:
    """A copy of a config dataclass with other values; ConfigError for a field that it doesn't have."""
    fields = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in fields:
            kind = type(config).__name__
            raise ConfigError(
                f"{kind} has no {key!r}{_did_you_mean(key, fields)}; it has: {', '.join(fields)}"
            )
    # Lists come from yaml; the dataclasses hold tuples.
    return replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()})


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
