"""detectron2's names of a detector's tensors in terms of ours."""

from __future__ import annotations

import re

_RULES = (
    (r"^backbone\.fpn_lateral(\d)\.", lambda m: f"backbone.fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"^backbone\.fpn_output(\d)\.", lambda m: f"backbone.fpn.layer_blocks.{int(m[1]) - 2}.0."),
    (r"^proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"proposal_generator.head.conv.\1.0."),
    (r"^proposal_generator\.rpn_head\.conv\.", "proposal_generator.head.conv.0.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "proposal_generator.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "proposal_generator.head.bbox_pred."),
    (
        r"^roi_heads\.box_head\.(\d)\.conv(\d)\.norm\.",
        lambda m: f"roi_heads.box_head.{m[1]}.{int(m[2]) - 1}.1.",
    ),
    (r"^roi_heads\.box_head\.(\d)\.conv(\d)\.", lambda m: f"roi_heads.box_head.{m[1]}.{int(m[2]) - 1}.0."),
    (r"^roi_heads\.box_head\.(\d)\.fc1\.", r"roi_heads.box_head.\1.5."),
    (r"^roi_heads\.box_head\.fc(\d)\.", lambda m: f"roi_heads.box_head.0.fc{int(m[1]) + 5}."),
    (r"^roi_heads\.box_predictor\.(?=[a-z])", "roi_heads.box_predictor.0."),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.norm\.", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.1."),
    (r"^roi_heads\.mask_head\.mask_fcn(\d)\.", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0."),
    (r"^roi_heads\.mask_head\.deconv\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_heads\.mask_head\.predictor\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)


def from_detectron2(name: str) -> str:
    for pattern, replacement in _RULES:
        found, count = re.subn(pattern, replacement, name)
        if count:
            return found
    return name
