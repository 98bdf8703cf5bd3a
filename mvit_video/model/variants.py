"""The models that have names, each with the protocol that it is trained and tested by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mvit_video.errors import ConfigError
from mvit_video.model.clip_spec import IMAGENET_MEAN, IMAGENET_STD, ClipSpec
from mvit_video.model.config import MViTConfig
from mvit_video.model.fields import replace_fields
from mvit_video.model.mvit import MViT


@dataclass(frozen=True)
class Variant:
    config: MViTConfig
    protocol: ClipSpec


_IMAGENET = ClipSpec(mean=IMAGENET_MEAN, std=IMAGENET_STD)

# Kinetics-400. MViTv2 paper, table 1, and the official configurations.
_S = MViTConfig(embed_dim=96, num_heads=1, stages=(1, 2, 11, 2), drop_path=0.2)
_B = MViTConfig(embed_dim=96, num_heads=1, stages=(2, 3, 16, 3), drop_path=0.3, num_frames=32)
_L = MViTConfig(
    embed_dim=144, num_heads=2, stages=(2, 6, 36, 4), drop_path=0.75, num_frames=40, crop_size=312
)
_L_CLIPS = replace(_IMAGENET, clip_frames=40, stride=3, num_crops=3, short_side=312, crop=312)

# Kinetics-400. MViT paper (arXiv 2104.11227): no relative positions, no residual, widening in MLPs.
_V1_B = MViTConfig(
    stages=(1, 2, 11, 2),
    abs_pos="separable",
    rel_pos_temporal=False,
    rel_pos_spatial=False,
    residual_pooling=False,
    pool_q_every_block=False,
    dim_mul_in_attention=False,
)

# ImageNet-1K. MViTv2 paper, table 1 and appendix.
_IMAGE = MViTConfig(
    num_classes=1000,
    num_frames=1,
    patch_kernel=(1, 7, 7),
    patch_stride=(1, 4, 4),
    patch_2d=True,
    pool_kernel=(1, 3, 3),
    kv_stride=(1, 4, 4),
    class_token=False,
    rel_pos_temporal=False,
    head_dropout=0.0,
)
_IMAGE_PROTOCOL = replace(_IMAGENET, clip_frames=1, stride=1, num_clips=1, pixels="image")
# Not from the paper: small enough to train on two CPU cores in minutes.
_NANO = MViTConfig(
    embed_dim=32,
    stages=(1, 1, 1),
    num_frames=8,
    crop_size=64,
    kv_stride=(1, 4, 4),
    window=(4, 8, 8),
    drop_path=0.0,
    head_dropout=0.0,
)


def _image(**layout: Any) -> Variant:
    return Variant(replace(_IMAGE, **layout), _IMAGE_PROTOCOL)


VARIANTS = {
    "mvitv2_s_16x4": Variant(_S, ClipSpec(clip_frames=16, stride=4)),
    "mvitv2_b_32x3": Variant(_B, ClipSpec(clip_frames=32, stride=3)),
    "mvitv2_l_40x3": Variant(_L, _L_CLIPS),
    "mvitv1_b_16x4": Variant(_V1_B, ClipSpec(clip_frames=16, stride=4)),
    "mvitv1_b_32x3": Variant(
        replace(_V1_B, num_frames=32, drop_path=0.3), ClipSpec(clip_frames=32, stride=3)
    ),
    "mvitv2_t_224": _image(stages=(1, 2, 5, 2), drop_path=0.1),
    "mvitv2_s_224": _image(stages=(1, 2, 11, 2), drop_path=0.1),
    "mvitv2_b_224": _image(stages=(2, 3, 16, 3), drop_path=0.3),
    # The published L widens in MLPs.
    "mvitv2_l_224": _image(
        embed_dim=144, num_heads=2, stages=(2, 6, 36, 4), drop_path=0.5, dim_mul_in_attention=False
    ),
    # Published for ImageNet-21K, with a class token; the drop path is that of its detection model.
    "mvitv2_h_224": _image(embed_dim=192, num_heads=3, stages=(4, 8, 60, 8), drop_path=0.6, class_token=True),
    "mvitv2_nano_8x4": Variant(_NANO, ClipSpec(clip_frames=8, stride=4, short_side=64, crop=64)),
}


def list_models() -> list[str]:
    """Names that ``create_model`` knows."""
    return sorted(VARIANTS)


def change_variant(variant: Variant, overrides: Mapping[str, Any]) -> Variant:
    """A variant with other fields of ``MViTConfig``, which its protocol follows; None leaves one."""
    config, protocol = replace_fields(variant.config, overrides), variant.protocol
    if config.num_frames != variant.config.num_frames or config.crop_size != variant.config.crop_size:
        short_side = protocol.short_side * config.crop_size // protocol.crop  # rounded down, as officially
        protocol = replace(
            protocol, clip_frames=config.num_frames, crop=config.crop_size, short_side=short_side
        )
    return Variant(config, protocol)


def build(variant: Variant, **overrides: Any) -> MViT:
    """A model with fresh weights from a variant and the fields of ``MViTConfig`` that differ from it."""
    changed = change_variant(variant, overrides)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MViT(changed.config).parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * parameters > memory:  # the system would end the process without a word
        raise ConfigError(
            f"a model of {parameters / 1e9:.1f} billion parameters takes {4 * parameters / 1e9:.0f} GB, this "
            f"machine has {memory / 1e9:.0f} GB: choose a smaller embed_dim, stages or mlp_ratio"
        )
    return MViT(changed.config, changed.protocol)


def change_views(protocol: ClipSpec, **values: Any) -> ClipSpec:
    """A copy of a protocol with other values, of which None leaves what there is.

    As in the official code, three crops are cut out of a picture whose short side is the crop, unless
    ``values`` has a ``short_side``. Raises ConfigError for an unknown field, ValueError for a bad value.
    """
    if values.get("num_crops") == 3 and values.get("short_side") is None:
        values["short_side"] = values.get("crop") or protocol.crop
    return replace_fields(protocol, values)
