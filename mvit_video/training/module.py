"""What all trainings share: optimizer, schedule, random numbers, metrics and what a checkpoint holds."""

from __future__ import annotations

import logging
import math
import random
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mvit_video.data.loader import ClipLoader
from mvit_video.data.pixels import finish_clips
from mvit_video.errors import ConfigError, DataError, TrainingError
from mvit_video.io.fingerprint import Fingerprint
from mvit_video.training.metrics import Means
from mvit_video.training.recipe import learning_rate, parameter_groups
from mvit_video.training.resume import FINGERPRINT_KEY
from mvit_video.training.sharding import FullySharded, shard
from mvit_video.weights import METADATA_KEY
from mvit_video.weights.checkpoint import write_checkpoint

log = logging.getLogger(__name__)

_REMEDIES = "Lower optim.lr, lengthen optim.warmup, set trainer.gradient_clip_val=1"


@dataclass(frozen=True)
class Losses:
    """What a task makes of a batch.

    Attributes:
        metrics: scalars by the name behind "train/" or "val/", means over ``count`` samples; "loss" is the
            one that is trained.
        to_save: what a person needs to find out why the loss isn't finite, by name.
    """

    metrics: Mapping[str, Tensor]
    count: int
    to_save: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        return self.metrics["loss"]


class TrainingModule(pl.LightningModule):
    """A training without its task, which says what the losses of a batch are.

    Args:
        model: what is trained.
        optimizer: makes the optimizer from parameter groups, for example a partial ``torch.optim.AdamW``.
        lr, warmup_start_lr, end_lr: see ``learning_rate``.
        warmup: share of the training steps that the warm-up takes, in [0, 1).
        weight_decay, layer_decay: see ``parameter_groups``.
        lr_batch_size: samples a step, over all devices, that the learning rates are meant for; they are
            scaled linearly to those there are. None: they are taken as they are.
        batch_size: samples a step and device, for ``lr_batch_size``.
        seed: random numbers of a step depend on it, epoch, batch and rank alone.

    Raises:
        ConfigError: ``layer_decay`` of a model without known layers.

    Attributes:
        train_metrics, val_metrics: names of the metrics of ``Losses``, "loss" first.
        monitor: the metric that the best checkpoint has the best value of.
        run_fingerprint: what the run is made of, kept in its checkpoints; set before training.
    """

    train_metrics: ClassVar[Sequence[str]] = ("loss",)
    val_metrics: ClassVar[Sequence[str]] = ("loss",)
    monitor: ClassVar[str] = "val/loss"
    run_fingerprint: Fingerprint | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        lr: float,
        warmup: float = 0.15,
        warmup_start_lr: float = 1e-6,
        end_lr: float = 1e-6,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        lr_batch_size: int | None = None,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = optimizer
        self.lr, self.warmup, self.warmup_start_lr, self.end_lr = lr, warmup, warmup_start_lr, end_lr
        self.weight_decay, self.layer_decay = weight_decay, layer_decay
        self.lr_batch_size, self.batch_size, self.seed = lr_batch_size, batch_size, seed
        self.parameter_groups()  # finds early what it can't do
        self.train_means = Means((*(f"train/{name}" for name in self.train_metrics), "clips/s"))
        self.val_means = Means(f"val/{name}" for name in self.val_metrics)
        self._unchecked: deque[_Unchecked] = deque()
        self._step_end = time.perf_counter()

    @abstractmethod
    def training_losses(self, batch: Any, batch_index: int) -> Losses:
        """The losses of a training batch."""

    @abstractmethod
    def validation_losses(self, batch: Any) -> Losses | None:
        """The losses of a validation batch; None where it has no samples, since none could be read."""

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """What builds the model of a checkpoint again: plain dicts and lists."""

    def draw_batch(self, batch: Any, batch_index: int, path: Path) -> None:
        """Draw a training batch as the model sees it."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer takes, with ``lr_scale`` in each group."""
        return parameter_groups(self.model, self.weight_decay, self.layer_decay)

    def lr_factor(self, step: int, total: float) -> float:
        """Learning rate at a step of ``total``, over ``lr``."""
        return learning_rate(
            step,
            lr=self.lr,
            epochs=total,
            warmup_epochs=self.warmup * total,
            warmup_start_lr=self.warmup_start_lr,
            end_lr=self.end_lr,
        ) / (self.lr or 1.0)

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, FullySharded) and not isinstance(self.model, FSDPModule):
            shard(self.model, strategy.device_mesh)

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Seed all generators, so that nothing about them needs to be kept for a run that is resumed."""
        key = f"{self.seed} {self.current_epoch} {batch_index} {self.global_rank}"
        pl.seed_everything(random.Random(key).getrandbits(32), verbose=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Clips arrive as bytes, and become what the model sees where it is."""
        if not isinstance(getattr(batch, "clips", None), list):
            return batch
        clips = finish_clips(batch.clips)
        return batch._replace(clips=self.trainer.precision_plugin.convert_input(clips))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of a batch, which is logged with the other metrics and clips/s.

        Raises TrainingError where it isn't finite; on a GPU a few steps later, so as not to wait for it.
        """
        losses = self.training_losses(batch, batch_index)
        self._unchecked.append(_Unchecked(losses, self.global_step))
        self._require_finite(wait=False)
        now = time.perf_counter()
        speed = torch.tensor(losses.count / (now - self._step_end))
        self._step_end = now
        metrics = {f"train/{name}": value for name, value in losses.metrics.items()}
        self.train_means.add({**metrics, "clips/s": speed}, losses.count)
        # Processes agree on a number only where it is logged.
        every = cast(Any, self.trainer).log_every_n_steps
        is_logged = bool(every) and (self.trainer.global_step + 1) % every == 0
        for name, value in metrics.items():
            self.log(f"{name}_step", value, sync_dist=is_logged)
        self.log("clips/s_step", speed)
        return losses.loss

    def on_train_epoch_start(self) -> None:
        self._step_end = time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        self._require_finite(wait=True)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Add a batch to the means. Raises TrainingError where the model's output isn't finite."""
        losses = self.validation_losses(batch)
        if losses is None:
            self.val_means.add({}, 0)
            return
        if not losses.loss.isfinite():
            self.stop_validation()
        self.val_means.add({f"val/{name}": value for name, value in losses.metrics.items()}, losses.count)

    def on_validation_epoch_end(self) -> None:
        means = self.val_means.take()
        self._step_end = time.perf_counter()
        if means["val/loss"].isnan():
            if not self.trainer.sanity_checking:  # which sees a few videos
                raise DataError("no validation video can be read")
            return
        for name, mean in means.items():
            self.log(name, mean)

    def stop_validation(self) -> NoReturn:
        """Raises TrainingError."""
        raise TrainingError(
            f"the model's output isn't finite in the validation of epoch {self.current_epoch + 1}: its "
            f"weights or the data aren't. {_REMEDIES}"
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
        total = float(self.trainer.estimated_stepping_batches)
        if total == math.inf:
            raise ConfigError(
                "the learning rate has to know its last step: set trainer.max_epochs or max_steps"
            )
        scale = self._lr_scale()
        for group in optimizer.param_groups:
            group["lr"] = self.lr * scale * group["lr_scale"]
        schedule = LambdaLR(optimizer, lambda step: self.lr_factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_scale(self) -> float:
        """Linear scaling with the samples of a step: start, peak and end are all multiplied."""
        if self.lr_batch_size is None:
            return 1.0
        samples = self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        scale = samples / self.lr_batch_size
        log.info(
            "learning rate %g: %g x %d / %d samples", self.lr * scale, self.lr, samples, self.lr_batch_size
        )
        return scale

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._require_finite(wait=True)
        checkpoint[METADATA_KEY] = self.metadata()
        if self.run_fingerprint is not None:
            checkpoint[FINGERPRINT_KEY] = self.run_fingerprint

    def _require_finite(self, *, wait: bool) -> None:
        """Look at the losses that are there, or at all. Save what gave one that isn't finite, and raise."""
        while self._unchecked and (wait or self._unchecked[0].is_there()):
            unchecked = self._unchecked.popleft()
            if unchecked.is_finite():
                continue
            path = Path(self.trainer.default_root_dir) / f"nan_batch_rank{self.global_rank}.pt"
            write_checkpoint(dict(unchecked.losses.to_save), path)
            raise TrainingError(
                f"the loss isn't finite in epoch {self.current_epoch + 1}, step {unchecked.step}; the batch "
                f"is saved in {path}. {_REMEDIES} or another trainer.precision (now {self.trainer.precision})"
            )


@dataclass(frozen=True)
class Training:
    """All of a training but the Trainer. Batches have ``bad``, a list of the ``BadVideo`` that they lack.

    Attributes:
        num_files: videos or images of training and validation together.
        identity: what a resumed run is compared by (model, data, clips), by part and key.
    """

    module: TrainingModule
    training: ClipLoader[Any]
    validation: ClipLoader[Any]
    num_files: int
    identity: Mapping[str, Mapping[str, Any]]


class _Unchecked:
    """A loss that a GPU may still be working on; asking whether it is there doesn't wait."""

    def __init__(self, losses: Losses, step: int) -> None:
        self.losses, self.step = losses, step
        self._finite = losses.loss.detach().isfinite()
        self._event: torch.cuda.Event | None = None
        if self._finite.is_cuda:
            self._finite = self._finite.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def is_finite(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._finite)
