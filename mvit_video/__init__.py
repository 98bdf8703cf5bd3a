"""MViTv2 for video: train, evaluate and use it.

import mvit_video as mv

model = mv.create_model("mvitv2_s_16x4", num_classes=400)
logits = model(clips)  # float (B, 3, T, H, W) -> (B, 400)
"""

import os

# Threads of OpenMP that wait for work spin by default, which starves the processes that decode beside them:
# training on two busy cores is more than twice as fast without. It counts where torch isn't loaded yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mvit_video.data.decode import open_video
from mvit_video.data.views import kinetics_frame_indices, segment_frame_indices, spatial_views
from mvit_video.errors import CheckpointError, ConfigError, DataError, MVitVideoError, VideoError
from mvit_video.model import (
    MViT,
    MViTConfig,
    Protocol,
    create_model,
    from_slowfast,
    list_models,
    load_model,
    load_weights,
)
from mvit_video.predict import Prediction, Recognizer, predict

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MViT",
    "MViTConfig",
    "MVitVideoError",
    "Prediction",
    "Protocol",
    "Recognizer",
    "VideoError",
    "create_model",
    "from_slowfast",
    "kinetics_frame_indices",
    "list_models",
    "load_model",
    "load_weights",
    "open_video",
    "predict",
    "segment_frame_indices",
    "spatial_views",
]
