"""Training on labelled clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from mvit_video.data.augment import Augment
from mvit_video.data.datasets import (
    Batch,
    OpenVideo,
    TestViews,
    TrainingClips,
    training_loader,
    validation_loader,
)
from mvit_video.data.decode import open_video
from mvit_video.data.index import VideoSplits
from mvit_video.model import VideoModel
from mvit_video.training.mixing import Mixing, soft_targets
from mvit_video.training.module import Losses, TrainingModule
from mvit_video.training.plots import plot_batch
from mvit_video.training.resume import videos_sha256
from mvit_video.training.task import Training
from mvit_video.weights import model_metadata


class Classifier(TrainingModule):
    """Trains a model on labelled clips.

    Args:
        model: gives logits for clips (B, 3, T, H, W).
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        mixing: how batches are mixed.
        recipe: as of ``TrainingModule``.
    """

    train_metrics: ClassVar[Sequence[str]] = ("loss", "top1")
    val_metrics: ClassVar[Sequence[str]] = ("loss", "top1", "top5")
    monitor: ClassVar[str] = "val/top1"
    model: VideoModel

    def __init__(
        self, model: VideoModel, *, label_smoothing: float = 0.1, mixing: Mixing | None = None, **recipe: Any
    ) -> None:
        super().__init__(model, **recipe)
        self.label_smoothing, self.mixing = label_smoothing, mixing

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
        top1 = (logits.argmax(1) == targets.argmax(1)).float().mean()
        saved = {"clips": clips, "targets": targets, "logits": logits.detach(), "paths": list(batch.paths)}
        return Losses(
            {"loss": F.cross_entropy(logits, targets), "top1": top1}, count=len(batch.labels), to_save=saved
        )

    def validation_losses(self, batch: Batch) -> Losses | None:
        if not len(batch.labels):
            return None
        logits = self(batch.clips)
        if not logits.isfinite().all():
            self.stop_validation()
        hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
        metrics = {
            "loss": F.cross_entropy(logits, batch.labels),
            "top1": hits[:, 0].float().mean(),
            "top5": hits.any(1).float().mean(),
        }
        return Losses(metrics, count=len(batch.labels), to_save={})

    def metadata(self) -> dict[str, Any]:
        return model_metadata(self.model)

    def draw_batch(self, batch: Batch, batch_index: int, path: Path) -> None:
        clips, lam = self.mix(batch, batch_index)
        spec = self.model.protocol
        plot_batch(clips, batch.labels, lam, self.model.class_names, path, mean=spec.mean, std=spec.std)


def classification_training(
    module: Classifier,
    splits: VideoSplits,
    augment: Augment,
    *,
    open_file: OpenVideo = open_video,
    shuffle: bool = True,
    **loading: Any,
) -> Training:
    """Random clips for training, and the central clip of each validation video; ``loading`` as of loaders."""
    model = module.model
    clips = TrainingClips(splits.train.videos, model.protocol, augment, seed=module.seed, open_file=open_file)
    one_view = replace(model.protocol, num_clips=1, num_crops=1)
    centre_clips = TestViews(splits.val.videos, one_view, open_file=open_file)
    fields = asdict(model.config)
    identity = {
        "data": {
            "classes": splits.class_names,
            "train": videos_sha256(splits.train.videos),
            "val": videos_sha256(splits.val.videos),
        },
        "clips": asdict(model.protocol),
        "model": {key: value for key, value in fields.items() if key != "checkpoint_blocks"},  # same numbers
    }
    return Training(
        module,
        training_loader(clips, shuffle=shuffle, **loading),
        validation_loader(centre_clips, **loading),
        len(splits.train) + len(splits.val),
        identity,
    )
