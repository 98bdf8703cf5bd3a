"""Training by the command: what it leaves, that it learns motion, that it can be taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command

import mvit_video as mv


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


def test_fine_tuning_takes_a_new_head_and_another_size(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    model = mv.create_model("mvitv2_nano_8x4", num_classes=7, crop_size=48)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    arguments = [
        "experiment=motion",
        f"data.root={two_classes}",
        "weights=seven.pth",
        "trainer.max_epochs=1",
        "batch_size=4",
        "num_workers=0",
    ]
    refused = command("train", *arguments)
    assert refused.code == 1
    assert "its head has 7 classes, the model has 2" in refused.err
    taken = command("train", *arguments, "head=new")
    assert taken.code == 0, taken.err
    assert "6 interpolated: blocks.*.attn.rel_pos_h (x3), blocks.*.attn.rel_pos_w (x3)" in taken.out
    assert "2 fresh: head.projection.weight, head.projection.bias" in taken.out


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


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.fast_dev_run=true"],
        ["trainer.overfit_batches=2", "trainer.max_epochs=1"],
        ["trainer.precision=bf16-mixed", "trainer.max_epochs=1", "logger=csv"],
        ["trainer.accumulate_grad_batches=2", "trainer.max_epochs=1", "trainer.enable_checkpointing=false"],
        ["optim=sgd", "trainer.max_epochs=1", "model.checkpoint_blocks=true", "views.stride=2"],
    ],
    ids=lambda options: options[0],
)
def test_options_of_the_trainer_work(command: Command, two_classes: Path, options: list[str]) -> None:
    result = command(
        "train", "experiment=motion", f"data.root={two_classes}", "batch_size=2", "num_workers=0", *options
    )
    assert result.code == 0, result.err
    assert "epoch 1/1: train/loss" in result.out
