"""What a command line may hold: every key has a type, and no value ends in a stack trace."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli.arguments import quote
from mvit_video.cli.conf import compose
from mvit_video.cli.main import JOBS
from mvit_video.cli.schema import LIMITS, check, kinds_of
from mvit_video.errors import ConfigError

# What people type by mistake; each is tried for every key of every command.
ODD = [
    None,
    math.nan,
    -math.inf,
    -1,
    0.5,
    10**30,
    10**400,
    7,
    True,
    "abc",
    "",
    "\0",
    [],
    [1, "a"],
    {"a": 1},
    [[[]]],
]


def composed(command: str) -> DictConfig:
    config = compose(command, ["model=mvitv2_s_16x4"])
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    config.pop("logger", None)  # its folder is known when a run has begun
    return config


def keys(node: DictConfig, parent: str = "") -> Iterator[str]:
    for name in map(str, node):
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node[name]):
            yield from keys(node[name], f"{parent}{name}.")
        elif not name.startswith("_"):
            yield f"{parent}{name}"


@pytest.mark.parametrize("command", JOBS)
def test_defaults_are_allowed_and_stay(command: str) -> None:
    config = composed(command)
    assert set(keys(config)) <= set(kinds_of(command))
    before = OmegaConf.to_container(config)
    check(config, command)
    assert OmegaConf.to_container(config) == before


def test_limits_are_those_of_keys_that_are_there() -> None:
    keys = {key for command in JOBS for key in kinds_of(command)}
    assert set(LIMITS) <= keys | {key.rpartition(".")[2] for key in keys}


@pytest.mark.parametrize("command", JOBS)
def test_any_value_fits_or_is_refused(command: str) -> None:
    for key, kinds in kinds_of(command).items():
        refused = 0
        for value in ODD:
            fitting = 0
            for kind in kinds:
                with contextlib.suppress(ValueError):  # and no other error
                    kind.fit(value)
                    fitting += 1
            refused += not fitting
        assert refused >= 3, key


@pytest.mark.parametrize("command", JOBS)
def test_what_is_refused_is_named(command: str) -> None:
    config = composed(command)
    for key in keys(config):
        part = OmegaConf.create()
        OmegaConf.update(part, key, {"a": 1})
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} is {{'a': 1}}, expected "):
            check(part, command)


@pytest.mark.parametrize(
    ("key", "value", "fitted"),
    [
        ("batch_size", 1, 1),
        ("batch_size", 4.0, 4),
        ("batch_size", 0, None),
        ("batch_size", True, None),
        ("num_workers", 0, 0),
        ("ema", 0.5, 0.5),
        ("ema", 0, None),
        ("ema", 1, None),
        ("max_bad_videos", 0.99, 0.99),
        ("max_bad_videos", 1, 1),
        ("max_bad_videos", 1.5, None),
        ("optim.lr", 0, 0),
        ("optim.lr", -1, None),
        ("optim.optimizer", 5, None),
        ("optim.layer_decay", 0, None),
        ("head", "New", None),
        ("views.num_crops", 3, 3),
        ("views.num_crops", 2, None),
        ("views.mean", [-1, 0.5, 2], [-1, 0.5, 2]),
        ("views.mean", [0.5, 0.5], None),
        ("trainer.devices", "auto", "auto"),
        ("trainer.devices", [0, 1], [0, 1]),
        ("trainer.precision", 32, "32"),
        ("trainer.fast_dev_run", True, True),
        ("trainer.limit_train_batches", 0.0, None),
        ("model.pool_kernel", "stride", "stride"),
        ("model.q_strides", [[0, 1, 2, 2]], [[0, 1, 2, 2]]),
        ("data.class_names", ["a", 1], ["a", "1"]),
        ("freeze", "backbone", "backbone"),
        ("weights", 12, "12"),
        ("weights", False, "false"),
        ("weights", "a\0b", None),
    ],
)
def test_a_value_becomes_what_is_meant(key: str, value: object, fitted: object) -> None:
    config = OmegaConf.create()
    OmegaConf.update(config, key, value)
    if fitted is None:
        with pytest.raises(ConfigError, match=re.escape(key)):
            check(config, "train")
    else:
        check(config, "train")
        found = OmegaConf.select(config, key)
        assert found == fitted
        assert OmegaConf.is_config(found) or type(found) is type(fitted)


@pytest.mark.parametrize(
    ("command", "argument", "quoted"),
    [
        ("predict", "weights=12", 'weights="12"'),
        ("predict", "output=2024", 'output="2024"'),
        ("predict", "output=1e3", 'output="1e3"'),
        ("predict", "save_dir=true", 'save_dir="true"'),
        ("predict", "weights=epoch=3-step=99.ckpt", 'weights="epoch=3-step=99.ckpt"'),
        ("predict", "weights=a,b.ckpt", 'weights="a,b.ckpt"'),
        ("predict", 'weights=a"b.ckpt', 'weights="a\\"b.ckpt"'),
        ("predict", "weights=a'(1){b}.ckpt", 'weights="a\'(1){b}.ckpt"'),
        ("predict", "save=png,srt", "save=[png,srt]"),
        ("predict", "save=[png,srt]", "save=[png,srt]"),
        ("predict", "videos=[a=1.mp4,ü.mp4]", 'videos=["a=1.mp4","ü.mp4"]'),
        ("predict", "weights=null", "weights=null"),
        ("predict", "weights=best.ckpt", "weights=best.ckpt"),
        ("predict", "weights='12'", "weights='12'"),
        ("predict", "views.mean=0.4,0.4,0.4", "views.mean=[0.4,0.4,0.4]"),
        ("predict", "topk=3", "topk=3"),
        ("predict", "views=5x1", "views=5x1"),
        ("train", "data.root=ü", 'data.root="ü"'),
        ("train", "hydra.run.dir=a=b", 'hydra.run.dir="a=b"'),
        ("train", "logger.csv.save_dir=${data.root}", "logger.csv.save_dir=${data.root}"),
        ("train", "+trainer.x=1", "+trainer.x=1"),
        ("train", "~mixing", "~mixing"),
    ],
)
def test_text_is_quoted_where_hydra_would_read_something_else(
    command: str, argument: str, quoted: str
) -> None:
    assert quote(argument, command) == quoted


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quote("data.root=~/x", "train") == f'data.root="{tmp_path}/x"'
    assert quote("data.root=~x.mp4", "train") == 'data.root="./~x.mp4"'


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("weights=a.ckpt,b.ckpt", "weights=a.ckpt,b.ckpt"),
        ("weights=epoch=1.ckpt,epoch=2.ckpt", 'weights="epoch=1.ckpt","epoch=2.ckpt"'),
        ("optim.lr=1e-4,1e-3", "optim.lr=1e-4,1e-3"),
    ],
)
def test_commas_of_a_sweep_part_jobs(argument: str, quoted: str) -> None:
    assert quote(argument, "train", sweep=True) == quoted


def test_text_and_lists_arrive_as_meant(command: Command) -> None:
    shown = command("predict", "weights=12", "--cfg", "job", "output=007", "videos=a=b.mp4").out
    for line in ("weights: '12'", "output: '007'", "videos: a=b.mp4"):
        assert line in shown
    config = composed("predict")
    OmegaConf.update(config, "save", "srt")
    OmegaConf.update(config, "videos", "/a/b.mp4")
    OmegaConf.update(config, "ray_address", 12)
    OmegaConf.update(config, "topk", 5.0)
    check(config, "predict")
    assert (config.save, config.videos, config.ray_address) == (["srt"], ["/a/b.mp4"], "12")
    assert isinstance(config.topk, int)


def test_a_users_own_data_set_has_keys_of_its_own() -> None:
    config = composed("train")
    OmegaConf.update(config, "data", {"_target_": "mine.splits", "root": 5, "fold": "a"}, merge=False)
    check(config, "train")
    assert config.data.root == 5
