"""Detectors from checkpoints that describe them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mvit_video.detection.detector import Detector, DetectorConfig
from mvit_video.errors import CheckpointError
from mvit_video.model.config import MViTConfig
from mvit_video.weights.checkpoint import fit_weights, write_checkpoint
from mvit_video.weights.description import describing, own_metadata
from mvit_video.weights.reading import METADATA_KEY, distinct_names, find_weights, read_checkpoint

TASK = "detection"  # as checkpoints say it


def detector_metadata(detector: Detector) -> dict[str, Any]:
    """What a checkpoint must hold beside the weights to build the detector again: plain dicts and lists."""
    return {
        "task": TASK,
        "config": asdict(detector.config),
        "class_names": list(detector.class_names) if detector.class_names else None,
        "category_ids": list(detector.category_ids) if detector.category_ids else None,
    }


def load_detector(path: str | Path) -> Detector:
    """Build the detector that a checkpoint of ``mvit-train`` describes and load its weights, in eval mode.

    Raises:
        CheckpointError: it can't be read, is of another task or no description, or doesn't fit its own.
    """
    name, checkpoint = str(path), read_checkpoint(path)
    metadata = own_metadata(checkpoint, name, TASK, "mask_rcnn_mvitv2_t")
    weights = find_weights(checkpoint, name)[0]
    depth = len({key.split(".")[3] for key in weights if key.startswith("backbone.bottom_up.blocks.")})
    with describing(name, "detector"):
        values = dict(metadata["config"])
        config = DetectorConfig(MViTConfig(**values.pop("backbone")), **values)
        if depth != sum(config.backbone.stages):
            raise CheckpointError(f"{name}: its description has other blocks than its weights ({depth})")
        names = distinct_names(metadata["class_names"] or ()) or None
        ids = tuple(metadata["category_ids"] or ()) or None
        if any(len(listed) != config.num_classes for listed in (names, ids) if listed is not None):
            raise ValueError("class_names and category_ids must be one of each class")
        if ids and (len({*ids}) < len(ids) or not all(type(n) is int and abs(n) < 2**63 for n in ids)):
            raise ValueError("category_ids must be different numbers of 64 bits")
        with torch.device("meta"):  # memory is taken once both fit together
            expected = Detector(config).state_dict()
    fitted, _ = fit_weights(expected, weights, name, kept=())
    detector = Detector(config)
    detector.load_state_dict(fitted)
    detector.class_names, detector.category_ids = names, ids
    return detector.eval()


def save_detector(detector: Detector, path: str | Path) -> None:
    """Save weights with what ``load_detector`` needs; what the path held before stays if this fails."""
    weights = {name: value.detach().cpu() for name, value in detector.state_dict().items()}
    write_checkpoint({"model_state": weights, METADATA_KEY: detector_metadata(detector)}, path)
