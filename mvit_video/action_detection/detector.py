"""An MViT that is asked what the people in a clip do: RoIAlign on its last map, a logit a class and box.

As PySlowFast's ``MViT`` with ``ResNetRoIHead`` (``models/head_helper.py`` at 287ec007), with its names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mvit_video.action_detection.boxes import cut_regions
from mvit_video.errors import look_up
from mvit_video.model import ClipSpec, MViT, MViTConfig
from mvit_video.model.clip_spec import MAX_SIZE
from mvit_video.model.config import plan_blocks, pooling_strides
from mvit_video.model.variants import VARIANTS, build
from mvit_video.weights import create_model, load_weights

_OPTIONS = ("roi_stride", "roi_size", "aligned", "last_stage_stride")


class ActionDetector(MViT):
    """Clips and boxes -> logits of the actions in each box; several actions may be true of one.

    The norm of all patch tokens is averaged over time, cut out by RoIAlign, and its maximum goes to the head.
    ``state_dict`` has the names of a classifier, whose weights fit but for the head.

    Args:
        config: any grid works, not only that of ``config.crop_size``.
        roi_stride: pixels of the clip from one place of the last map to the next; None: as the model has them
            (PySlowFast's default of 16 puts boxes of a map of stride 32 beyond its border).
        roi_size: places along each side of what is cut out.
        aligned: boxes are moved by half a place, as pixel centres ask for.
        last_stage_stride: of the last stage's queries, in height and width, in place of what ``config`` says;
            1 gives a map twice as fine.

    Raises:
        ValueError: a number is out of range.
    """

    task = "action_detection"

    def __init__(
        self,
        config: MViTConfig,
        protocol: ClipSpec | None = None,
        *,
        roi_stride: float | None = None,
        roi_size: int = 7,
        aligned: bool = True,
        last_stage_stride: int | None = None,
    ) -> None:
        for name, value in (("roi_stride", roi_stride), ("roi_size", roi_size)):
            if value is not None and not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name} must be from 1 to {MAX_SIZE}, got {value!r}")
        if last_stage_stride is not None:
            config = _with_last_stride(config, last_stage_stride)
        super().__init__(config, protocol)
        self.roi_size, self.aligned = roi_size, aligned
        self.roi_stride = map_stride(config) if roi_stride is None else (float(roi_stride), float(roi_stride))

    def forward(self, clips: Tensor, boxes: Tensor) -> Tensor:  # type: ignore[override]
        """Logits of every box.

        Args:
            clips: float (B, 3, T, H, W).
            boxes: (R, 5): index of the clip in the batch, x1, y1, x2, y2 in pixels of the clip.

        Returns:
            (R, num_classes); probabilities are their sigmoid.

        Raises:
            ValueError: for another shape, or the index of a clip that isn't there.
        """
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(f"expected boxes of shape (R, 5), got {tuple(boxes.shape)}")
        stride_y, stride_x = self.roi_stride
        # On the CPU, for what is asked of them would wait for a GPU each time.
        places = boxes.detach().float().cpu() / torch.tensor([1, stride_x, stride_y, stride_x, stride_y])
        if not (named := {*places[:, 0].tolist()}) <= {*range(len(clips))}:
            raise ValueError(f"boxes name clips {sorted(named)}, there are {len(clips)}")
        tokens = self.forward_stages(clips)[-1].permute(0, 2, 3, 4, 1)  # (B, T', H', W', C)
        feature_map = self.norm(tokens).mean(1).permute(0, 3, 1, 2).float()
        cut = cut_regions(feature_map, places, self.roi_size, aligned=self.aligned)
        return self.head(cut.amax((2, 3)).to(tokens.dtype))

    @property
    def roi_options(self) -> dict[str, Any]:
        """The keyword arguments that build it again from its ``config`` and ``protocol``."""
        own = self.roi_stride == map_stride(self.config)
        stride = None if own else self.roi_stride[0]
        return {"roi_stride": stride, "roi_size": self.roi_size, "aligned": self.aligned}


def create_action_detector(
    name: str, num_classes: int = 80, *, weights: str | None = None, **overrides: Any
) -> ActionDetector:
    """Build an action detector by the name of its model, with fresh weights or, but for the head, published.

    ``mv.load_weights(detector, FILE, head="new")`` starts it from a file of a classifier.

    Args:
        name: one of ``mv.list_models()``.
        num_classes: actions; AVA has 80.
        weights: the name of a classifier's published weights, as of ``mv.create_model``.
        overrides: ``roi_stride``, ``roi_size``, ``aligned`` and ``last_stage_stride``, see
            ``ActionDetector``, and fields of ``MViTConfig`` that differ from the model's; None leaves those.

    Raises:
        ConfigError: for an unknown name or field.
        ValueError: for a value out of range.
        CheckpointError: published weights can't be fetched.
    """
    options = {k: v for k, v in overrides.items() if k in _OPTIONS and v is not None}
    layout = {key: value for key, value in overrides.items() if key not in _OPTIONS}
    base = build(look_up(name, VARIANTS, "model"), num_classes=num_classes, **layout)
    detector = ActionDetector(base.config, replace(base.protocol, num_clips=1, num_crops=1), **options)
    if weights is not None:
        load_weights(detector, create_model(name, weights=weights).state_dict(), head="new")
    return detector


def map_stride(config: MViTConfig) -> tuple[float, float]:
    """Pixels from one place of the last map to the next, in height and width."""
    stride_y, stride_x = config.patch_stride[1:]
    for plan in plan_blocks(config):
        stride_y, stride_x = stride_y * plan.q_stride[1], stride_x * plan.q_stride[2]
    return float(stride_y), float(stride_x)


def _with_last_stride(config: MViTConfig, stride: int) -> MViTConfig:
    if not (isinstance(stride, int) and stride > 0):
        raise ValueError(f"last_stage_stride must be a whole number from 1, got {stride!r}")
    q_strides, _ = pooling_strides(config)
    first = config.stage_starts[-1]
    time, _, _ = q_strides.get(first, (1, 1, 1))
    q_strides[first] = (time, stride, stride)
    return replace(config, q_strides=tuple((block, *grid) for block, grid in sorted(q_strides.items())))
