"""Action detectors from checkpoints that describe them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvit_video.action_detection.detector import ActionDetector
from mvit_video.model import MViTConfig
from mvit_video.weights import METADATA_KEY, load_weights, model_metadata
from mvit_video.weights.checkpoint import write_checkpoint
from mvit_video.weights.description import build_empty, describing, own_metadata, parse_metadata
from mvit_video.weights.reading import find_weights, read_checkpoint

MAX_ROI_SIZE = 64


def action_metadata(detector: ActionDetector) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build the detector again: plain dicts and lists."""
    return {"task": detector.task, **model_metadata(detector), "roi": detector.roi_options}


def load_action_detector(path: str | Path) -> ActionDetector:
    """Build the detector that a checkpoint of ``mvit-train`` describes and load its weights, in eval mode.

    Raises:
        CheckpointError: it can't be read, is of another task or no description, or doesn't fit its own.
    """
    name, checkpoint = str(path), read_checkpoint(path)
    metadata = own_metadata(checkpoint, name, ActionDetector.task, "action_mvitv2_s_16x4")
    description = parse_metadata(metadata, name, ActionDetector.task)
    build_empty(description, find_weights(checkpoint, name)[0], name)  # refuses sizes that don't fit
    with describing(name, "action detector"):
        roi = dict(metadata["roi"])
        size, stride, aligned = roi.pop("roi_size"), roi.pop("roi_stride"), roi.pop("aligned")
        if roi or type(size) is not int or not 0 < size <= MAX_ROI_SIZE or type(aligned) is not bool:
            raise ValueError(f"roi is {metadata['roi']}")
        assert isinstance(description.config, MViTConfig)
        detector = ActionDetector(
            description.config, description.protocol, roi_stride=stride, roi_size=size, aligned=aligned
        )
    load_weights(detector, checkpoint)
    return detector.eval()


def save_action_detector(detector: ActionDetector, path: str | Path) -> None:
    """Save weights with what ``load_action_detector`` needs; what the path held stays if this fails."""
    weights = {name: value.detach().cpu() for name, value in detector.state_dict().items()}
    write_checkpoint({"model_state": weights, METADATA_KEY: action_metadata(detector)}, path)
