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
from mvit_video.data.loader import WORKER_TYPES, ClipLoader
from mvit_video.data.ranks import rank_and_size, use_own_gpu
from mvit_video.errors import ConfigError
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import keep_former, remove_unfinished, sole_writer
from mvit_video.model import VideoModel
from mvit_video.training import callbacks, processes
from mvit_video.training.checkpoints import AtomicCheckpoints, LastCheckpoint
from mvit_video.training.fit import fit, lightning_errors
from mvit_video.training.metrics import BestCheckpoint, EpochLogger, ResumableMetrics
from mvit_video.training.module import Classifier, freeze
from mvit_video.training.plots import describe_labels, plot_history
from mvit_video.training.profiler import StageProfiler
from mvit_video.training.resume import find_checkpoint, resume, videos_sha256
from mvit_video.training.sharding import AveragedWeights, FullySharded
from mvit_video.weights import load_weights

log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

# What a resumed run is compared by: other steps of training, where they differ.
BATCH = ("accumulate_grad_batches", "limit_train_batches", "overfit_batches")
RECIPE = ("seed", "augment", "mixing", "freeze", "ema")
FREE = ("num_workers", "loader", "save_every_n_steps", "early_stopping", "compile", "max_bad_videos")


def train(config: DictConfig) -> float | None:
    """Build everything that ``conf/train.yaml`` describes, fit, and leave checkpoints, logs and curves.

    Returns the best validation top-1, for sweepers; None without a validation.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    folder = output / "checkpoints"
    with ExitStack() as stack:
        if rank_and_size()[0] == 0:
            stack.enter_context(sole_writer(folder))
        # Everything that can be checked without data is built before data are read.
        pl.seed_everything(config.seed, workers=True, verbose=False)
        use_own_gpu()
        _check_recipe(config)
        resume_from = find_checkpoint(config.ckpt_path, output, own_only=_has_own_folder())
        history, policy = EpochLogger(), callbacks.BadVideoPolicy()
        trainer = _build_trainer(config, output, [ResumableMetrics(), history, policy])

        splits: VideoSplits = app.build(config.data)
        model = _build_model(config, splits)
        classifier: Classifier = app.build(config.optim, _partial_=True)(
            model, batch_size=config.batch_size, mixing=app.build(config.mixing), seed=config.seed
        )
        training, validation = (
            stack.enter_context(closing(loader)) for loader in _build_loaders(config, model, splits, trainer)
        )
        _describe(model, splits, output)
        classifier.run_fingerprint = _fingerprint(config, model, splits, trainer.world_size)
        if resume_from is not None:
            resume(resume_from, classifier.run_fingerprint, training, max_epochs=trainer.max_epochs)
        if trainer.is_global_zero:
            remove_unfinished(folder)
            if resume_from is None or resume_from.parent != folder:
                keep_former(folder)
        total = len(splits.train) + len(splits.val)
        policy.bad_videos = BadVideos(
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
    _report(trainer, history, policy.bad_videos, output)
    return history.best()


def _has_own_folder() -> bool:
    """Whether the user has chosen the run's folder, so that no other run is meant to be resumed in it."""
    run = HydraConfig.get()
    return run.mode == RunMode.MULTIRUN or any(o.startswith("hydra.run.dir=") for o in run.overrides.hydra)


def _check_recipe(config: DictConfig) -> None:
    augment, mixing = app.build(config.augment), app.build(config.mixing)
    if mixing is not None and mixing.probability and config.batch_size * augment.repeats < 2:
        raise ConfigError("mixing pairs the clips of a batch; batch_size=2 or more is needed, or mixing=none")
    app.build_decoder(config)
    with torch.device("meta"):
        sketch = app.build(config.model, weights=None)
        app.override_protocol(sketch.protocol, config.views)
        app.build(config.optim, model=sketch)


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
    if config.compile:
        model.compile()
    return model


def _build_loaders(
    config: DictConfig, model: VideoModel, splits: VideoSplits, trainer: pl.Trainer
) -> tuple[ClipLoader[Any], ClipLoader[Any]]:
    """Random clips for training, and the central clip of each validation video."""
    loading: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "rank": trainer.global_rank,
        "num_replicas": trainer.world_size,
        "worker_type": WORKER_TYPES[config.loader],
        "pin_memory": torch.cuda.is_available() and config.num_workers > 0,
    }
    open_file, augment = app.build_decoder(config), app.build(config.augment)
    clips = TrainingClips(splits.train.videos, model.protocol, augment, seed=config.seed, open_file=open_file)
    one_view = replace(model.protocol, num_clips=1, num_crops=1)
    centre_clips = TestViews(splits.val.videos, one_view, open_file=open_file)
    shuffle = not config.trainer.overfit_batches
    return training_loader(clips, shuffle=shuffle, **loading), validation_loader(centre_clips, **loading)


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


