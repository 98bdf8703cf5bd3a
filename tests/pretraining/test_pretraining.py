"""mvit-train without labels: what it leaves, that it goes on exactly, that its weights are fine-tuned."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import generate as motion
import hydra
import pytest
import torch
from conftest import Command, error_line

import mvit_video as mv
from mvit_video.cli.conf import CONF_DIR
from mvit_video.data.augment import Augment
from mvit_video.data.datasets import training_loader, validation_loader
from mvit_video.data.index import unlabelled_splits
from mvit_video.errors import ConfigError, DataError
from mvit_video.model.clip_spec import KINETICS_MEAN, KINETICS_STD
from mvit_video.pretraining.data import MaskedTestViews, MaskedTrainingClips, collate_masked
from mvit_video.pretraining.hog import cells_of, hog, hog_targets
from mvit_video.pretraining.masks import Masking
from mvit_video.pretraining.pretrainer import render

SMALL = [
    "experiment=maskfeat_motion",
    "data.val_fraction=0.2",
    "batch_size=2",  # of nine training videos: four steps an epoch
    "num_workers=0",
    "model.embed_dim=8",
    "model.stages=[1,1]",
    "model.crop_size=32",
    "model.num_frames=4",
    "masking.cell=8",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "logger=csv",
]


@pytest.fixture(scope="module")
def unlabelled(two_classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eleven readable videos and a broken one, some deeper than others."""
    root = tmp_path_factory.mktemp("unlabelled")
    for number, path in enumerate(sorted(path for path in two_classes.rglob("*") if path.is_file())):
        target = root / ("a/b" if number % 2 else "") / f"{number}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / "0.mp4").write_bytes(b"broken")
    return root


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_a_folder_of_videos_is_all_it_needs(command: Command, unlabelled: Path, tmp_path: Path) -> None:
    data = [f"data.root={unlabelled}", "max_bad_videos=1"]
    result = command("train", *SMALL, *data, "ema=0.5", "save_every_n_steps=3", "hydra.run.dir=run")
    assert result.code == 0, result.err
    assert "10 training and 2 held-out videos" in result.out
    assert "val/loss" in result.out
    for name in ("batch.png", "predictions.png", "learning_curve.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    checkpoints = tmp_path / "run" / "checkpoints"
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)
    assert best["mvit_video"]["pretraining"] == {"depths": [1], "features": "hog"}

    # It goes on exactly from the middle of its last epoch.
    middle = shutil.copy(checkpoints / "previous.ckpt", tmp_path / "middle.ckpt")
    again = command(
        "train",
        *SMALL,
        *data,
        "ema=0.5",
        "save_every_n_steps=3",
        f"ckpt_path={middle}",
        "hydra.run.dir=again",
    )
    assert again.code == 0, again.err
    first, second = (weights_of(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "again"))
    assert all(second[name].equal(value) for name, value in first.items())
    other = command("train", *SMALL, *data, "masking=tube", f"ckpt_path={middle}", "hydra.run.dir=other")
    assert "masking" in error_line(other, "train")


def test_it_learns(command: Command, unlabelled: Path, tmp_path: Path) -> None:
    """In bfloat16, with the other kinds of masks and features."""
    few = ["trainer.max_epochs=4", "optim.lr=1e-2", "trainer.precision=bf16-mixed", f"data.root={unlabelled}"]
    for number, kind in enumerate((["masking=tube"], ["masking=frame", "model.features=pixels"])):
        masks = [kind[0], "masking.cell=8", *kind[1:]]
        result = command("train", *SMALL, *few, *masks, f"hydra.run.dir={number}")
        assert result.code == 0, result.err
        last = torch.load(tmp_path / str(number) / "checkpoints" / "last.ckpt", weights_only=True)
        history = next(value for key, value in last["callbacks"].items() if key.startswith("History"))
        losses = [row["val/loss"] for row in history["epochs"]]
        assert losses[-1] < losses[0]
        assert (tmp_path / str(number) / "predictions.png").is_file()


