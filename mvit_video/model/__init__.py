"""The model: torch only, knows no video files."""

from mvit_video.model.base import VideoModel
from mvit_video.model.clip_spec import ClipSpec
from mvit_video.model.config import MViTConfig
from mvit_video.model.describe import describe
from mvit_video.model.mvit import MViT, layer_groups
from mvit_video.model.variants import list_models

__all__ = ["ClipSpec", "MViT", "MViTConfig", "VideoModel", "describe", "layer_groups", "list_models"]