def _fingerprint(config: DictConfig, model: VideoModel, splits: VideoSplits, world_size: int) -> Fingerprint:
    """What the run is made of; ``settings`` may change when it is resumed."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    trainer, optim = plain["trainer"], plain["optim"]
    fields = asdict(cast(Any, model.config))
    return fingerprint(
        batch={"size": config.batch_size * world_size} | {key: trainer.get(key) for key in BATCH},
        data={
            "classes": splits.class_names,
            "train": videos_sha256(splits.train.videos),
            "val": videos_sha256(splits.val.videos),
        },
        clips=asdict(model.protocol),
        model={key: value for key, value in fields.items() if key != "checkpoint_blocks"},  # same numbers
        optim={key: value for key, value in optim.items() if key not in ("_target_", "_partial_")},
        **{key: plain[key] for key in RECIPE},
        settings={key: plain[key] for key in FREE}
        | {key: value for key, value in trainer.items() if key not in (*BATCH, "_target_")},
    )


def _build_trainer(config: DictConfig, output: Path, own: list[Callback]) -> pl.Trainer:
    trainer, folder = config.trainer, output / "checkpoints"
    trainer.devices, trainer.num_nodes = processes.choose_devices(trainer.devices, trainer.num_nodes)
    precision, sharded = str(trainer.precision), trainer.strategy == "fsdp"
    if sharded and precision in ("16", "16-mixed"):  # Lightning scales no gradients in shards
        raise ConfigError(f"trainer.precision={precision} isn't possible with fsdp; bf16-mixed is")
    used = [*own, callbacks.BatchPicture(output / "batch.png")]
    if trainer.enable_checkpointing:
        used += [BestCheckpoint(folder), LastCheckpoint(folder, config.save_every_n_steps)]
    if trainer.enable_progress_bar:
        used.append(callbacks.EpochProgress())
    if config.ema is not None:
        used.append(AveragedWeights(decay=config.ema))
    if config.early_stopping is not None:
        if trainer.limit_val_batches == 0:
            raise ConfigError("early_stopping looks at validations, and trainer.limit_val_batches=0 has none")
        patience = {"patience": config.early_stopping, "check_on_train_epoch_end": False}
        used.append(EarlyStopping("val/top1", mode="max", **patience))
    loggers = list(app.build(config.logger).values())
    if loggers:
        used.append(LearningRateMonitor("step"))
    profiler: Any = trainer.profiler and PROFILERS[trainer.profiler](dirpath=output, filename="profile")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU.*")  # an error of our own
    warnings.filterwarnings("ignore", ".*could not find the monitored key.*")  # where no validation was due
    with lightning_errors():
        built: pl.Trainer = app.build(
            trainer,
            **({"strategy": FullySharded()} if sharded else {}),
            callbacks=[*used, callbacks.EstimatedTime(), callbacks.Interrupts()],
            logger=loggers,
            profiler=StageProfiler() if config.profile else profiler,
            plugins=[AtomicCheckpoints()],
            default_root_dir=str(output),
            enable_progress_bar=False,  # Lightning's
        )
    if isinstance(built.accelerator, CPUAccelerator) and precision in ("16", "16-mixed", "16-true"):
        raise ConfigError(f"trainer.precision={precision} (float16) is for GPUs; on a CPU give bf16-mixed")
    processes.check_processes(built, HydraConfig.get().overrides.task)
    return built


def _report(trainer: pl.Trainer, history: EpochLogger, bad_videos: BadVideos, output: Path) -> None:
    if bad_videos.found:
        plural = "s" if len(bad_videos.found) > 1 else ""
        log.warning("%d unreadable video%s, listed in %s", len(bad_videos.found), plural, bad_videos.file)
    if history.epochs and trainer.is_global_zero:
        plot_history(history.epochs, output / "learning_curve.png")
        log.info("learning curve: %s", output / "learning_curve.png")
    best = trainer.checkpoint_callback
    if isinstance(best, BestCheckpoint) and best.best_model_path:
        log.info("best checkpoint: %s", best.best_model_path)
