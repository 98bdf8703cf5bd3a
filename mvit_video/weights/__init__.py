"""Weights from files and into files, and the models that they belong to."""

from mvit_video.weights.checkpoint import (
    LoadReport,
    build_for_weights,
    from_slowfast,
    load_model,
    load_weights,
    save_weights,
)
from mvit_video.weights.create import create_model
from mvit_video.weights.description import model_metadata, weights_sha256
from mvit_video.weights.reading import METADATA_KEY

__all__ = [
    "METADATA_KEY",
    "LoadReport",
    "build_for_weights",
    "create_model",
    "from_slowfast",
    "load_model",
    "load_weights",
    "model_metadata",
    "save_weights",
    "weights_sha256",
]
