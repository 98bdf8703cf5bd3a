"""Models by name, with fresh or published weights."""

from __future__ import annotations

from typing import Any, Literal

from mvit_video.errors import ConfigError, did_you_mean
from mvit_video.model import MViT
from mvit_video.model.variants import VARIANTS, build, list_models
from mvit_video.weights.published import create_published


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    weights: str | None = None,
    head: Literal["strict", "new"] = "strict",
    **overrides: Any,
) -> MViT:
    """Build a model by name, with fresh or published weights.

    Args:
        name: one of ``list_models()``.
        num_classes: outputs of the head; the variant's own, or that of the weights, where None.
        weights: the name of published weights, see ``published.PUBLISHED``: "kinetics400", "ssv2", ...
        head: "new" leaves the head out of the published weights, as for other classes.
        overrides: fields of ``MViTConfig`` that differ from the variant's; None leaves the variant's. The
            model's protocol follows ``num_frames`` and ``crop_size``.

    Raises:
        ConfigError: for an unknown name or field.
        ValueError: for a value out of range.
        CheckpointError: published weights can't be fetched, or know another number of classes.
    """
    if weights is not None:
        return create_published(name, weights, num_classes, head=head, **overrides)
    if name not in VARIANTS:
        raise ConfigError(
            f"unknown model {name!r}{did_you_mean(name, VARIANTS)}; known: {', '.join(list_models())}"
        )
    return build(VARIANTS[name], num_classes=num_classes, **overrides)
