"""Training by the command: what it leaves, that it learns motion, that it can be taken up again."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import generate as motion
import pytest
import torch
from conftest import Command, TrainedRun

import mvit_video as mv
from mvit_video.data.clips import TestViews
from mvit_video.data.index import folder_splits

OPPOSITE = {
    "moving_left": "moving_right",
    "moving_up": "moving_down",
    "rotating_clockwise": "rotating_counterclockwise",
    "growing": "shrinking",
}
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}


def test_a_run_leaves_checkpoints_logs_and_a_learning_curve(trained: TrainedRun) -> None:
    assert {path.name for path in (trained.output / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (trained.output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((trained.output / "tensorboard").rglob("events.out.tfevents.*"))
    with (trained.output / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracy = [float(row["val/top1"]) for row in rows if row["val/top1"]]
    assert len(accuracy) == 8
    assert accuracy[-1] > accuracy[0]
    assert (trained.output / ".hydra" / "config.yaml").is_file()
    said = re.findall(r"epoch (\d+)/8: train/loss [\d.]+, train/top1 [\d.]+, val/loss", trained.log)
    assert said == [str(epoch) for epoch in range(1, 9)]


def test_a_checkpoint_knows_its_model_classes_and_protocol(trained: TrainedRun) -> None:
    model = mv.load_model(trained.checkpoint)
    assert model.class_names == tuple(sorted(motion.CLASSES))
    assert model.config.num_classes == len(motion.CLASSES)
    assert (model.protocol.clip_frames, model.protocol.stride, model.protocol.crop) == (8, 4, 64)
    assert not model.training


def test_only_the_order_of_the_frames_gives_the_class_away(trained: TrainedRun) -> None:
    """The trained model tells opposite motions apart; on shuffled frames, or on one, it has to guess."""
    model = mv.load_model(trained.checkpoint)
    splits = folder_splits(trained.data)
    views = list(TestViews(splits.val.videos, model.protocol))
    names = splits.class_names
    generator = torch.Generator().manual_seed(0)

    def accuracy(rearrange) -> tuple[float, float]:
        """Share of right videos; share of right ones among those taken for the class or its opposite."""
        right = opposite = 0
        for video in views:
            with torch.inference_mode():
                scores = model(rearrange(video.clips)).softmax(-1).mean(0)
            label = video.video.label
            other = names.index(OPPOSITE[names[label]])
            right += scores.argmax().item() == label
            opposite += (scores[label] > scores[other]).item()
        return right / len(views), opposite / len(views)

    in_order, directions = accuracy(lambda clips: clips)
    _, shuffled = accuracy(lambda clips: clips[:, :, torch.randperm(8, generator=generator)])
    single, _ = accuracy(lambda clips: clips[:, :, 3:4].expand(-1, -1, 8, -1, -1))
    reversed_right, _ = accuracy(lambda clips: clips.flip(2))
    assert in_order >= 0.75
    assert directions >= 0.85
    assert shuffled <= 0.68  # chance is 0.5
    assert single <= 0.3  # chance is 0.125
    assert reversed_right <= 0.2  # a clip played backwards is its opposite


@pytest.mark.parametrize("own", [True, False], ids=["own checkpoint", "newest run"])
def test_training_is_taken_up_again(command: Command, two_classes: Path, tmp_path: Path, own: bool) -> None:
    arguments = ["experiment=motion", f"data.root={two_classes}", "batch_size=4", "num_workers=0"]
    run_dir = ["hydra.run.dir=run"] if own else []
    first = command("train", *arguments, "trainer.max_epochs=1", *run_dir)
    assert first.code == 0, first.err
    second = command("train", *arguments, "trainer.max_epochs=2", "ckpt_path=last", *run_dir)
    assert second.code == 0, second.err
    assert "resuming from" in second.out
    assert "epoch 2/2" in second.out
    assert "epoch 1/2" not in second.out
    last = sorted(tmp_path.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    state = torch.load(last, weights_only=True)
    assert state["epoch"] == 1
    history = next(value for key, value in state["callbacks"].items() if key.startswith("History"))
    assert [row["epoch"] for row in history["epochs"]] == [1, 2]


def test_own_videos_in_two_folders(command: Command, two_classes: Path, tmp_path: Path) -> None:
    """The first thing a new user does, with the default model made small enough for a test."""
    result = command(
        "train",
        "data=folder",
        f"data.root={two_classes}",
        "trainer.max_epochs=2",
        "batch_size=2",
        "num_workers=0",
        "model.embed_dim=16",
        "model.stages=[1,1]",
        "model.crop_size=32",
        "model.num_frames=4",
        "hydra.run.dir=run",
    )
    assert result.code == 0, result.err
    assert "2 classes, 10 training and 2 validation videos" in result.out
    model = mv.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert model.class_names == ("cats", "dogs and birds")
    assert (model.protocol.clip_frames, model.protocol.crop) == (4, 32)


def test_fine_tuning_starts_from_weights(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    result = command(
        "train",
        "experiment=motion",
        f"data.root={two_classes}",
        f"weights={checkpoint}",
        "optim.lr=0",
        "optim.warmup_start_lr=0",
        "optim.end_lr=0",
        "trainer.max_epochs=1",
        "batch_size=4",
        "num_workers=0",
        "hydra.run.dir=run",
    )
    assert result.code == 0, result.err
    before = mv.load_model(checkpoint).state_dict()
    after = mv.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_sweep_runs_every_job(command: Command, two_classes: Path, tmp_path: Path) -> None:
    result = command(
        "train",
        "--multirun",
        "experiment=motion",
        "model/position=none,time",
        f"data.root={two_classes}",
        "trainer.max_epochs=1",
        "batch_size=4",
        "num_workers=0",
        "hydra.sweep.dir=sweep",
    )
    assert result.code == 0, result.err
    models = [mv.load_model(tmp_path / "sweep" / job / "checkpoints" / "best.ckpt") for job in "01"]
    assert [model.config.rel_pos_temporal for model in models] == [False, True]
