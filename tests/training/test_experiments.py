"""Each published recipe value by value, as it composes, against the official configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli.app import override_protocol
from mvit_video.cli.conf import CONF_DIR
from mvit_video.model.clip_spec import IMAGENET_MEAN, IMAGENET_STD, KINETICS_MEAN, KINETICS_STD

FILES = (CONF_DIR / "experiment").glob("*.yaml")
EXPERIMENTS = sorted(  # classification
    path.stem
    for path in FILES
    if "\ntask:" not in path.read_text() and not path.stem.startswith(("ava_", "coco_"))
)

ADAMW = {
    "optimizer": "torch.optim.AdamW",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "layer_decay": 1.0,
    "precision": "auto",
    "accumulate": 1,
    "ema": None,
    "head_init_scale": 1.0,
    "aspect": (0.75, 1.3333),
    "area": (0.08, 1.0),
    "colour_jitter": 0.0,
    "erase": (0.25, 1),
    "mixup": (0.8, 1.0, 0.5),
}
KINETICS_S = ADAMW | {
    "model": "mvitv2_s_16x4",
    "frames": (16, 4, 224),
    "sampling": "uniform",
    "lr": (1e-4, 1e-6, 1e-6),
    "videos": 16,  # on eight devices
    "warmup_epochs": 30,
    "epochs": 200,
    "clip": 1.0,
    "drop_path": 0.2,
    "head_dropout": 0.5,
    "repeats": 2,
    "mix_probability": 1.0,
    "rand_augment": "rand-m7-n4-mstd0.5-inc1",
    "fill": (128, 128, 128),
    "bgr": False,
    "crop_first": False,
    "short_side": 256,
    "short_side_range": None,
    "flip": 0.5,
    "normalised": (KINETICS_MEAN, KINETICS_STD),
    "views": (5, 1, 256),
    "checkpoint_blocks": False,
    "published": None,
}
KINETICS_B = KINETICS_S | {"model": "mvitv2_b_32x3", "frames": (32, 3, 224), "drop_path": 0.3}
KINETICS_L = KINETICS_B | {
    "model": "mvitv2_l_40x3",
    "frames": (40, 3, 312),
    "drop_path": 0.75,
    "repeats": 1,
    "mix_probability": 0.0,
    "short_side": 356,
    "normalised": (IMAGENET_MEAN, IMAGENET_STD),
    "views": (5, 3, 312),
    "checkpoint_blocks": True,
}
SSV2_S = KINETICS_S | {
    "optimizer": "torch.optim.SGD",
    "momentum": (0.9, 0, True),
    "sampling": "segment",
    "lr": (2.5e-3, 1e-4, 1e-6),
    "warmup_epochs": 3,
    "epochs": 100,
    "weight_decay": 1e-4,
    "clip": None,
    "drop_path": 0.4,
    "repeats": 1,
    "bgr": True,
    "short_side": None,
    "short_side_range": (256, 320),
    "flip": 0.0,
    "views": (1, 3, 224),
    "published": "kinetics400",
}
SSV2_B = SSV2_S | {"model": "mvitv2_b_32x3", "frames": (32, 3, 224), "lr": (1.5e-3, 1e-4, 1e-6)}
SSV2_L = SSV2_S | {
    "model": "mvitv2_l_40x3",
    "frames": (40, 3, 312),
    "lr": (1.25e-3, 1e-6, 1e-6),
    "videos": 8,
    "epochs": 40,
    "clip": 2.0,
    "drop_path": 0.75,
    "mix_probability": 0.0,
    "short_side_range": (356, 446),
    # BGR frames were normalised with the constants of RGB
    "normalised": (IMAGENET_MEAN[::-1], IMAGENET_STD[::-1]),
    "views": (1, 3, 312),
    "checkpoint_blocks": True,
}
IMAGE_T = KINETICS_S | {
    "model": "mvitv2_t_224",
    "frames": (1, 1, 224),
    "lr": (2.5e-4, 1e-8, 1e-6),
    "videos": 256,
    "warmup_epochs": 70,
    "epochs": 300,
    "drop_path": 0.1,
    "head_dropout": 0.0,
    "repeats": 1,
    "rand_augment": "rand-m9-n6-mstd0.5-inc1",
    "fill": (124, 116, 104),
    "crop_first": True,
    "short_side": None,
    "normalised": (IMAGENET_MEAN, IMAGENET_STD),
    "views": (1, 1, 256),
}
MASKFEAT_S = KINETICS_S | {
    "published": "maskfeat",
    "lr": (6e-4, 1e-6, 1e-6),
    "layer_decay": 0.75,
    "warmup_epochs": 20,
    "epochs": 100,
    "clip": 5.0,
    "drop_path": 0.1,
    "head_dropout": 0.0,
    "head_init_scale": 0.001,
    "rand_augment": "rand-m7-mstd0.5-inc1",
    "views": (10, 1, 256),
    "data": "kinetics400",
}
MASKFEAT_L = MASKFEAT_S | {
    "model": "mvitv2_l_40x3",
    "lr": (6e-4, 1e-8, 1e-5),
    "layer_decay": 0.875,
    "warmup_epochs": 5,
    "epochs": 75,
    "drop_path": 0.2,
    "repeats": 1,
    "checkpoint_blocks": True,
}
RECIPES: dict[str, dict[str, Any]] = {
    "maskfeat_k400_mvitv2_s_16x4_ft": MASKFEAT_S,
    "maskfeat_k400_mvitv2_l_16x4_ft": MASKFEAT_L,
    **{
        f"k{kinetics}_{recipe['model']}": recipe | {"data": f"kinetics{kinetics}"}
        for kinetics in (400, 600, 700)
        for recipe in (KINETICS_S, KINETICS_B, KINETICS_L)
    },
    **{f"ssv2_{recipe['model']}": recipe | {"data": "ssv2"} for recipe in (SSV2_S, SSV2_B, SSV2_L)},
    **{
        f"in1k_mvitv2_{size}": IMAGE_T
        | {"data": "imagenet", "model": f"mvitv2_{size}_224", "drop_path": drop_path}
        for size, drop_path in (("t", 0.1), ("s", 0.1), ("b", 0.3), ("l", 0.5))
    },
}


def composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("train", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_published_values(name: str) -> None:
    config, expected = composed(f"experiment={name}"), RECIPES[name]
    assert config.hydra.runtime.choices.data == expected["data"]

    with torch.device("meta"):
        model = instantiate(config.model, weights=None, _convert_="all")
    protocol = override_protocol(model.protocol, config.views)
    assert config.model.name == expected["model"]
    is_pretrained = expected["published"] == "maskfeat"  # in a file, whose layout the model has
    assert config.model.weights == (None if is_pretrained else expected["published"])
    assert model.config.mean_pooling is is_pretrained
    assert not (is_pretrained and model.config.dim_mul_in_attention)
    assert (config.head == "new") is bool(expected["published"])
    assert (protocol.clip_frames, protocol.stride, protocol.crop) == expected["frames"]
    assert (protocol.num_clips, protocol.num_crops, protocol.short_side) == expected["views"]
    assert protocol.sampling == expected["sampling"]
    assert (protocol.mean, protocol.std) == expected["normalised"]
    for field in ("drop_path", "head_dropout", "head_init_scale", "checkpoint_blocks"):
        assert getattr(model.config, field) == expected[field]

    optim, trainer = config.optim, config.trainer
    assert optim.optimizer._target_ == expected["optimizer"]
    if expected["optimizer"].endswith("SGD"):
        sgd = optim.optimizer
        assert (sgd.momentum, sgd.get("dampening", 0), sgd.nesterov) == expected["momentum"]
    else:
        assert tuple(optim.optimizer.betas) == expected["betas"]
        assert optim.optimizer.eps == expected["eps"]
    assert (optim.lr, optim.warmup_start_lr, optim.end_lr) == expected["lr"]
    assert optim.lr_batch_size == 8 * config.batch_size == expected["videos"]
    assert trainer.max_epochs == expected["epochs"]
    assert optim.warmup * trainer.max_epochs == pytest.approx(expected["warmup_epochs"], abs=1e-6)
    assert (optim.weight_decay, optim.label_smoothing, optim.layer_decay) == (
        expected["weight_decay"],
        expected["label_smoothing"],
        expected["layer_decay"],
    )
    assert trainer.gradient_clip_val == expected["clip"]
    assert trainer.gradient_clip_algorithm in (None, "norm")
    assert trainer.precision == expected["precision"]
    assert trainer.accumulate_grad_batches == expected["accumulate"]
    assert config.ema == expected["ema"]
    assert config.freeze is None

    mixing = instantiate(config.mixing)
    assert mixing.probability == expected["mix_probability"]
    assert (mixing.mixup, mixing.cutmix, mixing.switch_probability) == expected["mixup"]

    augment = instantiate(config.augment, _convert_="all")
    for field in ("repeats", "rand_augment", "fill", "bgr", "crop_first", "short_side", "short_side_range"):
        assert getattr(augment, field) == expected[field]
    assert augment.flip_probability == expected["flip"]
    assert augment.area == expected["area"]
    assert augment.aspect == pytest.approx(expected["aspect"], abs=1e-4)
    assert augment.colour_jitter == expected["colour_jitter"]
    assert (augment.erase_probability, augment.erase_count) == expected["erase"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_built(name: str) -> None:
    config = composed(f"experiment={name}")
    with torch.device("meta"):
        model = instantiate(config.model, weights=None, num_classes=5, _convert_="all")
        instantiate(config.optim, model=model, _convert_="all")
    augment = instantiate(config.augment, _convert_="all")
    crop = override_protocol(model.protocol, config.views).crop
    assert augment.short_side_range is None or augment.short_side_range[0] >= crop
    others = ("motion", "finetune", "linear_probe", "maskfeat_motion")
    assert name in RECIPES or name in others or name.startswith("maskfeat_k400")


def test_fine_tuning_goes_gently() -> None:
    published, gentle, probe = (
        composed(f"experiment={name}") for name in ("k400_mvitv2_s_16x4", "finetune", "linear_probe")
    )
    assert gentle.optim.layer_decay < 1
    assert gentle.trainer.max_epochs < published.trainer.max_epochs
    assert gentle.head == probe.head == "new"
    assert gentle.freeze is None
    assert probe.freeze == "backbone"


def test_every_option_file_says_what_it_is() -> None:
    for path in (Path(CONF_DIR) / "experiment").glob("*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package _global_"
        assert lines[1].startswith("# ")
        assert OmegaConf.load(path)
