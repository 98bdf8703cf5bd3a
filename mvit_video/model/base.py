"""What the commands need of a model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from mvit_video.model.clip_spec import ClipSpec


class VideoModel(nn.Module):
    """A model of clips: float (B, 3, T, H, W) -> logits (B, num_classes).

    Attributes:
        config: what shapes it, a dataclass; ``config.num_classes`` counts its outputs.
        protocol: how clips for it are cut and normalised.
        class_names: what its outputs mean; None: unknown.
        classifier: name of the layer that depends on the classes.
        multi_label: a clip may be of several classes, or of none.
        task: what its checkpoints say that they are of.
    """

    config: Any
    protocol: ClipSpec
    class_names: tuple[str, ...] | None
    classifier: str
    multi_label: bool = False
    task: ClassVar[str] = "classification"

    def probabilities(self, logits: Tensor) -> Tensor:
        """What logits (..., num_classes) mean: their softmax; of a multi-label model each one's sigmoid."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)


def require_clips(clips: Tensor) -> None:
    """Raises ValueError for what isn't (B, 3, T, H, W), and for an empty batch."""
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[0] == 0:
        empty = ", an empty batch" if clips.ndim and clips.shape[0] == 0 else ""
        raise ValueError(f"expected clips of shape (B, 3, T, H, W), got {tuple(clips.shape)}{empty}")
