"""Region proposals: anchors on every level of the pyramid, their scores, and the best of them.

As in detectron2's ``modeling/proposal_generator/rpn.py`` at 02b5c4e2, whose numbers torchvision's own
``RegionProposalNetwork`` doesn't give: it rounds anchors, derives their strides from the padded size, ranks
by rounded probabilities and divides its losses by another count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

ANCHOR_SIZES = (32, 64, 128, 256, 512)  # pixels, of p2 to p6
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width
STRIDES = (4, 8, 16, 32, 64)  # pixels, of p2 to p6
NMS_THRESH = 0.7
MATCH_LOW, MATCH_HIGH = 0.3, 0.7  # IoU below which an anchor is background, from which it is an object
POSITIVE_FRACTION = 0.5

Losses = dict[str, Tensor]


class ProposalGenerator(nn.Module):
    """Boxes that may hold an object, from the maps of a feature pyramid.

    Args:
        channels: of every map.
        conv_depth: 3 x 3 convolutions before the two outputs.
        pre_nms_top_n, post_nms_top_n: boxes per level before, and per image after non-maximum suppression, in
            training and in testing.
        batch_size_per_image: anchors of an image that the losses count, at most half of them objects.
    """

    def __init__(
        self,
        channels: int,
        *,
        conv_depth: int,
        pre_nms_top_n: tuple[int, int],
        post_nms_top_n: tuple[int, int],
        batch_size_per_image: int,
    ) -> None:
        super().__init__()
        self.head = RPNHead(channels, len(ANCHOR_RATIOS), conv_depth)
        self.pre_nms_top_n, self.post_nms_top_n = pre_nms_top_n, post_nms_top_n
        self._coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self._matcher = Matcher(MATCH_HIGH, MATCH_LOW, allow_low_quality_matches=True)
        self._sampler = BalancedPositiveNegativeSampler(batch_size_per_image, POSITIVE_FRACTION)

    def forward(
        self, maps: list[Tensor], sizes: list[tuple[int, int]], boxes: list[Tensor] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Maps (B, C, H, W) of p2 to p6 -> for each image, boxes (N, 4) as xyxy pixels, the likeliest first.

        Args:
            sizes: height and width of each image in its padded batch, pixels.
            boxes: the objects of each image, (M, 4), for the losses.
        """
        logits, deltas = self.head(maps)
        anchors = [
            grid_anchors((level.shape[-2], level.shape[-1]), size, stride, level)
            for level, size, stride in zip(maps, ANCHOR_SIZES, STRIDES, strict=True)
        ]
        # (B, A, H, W) -> (B, H*W*A), and (B, A*4, H, W) -> (B, H*W*A, 4)
        logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
        deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
        losses = {} if boxes is None else self._losses(torch.cat(anchors), logits, deltas, boxes)
        return self._best(anchors, logits, deltas, sizes), losses

    @torch.no_grad()
    def _best(
        self, anchors: list[Tensor], logits: list[Tensor], deltas: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        before, after = (top[not self.training] for top in (self.pre_nms_top_n, self.post_nms_top_n))
        found = []  # of each level boxes (B, N, 4), their scores and the number of the level (B, N)
        for number, level in enumerate(zip(anchors, logits, deltas, strict=True)):
            level_anchors, level_logits, level_deltas = level
            # By logits: probabilities of very likely boxes are equal, so their order would be chance.
            best, index = level_logits.topk(min(before, level_logits.shape[1]), dim=1)
            chosen = level_deltas.gather(1, index[..., None].expand(-1, -1, 4)).float()
            decoded = self._coder.decode_single(chosen.flatten(0, 1), level_anchors[index.flatten()])
            found.append((decoded.view(*index.shape, 4), best, torch.full_like(index, number)))
        boxes, scores, levels = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        if not self.training:
            require_finite(boxes, scores)
        return [_suppressed(*image, after) for image in zip(boxes, scores, levels, sizes, strict=True)]

    def _losses(
        self, anchors: Tensor, logits: list[Tensor], deltas: list[Tensor], boxes: list[Tensor]
    ) -> Losses:
        labels, targets = [], []
        for image_boxes in boxes:
            matched = match(self._matcher, image_boxes, anchors)
            label = (matched >= 0).float()
            label[matched == Matcher.BETWEEN_THRESHOLDS] = -1
            (positive,), (negative,) = self._sampler([label])
            labels.append(torch.where((positive | negative).bool(), label, -1))
            none = image_boxes if len(image_boxes) else anchors[:1]
            targets.append(self._coder.encode_single(none[matched.clamp(min=0)], anchors))
        label, target = torch.stack(labels), torch.stack(targets)
        count = self._sampler.batch_size_per_image * len(boxes)  # the configured number, as officially
        taken, positive = label >= 0, label == 1
        scores, offsets = torch.cat(logits, 1).float(), torch.cat(deltas, 1).float()
        objectness = F.binary_cross_entropy_with_logits(scores[taken], label[taken], reduction="sum")
        location = F.l1_loss(offsets[positive], target[positive], reduction="sum")
        return {"loss_rpn_cls": objectness / count, "loss_rpn_loc": location / count}


def grid_anchors(grid: tuple[int, int], size: int, stride: int, like: Tensor) -> Tensor:
    """Anchors of one level, (H*W*A, 4) xyxy pixels, centred on each cell's upper left corner, unrounded."""
    ratios = torch.tensor(ANCHOR_RATIOS, dtype=torch.float64)
    width = (size * size / ratios).sqrt()
    half = torch.stack([-width, -width * ratios, width, width * ratios], 1).float().to(like.device) / 2
    y, x = (torch.arange(0, n * stride, stride, device=like.device, dtype=torch.float32) for n in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    corners = torch.stack([x, y, x, y], -1)  # (H, W, 4)
    return (corners[:, :, None] + half).flatten(0, 2)


def require_finite(*outputs: Tensor) -> None:
    """Raises FloatingPointError: a box or a score that is NaN would be taken for nothing found."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise FloatingPointError("NaN or infinite outputs")


def has_area(boxes: Tensor) -> Tensor:
    """Of each box (N, 4), whether it has."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def match(matcher: Matcher, objects: Tensor, boxes: Tensor) -> Tensor:
    """For each box the object that it overlaps most, or a negative number of ``Matcher``: int64 (N,)."""
    if not len(objects):
        return torch.full((len(boxes),), Matcher.BELOW_LOW_THRESHOLD, device=boxes.device)
    return matcher(box_iou(objects, boxes))


def _suppressed(boxes: Tensor, scores: Tensor, levels: Tensor, size: tuple[int, int], most: int) -> Tensor:
    finite = boxes.isfinite().all(1) & scores.isfinite()
    boxes = clip_boxes_to_image(boxes, size)
    kept = finite & has_area(boxes)
    boxes = boxes[kept]
    return boxes[batched_nms(boxes, scores[kept].float(), levels[kept], NMS_THRESH)[:most]]
