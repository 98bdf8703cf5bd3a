"""mvit-train: train a model on videos or images."""

from __future__ import annotations

import importlib
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from mvit_video.cli import app
from mvit_video.data.ranks import rank_and_size, use_own_gpu
from mvit_video.errors import ConfigError
from mvit_video.io.fingerprint import Fingerprint, fingerprint
from mvit_video.io.writing import sole_writer
from mvit_video.training import processes
from mvit_video.training.callbacks import CompileIfFaster, StageProfiler
from mvit_video.training.checkpoints import CHECKPOINTS, AtomicCheckpoints
from mvit_video.training.classification import MultiLabelClassifier
from mvit_video.training.fit import tame_lightning
from mvit_video.training.module import Training
from mvit_video.training.resume import find_checkpoint
from mvit_video.training.run import make_callbacks, run
from mvit_video.training.sharding import FullySharded

log = logging.getLogger(__name__)

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}

# What a resumed run is compared by: other steps of training, where they differ.
BATCH = ("accumulate_grad_batches", "limit_train_batches", "overfit_batches")
RECIPE = ("seed", "augment", "mixing", "freeze", "ema")
# What may differ, and is told then: videos may have moved.
FREE = (
    *("data", "decoder", "num_workers", "loader", "save_every_n_steps", "early_stopping", "compile"),
    "max_bad_videos",
)


def train(config: DictConfig) -> float | None:
    """Build everything that ``conf/train.yaml`` describes, fit, and leave checkpoints, logs and curves.

    Returns the best value of ``monitor``, for sweepers; None without a validation.
    """
    task = importlib.import_module(f"mvit_video.cli.tasks.{config.task}")
    if config.task != "classification":
        with open_dict(config.data):
            if config.data.pop("balance", None):
                raise ConfigError(f"data.balance is for task=classification, not {config.task}")
        if OmegaConf.select(config, "mixing.probability"):
            raise ConfigError(f"mixing is for task=classification; {config.task} takes mixing=none")
    if config.fresh and (config.task != "classification" or not config.weights):
        raise ConfigError("fresh is for a classifier that starts from weights=FILE")
    output = Path(HydraConfig.get().runtime.output_dir)
    with ExitStack() as stack:
        if rank_and_size()[0] == 0:
            stack.enter_context(sole_writer(output / CHECKPOINTS))
        # Everything that can be checked without data is built before data are read.
        pl.seed_everything(config.seed, workers=True, verbose=False)
        use_own_gpu()
        app.build(config.optim, model=task.sketch(config))
        several = config.data.get("multi_label")  # classes a video
        module: Any = MultiLabelClassifier if several else get_class(config.optim._target_)
        monitor = config.monitor or module.monitor
        resume_from = find_checkpoint(config.ckpt_path, output, own_only=_has_own_folder())
        trainer = _build_trainer(config, output, monitor)

        training: Training = task.train(config, trainer)
        if config.compile == "auto":
            trainer.callbacks.append(CompileIfFaster())  # type: ignore[attr-defined]
        elif config.compile:
            training.module.model.compile()
        return run(
            trainer,
            training,
            output,
            monitor=monitor,
            run_fingerprint=_fingerprint(config, training, trainer.world_size),
            resume_from=resume_from,
            max_bad_videos=config.max_bad_videos,
        )


def _has_own_folder() -> bool:
    """Whether the user has chosen the run's folder, so that no other run is meant to be resumed in it."""
    run = HydraConfig.get()
    return run.mode == RunMode.MULTIRUN or any(o.startswith("hydra.run.dir=") for o in run.overrides.hydra)


def _fingerprint(config: DictConfig, training: Training, world_size: int) -> Fingerprint:
    """What the run is made of; ``settings`` may change when it is resumed."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    trainer, optim = plain["trainer"], plain["optim"]
    return fingerprint(
        batch={"size": config.batch_size * world_size} | {key: trainer.get(key) for key in BATCH},
        optim={key: value for key, value in optim.items() if key not in ("_target_", "_partial_")},
        **{key: plain.get(key) for key in RECIPE},
        **training.identity,
        settings={key: plain[key] for key in FREE}
        | {key: value for key, value in trainer.items() if key not in (*BATCH, "_target_")},
    )


def _build_trainer(config: DictConfig, output: Path, monitor: str) -> pl.Trainer:
    trainer = config.trainer
    trainer.devices, trainer.num_nodes = processes.choose_devices(trainer.devices, trainer.num_nodes)
    trainer.precision = choose_precision(str(trainer.precision), str(trainer.accelerator))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not config.exact
    sharded = trainer.strategy == "fsdp"
    if sharded and trainer.precision in ("16", "16-mixed"):  # Lightning scales no gradients in shards
        raise ConfigError(f"trainer.precision={trainer.precision} isn't possible with fsdp; bf16-mixed is")
    if config.early_stopping is not None and trainer.limit_val_batches == 0:
        raise ConfigError("early_stopping looks at validations, and trainer.limit_val_batches=0 has none")
    every, epochs = (trainer.get(key) or 0 for key in ("check_val_every_n_epoch", "max_epochs"))
    if 0 < epochs < every:
        trainer.check_val_every_n_epoch = epochs  # else it would end without a best checkpoint
    accompanying = make_callbacks(
        output,
        monitor,
        checkpoints=trainer.enable_checkpointing,
        progress=trainer.enable_progress_bar,
        save_every_n_steps=config.save_every_n_steps,
        ema=config.ema,
        early_stopping=config.early_stopping,
    )
    loggers = list(app.build(config.logger).values())
    profiler: Any = trainer.profiler and PROFILERS[trainer.profiler](dirpath=output, filename="profile")
    with tame_lightning():
        built: pl.Trainer = app.build(
            trainer,
            **({"strategy": FullySharded()} if sharded else {}),
            callbacks=[*accompanying, *([LearningRateMonitor("step")] if loggers else [])],
            logger=loggers,
            profiler=StageProfiler() if config.profile else profiler,
            plugins=[AtomicCheckpoints()],
            default_root_dir=str(output),
            enable_progress_bar=False,  # Lightning's
        )
    if isinstance(built.accelerator, CPUAccelerator) and trainer.precision in ("16", "16-mixed", "16-true"):
        raise ConfigError(
            f"trainer.precision={trainer.precision} (float16) is for GPUs; on a CPU give bf16-mixed"
        )
    processes.check_processes(built, HydraConfig.get().overrides.task)
    return built


def choose_precision(precision: str, accelerator: str) -> str:
    """Resolve "auto": bf16-mixed on GPUs that compute with it, else float32."""
    if precision != "auto":
        return precision
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
