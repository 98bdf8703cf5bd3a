"""The detectors that have names (MViTv2 paper, table 5; detectron2's ``projects/MViTv2`` at 02b5c4e2)."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from mvit_video.detection.detector import Detector, DetectorConfig
from mvit_video.errors import look_up
from mvit_video.model import MViTConfig
from mvit_video.model.fields import replace_fields


def _backbone(
    stages: tuple[int, ...], drop_path: float, embed_dim: int = 96, num_heads: int = 1, **more: Any
) -> MViTConfig:
    """The layout of the image models, with windows except at the end of the last three stages (Hwin)."""
    kv_strides: list[int] = []
    for depth, stride, last in zip(stages, (4, 2, 1, 1), (4, 4, 2, 1), strict=True):
        kv_strides += [stride] * (depth - 1) + [last]
    return MViTConfig(
        num_classes=1,
        num_frames=1,
        embed_dim=embed_dim,
        num_heads=num_heads,
        stages=stages,
        patch_kernel=(1, 7, 7),
        patch_stride=(1, 4, 4),
        patch_2d=True,
        pool_kernel=(1, 3, 3),
        kv_stride=(1, 4, 4),
        kv_strides=tuple((block, 1, stride, stride) for block, stride in enumerate(kv_strides)),
        class_token=False,
        rel_pos_temporal=False,
        rel_pos_zero_init=True,
        attention="pooling_hybrid_window",
        window=(1, 56, 56),
        window_padding=True,
        drop_path=drop_path,
        **more,
    )


_BACKBONES = {
    "t": _backbone((1, 2, 5, 2), 0.2),
    "s": _backbone((1, 2, 11, 2), 0.2),
    "b": _backbone((2, 3, 16, 3), 0.4),
    "l": _backbone((2, 6, 36, 4), 0.5, 144, 2),
    "h": _backbone((4, 8, 60, 8), 0.6, 192, 3, checkpoint_blocks=True),
}
_NANO = replace(
    _backbone((1, 1, 2, 1), 0.0, 32),
    attention="pooling",  # windows of few tokens would save nothing
    window_padding=False,
    crop_size=128,
)
DETECTORS = {
    f"{method}_mvitv2_{size}": DetectorConfig(backbone, cascade=method.startswith("cascade"))
    for method, sizes in (("mask_rcnn", "tsbl"), ("cascade_mask_rcnn", "tsblh"))
    for size, backbone in _BACKBONES.items()
    if size in sizes
}
# Small enough to train on two CPU cores in minutes, on small images.
DETECTORS["mask_rcnn_mvitv2_nano"] = DetectorConfig(
    _NANO,
    rpn_pre_nms_top_n_train=300,
    rpn_pre_nms_top_n_test=300,
    rpn_post_nms_top_n_train=150,
    rpn_post_nms_top_n_test=100,
    rpn_batch_size_per_image=64,
    box_batch_size_per_image=32,
    min_size=96,
    max_size=192,
    channels=32,
    box_channels=128,
)


def list_detectors() -> list[str]:
    """Names that ``create_detector`` knows."""
    return sorted(DETECTORS)


def create_detector(name: str, num_classes: int = 80, *, weights: None = None, **overrides: Any) -> Detector:
    """Build a detector by name, with fresh weights.

    Args:
        name: one of ``list_detectors()``.
        num_classes: without the background.
        weights: always None; files are loaded by ``mvit_video.load_weights``.
        overrides: fields of ``DetectorConfig``, or of ``MViTConfig`` for its backbone, that differ; None
            leaves a field as it is.

    Raises:
        ConfigError: for an unknown name or field.
        ValueError: for a value out of range.
    """
    config = look_up(name, DETECTORS, "detector")
    own = {field.name for field in fields(DetectorConfig)} - {"backbone", "num_classes", "cascade"}
    layout = replace_fields(config.backbone, {k: v for k, v in overrides.items() if k not in own}, own)
    detection = {key: value for key, value in overrides.items() if key in own}
    return Detector(replace_fields(config, {**detection, "num_classes": num_classes, "backbone": layout}))
