"""How a model is trained: parameter groups, learning-rate schedule, loss and what is logged."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mvit_video.data.datasets import Batch
from mvit_video.errors import ConfigError, DataError, TrainingError
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.io.writing import replacing
from mvit_video.model import MViT, VideoModel, layer_groups
from mvit_video.training.metrics import Means
from mvit_video.training.mixing import Mixing, soft_targets
from mvit_video.training.resume import FINGERPRINT_KEY
from mvit_video.training.sharding import FullySharded, shard
from mvit_video.weights import METADATA_KEY, model_metadata

log = logging.getLogger(__name__)

_REMEDIES = "Lower optim.lr, lengthen optim.warmup, set trainer.gradient_clip_val=1"


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


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the parameters that are trained by weight decay, and with layer decay by depth.

    Biases and everything one-dimensional (norms) don't decay. As in the official recipe, the class token,
    position tables and pooling kernels do. ``lr_scale`` of a group is ``layer_decay`` to the power of its
    distance from the head. Raises ConfigError for layer decay of a model without known layers.
    """
    layers = [[name for name, _ in model.named_parameters()]]
    if layer_decay != 1:
        if not isinstance(model, MViT):
            raise ConfigError(f"layer_decay needs an MViT, {type(model).__name__} has no known layers")
        layers = layer_groups(model)
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    for depth, names in enumerate(layers):
        scale = layer_decay ** (len(layers) - 1 - depth)
        trained = [name for name in names if parameters[name].requires_grad]
        plain = [name for name in trained if parameters[name].ndim <= 1 or name.endswith(".bias")]
        decayed = [name for name in trained if name not in plain]
        groups += [
            {"params": [parameters[name] for name in chosen], "weight_decay": decay, "lr_scale": scale}
            for chosen, decay in ((decayed, weight_decay), (plain, 0.0))
            if chosen
        ]
    return groups


def freeze(model: VideoModel, parts: Sequence[str]) -> None:
    """Keep parts of a model as they are, without dropout or drop path in them.

    Args:
        parts: names of modules or parameters, such as "blocks.0"; "backbone" is everything but the head.

    Raises:
        ConfigError: nothing has such a name, or nothing is left to train.
    """
    known = [name for name, _ in [*model.named_modules(), *model.named_parameters()] if name]
    if list(parts) == ["backbone"]:
        head = f"{model.classifier}."
        around = [name for name in known if head.startswith(f"{name}.") or f"{name}.".startswith(head)]
        parts = [name for name in known if name not in around]
    for part in parts:
        if part not in known:
            modules = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"freeze: the model has no {part!r}; it has: backbone, {modules}")

    def chosen(name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in parts)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not chosen(name))
    for name, module in model.named_modules():
        if chosen(name):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: nothing is left to train")


