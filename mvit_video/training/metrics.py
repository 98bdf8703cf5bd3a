"""What an epoch's lines, curves and best checkpoint are made of: means over the videos that were seen."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mvit_video.data.ranks import rank_and_size
from mvit_video.io.writing import replacing

log = logging.getLogger(__name__)

MEANS_KEY = "train_means"  # of a checkpoint


class Means(nn.ModuleDict):
    """Means by name, over all samples of all processes: each counts by the samples that it has seen."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__({name: MeanMetric(nan_strategy="disable") for name in names})

    def add(self, means: Mapping[str, Tensor], count: int) -> None:
        """Scalars by name, the means of ``count`` samples of this process; no samples need no means."""
        for name, metric in self.items():
            cast(Any, metric).update(means[name].detach().expand(count) if count else torch.empty(0))

    def take(self) -> dict[str, Tensor]:
        """The means, NaN where there were no samples, and begin anew. All processes have to call it."""
        means = {}
        for name, metric in cast(Iterable[tuple[str, MeanMetric]], self.items()):
            means[name] = metric.compute()
            metric.reset()
        return means


class ResumableMetrics(pl.Callback):
    """Logs an epoch's training means, of the whole epoch where it was stopped in between too.

    It comes before callbacks that read them.
    """

    def __init__(self) -> None:
        self._of_cut_epoch: dict[str, dict[str, Tensor]] | None = None  # sums

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[MEANS_KEY] = self._of_cut_epoch or self._sums(trainer, pl_module)

    def _sums(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, dict[str, Tensor]]:
        """Of all processes."""
        return {
            name: {
                state: trainer.strategy.reduce(value.clone(), reduce_op="sum")
                for state, value in metric.metric_state.items()
            }
            for name, metric in pl_module.train_means.items()
        }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero:  # the first process takes up the sums of all
            return
        for name, states in checkpoint.get(MEANS_KEY, {}).items():
            metric = pl_module.train_means[name]
            metric.update(torch.empty(0))  # else it would warn that it has seen nothing
            for state, value in states.items():
                setattr(metric, state, value.to(metric.device))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._of_cut_epoch = self._sums(trainer, pl_module) if is_cut(trainer) else None
        for name, mean in pl_module.train_means.take().items():
            pl_module.log(f"{name}_epoch", mean)


def is_cut(trainer: pl.Trainer) -> bool:
    """Whether an epoch that ends has batches left, by max_steps, early stopping or max_time.

    A run that is resumed goes on with them.
    """
    return trainer.fit_loop.batch_idx + 1 < trainer.num_training_batches


class EpochLogger(pl.Callback):
    """Keeps the metrics of every epoch, through resumes, and logs a line of each."""

    state_key = "History"  # in checkpoints

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._has_validated = self._is_last_cut = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._has_validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = trainer.callback_metrics
        names = [name for name in found if name.startswith("train/") and name.endswith("_epoch")]
        if self._has_validated:  # else these are the numbers of an earlier epoch
            names += [name for name in found if name.startswith("val/")]
        names += ["clips/s_epoch"] if "clips/s_epoch" in found else []
        row = {name.removesuffix("_epoch"): float(found[name]) for name in names}
        self.epochs.append({"epoch": trainer.current_epoch + 1, **row})
        self._is_last_cut = is_cut(trainer)
        self._has_validated = False
        line = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        log.info("epoch %d/%s: %s", trainer.current_epoch + 1, trainer.max_epochs, line)

    def best(self, monitor: str) -> float | None:
        """The best value of a metric; None where no epoch has it."""
        better = min if best_is(monitor) == "min" else max
        return better((row[monitor] for row in self.epochs if monitor in row), default=None)

    def describe(self, monitor: str, value: float) -> str:
        """A metric's value and its epoch; of equal values that of the lowest loss, as the checkpoint is."""
        rows = [row for row in self.epochs if row.get(monitor) == value]
        epochs = [row["epoch"] for row in sorted(rows, key=lambda row: row.get("val/loss", 0))]
        where = f"epoch {epochs[0]:.0f}, " if epochs else ""  # in the middle of one
        return f"{where}{monitor} {value:.3f}"

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs[:-1] if self._is_last_cut else self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])


def best_is(monitor: str) -> str:
    """Whether a metric is best where it is lowest ("min"), as losses are, or highest ("max")."""
    return "min" if monitor.endswith("loss") else "max"


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights of the best value of a metric, and of several such those of the lowest loss."""

    def __init__(self, folder: Any, monitor: str) -> None:
        super().__init__(folder, "best", monitor=monitor, mode=best_is(monitor), enable_version_counter=False)
        self._loss = float("inf")

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        loss = float(trainer.callback_metrics.get("val/loss", float("inf")))
        is_better = super().check_monitor_top_k(trainer, current)
        ties = current is not None and self.best_model_score is not None and current == self.best_model_score
        if is_better or (ties and loss < self._loss):
            self._loss = loss
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_loss": self._loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best so far; a run that goes on in another folder takes it along."""
        former, own = Path(state_dict["best_model_path"]), Path(self.dirpath or "", "best.ckpt")
        if former.is_file() and not own.is_file() and rank_and_size()[0] == 0:
            with former.open("rb") as source, replacing(own) as copy:
                shutil.copyfileobj(source, copy)
        moved: dict[str, Any] = {"dirpath": self.dirpath, "best_model_path": str(own)}
        if former.is_file() or own.is_file():
            scores = state_dict["best_k_models"].values()
            moved |= {"kth_best_model_path": str(own), "best_k_models": {str(own): s for s in scores}}
        else:
            moved |= {"best_model_path": "", "best_model_score": None, "best_k_models": {}}
            if former.name:
                log.warning("%s isn't there any more; best.ckpt will be the best from here on", former)
        super().load_state_dict({**state_dict, **moved})
        self._loss = state_dict.get("best_loss", float("inf")) if moved["best_k_models"] else float("inf")
