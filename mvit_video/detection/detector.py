"""Mask R-CNN and Cascade Mask R-CNN on an MViTv2 with a feature pyramid (paper, sections 4.1.5 and 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from mvit_video.detection.augment import MAX_SIDE, TEST_SHORT_SIDE
from mvit_video.detection.backbone import CHANNELS, DIVISOR, Backbone
from mvit_video.detection.masks import paste_masks
from mvit_video.detection.proposals import ProposalGenerator, has_area
from mvit_video.detection.roi_heads import BOX_CHANNELS, Detections, RoIHeads, Target
from mvit_video.detection.weights import load_detector_weights
from mvit_video.model import MViTConfig
from mvit_video.model.clip_spec import MAX_SIZE
from mvit_video.model.fields import check_types

# Far above any detector's, far below what would fill a machine's memory.
_MOST = {"num_classes": 2**16, "box_detections_per_img": 1000, "min_size": MAX_SIZE, "max_size": MAX_SIZE}
_MOST |= dict.fromkeys(("rpn_batch_size_per_image", "box_batch_size_per_image"), 10**7)  # those there are
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in [0, 255]


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that shapes a detector; the defaults are those of the paper's COCO models.

    Raises ValueError for a value that no detector has.

    Attributes:
        backbone: its layout; the position tables are made for ``backbone.crop_size``.
        num_classes: without the background.
        cascade: three stages (Cascade Mask R-CNN) instead of one (Mask R-CNN).
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: proposals kept on each level before non-maximum
            suppression.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: proposals kept in each image after it.
        rpn_batch_size_per_image, box_batch_size_per_image: anchors, and regions, an image that losses count.
        box_score_thresh: detections have scores above it.
        box_nms_thresh: of two boxes of a class that overlap more (IoU), the less likely is left out.
        box_detections_per_img: at most as many.
        min_size, max_size: pixels; in testing, an image's short side becomes the first unless its long side
            would exceed the second. ``Detector`` itself takes images as they are.
        fpn: whether coarse maps of the backbone flow into fine ones, or each is projected alone.
        channels: of the maps that all heads read, and of the heads' convolutions.
        box_channels: of the layers behind a region's box.
    """

    backbone: MViTConfig
    num_classes: int = 80
    cascade: bool = False
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    rpn_batch_size_per_image: int = 256
    box_batch_size_per_image: int = 512
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    min_size: int = TEST_SHORT_SIDE
    max_size: int = MAX_SIDE
    fpn: bool = True
    channels: int = CHANNELS
    box_channels: int = BOX_CHANNELS

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in vars(self).items():
            least, most = (0, 1) if name.endswith("thresh") else (1, _MOST.get(name, 10_000))
            if type(value) in (int, float) and not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")


class Detector(nn.Module):
    """Detects objects: boxes, classes and masks.

    In evaluation, ``detector(images)`` gives for each image a dict of ``boxes`` (N, 4) as xyxy pixels,
    ``scores`` (N,), the highest first, ``labels`` int64 (N,) from 0, and ``masks`` bool (N, H, W). In
    training, ``detector(images, targets)`` gives the losses by their official names.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.class_names: tuple[str, ...] | None = None
        self.category_ids: tuple[int, ...] | None = None  # of the classes, in their json file
        self.backbone = Backbone(config.backbone, config.channels, top_down=config.fpn)
        self.proposal_generator = ProposalGenerator(
            config.channels,
            conv_depth=2 if config.cascade else 1,
            pre_nms_top_n=(config.rpn_pre_nms_top_n_train, config.rpn_pre_nms_top_n_test),
            post_nms_top_n=(config.rpn_post_nms_top_n_train, config.rpn_post_nms_top_n_test),
            batch_size_per_image=config.rpn_batch_size_per_image,
        )
        self.roi_heads = RoIHeads(
            config.channels,
            config.num_classes,
            box_channels=config.box_channels,
            cascade=config.cascade,
            batch_size_per_image=config.box_batch_size_per_image,
            score_thresh=config.box_score_thresh,
            nms_thresh=config.box_nms_thresh,
            detections_per_img=config.box_detections_per_img,
        )
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of the backbone, which sharded training cuts up one by one."""
        return self.backbone.bottom_up.blocks

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None = None,
        *,
        output_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> Any:
        """Detections of each image, or in training the losses of all.

        Args:
            images: uint8 RGB (3, H, W), of any sizes.
            targets: the objects of each image, for training: ``boxes`` float (M, 4) xyxy pixels, ``labels``
                int64 (M,) and ``masks``, of each object a list of polygons [x0, y0, x1, y1, ...], or bool
                (M, H, W).
            output_sizes: height and width that boxes and masks are given for; the image's own where None.

        Raises:
            ValueError: training without targets, or other than one for each image.
            FloatingPointError: in evaluation, what it computes isn't finite.
        """
        if self.training and (targets is None or len(targets) != len(images)):
            raise ValueError("in training, a detector needs the targets of each image")
        batch, sizes = self.batched(images)
        maps = list(self.backbone(batch).values())
        if self.training and targets is not None:
            boxes = [target["boxes"].to(batch.device) for target in targets]
            proposals, losses = self.proposal_generator(maps, sizes, boxes)
            return losses | self.roi_heads.losses(maps, proposals, sizes, targets)
        proposals, _ = self.proposal_generator(maps, sizes)
        found = self.roi_heads.detect(maps, proposals, sizes)
        return [
            _in_pixels(detections, size, wanted)
            for detections, size, wanted in zip(found, sizes, output_sizes or sizes, strict=True)
        ]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The backbone alone: how much the rest computes depends on its detections."""
        self.backbone.compile(*args, **kwargs)

    load_weights = load_detector_weights

    def batched(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images, normalised and padded with zeros to one size, and the height and width of each."""
        normed = [(image.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std for image in images]
        sizes = [(image.shape[1], image.shape[2]) for image in normed]
        height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
        padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in normed]
        return torch.stack(padded), sizes


def _in_pixels(found: Detections, size: tuple[int, int], wanted: tuple[int, int]) -> dict[str, Tensor]:
    """Detections on an image of ``size`` as those of the same image of another size."""
    height, width = wanted
    scale = found.boxes.new_tensor([width / size[1], height / size[0]] * 2)
    boxes = clip_boxes_to_image(found.boxes * scale, wanted)
    kept = has_area(boxes)
    masks = paste_masks(found.masks[kept], boxes[kept], height, width)
    return {"boxes": boxes[kept], "scores": found.scores[kept], "labels": found.labels[kept], "masks": masks}
