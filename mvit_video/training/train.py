"""A training from Python."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from mvit_video.data.augment import Augment
from mvit_video.data.class_names import check_same_classes
from mvit_video.data.index import VideoSplits
from mvit_video.data.ranks import rank_and_size
from mvit_video.io.console import show_log
from mvit_video.io.fingerprint import fingerprint
from mvit_video.io.writing import sole_writer
from mvit_video.model import VideoModel
from mvit_video.training.checkpoints import CHECKPOINTS, AtomicCheckpoints
from mvit_video.training.classification import Classifier, MultiLabelClassifier, classification_training
from mvit_video.training.fit import tame_lightning
from mvit_video.training.mixing import Mixing
from mvit_video.training.resume import find_checkpoint
from mvit_video.training.run import make_callbacks, run


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
    monitor: str | None = None,
    balance: Literal["sampler", "loss"] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Train a model on labelled videos, as ``mvit-train experiment=finetune`` does with its default rates.

    A line for each epoch goes where ``show_log`` says.

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
        monitor: name of the metric that the best checkpoint goes by; None: "val/top1", or "val/map" where
            videos have several classes.
        balance: of rare and frequent classes, see ``classification_training``.
        trainer: further arguments of Lightning's Trainer, such as ``{"precision": "bf16-mixed"}``.

    Returns:
        The best checkpoint, for ``load_model``.

    Raises:
        ConfigError: settings that can't work. DataError: too many unreadable videos.
    """
    output = Path(output).expanduser().resolve()
    check_same_classes(model.class_names, model.config.num_classes, splits.class_names)
    model.class_names, model.multi_label = splits.class_names, splits.multi_label
    recipe = {"lr": lr, "layer_decay": layer_decay, "label_smoothing": label_smoothing, "warmup": 0.1}
    optimizer: Any = torch.optim.AdamW
    kind = MultiLabelClassifier if splits.multi_label else Classifier
    module = kind(model, optimizer=optimizer, mixing=mixing, batch_size=batch_size, seed=seed, **recipe)
    options: dict[str, Any] = {"balance": balance, "num_workers": num_workers, "resume": resume}
    options |= {"monitor": monitor or kind.monitor, "trainer": {"max_epochs": max_epochs, **(trainer or {})}}
    _fit(module, splits, output, recipe, augment or Augment(), **options)
    return output / CHECKPOINTS / "best.ckpt"


def _fit(
    module: Classifier,
    splits: VideoSplits,
    output: Path,
    recipe: Mapping[str, float],
    augment: Augment,
    *,
    monitor: str,
    balance: Any,
    num_workers: int,
    resume: bool,
    trainer: Mapping[str, Any],
) -> None:
    module.model.train()  # Lightning leaves modes as they are
    with ExitStack() as stack:
        if rank_and_size()[0] == 0:
            stack.enter_context(show_log())
            stack.enter_context(sole_writer(output / CHECKPOINTS))
        pl.seed_everything(module.seed, workers=True, verbose=False)
        with tame_lightning():
            built = pl.Trainer(
                callbacks=make_callbacks(output, monitor),
                plugins=[AtomicCheckpoints()],
                default_root_dir=str(output),
                **{"logger": False, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0, **trainer},
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
        training = classification_training(
            module,
            splits,
            augment,
            balance=balance,
            batch_size=module.batch_size,
            num_workers=num_workers,
            rank=built.global_rank,
            num_replicas=built.world_size,
            pin_memory=torch.cuda.is_available() and num_workers > 0,
        )
        same = fingerprint(
            batch={"size": module.batch_size * built.world_size},
            optim=recipe,
            seed=module.seed,
            augment=asdict(augment),
            mixing=asdict(module.mixing) if module.mixing else None,
            **training.identity,
        )
        found = find_checkpoint("last", output, own_only=True) if resume else None
        options: dict[str, Any] = {"run_fingerprint": same, "resume_from": found, "max_bad_videos": 0.2}
        run(built, training, output, monitor=monitor, **options)
    module.model.eval()
