"""Detectors from checkpoints that describe them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mvit_video.detection.detector import Detector, DetectorConfig
from mvit_video.errors import CheckpointError, brief
from mvit_video.model.config import MViTConfig
from mvit_video.model.fields import replace_fields
from mvit_video.weights.checkpoint import fit_weights, write_checkpoint
from mvit_video.weights.description import MAX_BLOCKS
from mvit_video.weights.reading import (
    METADATA_KEY,
    distinct_names,
    find_weights,
    read_checkpoint,
    require_bounded,
)

TASK = "detection"  # as checkpoints say it
_MOST = 2**16  # of any number that shapes a detector


@dataclass(frozen=True)
class _Description:
    config: DetectorConfig
    class_names: tuple[str, ...] | None
    category_ids: tuple[int, ...] | None


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
    if METADATA_KEY not in checkpoint:
        raise CheckpointError(
            f"{name}: holds weights but not which detector they belong to; name it too, for example "
            "model=mask_rcnn_mvitv2_t"
        )
    described = _parse(checkpoint[METADATA_KEY], name)
    weights = find_weights(checkpoint, name)[0]
    depth = len({key.split(".")[3] for key in weights if key.startswith("backbone.bottom_up.blocks.")})
    if depth != sum(described.config.backbone.stages):
        raise CheckpointError(f"{name}: its description has other blocks than its weights ({depth})")
    try:
        with torch.device("meta"):  # memory is taken once both fit together
            expected = Detector(described.config).state_dict()
    except Exception as error:  # sizes that overflow, factors that leave nothing
        raise CheckpointError(
            f"{name}: its description of the detector can't be used ({brief(error)})"
        ) from None
    fitted, _ = fit_weights(expected, weights, name, kept=())
    detector = Detector(described.config)
    detector.load_state_dict(fitted)
    detector.class_names, detector.category_ids = described.class_names, described.category_ids
    return detector.eval()


def save_detector(detector: Detector, path: str | Path) -> None:
    """Save weights with what ``load_detector`` needs; what the path held before stays if this fails."""
    weights = {name: value.detach().cpu() for name, value in detector.state_dict().items()}
    write_checkpoint({"model_state": weights, METADATA_KEY: detector_metadata(detector)}, path)


def _parse(metadata: Any, name: str) -> _Description:
    try:
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        require_bounded(metadata)
        task = metadata.get("task", "classification")
        if task != TASK:
            raise CheckpointError(f"{name}: a checkpoint of the task {task}, not of {TASK}")
        values = dict(metadata["config"])
        backbone = replace_fields(MViTConfig(), dict(values.pop("backbone")))
        if sum(backbone.stages) > MAX_BLOCKS:
            raise ValueError(f"{sum(backbone.stages)} blocks, at most {MAX_BLOCKS} are possible")
        config = DetectorConfig(backbone, **values)
        _check_numbers(dataclasses.asdict(config))
        names, ids = metadata["class_names"], metadata["category_ids"]
        for listed, kind in ((names, str), (ids, int)):
            if listed is not None and (
                len(listed) != config.num_classes or not all(type(entry) is kind for entry in listed)
            ):
                raise ValueError("class_names and category_ids must be one of each class")
        return _Description(config, distinct_names(names) if names else None, tuple(ids) if ids else None)
    except CheckpointError:
        raise
    except Exception as error:  # a file can hold anything in the place of anything
        raise CheckpointError(
            f"{name}: its description of the detector can't be used ({brief(error)})"
        ) from None


def _check_numbers(values: Mapping[str, Any]) -> None:
    for field, value in values.items():
        if field != "backbone" and not (type(value) in (int, float, bool) and 0 <= value <= _MOST):
            raise ValueError(f"{field} must be a number from 0 to {_MOST}, got {value}")
