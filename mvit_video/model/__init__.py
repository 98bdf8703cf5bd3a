"""The model: torch only, knows no video files."""

from mvit_video.model.base import VideoModel
from mvit_video.model.checkpoint import LoadReport, from_slowfast, load_model, load_weights, save_weights
from mvit_video.model.config import MViTConfig
from mvit_video.model.describe import describe
from mvit_video.model.mvit import MViT, layer_groups
from mvit_video.model.protocol import Protocol
from mvit_video.model.variants import create_model, list_models

__all__ = [
    "LoadReport",
    "MViT",
    "MViTConfig",
    "Protocol",
    "VideoModel",
    "create_model",
    "describe",
    "from_slowfast",
    "layer_groups",
    "list_models",
    "load_model",
    "load_weights",
    "save_weights",
]
