"""Who is in a picture: people found by a detector whose weights lie in a file, or by torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_V2_Weights,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.transforms.functional import to_pil_image

from mvit_video.action_detection.prediction import FindPeople
from mvit_video.detection.checkpoint import load_detector
from mvit_video.detection.data import resized
from mvit_video.errors import CheckpointError, DataError
from mvit_video.prediction.prediction import NOT_FINITE
from mvit_video.weights.checkpoint import fit_weights
from mvit_video.weights.published import PublishedWeights, fetch
from mvit_video.weights.reading import find_weights, read_checkpoint, read_task

COCO_CLASSES, COCO_PERSON = 91, 1  # of torchvision's models
PUBLISHED = PublishedWeights(
    "fasterrcnn_resnet50_fpn_v2", "coco", COCO_CLASSES, FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url
)


def find_people(file: str | None, device: str) -> FindPeople:
    """By a detector of ``mvit-train`` that knows a class "person", or torchvision's Faster R-CNN for COCO.

    Args:
        file: its weights; None: torchvision's own, which are fetched where they aren't in its folder yet.

    Raises:
        CheckpointError: it is a file of neither, or can't be fetched.
    """
    if file is not None and read_task(file) == "detection":
        return _by_our_detector(file, device)
    return _by_torchvision(read_checkpoint(file) if file else fetch(PUBLISHED), file or PUBLISHED.url, device)


def _by_our_detector(file: str, device: str) -> FindPeople:
    detector = load_detector(file).to(device)
    names, config = detector.class_names or (), detector.config
    if "person" not in names:
        raise CheckpointError(f"{file}: this detector has no class 'person'")

    def detect(picture: Tensor) -> Mapping[str, Tensor]:
        small = resized(to_pil_image(picture.cpu()), config.min_size, config.max_size).to(device)
        try:
            (found,) = detector([small], output_sizes=[(picture.shape[1], picture.shape[2])])
        except FloatingPointError:
            raise DataError(f"{file}: {NOT_FINITE}") from None
        return found

    return _people(detect, names.index("person"))


def _by_torchvision(checkpoint: dict[str, Any], name: str, device: str) -> FindPeople:
    weights = find_weights(checkpoint, name)[0]
    is_v2 = "roi_heads.box_head.0.0.weight" in weights
    build = fasterrcnn_resnet50_fpn_v2 if is_v2 else fasterrcnn_resnet50_fpn
    detector = build(weights=None, weights_backbone=None, num_classes=COCO_CLASSES)
    neither = "; neither a detector of mvit-train nor torchvision's fasterrcnn_resnet50_fpn or _v2"
    fitted, _ = fit_weights(detector.state_dict(), weights, name, kept=(), hint=lambda: neither)
    detector.load_state_dict(fitted)
    detector.to(device).eval()
    return _people(lambda picture: detector([picture.to(device).float() / 255])[0], COCO_PERSON)


def _people(detect: Callable[[Tensor], Mapping[str, Tensor]], label: int) -> FindPeople:
    def find(picture: Tensor) -> tuple[Tensor, Tensor]:
        found = detect(picture)
        people = found["labels"] == label
        return found["boxes"][people].cpu(), found["scores"][people].cpu()

    return find
