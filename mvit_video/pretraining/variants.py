"""The pre-trainings that have names (``configs/masked_ssl`` of facebookresearch/SlowFast at 287ec007)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mvit_video.errors import look_up
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import pooling_strides
from mvit_video.model.variants import VARIANTS, Variant, change_variant
from mvit_video.pretraining.maskfeat import Features, MaskFeat


def _pretrained(classifier: str, clips: ClipSpec, **layout: Any) -> Variant:
    regular = {"drop_path": 0.0, "head_dropout": 0.0}
    return Variant(replace(VARIANTS[classifier].config, **(regular | layout)), clips)


# The official ones widen in MLPs, as their classifiers do after fine-tuning.
PRETRAINERS = {
    "maskfeat_mvitv2_s_16x4": _pretrained("mvitv2_s_16x4", ClipSpec(), dim_mul_in_attention=False),
    "maskfeat_mvitv2_l_16x4": _pretrained(
        "mvitv2_l_40x3", ClipSpec(), dim_mul_in_attention=False, num_frames=16, crop_size=224
    ),
    "maskfeat_mvitv2_nano_8x4": _pretrained("mvitv2_nano_8x4", VARIANTS["mvitv2_nano_8x4"].protocol),
}


def list_pretrainers() -> list[str]:
    """Names that ``create_pretrainer`` knows."""
    return sorted(PRETRAINERS)


def create_pretrainer(
    name: str,
    *,
    depths: Sequence[int] | None = None,
    features: Features = "hog",
    weights: None = None,
    **overrides: Any,
) -> MaskFeat:
    """Build a model for pre-training by name, with fresh weights.

    The last stage (of three or more) keeps the grid of the stage before; all else is as in the classifier,
    whose weights it so gives. With ``dim_mul_in_attention=True``, that is the ordinary MViTv2 of
    ``create_model``.

    Args:
        name: one of ``list_pretrainers()``.
        depths, features: see ``MaskFeat``; None: the last block.
        weights: always None; files are loaded by ``mvit_video.load_weights``.
        overrides: fields of ``MViTConfig`` that differ; None leaves the variant's.

    Raises:
        ConfigError: for an unknown name or field.
        ValueError: for a value out of range.
    """
    variant = change_variant(look_up(name, PRETRAINERS, "pre-training"), overrides)
    config = variant.config
    if overrides.get("q_strides") is None and len(config.stages) > 2:
        strides = pooling_strides(config)[0] | {config.stage_starts[-1]: (1, 1, 1)}
        config = replace(config, q_strides=tuple((block, *stride) for block, stride in strides.items()))
    last = (sum(config.stages) - 1,)
    return MaskFeat(
        config, depths=last if depths is None else tuple(depths), features=features, protocol=variant.protocol
    )
