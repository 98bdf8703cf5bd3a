"""Action detectors from checkpoints that describe them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mvit_video.action_detection.detector import ActionDetector
from mvit_video.errors import CheckpointError, brief
from mvit_video.model import MViTConfig
from mvit_video.weights import METADATA_KEY, LoadReport, load_weights, model_metadata
from mvit_video.weights.checkpoint import write_checkpoint
from mvit_video.weights.description import build_empty, parse_metadata
from mvit_video.weights.reading import find_weights, read_checkpoint

TASK = "action_detection"  # as checkpoints say it
MAX_ROI_SIZE = 64


def action_metadata(detector: ActionDetector) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build the detector again: plain dicts and lists."""
    return {"task": TASK, **model_metadata(detector), "roi": detector.roi_options}


def load_action_detector(path: str | Path) -> ActionDetector:
    """Build the detector that a checkpoint of ``mvit-train`` describes and load its weights, in eval mode.

    Raises:
        CheckpointError: it can't be read, is of another task or no description, or doesn't fit its own.
    """
    name, checkpoint = str(path), read_checkpoint(path)
    if METADATA_KEY not in checkpoint:
        raise CheckpointError(
            f"{name}: holds weights but not which action detector they belong to; name it too, for example "
            "model=action_mvitv2_s_16x4"
        )
    if not (metadata := _own_metadata(checkpoint)):
        raise CheckpointError(f"{name}: a checkpoint of another task, not of {TASK}")
    description = parse_metadata(metadata, name)
    build_empty(description, find_weights(checkpoint, name)[0], name)  # refuses sizes that don't fit
    try:
        roi = dict(metadata["roi"])
        size, stride, aligned = roi.pop("roi_size"), roi.pop("roi_stride"), roi.pop("aligned")
        if roi or type(size) is not int or not 0 < size <= MAX_ROI_SIZE or type(aligned) is not bool:
            raise ValueError(f"roi is {metadata['roi']}")
        assert isinstance(description.config, MViTConfig)
        detector = ActionDetector(
            description.config, description.protocol, roi_stride=stride, roi_size=size, aligned=aligned
        )
    except Exception as error:  # a file can hold anything in the place of anything
        raise CheckpointError(
            f"{name}: its description of the action detector can't be used ({brief(error)})"
        ) from None
    load_weights(detector, {**checkpoint, METADATA_KEY: metadata})
    detector.class_names = description.class_names
    return detector.eval()


def load_action_weights(
    detector: ActionDetector, path: str | Path, *, head: Literal["strict", "new"] = "strict"
) -> LoadReport:
    """``load_weights`` of a classifier's file, or of an action detector's. Raises CheckpointError."""
    checkpoint = read_checkpoint(path)
    if metadata := _own_metadata(checkpoint):
        checkpoint = {**checkpoint, METADATA_KEY: metadata}
    return load_weights(detector, checkpoint, head=head)


def _own_metadata(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint of this task says of its model, without the task; None for all others."""
    metadata = checkpoint.get(METADATA_KEY)
    try:
        metadata = dict(json.loads(metadata) if isinstance(metadata, str) else metadata or {})
    except (TypeError, ValueError):
        return None
    return metadata if metadata.pop("task", None) == TASK else None


def save_action_detector(detector: ActionDetector, path: str | Path) -> None:
    """Save weights with what ``load_action_detector`` needs; what the path held stays if this fails."""
    weights = {name: value.detach().cpu() for name, value in detector.state_dict().items()}
    write_checkpoint({"model_state": weights, METADATA_KEY: action_metadata(detector)}, path)
