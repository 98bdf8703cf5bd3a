"""Classification of videos."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from mvit_video.cli import app
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.index import VideoSplits
from mvit_video.errors import ConfigError
from mvit_video.model import VideoModel
from mvit_video.training.classification import Classifier, MultiLabelClassifier, classification_training
from mvit_video.training.module import Training
from mvit_video.training.plots import describe_labels
from mvit_video.training.recipe import freeze
from mvit_video.weights import build_for_weights

log = logging.getLogger(__name__)

FEW_VIDEOS, FEW_OF_A_CLASS = 1000, 50
MANY_PARAMETERS = 5e6


def sketch(config: DictConfig) -> VideoModel:
    """The model without memory. Raises ConfigError for whatever can be refused before data are read."""
    augment, mixing = app.build(config.augment), app.build(config.mixing)
    if mixing is not None and mixing.probability and config.batch_size * augment.repeats < 2:
        raise ConfigError("mixing pairs the clips of a batch; batch_size=2 or more is needed, or mixing=none")
    app.build_decoder(config)
    with torch.device("meta"):
        model: VideoModel = app.build(config.model, weights=None)
    app.override_protocol(model.protocol, config.views)
    return model


def train(config: DictConfig, trainer: pl.Trainer) -> Training:
    """Random clips for training, and the central clip of each validation video."""
    splits: VideoSplits = app.build_data(config.data)
    model = _build_model(config, splits)
    kind = MultiLabelClassifier if splits.multi_label else Classifier
    own = {"_target_": f"{kind.__module__}.{kind.__name__}"}
    classifier: Classifier = app.build_module(config, model, own, mixing=app.build(config.mixing))
    _describe(model, splits)
    if not (config.weights or config.model.get("weights") or config.ckpt_path):
        _warn_of_few_videos(model, splits)
    return classification_training(
        classifier,
        splits,
        app.build(config.augment),
        open_file=app.build_decoder(config),
        shuffle=not config.trainer.overfit_batches,
        balance=config.data.balance,
        **app.loading(config, trainer),
    )


def _build_model(config: DictConfig, splits: VideoSplits) -> VideoModel:
    if splits.num_classes < 2:
        raise ConfigError(f"the data set has one class ({splits.class_names[0]}); training needs two or more")
    head: dict[str, Any] = {"head": config.head} if config.model.get("weights") else {}
    if config.weights:
        head = {"weights": None}  # a file takes the place of published weights

    def build(**values: Any) -> VideoModel:
        built: VideoModel = app.build(config.model, **head, **values)
        built.protocol = app.override_protocol(built.protocol, config.views)
        return built

    if config.weights:
        model, report = build_for_weights(
            build, config.weights, splits.num_classes, head=config.head, fresh=app.texts(config.fresh)
        )
        log.info("weights of %s\n%s", config.weights, report)
    else:
        model = build(num_classes=splits.num_classes)
    check_same_classes(model.class_names, model.config.num_classes, splits.class_names)
    model.class_names, model.multi_label = splits.class_names, splits.multi_label
    model.train()  # published weights come in eval mode, and Lightning leaves modes as they are
    freeze(model, app.texts(config.freeze))
    return model


def _describe(model: VideoModel, splits: VideoSplits) -> None:
    log.info(
        "%.1f M parameters, %d classes, %d training and %d validation videos; %s",
        sum(p.numel() for p in model.parameters()) / 1e6,
        splits.num_classes,
        len(splits.train),
        len(splits.val),
        model.protocol,
    )
    labels = [label for video in splits.train.videos for label in video.labels]
    log.info("training videos of each class:\n%s", describe_labels(labels, splits.class_names))


def _warn_of_few_videos(model: VideoModel, splits: VideoSplits) -> None:
    count, parameters = len(splits.train), sum(p.numel() for p in model.parameters())
    is_few = count < FEW_VIDEOS or count < FEW_OF_A_CLASS * splits.num_classes
    if is_few and parameters > MANY_PARAMETERS:
        log.warning(
            "%.0f M parameters learn little from scratch on %d videos; fine-tune trained weights instead: "
            "experiment=finetune weights=FILE (without weights=, those of Kinetics-400 are fetched)",
            parameters / 1e6,
            count,
        )
