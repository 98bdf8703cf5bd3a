"""Models by name, with fresh or published weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from mvit_video.errors import ConfigError, look_up
from mvit_video.model.config import MViTConfig
from mvit_video.model.mvit import MViT, StageFeatures
from mvit_video.model.variants import VARIANTS, Variant, build
from mvit_video.weights import published
from mvit_video.weights.checkpoint import from_slowfast, load_weights
from mvit_video.weights.formats import to_pyslowfast_keys
from mvit_video.weights.pyslowfast import infer_layout, read_cfg
from mvit_video.weights.reading import find_weights


@overload
def create_model(
    name: str, num_classes: int | None = None, *, features_only: Literal[False] = False, **options: Any
) -> MViT: ...


@overload
def create_model(
    name: str, num_classes: int | None = None, *, features_only: Literal[True], **options: Any
) -> StageFeatures: ...


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    weights: str | None = None,
    head: Literal["strict", "new"] = "strict",
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> MViT | StageFeatures:
    """Build a model by name, with fresh or published weights; with those it is in eval mode.

    Args:
        name: one of ``list_models()``.
        num_classes: outputs of the head; the variant's own, or that of the weights, where None.
        weights: the name of published weights, see ``published.PUBLISHED``: "kinetics400", "ssv2", ...; they
            are fetched on first use into torch hub's folder. Tables for another size are interpolated.
        head: "new" leaves the head out of the published weights, as for other classes.
        features_only: give the maps of the stages ``out_indices`` (None: all) instead of logits, see
            ``StageFeatures``.
        overrides: fields of ``MViTConfig`` that differ from the variant's; None leaves the variant's. The
            model's protocol follows ``num_frames`` and ``crop_size``.

    Raises:
        ConfigError: for an unknown name or field.
        ValueError: for a value out of range.
        CheckpointError: published weights can't be fetched, or know another number of classes.
    """
    if weights is not None:
        model = _create_published(name, weights, num_classes, head=head, **overrides)
    else:
        model = build(look_up(name, VARIANTS, "model"), num_classes=num_classes, **overrides)
    return StageFeatures(model, out_indices) if features_only else model


def _create_published(
    model: str, name: str, num_classes: int | None, *, head: Literal["strict", "new"], **overrides: Any
) -> MViT:
    known = {entry.name: entry for entry in published.PUBLISHED if entry.model == model}
    if name not in known:
        names = ", ".join(known) or "none"
        raise ConfigError(f"there are no weights {name!r} of {model}; published are: {names}")
    entry = known[name]
    checkpoint = published.fetch(entry)
    variant = VARIANTS[model]
    if "cfg" in checkpoint:  # the file knows its layout and protocol best
        changed = head == "new" or num_classes not in (None, entry.num_classes)
        if not changed and all(value is None for value in overrides.values()):
            return from_slowfast(checkpoint)
        description = read_cfg(checkpoint, entry.file_name)
        assert isinstance(description.config, MViTConfig)
        variant = Variant(description.config, description.protocol)
    built = build(variant, num_classes=num_classes or entry.num_classes, **overrides)
    found = to_pyslowfast_keys(find_weights(checkpoint, entry.file_name)[0], entry.file_name)
    layout = infer_layout(built.config, set(found))
    if layout != built.config:  # the published L is another model than its configuration gives
        built = MViT(layout, built.protocol)
    load_weights(built, checkpoint, head=head)
    spec = built.protocol
    if name == "ssv2" and "cfg" not in checkpoint:
        # These models saw BGR frames, swapped behind the normalisation.
        spec = replace(spec, mean=spec.mean[::-1], std=spec.std[::-1])
        built.protocol = replace(spec, sampling="segment", num_clips=1, num_crops=3, short_side=spec.crop)
    elif name.endswith("_torchvision"):
        built.protocol = replace(spec, sampling="torchvision", pixels="torchvision")
    return built.eval()