class Classifier(pl.LightningModule):
    """Trains a model on labelled clips.

    Args:
        model: gives logits for clips (B, 3, T, H, W).
        optimizer: makes the optimizer from parameter groups, for example a partial ``torch.optim.AdamW``.
        lr, warmup_start_lr, end_lr: see ``learning_rate``.
        warmup: share of the training steps that the warm-up takes, in [0, 1).
        weight_decay: see ``parameter_groups``.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        layer_decay: see ``parameter_groups``.
        lr_batch_size: videos a step, over all devices, that the learning rates are meant for; they are scaled
            linearly to those there are. None: they are taken as they are.
        batch_size: videos a step and device, for ``lr_batch_size``.
        mixing: how batches are mixed.
        seed: random numbers of a step depend on it, epoch, batch and rank alone.

    Raises:
        ConfigError: ``layer_decay`` of a model without known layers.

    Attributes:
        run_fingerprint: what the run is made of, kept in its checkpoints; set before training.
    """

    run_fingerprint: Fingerprint | None = None

    def __init__(
        self,
        model: VideoModel,
        *,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        lr: float,
        warmup: float = 0.15,
        warmup_start_lr: float = 1e-6,
        end_lr: float = 1e-6,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
        layer_decay: float = 1.0,
        lr_batch_size: int | None = None,
        batch_size: int = 1,
        mixing: Mixing | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        parameter_groups(model, weight_decay, layer_decay)  # finds early what it can't do
        self.model = model
        self.make_optimizer = optimizer
        self.lr, self.warmup, self.warmup_start_lr, self.end_lr = lr, warmup, warmup_start_lr, end_lr
        self.weight_decay, self.layer_decay, self.label_smoothing = weight_decay, layer_decay, label_smoothing
        self.lr_batch_size, self.batch_size = lr_batch_size, batch_size
        self.mixing, self.seed = mixing, seed
        self.train_means = Means(("train/loss", "train/top1", "clips/s"))
        self.val_means = Means(("val/loss", "val/top1", "val/top5"))
        self._step_end = time.perf_counter()

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, FullySharded) and not isinstance(self.model, FSDPModule):
            shard(self.model, strategy.device_mesh)

    def forward(self, clips: Tensor) -> Tensor:
        return self.model(clips)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Seed all generators, so that nothing about them needs to be kept for a run that is resumed."""
        key = f"{self.seed} {self.current_epoch} {batch_index} {self.global_rank}"
        pl.seed_everything(random.Random(key).getrandbits(32), verbose=False)

    def mix(self, batch: Batch, batch_index: int) -> tuple[Tensor, float]:
        """The batch's clips, mixed with their reverse, and lam, the share of a clip's own class."""
        if self.mixing is None:
            return batch.clips, 1.0
        key = (self.seed, self.current_epoch, batch_index, self.global_rank)
        return self.mixing(batch.clips, np.random.RandomState(key))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of a batch, which is logged with its top-1 and clips/s.

        Raises TrainingError where it isn't finite.
        """
        clips, lam = self.mix(batch, batch_index)
        num_classes = self.model.config.num_classes
        targets = soft_targets(batch.labels, num_classes, lam=lam, smoothing=self.label_smoothing)
        logits = self(clips)
        loss = F.cross_entropy(logits, targets)
        if not torch.isfinite(loss):
            self._stop(batch, clips, targets, logits)
        top1 = (logits.argmax(1) == targets.argmax(1)).float().mean()
        now = time.perf_counter()
        speed = torch.tensor(len(batch.labels) / (now - self._step_end))
        self._step_end = now
        self.train_means.add({"train/loss": loss, "train/top1": top1, "clips/s": speed}, len(batch.labels))
        # Processes agree on a number only where it is logged.
        every = cast(Any, self.trainer).log_every_n_steps
        is_logged = bool(every) and (self.trainer.global_step + 1) % every == 0
        self.log("train/loss_step", loss, sync_dist=is_logged)
        self.log("train/top1_step", top1, sync_dist=is_logged)
        self.log("clips/s_step", speed)
        return loss

    def on_train_epoch_start(self) -> None:
        self._step_end = time.perf_counter()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch, which is empty if none of its videos could be read, to loss and accuracies.

        Raises TrainingError where the model's output isn't finite.
        """
        size = len(batch.labels)
        if not size:
            self.val_means.add({}, 0)
            return
        logits = self(batch.clips)
        if not logits.isfinite().all():
            raise TrainingError(
                f"the model's output isn't finite in the validation of epoch {self.current_epoch + 1}: its "
                f"weights or the data aren't. {_REMEDIES}"
            )
        hits = logits.topk(min(5, logits.shape[1])).indices == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels)
        top1, top5 = hits[:, 0].float().mean(), hits.any(1).float().mean()
        self.val_means.add({"val/loss": loss, "val/top1": top1, "val/top5": top5}, size)

    def on_validation_epoch_end(self) -> None:
        means = self.val_means.take()
        self._step_end = time.perf_counter()
        if means["val/loss"].isnan():
            if not self.trainer.sanity_checking:  # which sees a few videos
                raise DataError("no validation video can be read")
            return
        for name, mean in means.items():
            self.log(name, mean)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model, self.weight_decay, self.layer_decay)
        optimizer = self.make_optimizer(groups)
        total = float(self.trainer.estimated_stepping_batches)
        if total == math.inf:
            raise ConfigError(
                "the learning rate has to know its last step: set trainer.max_epochs or max_steps"
            )

        def factor(step: int) -> float:
            return learning_rate(
                step,
                lr=self.lr,
                epochs=total,
                warmup_epochs=self.warmup * total,
                warmup_start_lr=self.warmup_start_lr,
                end_lr=self.end_lr,
            ) / (self.lr or 1.0)

        scale = self._lr_scale()
        for group in optimizer.param_groups:
            group["lr"] = self.lr * scale * group["lr_scale"]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    def _lr_scale(self) -> float:
        """Linear scaling with the videos of a step: start, peak and end are all multiplied."""
        if self.lr_batch_size is None:
            return 1.0
        videos = self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        scale = videos / self.lr_batch_size
        log.info(
            "learning rate %g: %g x %d / %d videos", self.lr * scale, self.lr, videos, self.lr_batch_size
        )
        return scale

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[METADATA_KEY] = model_metadata(self.model)
        if self.run_fingerprint is not None:
            checkpoint[FINGERPRINT_KEY] = self.run_fingerprint

    def _stop(self, batch: Batch, clips: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Save what gave a loss that isn't finite, and raise TrainingError."""
        path = Path(self.trainer.default_root_dir) / f"nan_batch_rank{self.global_rank}.pt"
        saved = {"clips": clips, "targets": targets, "logits": logits.detach(), "paths": list(batch.paths)}
        with replacing(path) as file:
            torch.save(saved, file)
        raise TrainingError(
            f"the loss isn't finite in epoch {self.current_epoch + 1}, step {self.global_step}; the batch is "
            f"saved in {path}. {_REMEDIES} or another trainer.precision (now {self.trainer.precision})"
        )
