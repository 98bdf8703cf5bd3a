"""What is in each region: classes and boxes in one or three stages, and masks.

Mask R-CNN and Cascade R-CNN as in detectron2's ``modeling/roi_heads`` at 02b5c4e2. Classes are 0 to C - 1 and
the background is C, the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format

from mvit_video.detection.masks import Polygons, crop_masks
from mvit_video.detection.proposals import STRIDES, Losses, has_area, match, require_finite

BOX_CHANNELS = 1024  # in all published models
BOX_SIZE, MASK_SIZE = 7, 14  # cells of a region that the heads see; masks come out twice as large
POSITIVE_FRACTION = 0.25
STAGE_IOUS = (0.5, 0.6, 0.7)
STAGE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


class Target(TypedDict):
    """Objects of an image: boxes (M, 4) xyxy pixels, labels int64 (M,), masks polygons or bool (M, H, W)."""

    boxes: Tensor
    labels: Tensor
    masks: Polygons | Tensor


class Regions(NamedTuple):
    """Boxes of one image that are trained on: (N, 4), classes (N,) with background last, objects (N,)."""

    boxes: Tensor
    labels: Tensor
    objects: Tensor


class Detections(NamedTuple):
    """The objects detected in an image, the likeliest first; masks: probabilities on a grid over each box."""

    boxes: Tensor  # (N, 4), xyxy pixels
    scores: Tensor  # (N,)
    labels: Tensor  # int64 (N,)
    masks: Tensor  # (N, 28, 28)


class Predictor(nn.Module):
    """Class logits (N, C + 1) and box offsets (N, 4), or (N, C * 4) where every class has its own."""

    def __init__(self, channels: int, num_classes: int, *, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class RoIHeads(nn.Module):
    """The second half of Mask R-CNN (one stage) or Cascade Mask R-CNN (three).

    Args:
        channels: of the pyramid's maps, and of convolutions here.
        box_channels: of the layers that classes and boxes are read from.
        cascade: three stages that refine each other's boxes, with batch normalisation, a box for all classes.
        Others: the fields ``box_...`` of ``DetectorConfig``.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        box_channels: int,
        cascade: bool,
        batch_size_per_image: int,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
    ) -> None:
        super().__init__()
        self.num_classes, self.detections_per_img = num_classes, detections_per_img
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        stages = 3 if cascade else 1
        size = (channels, BOX_SIZE, BOX_SIZE)
        self.box_head = nn.ModuleList(
            FastRCNNConvFCHead(size, [channels] * 4, [box_channels], nn.BatchNorm2d)
            if cascade
            else TwoMLPHead(channels * BOX_SIZE**2, box_channels)
            for _ in range(stages)
        )
        self.box_predictor = nn.ModuleList(
            Predictor(box_channels, num_classes, class_agnostic=cascade) for _ in range(stages)
        )
        self.mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, nn.BatchNorm2d if cascade else None)
        self.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
        for module in self.box_head.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)
        nn.init.normal_(cast(nn.Conv2d, self.mask_predictor.mask_fcn_logits).weight, std=0.001)
        self._sampler = BalancedPositiveNegativeSampler(batch_size_per_image, POSITIVE_FRACTION)
        self._coders = [BoxCoder(weights) for weights in STAGE_WEIGHTS[:stages]]
        self._matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in STAGE_IOUS[:stages]]

    def losses(
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: Sequence[Target],
    ) -> Losses:
        """Losses of all stages and of the masks of the proposals that hold objects."""
        with torch.no_grad():
            sampled = [self._sample(boxes, target) for boxes, target in zip(proposals, targets, strict=True)]
        losses: Losses = {}
        regions = sampled
        for number, coder in enumerate(self._coders):
            boxes = [region.boxes for region in regions]
            logits, deltas = self._stage(number, maps, boxes)
            suffix = f"_stage{number}" if len(self._coders) > 1 else ""
            found = self._box_losses(regions, targets, logits, deltas, coder)
            losses |= {name + suffix: loss for name, loss in found.items()}
            if number + 1 < len(self._coders):
                with torch.no_grad():
                    refined = _clipped(self._decode(number, boxes, deltas), sizes)
                    regions = [
                        self._labelled(kept[has_area(kept)], target, self._matchers[number + 1])
                        for kept, target in zip(refined, targets, strict=True)
                    ]
        losses["loss_mask"] = self._mask_loss(maps, sampled, targets)
        return losses

    @torch.no_grad()
    def detect(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Detections]:
        """The objects of each image, boxes in pixels of the padded batch, clipped to the image."""
        decoded, probabilities = proposals, []
        for number in range(len(self.box_head)):
            boxes = _clipped(decoded, sizes)
            logits, deltas = self._stage(number, maps, boxes)
            probabilities.append(logits.float().softmax(-1))
            decoded = self._decode(number, boxes, deltas)
        scores = torch.stack(probabilities).mean(0).split([len(found) for found in proposals])
        found = [self._choose(*image) for image in zip(decoded, scores, sizes, strict=True)]
        boxes, _, labels = map(list, zip(*found, strict=True))
        masks = self._mask_logits(maps, boxes, torch.cat(labels)).float().sigmoid()
        require_finite(masks)
        parts = masks.split(list(map(len, labels)))
        return [Detections(*image, mask) for image, mask in zip(found, parts, strict=True)]

    def _stage(self, number: int, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and box offsets of all images' boxes."""
        pooled, share = pool_regions(maps, boxes, BOX_SIZE), 1 / len(self.box_head)
        if self.training and share < 1 and pooled.requires_grad:  # the stages of a cascade share the gradient
            pooled.register_hook(lambda gradient: gradient * share)
        return self.box_predictor[number](self.box_head[number](pooled))

    def _decode(self, number: int, boxes: list[Tensor], deltas: Tensor) -> list[Tensor]:
        """The boxes of each image that a stage makes of its own."""
        decoded = self._coders[number].decode_single(deltas.float(), torch.cat(boxes))
        return list(decoded.split([len(found) for found in boxes]))

    def _sample(self, proposals: Tensor, target: Target) -> Regions:
        """Proposals and objects themselves, labelled, at most a quarter of them objects."""
        regions = self._labelled(torch.cat([proposals, target["boxes"]]), target, self._matchers[0])
        (positive,), (negative,) = self._sampler([(regions.labels < self.num_classes).float()])
        taken = torch.cat([positive.nonzero()[:, 0], negative.nonzero()[:, 0]])
        return Regions(*(values[taken] for values in regions))

    def _labelled(self, boxes: Tensor, target: Target, matcher: Matcher) -> Regions:
        matched = match(matcher, target["boxes"], boxes)
        labels = matched.new_full((len(boxes),), self.num_classes)
        labels[matched >= 0] = target["labels"][matched[matched >= 0]]
        return Regions(boxes, labels, matched.clamp(min=0))

    def _box_losses(
        self,
        regions: list[Regions],
        targets: Sequence[Target],
        logits: Tensor,
        deltas: Tensor,
        coder: BoxCoder,
    ) -> Losses:
        labels = torch.cat([region.labels for region in regions])
        boxes = torch.cat([region.boxes for region in regions])
        objects = torch.cat(
            [
                target["boxes"][region.objects] if len(target["boxes"]) else region.boxes
                for region, target in zip(regions, targets, strict=True)
            ]
        )
        positive = (labels < self.num_classes).nonzero()[:, 0]
        offsets = deltas.unflatten(1, (-1, 4))[positive]  # (P, C or 1, 4)
        chosen = labels[positive] if offsets.shape[1] > 1 else torch.zeros_like(positive)
        offsets = offsets[torch.arange(len(positive), device=positive.device), chosen]
        wanted = coder.encode_single(objects[positive], boxes[positive])
        classification = F.cross_entropy(logits.float(), labels, reduction="sum") / max(len(labels), 1)
        location = F.l1_loss(offsets.float(), wanted, reduction="sum") / max(len(labels), 1)
        return {"loss_cls": classification, "loss_box_reg": location}

    def _choose(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, C*4 or 4), scores (N, C + 1) -> boxes, scores and classes of the best."""
        require_finite(boxes, scores)
        scores = scores[:, :-1]
        boxes = clip_boxes_to_image(boxes.unflatten(1, (-1, 4)), size).expand(-1, scores.shape[1], -1)
        row, label = (scores > self.score_thresh).nonzero(as_tuple=True)
        boxes, scores = boxes[row, label], scores[row, label]
        best = batched_nms(boxes, scores, label, self.nms_thresh)[: self.detections_per_img]
        return boxes[best], scores[best], label[best]

    def _mask_loss(self, maps: list[Tensor], regions: list[Regions], targets: Sequence[Target]) -> Tensor:
        positive = [region.labels < self.num_classes for region in regions]
        boxes = [region.boxes[kept] for region, kept in zip(regions, positive, strict=True)]
        labels = torch.cat([region.labels[kept] for region, kept in zip(regions, positive, strict=True)])
        logits = self._mask_logits(maps, boxes, labels)
        wanted = torch.cat(
            [
                crop_masks(_select(target["masks"], region.objects[kept]), region.boxes[kept], 2 * MASK_SIZE)
                for region, kept, target in zip(regions, positive, targets, strict=True)
            ]
        )
        if not len(labels):
            return logits.sum() * 0
        return F.binary_cross_entropy_with_logits(logits.float(), wanted.float())

    def _mask_logits(self, maps: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Those of each box's class, (N, 28, 28)."""
        logits = self.mask_predictor(self.mask_head(pool_regions(maps, boxes, MASK_SIZE)))
        return logits[torch.arange(len(labels), device=labels.device), labels]


def pool_regions(maps: list[Tensor], boxes: list[Tensor], size: int) -> Tensor:
    """RoIAlign, each box on the map that suits its size: (N, C, size, size).

    A box of 224 x 224 pixels is read from p4 (FPN paper, arXiv 1612.03144, equation 1).

    Args:
        maps: p2 to p5 and maybe more, (B, C, H, W).
        boxes: of each image, (N, 4) xyxy pixels.
    """
    exact = torch.promote_types(maps[0].dtype, torch.float32)  # half precision would move boxes by pixels
    rois, side = convert_boxes_to_roi_format(boxes).to(exact), box_area(torch.cat(boxes)).sqrt()
    level = (4 + (side / 224 + 1e-8).log2()).floor().clamp(2, 5).long() - 2
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for number, (features, stride) in enumerate(zip(maps[:4], STRIDES, strict=False)):
        index = (level == number).nonzero()[:, 0]
        if len(index):
            align = {"spatial_scale": 1 / stride, "sampling_ratio": 0, "aligned": True}
            regions = roi_align(features.to(exact), rois[index], size, **align)
            pooled = pooled.index_copy(0, index, regions.to(pooled.dtype))
    return pooled


def _clipped(boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
    return [clip_boxes_to_image(found, size) for found, size in zip(boxes, sizes, strict=True)]


def _select(masks: Polygons | Tensor, index: Tensor) -> Polygons | Tensor:
    return masks[index] if isinstance(masks, Tensor) else [masks[i] for i in index.tolist()]
