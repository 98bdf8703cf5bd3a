"""Learning from videos without labels: masked feature prediction (MaskFeat, arXiv 2112.09133)."""

from mvit_video.pretraining.hog import hog, hog_targets
from mvit_video.pretraining.maskfeat import MaskFeat
from mvit_video.pretraining.masks import cube_mask, frame_mask, tube_mask
from mvit_video.pretraining.variants import create_pretrainer, list_pretrainers

__all__ = [
    "MaskFeat",
    "create_pretrainer",
    "cube_mask",
    "frame_mask",
    "hog",
    "hog_targets",
    "list_pretrainers",
    "tube_mask",
]
