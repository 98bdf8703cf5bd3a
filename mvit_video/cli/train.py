"""mvit-train: train a model on labelled videos."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mvit_video.cli import app
from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.datasets import TestViews, TrainingClips, training_loader, validation_loader
from mvit_video.data.index import VideoSplits
from mvit_video.data.loader import WORKER_TYPES
from mvit_video.data.ranks import rank_and_size, use_own_gpu
from mvit_video.errors import ConfigError
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import keep_former, remove_unfinished, sole_writer
from mvit_video.model import VideoModel
from mvit_video.training import processes
from mvit_video.training.callbacks import (
    BadVideoPolicy,
    BatchPicture,
    EpochProgress,
    EstimatedTime,
    Interrupts,
)
from mvit_video.training.checkpoints import AtomicCheckpoints, LastCheckpoint
from mvit_video.training.fit import fit, lightning_errors
from mvit_video.training.metrics import BestCheckpoint, EpochLogger, ResumableMetrics
from mvit_video.training.module import Classifier, freeze
from mvit_video.training.plots import describe_labels, plot_history
from mvit_video.training.profiler import StageProfiler
from mvit_video.training.resume import (
    RunFingerprint,
    SeedEachStep,
    find_checkpoint,
    optimizer_kind,
    resume,
    videos_sha256,
)
from mvit_video.training.sharding import AveragedWeights, FullySharded
from mvit_video.weights import load_weights

log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
FREE_SETTINGS = ("num_workers", "loader", "save_every_n_steps", "early_stopping", "compile", "max_bad_videos")
FREE_TRAINER_SETTINGS = (
    *("accelerator", "strategy", "precision", "max_epochs", "max_steps", "max_time", "limit_val_batches"),
    *("val_check_interval", "check_val_every_n_epoch", "gradient_clip_val", "gradient_clip_algorithm"),
)


def train(config: DictConfig) -> float | None:
    """Build everything that ``conf/train.yaml`` describes, fit, and leave checkpoints, logs and curves.

    Returns the best validation top-1, for sweepers; None without a validation.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    with ExitStack() as stack:
        if rank_and_size()[0] == 0:
            stack.enter_context(sole_writer(output / "checkpoints"))
        return _train(config, output, stack)


def _train(config: DictConfig, output: Path, stack: ExitStack) -> float | None:
    # Everything that can be checked without data is built before data are read.
    augment, mixing = app.build(config.augment), app.build(config.mixing)
    if mixing is not None and mixing.probability and config.batch_size * augment.repeats < 2:
        raise ConfigError("mixing pairs the clips of a batch; batch_size=2 or more is needed, or mixing=none")
    pl.seed_everything(config.seed, workers=True, verbose=False)
    use_own_gpu()
    open_file = app.build_decoder(config)
    own_only = HydraConfig.get().mode == RunMode.MULTIRUN or any(
        override.startswith("hydra.run.dir=") for override in HydraConfig.get().overrides.hydra
    )
    resume_from = find_checkpoint(config.ckpt_path, output, own_only=own_only)
    history, policy, identity = EpochLogger(), BadVideoPolicy(), RunFingerprint()
    with lightning_errors():
        trainer = _build_trainer(config, output, [history, policy, identity])
    processes.check_processes(trainer, HydraConfig.get().overrides.task)
    with torch.device("meta"):
        sketch = app.build(config.model, weights=None)
        app.override_protocol(sketch.protocol, config.views)
        app.build(config.optim, model=sketch)

    splits: VideoSplits = app.build(config.data)
    model = _build_model(config, splits)
    classifier = app.build(config.optim, _partial_=True)(
        model, batch_size=config.batch_size, mixing=mixing, seed=config.seed
    )
    if config.compile:
        model.compile()
    loading: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "rank": trainer.global_rank,
        "num_replicas": trainer.world_size,
        "worker_type": WORKER_TYPES[config.loader],
        "pin_memory": torch.cuda.is_available() and config.num_workers > 0,
    }
    clips = TrainingClips(splits.train.videos, model.protocol, augment, seed=config.seed, open_file=open_file)
    one_view = replace(model.protocol, num_clips=1, num_crops=1)
    centre_clips = TestViews(splits.val.videos, one_view, open_file=open_file)
    shuffle = not config.trainer.overfit_batches
    training = stack.enter_context(closing(training_loader(clips, shuffle=shuffle, **loading)))
    validation = stack.enter_context(closing(validation_loader(centre_clips, **loading)))
    _describe(model, splits, output)

    identity.fingerprint = _fingerprint(config, classifier, splits, trainer.world_size)
    folder = output / "checkpoints"
    if resume_from is not None:
        resume(resume_from, identity.fingerprint, training, max_epochs=trainer.max_epochs)
    if trainer.is_global_zero:
        remove_unfinished(folder)
        if resume_from is None or resume_from.parent != folder:
            keep_former(folder)
    total = len(splits.train) + len(splits.val)
    bad_videos = policy.bad_videos = BadVideos(
        output / "bad_videos.csv",
        allowed=allowed_bad_videos(config.max_bad_videos, total),
        total=total,
        go_on=resume_from is not None or not trainer.is_global_zero,
    )
    try:
        fit(trainer, classifier, training, validation, resume_from)
    except SIGTERMException:
        log.warning("stopped by a signal; ckpt_path=last resumes from the last checkpoint")
        sys.exit(128 + signal.SIGTERM)
    if bad_videos.found:
        plural = "s" if len(bad_videos.found) > 1 else ""
        log.warning("%d unreadable video%s, listed in %s", len(bad_videos.found), plural, bad_videos.file)
    if history.epochs and trainer.is_global_zero:
        plot_history(history.epochs, output / "learning_curve.png")
        log.info("learning curve: %s", output / "learning_curve.png")
    best = trainer.checkpoint_callback
    if isinstance(best, BestCheckpoint) and best.best_model_path:
        log.info("best checkpoint: %s", best.best_model_path)
    return history.best()


