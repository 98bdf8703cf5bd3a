"""The backbone of a detector with its pyramid as one file that runs without this package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mvit_video.detection.checkpoint import detector_metadata
from mvit_video.detection.detector import Detector
from mvit_video.errors import ConfigError
from mvit_video.weights.export import Program, load_program, write_program

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
    if any(side % 32 or side < 32 for side in size):
        raise ConfigError(f"sides of {size[0]} x {size[1]} pixels must be multiples of 32")
    model, images = _Maps(detector.backbone).cpu().eval(), torch.zeros(1, 3, *size)
    write_program(model, {"images": images}, LEVELS, detector_metadata(detector), Path(path))


def load_maps(path: str | Path, trust: bool = False) -> Program:
    """What a file of ``export_backbone`` computes. ``trust`` and errors are those of ``load_exported``."""
    return load_program(path, trust=trust)[0]