def test_its_weights_are_fine_tuned(
    command: Command, unlabelled: Path, two_classes: Path, tmp_path: Path
) -> None:
    """Widened in MLPs, as officially; the classifier follows without being told."""
    layout = [
        "model.stages=[1,1,2]",
        "model.dim_mul_in_attention=false",
        f"data.root={unlabelled}",
        "trainer.max_epochs=1",
    ]
    result = command("train", *SMALL, *layout, "hydra.run.dir=pre")
    assert result.code == 0, result.err
    weights = tmp_path / "pre" / "checkpoints" / "last.ckpt"
    small = [option for option in SMALL if option.startswith("model.")]
    options = [
        *small,
        "model.stages=[1,1,2]",
        f"data.root={two_classes}",
        "trainer.max_epochs=1",
        "batch_size=2",
        "num_workers=0",
    ]
    result = command(
        "train",
        "experiment=finetune",
        "model=mvitv2_nano_8x4",
        f"weights={weights}",
        *options,
        "hydra.run.dir=ft",
    )
    assert result.code == 0, result.err
    assert "tensors loaded" in result.out
    assert "4 fresh: norm.weight, norm.bias, head.projection.weight, head.projection.bias" in result.out
    assert "2 interpolated: blocks.*.attn.rel_pos_h, blocks.*.attn.rel_pos_w" in result.out
    assert not mv.load_model(tmp_path / "ft" / "checkpoints" / "last.ckpt").config.dim_mul_in_attention
    refused = command("predict", str(two_classes), f"weights={weights}")
    assert "experiment=finetune" in error_line(refused, "predict")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["model=mvitv2_nano_8x4"], "maskfeat_mvitv2_s_16x4"),
        (["masking.cell=24"], "masking"),
        (["masking.cell=32"], "masking"),
        (
            ["experiment=motion", "task=pretraining", "model=maskfeat_mvitv2_nano_8x4", "optim=pretraining"],
            "masking=cube",
        ),
        (["masking.ratio=1"], "masking.ratio"),
        (["fresh=[blocks.0]"], "fresh"),
        (["views.crop=28", "masking.cell=14"], "views"),
        (["mixing=mixup_cutmix"], "mixing=none"),
        (["data.root=nowhere"], "nowhere"),
        (["task=classification", "experiment=motion", "data=videos"], "one class"),
    ],
)
def test_what_can_not_be_is_named(command: Command, unlabelled: Path, options: list[str], named: str) -> None:
    given = [o for o in SMALL[:1] if not any(x.startswith("experiment=") for x in options)]
    if "model=mvitv2_nano_8x4" not in options:
        given += ["model.crop_size=32"]
    result = command("train", *given, f"data.root={unlabelled}", *options)
    assert named in error_line(result, "train")


