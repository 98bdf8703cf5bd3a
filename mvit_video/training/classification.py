"""Training on labelled clips."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores, MultilabelAveragePrecision

from mvit_video.data.augment import Augment
from mvit_video.data.datasets import (
    Batch,
    ClipDataset,
    OpenVideo,
    ViewDataset,
    training_loader,
    validation_loader,
)
from mvit_video.data.decode import open_video
from mvit_video.data.index import VideoSplits
from mvit_video.data.samplers import inverse_frequencies
from mvit_video.errors import ConfigError
from mvit_video.model import VideoModel
from mvit_video.training.metrics import Means
from mvit_video.training.mixing import Mixing, hard_targets, soft_targets
from mvit_video.training.module import Losses, Training, TrainingModule
from mvit_video.training.plots import plot_batch
from mvit_video.training.resume import files_identity, model_identity, videos_sha256
from mvit_video.weights import model_metadata


class Classifier(TrainingModule):
    """Trains a model on labelled clips.

    Args:
        model: gives logits for clips (B, 3, T, H, W).
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        mixing: how batches are mixed.
        recipe: as of ``TrainingModule``.

    Attributes:
        class_weights: float (num_classes,), what a class counts in the loss of a training; None: all alike.
    """

    train_metrics: ClassVar[Sequence[str]] = ("loss", "top1")
    val_metrics: ClassVar[Sequence[str]] = ("loss", "top1", "top5", "balanced_accuracy")
    monitor: ClassVar[str] = "val/top1"
    model: VideoModel
    class_weights: Tensor | None

    def __init__(
        self, model: VideoModel, *, label_smoothing: float = 0.1, mixing: Mixing | None = None, **recipe: Any
    ) -> None:
        super().__init__(model, **recipe)
        self.label_smoothing, self.mixing = label_smoothing, mixing
        self.register_buffer("class_weights", None, persistent=False)
        *of_samples, self.of_all = self.val_metrics  # means over samples, and what needs all of them at once
        self.val_means = Means(f"val/{name}" for name in of_samples)
        self.val_scores = self.make_val_scores(model.config.num_classes)

    def make_val_scores(self, num_classes: int) -> Any:
        """What collects the last one of ``val_metrics``."""
        return MulticlassStatScores(num_classes, average=None, validate_args=False)

    def val_score(self) -> Tensor:
        """The mean over the classes that have videos; torchmetrics' counts those that have none, too."""
        hits, *_, support = self.val_scores.compute().T
        return (hits / support)[support > 0].mean()

    def mix(self, batch: Batch, batch_index: int) -> tuple[Tensor, float]:
        """The batch's clips, mixed with their reverse, and lam, the share of a clip's own class."""
        if self.mixing is None:
            return batch.clips, 1.0
        key = (self.seed, self.current_epoch, batch_index, self.global_rank)
        return self.mixing(batch.clips, np.random.RandomState(key))

    def training_losses(self, batch: Batch, batch_index: int) -> Losses:
        clips, lam = self.mix(batch, batch_index)
        num_classes = self.model.config.num_classes
        targets = soft_targets(batch.labels, num_classes, lam=lam, smoothing=self.label_smoothing)
        logits = self(clips)
        saved = {"clips": clips, "targets": targets, "logits": logits.detach(), "paths": list(batch.paths)}
        return Losses(self.training_metrics(logits, targets), count=len(batch.labels), to_save=saved)

    def training_metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss and what else is told of a training batch."""
        top1 = (logits.argmax(1) == targets.argmax(1)).float().mean()
        return {"loss": F.cross_entropy(logits, targets, weight=self.class_weights), "top1": top1}

    def validation_losses(self, batch: Batch) -> Losses | None:
        if not len(batch.labels):
            return None
        logits = self(batch.clips)
        if not logits.isfinite().all():
            self.stop_validation()
        return Losses(self.validation_metrics(logits, batch.labels), count=len(batch.labels))

    def validation_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and what else is told of a validation batch, whose scores are collected."""
        self.val_scores.update(logits, labels)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        top1, top5 = hits[:, 0].float().mean(), hits.any(1).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "top1": top1, "top5": top5}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        score = self.val_score()  # of all processes
        self.val_scores.reset()
        if not score.isnan():
            self.log(f"val/{self.of_all}", score)

    def metadata(self) -> dict[str, Any]:
        return model_metadata(self.model)

    def draw_batch(self, batch: Batch, batch_index: int, path: Path) -> None:
        clips, lam = self.mix(batch, batch_index)
        spec = self.model.protocol
        plot_batch(clips, batch.labels, lam, self.model.class_names, path, mean=spec.mean, std=spec.std)


