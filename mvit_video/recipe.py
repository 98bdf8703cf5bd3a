"""How a model is trained: parameter groups, learning-rate schedule, loss and what is logged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from mvit_video.data.clips import Batch
from mvit_video.model import MViT
from mvit_video.model.checkpoint import METADATA_KEY, model_metadata

log = logging.getLogger(__name__)


def learning_rate(
    epoch: float, *, lr: float, epochs: float, warmup_epochs: float, warmup_start_lr: float, end_lr: float
) -> float:
    """Linear warm-up, then half a cosine, at a fractional epoch; the official schedule.

    ``lr`` is reached at ``warmup_epochs`` and ``end_lr`` at ``epochs``.
    """
    if epoch < warmup_epochs:
        return warmup_start_lr + (lr - warmup_start_lr) * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12), 1.0)
    return end_lr + (lr - end_lr) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters by weight decay: none for biases and everything one-dimensional (norms).

    As in the official recipe, the class token, position tables and pooling kernels do decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class Classifier(pl.LightningModule):
    """Trains a model on labelled clips.

    Args:
        model: gives logits for clips (B, 3, T, H, W).
        optimizer: makes the optimizer from parameter groups, for example a partial ``torch.optim.AdamW``.
        lr, warmup_start_lr, end_lr: see ``learning_rate``.
        warmup: share of the training steps that the warm-up takes, in [0, 1).
        weight_decay: see ``parameter_groups``.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        model: MViT,
        *,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        lr: float,
        warmup: float = 0.15,
        warmup_start_lr: float = 1e-6,
        end_lr: float = 1e-6,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in {"lr": lr, "warmup_start_lr": warmup_start_lr, "end_lr": end_lr}.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name, value in {"warmup": warmup, "label_smoothing": label_smoothing}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        self.model = model
        self.make_optimizer = optimizer
        self.lr, self.warmup, self.warmup_start_lr, self.end_lr = lr, warmup, warmup_start_lr, end_lr
        self.weight_decay, self.label_smoothing = weight_decay, label_smoothing
        num_classes = model.config.num_classes
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        self._step_end = time.perf_counter()

    def forward(self, clips: Tensor) -> Tensor:
        return self.model(clips)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        logits = self(batch.clips)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        self.train_top1(logits.softmax(-1), batch.labels)
        now = time.perf_counter()
        clips_per_second = len(batch.labels) / (now - self._step_end)
        self._step_end = now
        size = len(batch.labels)
        self.log(
            "train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=size, sync_dist=True
        )
        self.log("train/top1", self.train_top1, prog_bar=True, on_step=True, on_epoch=True)
        self.log("clips/s", clips_per_second, prog_bar=True, on_step=True, on_epoch=True, batch_size=size)
        return loss

    def on_train_epoch_start(self) -> None:
        self._step_end = time.perf_counter()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if not len(batch.labels):
            return
        logits = self(batch.clips)
        size = len(batch.labels)
        self.log("val/loss", F.cross_entropy(logits, batch.labels), batch_size=size, sync_dist=True)
        probabilities = logits.softmax(-1)
        for name, metric in (("val/top1", self.val_top1), ("val/top5", self.val_top5)):
            metric(probabilities, batch.labels)
            self.log(name, metric, prog_bar=name == "val/top1", batch_size=size)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter_groups(self.model, self.weight_decay))
        total = float(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            return learning_rate(
                step,
                lr=self.lr,
                epochs=total,
                warmup_epochs=self.warmup * total,
                warmup_start_lr=self.warmup_start_lr,
                end_lr=self.end_lr,
            ) / (self.lr or 1.0)

        for group in optimizer.param_groups:
            group["lr"] = self.lr
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[METADATA_KEY] = model_metadata(self.model)


class History(pl.Callback):
    """Keeps the metrics of every epoch, through resumes, and says them in one line each."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = ("train/loss_epoch", "train/top1_epoch", "val/loss", "val/top1", "val/top5", "clips/s_epoch")
        metrics = {n.removesuffix("_epoch"): trainer.callback_metrics.get(n) for n in names}
        row = {name: float(value) for name, value in metrics.items() if value is not None}
        self.epochs.append({"epoch": trainer.current_epoch + 1, **row})
        said = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        log.info("epoch %d/%s: %s", trainer.current_epoch + 1, trainer.max_epochs, said)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])
