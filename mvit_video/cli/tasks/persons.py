"""Who is in a picture: people found by a detector whose weights lie in a file."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2

from mvit_video.action_detection.prediction import FindPeople
from mvit_video.detection.checkpoint import load_detector
from mvit_video.errors import CheckpointError, brief
from mvit_video.weights.reading import find_weights, read_checkpoint, read_task

COCO_CLASSES, COCO_PERSON = 91, 1  # of torchvision's models


def find_people(file: str, device: str) -> FindPeople:
    """By a detector of ``mvit-train`` that knows a class "person", or torchvision's Faster R-CNN for COCO.

    Raises CheckpointError for a file of neither.
    """
    return _by_our_detector(file, device) if read_task(file) == "detection" else _by_torchvision(file, device)


def _by_our_detector(file: str, device: str) -> FindPeople:
    detector = load_detector(file).to(device)
    names = detector.class_names or ()
    if "person" not in names:
        raise CheckpointError(f"{file}: this detector has no class 'person'")
    label = names.index("person")

    def find(picture: Tensor) -> tuple[Tensor, Tensor]:
        (found,) = detector([picture.to(device)])
        people = found["labels"] == label
        return found["boxes"][people].cpu(), found["scores"][people].cpu()

    return find


def _by_torchvision(file: str, device: str) -> FindPeople:
    weights = find_weights(read_checkpoint(file), file)[0]
    is_v2 = "roi_heads.box_head.0.0.weight" in weights
    build = fasterrcnn_resnet50_fpn_v2 if is_v2 else fasterrcnn_resnet50_fpn
    detector = build(weights=None, weights_backbone=None, num_classes=COCO_CLASSES)
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file}: neither a detector of mvit-train nor torchvision's fasterrcnn_resnet50_fpn or _v2 "
            f"({brief(error)})"
        ) from None
    detector.to(device).eval()

    def find(picture: Tensor) -> tuple[Tensor, Tensor]:
        (found,) = detector([picture.to(device).float() / 255])
        people = found["labels"] == COCO_PERSON
        return found["boxes"][people].cpu(), found["scores"][people].cpu()

    return find