def _build_model(config: DictConfig, splits: VideoSplits) -> VideoModel:
    if splits.num_classes < 2:
        raise ConfigError(f"the data set has one class ({splits.class_names[0]}); training needs two or more")
    head: dict[str, Any] = {"head": config.head} if config.model.get("weights") else {}
    if config.weights:
        head = {"weights": None}  # a file takes the place of published weights
    model: VideoModel = app.build(config.model, num_classes=splits.num_classes, **head)
    model.protocol = app.override_protocol(model.protocol, config.views)
    if config.weights:
        report = load_weights(model, config.weights, head=config.head)
        log.info("weights of %s\n%s", config.weights, report)
    check_same_classes(model.class_names, model.config.num_classes, splits.class_names)
    model.class_names = splits.class_names
    if config.freeze:
        freeze(model, list(config.freeze) if OmegaConf.is_list(config.freeze) else [str(config.freeze)])
    return model


def _describe(model: VideoModel, splits: VideoSplits, output: Path) -> None:
    log.info(
        "%.1f M parameters, %d classes, %d training and %d validation videos; %s",
        sum(p.numel() for p in model.parameters()) / 1e6,
        splits.num_classes,
        len(splits.train),
        len(splits.val),
        model.protocol,
    )
    log.info("output directory: %s", output)
    labels = [video.label for video in splits.train.videos if video.label is not None]
    log.info("training videos of each class:\n%s", describe_labels(labels, splits.class_names))


def _fingerprint(
    config: DictConfig, classifier: Classifier, splits: VideoSplits, world_size: int
) -> Fingerprint:
    """What the run is made of; ``settings`` may change when it is resumed."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    trainer, model = plain["trainer"], classifier.model
    fields = asdict(cast(Any, model.config))
    optimizer = classifier.make_optimizer([{"params": [torch.nn.Parameter(torch.empty(1))]}])
    return fingerprint(
        batch={
            "size": config.batch_size * world_size,  # over all processes
            "accumulate_grad_batches": trainer["accumulate_grad_batches"],
            "limit_train_batches": trainer["limit_train_batches"],
            "overfit_batches": trainer["overfit_batches"],
        },
        seed=config.seed,
        data={
            "classes": splits.class_names,
            "train": videos_sha256(splits.train.videos),
            "val": videos_sha256(splits.val.videos),
        },
        clips=asdict(model.protocol),
        augment=plain["augment"],
        mixing=plain["mixing"],
        model={key: value for key, value in fields.items() if key != "checkpoint_blocks"},  # same numbers
        freeze=plain["freeze"],
        ema=config.ema,
        optim={key: value for key, value in plain["optim"].items() if key not in ("_target_", "_partial_")},
        optimizer=optimizer_kind(optimizer.defaults),
        settings={
            **{key: plain[key] for key in FREE_SETTINGS},
            **{key: trainer[key] for key in FREE_TRAINER_SETTINGS},
        },
    )


def _build_trainer(config: DictConfig, output: Path, callbacks: list[Callback]) -> pl.Trainer:
    config.trainer.devices, config.trainer.num_nodes = processes.choose_devices(
        config.trainer.devices, config.trainer.num_nodes
    )
    callbacks = [ResumableMetrics(), *callbacks, SeedEachStep(config.seed)]
    callbacks.append(BatchPicture(output / "batch.png"))
    if config.trainer.enable_checkpointing:
        callbacks.append(BestCheckpoint(output / "checkpoints"))
        callbacks.append(LastCheckpoint(output / "checkpoints", config.save_every_n_steps))
    if config.trainer.enable_progress_bar:
        callbacks.append(EpochProgress())
    if config.ema is not None:
        callbacks.append(AveragedWeights(decay=config.ema))
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping("val/top1", mode="max", patience=config.early_stopping))
    callbacks += [EstimatedTime(), Interrupts()]
    loggers = list(app.build(config.logger).values())
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU.*")  # an error of our own
    profiler: Any = config.trainer.profiler
    if config.profile:
        profiler = StageProfiler()
    elif profiler is not None:
        profiler = PROFILERS[profiler](dirpath=output, filename="profile")
    sharded = config.trainer.strategy == "fsdp"
    precision = str(config.trainer.precision)
    if sharded and precision in ("16", "16-mixed"):  # Lightning scales no gradients in shards
        raise ConfigError(f"trainer.precision={precision} isn't possible with fsdp; bf16-mixed is")
    trainer: pl.Trainer = app.build(
        config.trainer,
        **({"strategy": FullySharded()} if sharded else {}),
        callbacks=callbacks,
        logger=loggers,
        profiler=profiler,
        plugins=[AtomicCheckpoints()],
        default_root_dir=str(output),
    )
    if isinstance(trainer.accelerator, CPUAccelerator) and precision in ("16", "16-mixed", "16-true"):
        raise ConfigError(f"trainer.precision={precision} (float16) is for GPUs; on a CPU give bf16-mixed")
    return trainer
