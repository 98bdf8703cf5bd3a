"""What the commands need of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from mvit_video.model.clip_spec import ClipSpec


class VideoModel(nn.Module):
    """A model of clips: float (B, 3, T, H, W) -> logits (B, num_classes).

    Attributes:
        config: what shapes it, a dataclass; ``config.num_classes`` counts its outputs.
        protocol: how clips for it are cut and normalised.
        class_names: what its outputs mean; None: unknown.
        classifier: name of the layer that depends on the classes.
    """

    config: Any
    protocol: ClipSpec
    class_names: tuple[str, ...] | None
    classifier: str
