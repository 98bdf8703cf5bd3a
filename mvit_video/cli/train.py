"""mvit-train: train a model on labelled videos."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mvit_video.cli import app
from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.datasets import TestViews, TrainingClips, training_loader, validation_loader
from mvit_video.data.index import VideoSplits
from mvit_video.data.ranks import use_own_gpu
from mvit_video.errors import ConfigError, TrainingError
from mvit_video.training import processes
from mvit_video.training.bad_videos import BadVideoPolicy
from mvit_video.training.forecast import Forecast, is_out_of_memory
from mvit_video.training.module import History, freeze
from mvit_video.training.plots import describe_labels, plot_history
from mvit_video.training.profiler import StageProfiler
from mvit_video.training.resume import (
    AtomicCheckpoints,
    EpochAverages,
    LastCheckpoint,
    StepSeeds,
    find_checkpoint,
    restore_loader,
)
from mvit_video.training.sharding import AveragedWeights, FullySharded
from mvit_video.weights import load_weights

log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def train(config: DictConfig) -> None:
    """Build everything that ``conf/train.yaml`` describes, fit, and leave checkpoints, logs and curves."""
    output = Path(HydraConfig.get().runtime.output_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    # Everything that can be checked without data is built before data are read.
    if config.head not in ("strict", "new"):
        raise ConfigError(f"head must be strict or new, got {config.head!r}")
    augment, mixing = app.build(config.augment), app.build(config.mixing)
    if mixing is not None and mixing.probability and config.batch_size * augment.repeats < 2:
        raise ConfigError("mixing pairs the clips of a batch; batch_size=2 or more is needed, or mixing=none")
    allowed_bad_videos(config.max_bad_videos, 0)
    use_own_gpu()
    open_file = app.build_decoder(config)
    if config.save_every_n_steps is not None and config.save_every_n_steps < 1:
        raise ConfigError(f"save_every_n_steps must be null or at least 1, got {config.save_every_n_steps}")
    own_only = HydraConfig.get().mode == RunMode.MULTIRUN or any(
        override.startswith("hydra.run.dir=") for override in HydraConfig.get().overrides.hydra
    )
    resume_from = find_checkpoint(config.ckpt_path, output, own_only=own_only)
    history, policy = History(), BadVideoPolicy()
    config.trainer.devices, config.trainer.num_nodes = processes.choose_devices(
        config.trainer.devices, config.trainer.num_nodes
    )
    trainer = _build_trainer(config, output, [history, policy])
    if config.profile:
        cast(Any, trainer).profiler = StageProfiler()
    processes.check_processes(trainer, HydraConfig.get().overrides.task)
    with torch.device("meta"):
        sketch = app.build(config.model, weights=None)
        app.override_protocol(sketch.protocol, config.views)
        app.build(config.optim, model=sketch)

    splits: VideoSplits = app.build(config.data)
    if splits.num_classes < 2:
        raise ConfigError(f"the data set has one class ({splits.class_names[0]}); training needs two or more")
    head: dict[str, Any] = {"head": config.head} if config.model.get("weights") else {}
    if config.weights:
        head = {"weights": None}  # a file takes the place of published weights
    model = app.build(config.model, num_classes=splits.num_classes, **head)
    model.protocol = app.override_protocol(model.protocol, config.views)
    if config.weights:
        report = load_weights(model, config.weights, head=config.head)
        log.info("weights of %s\n%s", config.weights, report)
    check_same_classes(model.class_names, model.config.num_classes, splits.class_names)
    model.class_names = splits.class_names
    if config.freeze:
        freeze(model, list(config.freeze) if OmegaConf.is_list(config.freeze) else [str(config.freeze)])
    classifier = app.build(config.optim, _partial_=True)(
        model, batch_size=config.batch_size, mixing=mixing, seed=config.seed
    )
    if config.compile:
        model.compile()

    loading: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "process": trainer.global_rank,
        "processes": trainer.world_size,
        "kind": config.loader,
        "pin_memory": torch.cuda.is_available() and config.num_workers > 0,
    }
    clips = TrainingClips(splits.train.videos, model.protocol, augment, seed=config.seed, open_file=open_file)
    one_view = replace(model.protocol, num_clips=1, num_crops=1)
    centre_clips = TestViews(splits.val.videos, one_view, open_file=open_file)
    log.info(
        "%.1f M parameters, %d classes, %d training and %d validation videos; %s",
        sum(p.numel() for p in model.parameters()) / 1e6,
        splits.num_classes,
        len(splits.train),
        len(splits.val),
        model.protocol,
    )
    log.info("everything goes to %s", output)
    labels = [video.label for video in splits.train.videos if video.label is not None]
    log.info("training videos of each class:\n%s", describe_labels(labels, splits.class_names))
    total = len(splits.train) + len(splits.val)
    bad_videos = policy.bad_videos = BadVideos(
        output / "bad_videos.csv",
        allowed=allowed_bad_videos(config.max_bad_videos, total),
        total=total,
        go_on=resume_from is not None or not trainer.is_global_zero,
    )
    with (
        closing(training_loader(clips, shuffle=not config.trainer.overfit_batches, **loading)) as training,
        closing(validation_loader(centre_clips, **loading)) as validation,
    ):
        if resume_from is not None:
            restore_loader(training, resume_from)
        try:
            trainer.fit(classifier, training, validation, ckpt_path=resume_from, weights_only=True)
        except SIGTERMException:
            log.warning("stopped by a signal; ckpt_path=last goes on from the last checkpoint")
            sys.exit(128 + signal.SIGTERM)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"memory isn't enough for batch_size={config.batch_size}: lower it "
                "(trainer.accumulate_grad_batches makes up for that), or set model.checkpoint_blocks=true "
                "or trainer.precision=bf16-mixed"
            ) from None
        except ValueError as error:
            if "loaded state dict" not in str(error):
                raise
            raise ConfigError(
                f"{resume_from} can't go on with these settings: its optimizer has other groups of "
                "parameters; use those that it was started with, or start anew with weights=FILE"
            ) from None

    if bad_videos.found:
        log.warning("%d bad videos, listed in %s", len(bad_videos.found), bad_videos.file)
    if history.epochs and trainer.is_global_zero:
        plot_history(history.epochs, output / "learning_curve.png")
        log.info("learning curve: %s", output / "learning_curve.png")
    kept = trainer.checkpoint_callback
    if isinstance(kept, ModelCheckpoint) and kept.best_model_path:
        log.info("best checkpoint: %s", kept.best_model_path)


def _build_trainer(config: DictConfig, output: Path, callbacks: list[Callback]) -> pl.Trainer:
    callbacks = [EpochAverages(), *callbacks, StepSeeds(config.seed)]
    if config.trainer.enable_checkpointing:
        callbacks.append(
            ModelCheckpoint(
                output / "checkpoints",
                "best",
                monitor="val/top1",
                mode="max",
                enable_version_counter=False,
            )
        )
        callbacks.append(LastCheckpoint(output / "checkpoints", config.save_every_n_steps))
    if config.trainer.enable_progress_bar:
        callbacks.append(RichProgressBar(refresh_rate=1))
    if config.ema is not None:
        if not 0 < config.ema < 1:
            raise ConfigError(f"ema must be between 0 and 1, such as 0.9999, got {config.ema}")
        callbacks.append(AveragedWeights(decay=config.ema))
    if config.early_stopping is not None:
        callbacks.append(EarlyStopping("val/top1", mode="max", patience=config.early_stopping))
    callbacks.append(Forecast())
    loggers = list(app.build(config.logger).values())
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*AMP with fp16 is not supported on CPU.*")  # an error of our own
    profiler = config.trainer.profiler
    if profiler is not None:
        if profiler not in PROFILERS:
            raise ConfigError(f"trainer.profiler must be one of {', '.join(PROFILERS)}, got {profiler!r}")
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
