"""mvit-train: train a model on labelled videos."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mvit_video import cli, processes
from mvit_video.bad_videos import BadVideoPolicy, BadVideos, allowed_bad_videos
from mvit_video.data.clips import TestViews, TrainingClips, training_loader, validation_loader
from mvit_video.data.index import VideoSplits
from mvit_video.errors import ConfigError
from mvit_video.model import load_weights
from mvit_video.recipe import History
from mvit_video.report import plot_history
from mvit_video.resume import (
    AtomicCheckpoints,
    EpochAverages,
    LastCheckpoint,
    StepSeeds,
    find_checkpoint,
    restore_loader,
)
from mvit_video.timing import StageProfiler

log = logging.getLogger(__name__)


def main() -> None:
    try:
        sys.argv += processes.overrides(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"mvit-train: error: {error}")
    cli.run(train, "train")


def train(config: DictConfig) -> None:
    """Build everything that ``conf/train.yaml`` describes, fit, and leave checkpoints, logs and curves."""
    output = Path(HydraConfig.get().runtime.output_dir)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    # Everything that can be checked without data is built before data are read.
    cli.check_loading(config)
    if config.head not in ("strict", "new"):
        raise ConfigError(f"head must be strict or new, got {config.head!r}")
    augment = cli.build(config.augment)
    allowed_bad_videos(config.max_bad_videos, 0)
    processes.use_own_gpu()
    open_file = cli.build_decoder(config)
    if config.save_every_n_steps is not None and config.save_every_n_steps < 1:
        raise ConfigError(f"save_every_n_steps must be null or at least 1, got {config.save_every_n_steps}")
    own_only = any(override.startswith("hydra.run.dir=") for override in HydraConfig.get().overrides.hydra)
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
        sketch = cli.build(config.model, weights=None)
        cli.override_protocol(sketch.protocol, config.views)
        cli.build(config.optim, model=sketch)

    splits: VideoSplits = cli.build(config.data)
    head = {"head": config.head} if config.model.get("weights") else {}
    model = cli.build(config.model, num_classes=splits.num_classes, **head)
    model.protocol = cli.override_protocol(model.protocol, config.views)
    if config.weights:
        report = load_weights(model, config.weights, head=config.head)
        log.info("weights of %s\n%s", config.weights, report)
    model.class_names = splits.class_names
    classifier = cli.build(config.optim, model=model)

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
            log.warning("stopped by SIGTERM; ckpt_path=last goes on from here")
            sys.exit(128 + signal.SIGTERM)

    if bad_videos.found:
        log.warning("%d bad videos, listed in %s", len(bad_videos.found), bad_videos.file)
    if history.epochs and trainer.is_global_zero:
        plot_history(history.epochs, output / "learning_curve.png")
        log.info("learning curve: %s", output / "learning_curve.png")
    kept = trainer.checkpoint_callback
    if isinstance(kept, ModelCheckpoint) and kept.best_model_path:
        log.info("best checkpoint: %s", kept.best_model_path)


def _build_trainer(config: DictConfig, output: Path, callbacks: list[Callback]) -> pl.Trainer:
    callbacks += [StepSeeds(config.seed), EpochAverages()]
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
    loggers = list(cli.build(config.logger).values())
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    return cli.build(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpoints()],
        default_root_dir=str(output),
    )


if __name__ == "__main__":
    main()