def test_masks_follow_from_seed_epoch_and_index(unlabelled: Path) -> None:
    splits = unlabelled_splits(unlabelled, val_fraction=0.25)
    spec = mv.create_pretrainer("maskfeat_mvitv2_nano_8x4", crop_size=32, num_frames=4).protocol
    draw = partial(Masking(cell=8).draw, window=(2, 4, 4))

    def batches(num_workers: int, rank: int = 0, num_replicas: int = 1) -> list[Any]:
        clips = MaskedTrainingClips(splits.train.videos, spec, Augment(repeats=2), seed=3, draw_mask=draw)
        views = MaskedTestViews(splits.val.videos, spec, seed=3, draw_mask=draw)
        share = {"rank": rank, "num_replicas": num_replicas, "batch_size": 4 // num_replicas}
        training = training_loader(clips, collate_masked, num_workers=num_workers, **share)
        validation = validation_loader(views, collate_masked, num_workers=num_workers, **share)
        training.batches.set_epoch(1)
        found = [*training, *validation]
        training.close()
        validation.close()
        return found

    alone = batches(0)
    for batch, same in zip(alone, batches(2), strict=True):
        assert batch.clips.equal(same.clips)
        assert batch.masks.equal(same.masks)
    masks = alone[0].masks
    assert masks.shape == (8, 2, 4, 4)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 4
    halves = [batches(0, rank, 2)[0].masks.unflatten(0, (2, 2)) for rank in (0, 1)]
    assert torch.stack(halves, 1).flatten(0, 2).equal(masks)


def test_which_videos_are_held_out(unlabelled: Path, two_classes: Path, tmp_path: Path) -> None:
    splits = unlabelled_splits(unlabelled, val_fraction=0.25)
    names = {video.id for video in (*splits.train.videos, *splits.val.videos)}
    assert names >= {"0.mp4", "a/b/1.mp4"}
    assert (len(names), len(splits.val)) == (12, 3)
    assert unlabelled_splits(unlabelled, val_fraction=0.25) == splits
    for name in ("train", "val"):
        shutil.copytree(two_classes / "cats", tmp_path / name / "deep" / "er")
    folders = unlabelled_splits(tmp_path)
    assert all(video.id.startswith("train/") for video in folders.train.videos)
    assert all(video.id.startswith("val/") for video in folders.val.videos)
    with pytest.raises(ConfigError, match="val_fraction"):
        unlabelled_splits(unlabelled, val_fraction=1.0)
    with pytest.raises(DataError, match="no videos"):
        unlabelled_splits(Path(CONF_DIR))


def test_gradients_are_drawn_where_they_are() -> None:
    frames = torch.zeros(1, 3, 2, 32, 32)
    frames[..., 20:] = 1.0  # a vertical edge
    grid = (1, 2, 2)
    features = hog_targets(frames, grid)
    assert cells_of(features, grid)[0, 0].equal(hog(frames[:, :, 0])[0])
    picture = render(features.unflatten(1, grid), "hog")[0, 0, 0]
    column = picture.sum(0).argmax()
    assert 2 / 4 <= column / picture.shape[1] < 3 / 4
    assert picture.sum(0).max() > 3 * picture.sum(1).max()  # the stroke is upright
    pixels = torch.linspace(-1, 1, 768).expand(1, 1, 2, 2, 768)
    assert render(pixels, "pixels").shape == (1, 1, 3, 32, 32)


@pytest.mark.parametrize(("size", "checkpointing"), [("s", None), ("l", True)])
def test_recipes_have_the_published_values(size: str, checkpointing: bool | None) -> None:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("train", [f"experiment=maskfeat_k400_mvitv2_{size}_16x4"])
    optim, trainer, augment = config.optim, config.trainer, config.augment
    assert (config.model.name, config.task) == (f"maskfeat_mvitv2_{size}_16x4", "pretraining")
    assert (optim.lr, optim.warmup_start_lr, optim.end_lr, optim.weight_decay) == (1e-4, 1e-6, 1e-6, 0.05)
    assert (optim.optimizer._target_, list(optim.optimizer.betas)) == ("torch.optim.AdamW", [0.9, 0.999])
    assert optim.lr_batch_size == 8 * config.batch_size == 32
    assert optim.warmup * trainer.max_epochs == pytest.approx(10, abs=1e-6)
    assert (trainer.max_epochs, trainer.gradient_clip_val, optim.layer_decay) == (300, 0.02, 1.0)
    assert (list(augment.area), augment.flip_probability, augment.short_side) == ([0.5, 1.0], 0.5, 256)
    assert (augment.rand_augment, augment.erase_probability, augment.repeats) == (None, 0.0, 1)
    assert (config.masking.kind, config.masking.ratio, config.masking.cell) == ("cube", 0.4, 32)
    assert (config.ema, config.mixing.probability, config.model.checkpoint_blocks) == (
        None,
        0.0,
        checkpointing,
    )
    with torch.device("meta"):
        model = mv.create_pretrainer(config.model.name)
    assert (model.config.drop_path, model.config.dropout) == (0.0, 0.0)
    spec = model.protocol
    assert (spec.clip_frames, spec.stride, spec.crop, spec.short_side) == (16, 4, 224, 256)
    assert (spec.mean, spec.std) == (KINETICS_MEAN, KINETICS_STD)
    assert Masking().window(spec.clip_frames, spec.crop, 2) == (8, 7, 7)
    assert Masking().draw(random.Random(0), (8, 7, 7)).sum() == 156


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes(unlabelled: Path, tmp_path: Path, strategy: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mvit_video.train"]
    options = ["trainer.accelerator=cpu", f"trainer.strategy={strategy}", "max_bad_videos=1", "ema=0.5"]
    done = subprocess.run(
        [sys.executable, *launcher, *SMALL, f"data.root={unlabelled}", *options, "hydra.run.dir=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "predictions.png").is_file()
    model = mv.create_pretrainer(
        "maskfeat_mvitv2_nano_8x4", embed_dim=8, stages=(1, 1), crop_size=32, num_frames=4
    )
    assert not mv.load_weights(model, tmp_path / "run" / "checkpoints" / "last.ckpt").fresh


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    motion.generate(tmp_path, train_per_class=3, val_per_class=1, size=48)
    script = Path(__file__).parents[2] / "benchmarks" / "pretraining.py"
    command = [sys.executable, str(script), "--root", str(tmp_path), "--seeds", "1", "--steps", "2", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" ")[1] for row in rows] == ["labelled", "1", "5", "20"]
