"""The backbone of a detector with its pyramid as one file that runs without this package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mvit_video.detection.checkpoint import detector_metadata
from mvit_video.detection.detector import Detector
from mvit_video.errors import ConfigError
from mvit_video.weights.export import export_onnx, open_onnx, reading, require_trust, save_program

LEVELS = ("p2", "p3", "p4", "p5", "p6")


class _Maps(nn.Module):
    """A backbone whose maps come as a tuple, as exported programs have it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


def export_backbone(detector: Detector, path: str | Path, size: tuple[int, int]) -> None:
    """Write backbone and pyramid as ONNX (``.onnx``) or as a program of ``torch.export`` (``.pt2``).

    It takes normalised images, float (1, 3, H, W), of one size and gives p2 to p6. What follows, from the
    proposals on, depends on how many objects there are, which a program of fixed shapes can't.

    Args:
        size: H and W, multiples of 32.

    Raises:
        ConfigError: another size, or a package that this needs is missing.
    """
    path = Path(path)
    if any(side % 32 or side < 32 for side in size):
        raise ConfigError(f"sides of {size[0]} x {size[1]} pixels must be multiples of 32")
    model, images = _Maps(detector.backbone).cpu().eval(), torch.zeros(1, 3, *size)
    metadata = json.dumps(detector_metadata(detector))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters: about their own insides
        if path.suffix == ".pt2":
            save_program(torch.export.export(model, (images,)), path, metadata)
        else:
            export_onnx(model, {"images": images}, LEVELS, metadata, path)


def load_maps(path: str | Path, trust: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """What a file of ``export_backbone`` computes. ``trust`` and errors are those of ``load_exported``."""
    if Path(path).suffix != ".onnx":
        require_trust(path, trust)
        with reading(path):
            module = torch.export.load(path).module()
        return lambda images: list(module(images))
    with reading(path):
        session = open_onnx(path)

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(found) for found in session.run(list(LEVELS), {"images": images.numpy()})]

    return run
