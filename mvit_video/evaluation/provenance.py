"""What scores came from: written into results, and compared before an evaluation is resumed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import torch

from mvit_video.io.fingerprint import Fingerprint, file_sha256, fingerprint
from mvit_video.model import VideoModel
from mvit_video.model.variants import VARIANTS
from mvit_video.weights.description import NOT_ARCHITECTURE, weights_sha256

_PACKAGES = ("mvit-video", "torch", "torchvision", "torchmetrics", "av", "numpy")


def provenance_of(model: VideoModel, weights: str | None, **settings: Any) -> Fingerprint:
    """What the scores of ``model``, before it is cast to another precision, come from.

    Args:
        weights: their file, or the name of published ones.
        settings: further JSON values: class_map, model_classes, decoder, split, data, and command (line).
    """
    file = Path(weights or "").expanduser()
    return fingerprint(
        weights=weights or "random",
        weights_sha256=file_sha256(file) if file.is_file() else None,
        model_sha256=weights_sha256(model),
        model_name=_known_as(model),
        model=asdict(model.config),
        protocol=asdict(model.protocol),
        protocol_text=str(model.protocol),
        versions=versions(),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        **settings,
    )


def identity(provenance: Fingerprint, class_names: Sequence[str]) -> Fingerprint:
    """The part of a provenance, with precision, that another evaluation must share to be resumed."""
    same = ("model", "protocol", "precision", "decoder", "class_map", "model_classes", "split", "data")
    return {
        "weights": {"sha256": provenance["model_sha256"]},
        "class_names": list(class_names),
        **{name: provenance[name] for name in same},
    }


def _known_as(model: VideoModel) -> str:
    """The variant whose architecture a model has, else its class."""
    free = dict.fromkeys(NOT_ARCHITECTURE)
    own = asdict(model.config)
    found = (name for name, variant in VARIANTS.items() if asdict(variant.config) | free == own | free)
    return next(found, own.get("name", type(model).__name__))


def versions() -> dict[str, str]:
    """Of Python, FFmpeg and the packages that numbers depend on."""
    packages = {name: version(name) for name in _PACKAGES}
    packages["torch"] = torch.__version__  # tells the build too
    return {"python": platform.python_version(), **packages, "ffmpeg": av.ffmpeg_version_info}