class MultiLabelClassifier(Classifier):
    """Trains a model on clips of several classes, or of none, each class by itself; arguments as there.

    The loss is binary cross entropy, the mean over clips and classes, as in PySlowFast for Charades.
    """

    train_metrics: ClassVar[Sequence[str]] = ("loss",)
    val_metrics: ClassVar[Sequence[str]] = ("loss", "map")
    monitor: ClassVar[str] = "val/map"

    def make_val_scores(self, num_classes: int) -> Any:
        return MultilabelAveragePrecision(num_classes, average=None, validate_args=False)

    def val_score(self) -> Tensor:
        """The mean over the classes that have videos; others get 0, which no class with a video can have."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of those classes
            found: Tensor = self.val_scores.compute()
        return found[found > 0].mean()

    def training_metrics(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": F.binary_cross_entropy_with_logits(logits, targets)}

    def validation_losses(self, batch: Batch) -> Losses | None:
        if not len(batch.labels):  # all processes have something to gather
            nothing = torch.empty(0, self.model.config.num_classes, device=self.device)
            self.val_scores.update(nothing, nothing.long())
        return super().validation_losses(batch)

    def validation_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        targets = hard_targets(labels, logits.shape[1])
        self.val_scores.update(logits.float().sigmoid(), targets.long())
        return {"loss": F.binary_cross_entropy_with_logits(logits.float(), targets)}


def classification_training(
    module: Classifier,
    splits: VideoSplits,
    augment: Augment,
    *,
    open_file: OpenVideo = open_video,
    shuffle: bool = True,
    balance: Literal["sampler", "loss"] | None = None,
    **loading: Any,
) -> Training:
    """Random clips for training, and the central clip of each validation video.

    Args:
        balance: of rare and frequent classes. "sampler": an epoch draws videos, rare ones again and again,
            so that all classes come about equally often; "loss": the loss counts them that much more.
        loading: as of loaders.

    Raises ConfigError for ``balance`` of videos of several classes.
    """
    if balance and splits.multi_label:
        raise ConfigError("data.balance is for videos of one class each; data.multi_label=true has none")
    model = module.model
    reading: dict[str, Any] = {"open_file": open_file, "pending": True}
    clips = ClipDataset(splits.train.videos, model.protocol, augment, seed=module.seed, **reading)
    one_view = replace(model.protocol, num_clips=1, num_crops=1)
    centre_clips = ViewDataset(splits.val.videos, one_view, **reading)
    labels = [label for video in splits.train.videos for label in video.labels]
    of_class = inverse_frequencies(labels, splits.num_classes)
    weights = [of_class[label] for label in labels] if balance == "sampler" else None
    if balance == "loss":
        module.class_weights = torch.tensor(of_class)
    identity = {
        "data": {
            "classes": splits.class_names,
            "train": videos_sha256(splits.train.videos),
            "val": videos_sha256(splits.val.videos),
            **({"balance": balance} if balance else {}),
        },
        "clips": asdict(model.protocol),
        "model": model_identity(model.config),
        **files_identity(train=splits.train.videos, val=splits.val.videos),
    }
    return Training(
        module,
        training_loader(clips, shuffle=shuffle, weights=weights, **loading),
        validation_loader(centre_clips, **loading),
        len(splits.train) + len(splits.val),
        identity,
    )
