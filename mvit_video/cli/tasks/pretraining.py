"""Learning from videos without labels."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.data.index import VideoSplits
from mvit_video.errors import ConfigError
from mvit_video.model.config import Grid
from mvit_video.pretraining.data import MaskedTestViews, MaskedTrainingClips, collate_masked
from mvit_video.pretraining.maskfeat import MaskFeat
from mvit_video.pretraining.masks import Masking
from mvit_video.pretraining.pretrainer import PICTURE, Pretrainer
from mvit_video.training.module import Training
from mvit_video.training.recipe import freeze
from mvit_video.training.resume import files_identity, model_identity, videos_sha256

log = logging.getLogger(__name__)


def sketch(config: DictConfig) -> MaskFeat:
    """The model without memory. Raises ConfigError for whatever can be refused before data are read."""
    app.build(config.augment)
    app.build_decoder(config)
    with torch.device("meta"):
        model = app.build(config.model)
    if not isinstance(model, MaskFeat):
        raise ConfigError(
            f"task=pretraining needs a model such as maskfeat_mvitv2_s_16x4, not {config.model.name}"
        )
    model.protocol = app.override_protocol(model.protocol, config.views)
    _, window = _masking(config, model)
    spec = model.protocol
    clips = torch.empty(1, 3, spec.clip_frames, spec.crop, spec.crop, device="meta")
    try:
        for _, grid in model.predict(clips, torch.empty(1, *window, device="meta")):
            model.target_length(grid, spec.crop)
    except ValueError as error:
        raise ConfigError(f"views: {error}") from None
    return model


def train(config: DictConfig, trainer: pl.Trainer) -> Training:
    """Random masked clips for training, and the central clip of each held-out video."""
    splits: VideoSplits = app.build(config.data)
    model: MaskFeat = app.build(config.model)
    model.protocol = app.override_protocol(model.protocol, config.views)
    app.load_weights_of(config, model)
    freeze(model, app.texts(config.freeze))
    pretrainer: Pretrainer = app.build_module(config, model)
    masking, window = _masking(config, model)
    drawing: dict[str, Any] = {
        "draw_mask": partial(masking.draw, window=window),
        "seed": config.seed,
        "open_file": app.build_decoder(config),
        "pending": True,
    }
    clips = MaskedTrainingClips(splits.train.videos, model.protocol, app.build(config.augment), **drawing)
    one_view = replace(model.protocol, num_clips=1, num_crops=1)
    held_out = MaskedTestViews(splits.val.videos, one_view, **drawing)
    loaders = app.build_loaders(config, trainer, clips, held_out, collate_masked)
    log.info(
        "%.1f M parameters, %d training and %d held-out videos; %s; masks of %d x %d x %d cells; "
        "after each epoch, %s shows what is predicted",
        sum(p.numel() for p in model.parameters()) / 1e6,
        len(splits.train),
        len(splits.val),
        model.protocol,
        *window,
        PICTURE,
    )
    about = {"depths": model.depths, "features": model.features}
    identity = {
        "data": {"train": videos_sha256(splits.train.videos), "val": videos_sha256(splits.val.videos)},
        "clips": asdict(model.protocol),
        "masking": asdict(masking),
        "model": model_identity(model.config) | about,
        **files_identity(train=splits.train.videos, val=splits.val.videos),
    }
    return Training(pretrainer, *loaders, len(splits.train) + len(splits.val), identity)


def _masking(config: DictConfig, model: MaskFeat) -> tuple[Masking, Grid]:
    """How masks are drawn, and the cells of one."""
    if config.get("masking") is None:
        raise ConfigError("a pre-training needs masks: masking=cube")
    masking: Masking = app.build(config.masking)
    spec, patch_stride = model.protocol, model.config.patch_stride
    try:
        return masking, masking.window(spec.clip_frames, spec.crop, patch_stride[0])
    except ValueError as error:
        raise ConfigError(f"masking: {error}") from None
