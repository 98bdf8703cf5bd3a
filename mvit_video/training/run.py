"""A training from its first step to its last checkpoint, by command or from Python."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mvit_video.data.augment import Augment
from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.datasets import TestViews, TrainingClips, training_loader, validation_loader
from mvit_video.data.index import VideoSplits
from mvit_video.data.ranks import rank_and_size
from mvit_video.errors import ConfigError
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import keep_former, remove_unfinished, sole_writer
from mvit_video.model import VideoModel
from mvit_video.training import callbacks
from mvit_video.training.checkpoints import AtomicCheckpoints, LastCheckpoint
from mvit_video.training.classification import Classifier
from mvit_video.training.fit import fit, lightning_errors
from mvit_video.training.metrics import BestCheckpoint, EpochLogger, ResumableMetrics, best_is
from mvit_video.training.mixing import Mixing
from mvit_video.training.plots import plot_history
from mvit_video.training.resume import find_checkpoint, resume, videos_sha256
from mvit_video.training.sharding import AveragedWeights
from mvit_video.training.task import Training

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # folder of a run


def make_callbacks(
    output: Path,
    monitor: str,
    *,
    checkpoints: bool = True,
    progress: bool = True,
    save_every_n_steps: int | None = 1000,
    ema: float | None = None,
    early_stopping: int | None = None,
) -> list[Callback]:
    """What every training is accompanied by.

    Args:
        monitor: name of the metric that ``best.ckpt`` and early stopping go by.
        save_every_n_steps: how often ``last.ckpt`` is written beside after epochs; None: not.
        ema: decay of averaged weights; None: none are kept.
        early_stopping: validations without a better ``monitor`` that end the training; None: none do.
    """
    # Means are logged before others read them, and Lightning puts checkpoints last.
    used: list[Callback] = [ResumableMetrics(), EpochLogger(), callbacks.BadVideoPolicy()]
    used.append(callbacks.BatchPicture(output / "batch.png"))
    if checkpoints:
        folder = output / CHECKPOINTS
        used += [BestCheckpoint(folder, monitor), LastCheckpoint(folder, save_every_n_steps)]
    if progress:
        used.append(callbacks.EpochProgress())
    if ema is not None:
        used.append(AveragedWeights(decay=ema))
    if early_stopping is not None:
        mode = best_is(monitor)
        used.append(
            EarlyStopping(monitor, patience=early_stopping, mode=mode, check_on_train_epoch_end=False)
        )
    return [*used, callbacks.EstimatedTime(), callbacks.Interrupts()]


def run(
    trainer: pl.Trainer,
    training: Training,
    output: Path,
    *,
    monitor: str,
    run_fingerprint: Fingerprint,
    resume_from: Path | None,
    max_bad_videos: float,
) -> float | None:
    """Fit, with the callbacks of ``make_callbacks`` in the Trainer; draw the curves.

    Args:
        run_fingerprint: what a run must share with the checkpoint that it goes on from.
        max_bad_videos: how many may be unreadable, see ``allowed_bad_videos``.

    Returns:
        The best value of ``monitor``; None without a validation.

    Raises:
        ConfigError: ``monitor`` is no metric, or the checkpoint is of another run.
        SystemExit: a signal asked the run to end.
    """
    module, folder = training.module, output / CHECKPOINTS
    names = [f"val/{name}" for name in module.val_metrics]
    if monitor not in names:
        raise ConfigError(f"monitor={monitor} is none of the metrics of a validation: {', '.join(names)}")
    log.info("output directory: %s", output)
    module.run_fingerprint = run_fingerprint
    if resume_from is not None:
        resume(resume_from, run_fingerprint, training.training, max_epochs=trainer.max_epochs)
    if trainer.is_global_zero:
        remove_unfinished(folder)
        if resume_from is None or resume_from.parent != folder:
            keep_former(folder)
    history, policy = _callback(trainer, EpochLogger), _callback(trainer, callbacks.BadVideoPolicy)
    policy.bad_videos = bad_videos = BadVideos(
        output / "bad_videos.csv",
        allowed=allowed_bad_videos(max_bad_videos, training.num_files),
        total=training.num_files,
        go_on=resume_from is not None or not trainer.is_global_zero,
    )
    try:
        fit(trainer, module, training.training, training.validation, resume_from)
    except SIGTERMException:
        log.warning("stopped by a signal; ckpt_path=last resumes from the last checkpoint")
        sys.exit(128 + signal.SIGTERM)
    if bad_videos.found:
        plural = "s" if len(bad_videos.found) > 1 else ""
        log.warning("%d unreadable video%s, listed in %s", len(bad_videos.found), plural, bad_videos.file)
    if history.epochs and trainer.is_global_zero:
        plot_history(history.epochs, output / "learning_curve.png", monitor=monitor)
        log.info("learning curve: %s", output / "learning_curve.png")
    best = trainer.checkpoint_callback
    if isinstance(best, BestCheckpoint) and best.best_model_path:
        log.info("best checkpoint: %s (%s)", best.best_model_path, history.describe_best(monitor))
    return history.best(monitor)


def _callback(trainer: pl.Trainer, kind: type[Any]) -> Any:
    return next(found for found in trainer.callbacks if isinstance(found, kind))  # type: ignore[attr-defined]


def train(
    model: VideoModel,
    splits: VideoSplits,
    output: str | Path,
    *,
    max_epochs: int = 20,
    batch_size: int = 8,
    lr: float = 1e-4,
    layer_decay: float = 0.75,
    label_smoothing: float = 0.1,
    augment: Augment | None = None,
    mixing: Mixing | None = None,
    num_workers: int = 2,
    seed: int = 0,
    resume: bool = False,
    monitor: str = Classifier.monitor,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Train a model on labelled videos, as ``mvit-train experiment=finetune`` does with its default rates.

    Args:
        model: for as many classes as ``splits`` has; it takes over their names, and ends in eval mode with
            the weights of the last step.
        splits: training and validation videos, such as from ``folder_splits``.
        output: folder for checkpoints, curves, and ``bad_videos.csv``.
        batch_size: videos a step and device.
        lr: peak learning rate of AdamW, as it is taken.
        layer_decay: factor on the rate for each layer away from the head; 1 where ``model`` is no MViT.
        augment: random crops and mirroring, if None.
        num_workers: threads or processes that decode.
        resume: go on with the checkpoint in ``output``, if there is one.
        monitor: name of the metric that the best checkpoint goes by.
        trainer: further arguments of Lightning's Trainer, such as ``{"precision": "bf16-mixed"}``.

    Returns:
        The best checkpoint, for ``load_model``.

    Raises:
        ConfigError: settings that can't work. DataError: too many unreadable videos.
    """
    output = Path(output).expanduser().resolve()
    check_same_classes(model.class_names, model.config.num_classes, splits.class_names)
    model.class_names = splits.class_names
    model.train()  # Lightning leaves modes as they are
    folder = output / CHECKPOINTS
    with ExitStack() as stack:
        if rank_and_size()[0] == 0:
            stack.enter_context(sole_writer(folder))
        pl.seed_everything(seed, workers=True, verbose=False)
        with lightning_errors():
            built = pl.Trainer(
                max_epochs=max_epochs,
                callbacks=make_callbacks(output, monitor),
                plugins=[AtomicCheckpoints()],
                default_root_dir=str(output),
                **{"logger": False, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0, **(trainer or {})},
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
        loading: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "rank": built.global_rank,
            "num_replicas": built.world_size,
            "pin_memory": torch.cuda.is_available() and num_workers > 0,
        }
        clips = TrainingClips(splits.train.videos, model.protocol, augment or Augment(), seed=seed)
        centre_clips = TestViews(splits.val.videos, replace(model.protocol, num_clips=1, num_crops=1))
        recipe = {"lr": lr, "layer_decay": layer_decay, "label_smoothing": label_smoothing, "warmup": 0.1}
        module = Classifier(
            model,
            optimizer=partial(torch.optim.AdamW),
            mixing=mixing,
            batch_size=batch_size,
            seed=seed,
            **recipe,
        )
        training = Training(
            module,
            stack.enter_context(closing(training_loader(clips, **loading))),
            stack.enter_context(closing(validation_loader(centre_clips, **loading))),
            len(splits.train) + len(splits.val),
            classification_identity(model, splits),
        )
        run(
            built,
            training,
            output,
            monitor=monitor,
            run_fingerprint=fingerprint(
                batch={"size": batch_size * built.world_size},
                optim=recipe,
                seed=seed,
                augment=asdict(clips.augment),
                mixing=asdict(mixing) if mixing else None,
                **training.identity,
            ),
            resume_from=find_checkpoint("last", output, own_only=True) if resume else None,
            max_bad_videos=0.2,
        )
    model.eval()
    return folder / "best.ckpt"


def classification_identity(model: VideoModel, splits: VideoSplits) -> dict[str, dict[str, Any]]:
    """What the trainings of a classifier are compared by, see ``Training``."""
    fields = asdict(model.config)
    return {
        "data": {
            "classes": splits.class_names,
            "train": videos_sha256(splits.train.videos),
            "val": videos_sha256(splits.val.videos),
        },
        "clips": asdict(model.protocol),
        "model": {key: value for key, value in fields.items() if key != "checkpoint_blocks"},  # same numbers
    }
