"""Training by the command: what it leaves, that it learns motion, that it can be taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Command, error_line
from videos import write_numbered_video

import mvit_video as mv


def test_the_newest_run_is_taken_up_again(command: Command, two_classes: Path, tmp_path: Path) -> None:
    arguments = ["experiment=motion", f"data.root={two_classes}", "batch_size=4", "num_workers=0"]
    first = command("train", *arguments, "trainer.max_epochs=1")
    assert first.code == 0, first.err
    second = command("train", *arguments, "trainer.max_epochs=2", "ckpt_path=last")
    assert second.code == 0, second.err
    assert "resuming from" in second.out
    assert "epoch 2/2" in second.out
    assert "epoch 1/2" not in second.out
    last = sorted(tmp_path.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    state = torch.load(last, weights_only=True)
    history = next(value for key, value in state["callbacks"].items() if key.startswith("History"))
    assert [row["epoch"] for row in history["epochs"]] == [1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_training_and_evaluation_with_decoding_on_the_gpu(
    command: Command, tmp_path: Path, decoder: str
) -> None:
    for name in ("left", "right"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        for number in range(6):  # as large as NVDEC wants them
            path = tmp_path / "videos" / name / f"{number}.mp4"
            write_numbered_video(path, 40, height=256, width=340, options={"bf": "2"})
    data = ["data=folder", f"data.root={tmp_path / 'videos'}", f"decoder={decoder}"]
    data += ["decoder.device=cuda"] if decoder == "pyav" else []
    options = ["trainer.max_epochs=1", "trainer.accelerator=gpu", "trainer.devices=1", "batch_size=2"]
    result = command("train", "experiment=motion", *data, *options, "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert "bad video" not in result.out
    result = command("eval", *data, "weights=run/checkpoints/last.ckpt", "views=5x1", "device=cuda")
    assert result.code == 0, result.err


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
    assert "cats                5 ##" in result.out
    assert "one epoch will take about" in result.out
    assert (tmp_path / "run" / "batch.png").is_file()
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
        ["trainer.overfit_batches=2", "trainer.max_epochs=1", "trainer.precision=bf16-mixed", "logger=csv"],
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


BASE = ("experiment=motion", "batch_size=2", "num_workers=0", "trainer.max_epochs=1", "hydra.run.dir=run")


def test_mixing_repeats_and_rand_augment_train(command: Command, two_classes: Path) -> None:
    result = command("train", *BASE, f"data.root={two_classes}", "augment=kinetics", "mixing=mixup_cutmix")
    assert result.code == 0, result.err
    assert "epoch 1/1: train/loss" in result.out


def test_averaged_weights_are_evaluated_and_saved(
    command: Command, two_classes: Path, tmp_path: Path
) -> None:
    result = command("train", *BASE, f"data.root={two_classes}", "ema=0.9", "trainer.max_epochs=2")
    assert result.code == 0, result.err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    name = "model.head.projection.weight"
    assert not torch.equal(state["state_dict"][name], state["current_model_state"][name])
    assert torch.equal(mv.load_model(last).head.projection.weight, state["state_dict"][name])
    evaluated = command("eval", f"weights={last}", f"data.root={two_classes}", "num_workers=0", "views=1x1")
    assert evaluated.code == 0, evaluated.err
    resumed = command(
        "train", *BASE, f"data.root={two_classes}", "ema=0.9", "trainer.max_epochs=3", f"ckpt_path={last}"
    )
    assert resumed.code == 0, resumed.err
    assert "epoch 3/3" in resumed.out


def test_training_stops_early_without_progress(command: Command, two_classes: Path) -> None:
    still = [f"optim.{name}=0" for name in ("lr", "warmup_start_lr", "end_lr")]
    result = command(
        "train", *BASE, f"data.root={two_classes}", "early_stopping=2", "trainer.max_epochs=9", *still
    )
    assert result.code == 0, result.err
    assert "epoch 3/9" in result.out
    assert "epoch 4/9" not in result.out


def test_a_linear_probe_trains_the_head_alone(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    result = command(
        "train",
        "experiment=linear_probe",
        "model=mvitv2_nano_8x4",
        f"data.root={two_classes}",
        f"weights={checkpoint}",
        *BASE[1:],
        "optim.lr_batch_size=null",
    )
    assert result.code == 0, result.err
    before = mv.load_model(checkpoint).state_dict()
    after = mv.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.projection.weight", "head.projection.bias"}


def test_fine_tuning_changes_layers_less_far_from_the_head(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    result = command(
        "train",
        "experiment=finetune",
        "model=mvitv2_nano_8x4",
        f"data.root={two_classes}",
        f"weights={checkpoint}",
        *BASE[1:],
        "optim.layer_decay=0.1",
    )
    assert result.code == 0, result.err
    assert "learning rate 1.25e-05: 0.0001 x 2 / 16 samples" in result.out
    before = mv.load_model(checkpoint).state_dict()
    after = mv.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").state_dict()
    moved = [
        (after[name] - before[name]).abs().mean().item()
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.2.mlp.fc1.weight")
    ]
    assert moved[0] < 0.3 * moved[1] < 0.03 * moved[2]


def test_a_loss_that_is_not_finite_stops_the_run(command: Command, two_classes: Path, tmp_path: Path) -> None:
    rates = [f"optim.{name}=1e30" for name in ("lr", "warmup_start_lr", "end_lr")]
    result = command("train", *BASE, f"data.root={two_classes}", "optim=sgd", *rates)
    assert result.code == 1
    saved = tmp_path / "run" / "nan_batch_rank0.pt"
    assert "the loss isn't finite in epoch 1, step " in result.err
    assert str(saved) in result.err
    assert "Traceback" not in result.err
    batch = torch.load(saved, weights_only=True)
    assert batch["clips"].shape == (2, 3, 8, 64, 64)
    assert not batch["logits"].isfinite().all()
    assert all(Path(path).is_file() for path in batch["paths"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["GPU", "CPU"],
)
def test_too_little_memory_names_what_to_change(
    command: Command, two_classes: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def forward(self: mv.MViT, clips: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(mv.MViT, "forward", forward)
    result = command("train", *BASE, f"data.root={two_classes}")
    assert result.code == 1
    assert "out of memory: lower batch_size" in result.err
    assert "Traceback" not in result.err


def test_a_profile_is_left(command: Command, two_classes: Path, tmp_path: Path) -> None:
    options = ["trainer.profiler=advanced", "trainer.limit_val_batches=0"]
    result = command("train", *BASE, f"data.root={two_classes}", *options)
    assert result.code == 0, result.err
    (profile,) = (tmp_path / "run").glob("*profile*")
    assert "optimizer_step" in profile.read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.strategy=fdsp", "invalid strategy name: `strategy='fdsp'`"),
        ("freeze=3", "freeze: the model has no '3'; it has: backbone, patch_embed"),
        ("augment.rand_augment=m7", "augment: rand_augment is 'm7'; "),
        ("augment.short_side_range=[32,48]", "short_side_range (32, 48) is too small for crops of 64"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches is 0"),
        ("trainer.max_epochs=-1", "set trainer.max_epochs or max_steps"),
        ("trainer.limit_val_batches=0 early_stopping=1", "early_stopping looks at validations"),
    ],
)
def test_settings_that_can_not_work_are_named(
    command: Command, two_classes: Path, override: str, message: str
) -> None:
    result = command("train", *BASE, f"data.root={two_classes}", *override.split())
    assert message in error_line(result, "train")


def test_one_class_is_nothing_to_learn(command: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "cats").symlink_to(two_classes / "cats")
    line = error_line(command("train", *BASE, "data.root=one"), "train")
    assert "the data set has one class (cats); training needs two or more" in line


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16_is_refused_on_a_cpu(command: Command, two_classes: Path, precision: str) -> None:
    arguments = [f"data.root={two_classes}", "trainer.accelerator=cpu", f"trainer.precision={precision}"]
    line = error_line(command("train", *BASE, *arguments), "train")
    assert f"trainer.precision={precision} (float16) is for GPUs; on a CPU give bf16-mixed" in line


def test_classes_of_the_weights_must_be_those_of_the_data(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "cats").symlink_to(two_classes / "cats")
    (tmp_path / "renamed" / "dogs").symlink_to(two_classes / "dogs and birds")
    arguments = (*BASE, "data.root=renamed", f"weights={checkpoint}")
    refused = command("train", *arguments)
    assert refused.code == 1
    assert "class 1 is 'dogs and birds'" in refused.err
    taken = command("train", *arguments, "head=new")
    assert taken.code == 0, taken.err


def test_another_normalisation_than_that_of_the_weights_is_said(
    command: Command, two_classes: Path, checkpoint: Path
) -> None:
    arguments = (*BASE, f"data.root={two_classes}", f"weights={checkpoint}")
    assert "were trained with mean" not in command("train", *arguments).out
    said = command("train", *arguments, "views.mean=[0.5,0.5,0.5]")
    assert said.code == 0, said.err
    assert "were trained with mean (0.45, 0.45, 0.45)" in said.out
    assert "normalises with mean (0.5, 0.5, 0.5)" in said.out


@pytest.mark.slow
def test_a_compiled_model_trains_and_is_saved_as_usual(
    command: Command, two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    plain = torch.nn.Module.compile

    def traced(self: torch.nn.Module, **options: object) -> None:  # without C++, which takes minutes
        compiled.append(type(self).__name__)
        plain(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    result = command("train", *BASE, f"data.root={two_classes}", "compile=true", "ema=0.9", "logger=csv")
    assert result.code == 0, result.err
    assert compiled == ["Block"] * 3
    mv.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_mixing_needs_two_clips(command: Command, two_classes: Path) -> None:
    result = command(
        "train", "data=folder", f"data.root={two_classes}", "mixing=mixup_cutmix", "batch_size=1"
    )
    assert "mixing pairs the clips of a batch" in error_line(result, "train")
