"""What a command line may hold: every key is described, and no value ends in a stack trace."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from pathlib import Path

import pytest
import yaml
from conftest import Command
from omegaconf import DictConfig, OmegaConf

from mvit_video.cli import schema
from mvit_video.cli.arguments import quote
from mvit_video.cli.help import CONF_DIR
from mvit_video.cli.messages import compose_defaults
from mvit_video.errors import ConfigError

GROUPS = {
    "model": schema.Model,
    "data": schema.Data,
    "views": schema.Views,
    "decoder": schema.Decoder,
    "augment": schema.Augment,
    "mixing": schema.Mixing,
    "optim": schema.Optim,
    "trainer": schema.Trainer,
    "logger": schema.Logger,
}
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


def leaves(node: object, parent: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [parent]
    found = [leaves(value, f"{parent}.{name}".lstrip(".")) for name, value in node.items()]
    return [key for keys in found for key in keys if "_target_" not in key and "_partial_" not in key]


def keys_of(file: Path) -> list[str]:
    content = yaml.safe_load(file.read_text()) or {}
    return leaves({k: v for k, v in content.items() if k not in ("defaults", "hydra")}) if content else []


@pytest.mark.parametrize("command", schema.COMMANDS)
def test_every_key_of_a_command_has_a_type(command: str) -> None:
    for key in keys_of(CONF_DIR / f"{command}.yaml"):
        assert not key or schema.hint_of(key, schema.COMMANDS[command]) is not None, key


@pytest.mark.parametrize(
    "file", sorted(CONF_DIR.glob("*/**/*.yaml")), ids=lambda f: f"{f.parent.stem}-{f.stem}"
)
def test_every_key_of_a_group_has_a_type(file: Path) -> None:
    group = file.relative_to(CONF_DIR).parts[0]
    for key in keys_of(file):
        kind = schema.Train if group == "experiment" else GROUPS[group]
        assert not key or schema.hint_of(key, kind) is not None, key


def fits(value: object, hint: object) -> bool:
    with contextlib.suppress(ValueError):  # and no other error
        schema.fit(value, hint)
        return True
    return False


@functools.cache
def only(group: type[schema.Group], name: str) -> type[schema.Group]:
    """A group with one of the keys, to look at it alone."""
    return type(name, (schema.Group,), {"__annotations__": {name: schema.hint_of(name, group)}})


def composed(command: str) -> DictConfig:
    config = compose_defaults(command, ["model=mvitv2_s_16x4"])
    OmegaConf.set_struct(config, False)
    config.pop("logger", None)  # its folder is known when a run has begun
    return config


@pytest.mark.parametrize("command", schema.COMMANDS)
def test_defaults_are_allowed_and_stay(command: str) -> None:
    config = composed(command)
    before = OmegaConf.to_container(config)
    schema.check(config, schema.COMMANDS[command])
    assert OmegaConf.to_container(config) == before


@pytest.mark.parametrize("command", schema.COMMANDS)
def test_any_value_fits_or_is_refused(command: str) -> None:
    for key in leaves(OmegaConf.to_container(composed(command))):
        hint = schema.hint_of(key, schema.COMMANDS[command])
        assert sum(not fits(value, hint) for value in ODD) >= 3, key


@pytest.mark.parametrize("command", schema.COMMANDS)
def test_what_is_refused_is_named(command: str) -> None:
    config = composed(command)
    for key in leaves(OmegaConf.to_container(config)):
        name = key.split(".")[0]
        part = OmegaConf.create({name: copy.deepcopy(config._get_node(name))})
        OmegaConf.update(part, key, {"a": 1}, merge=False)
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} is {{'a': 1}}, expected "):
            schema.check(part, only(schema.COMMANDS[command], name))


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
    assert quote(argument, schema.COMMANDS[command]) == quoted


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quote("data.root=~/x", schema.Train) == f'data.root="{tmp_path}/x"'
    assert quote("data.root=~x.mp4", schema.Train) == 'data.root="./~x.mp4"'


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("weights=a.ckpt,b.ckpt", "weights=a.ckpt,b.ckpt"),
        ("weights=epoch=1.ckpt,epoch=2.ckpt", 'weights="epoch=1.ckpt","epoch=2.ckpt"'),
        ("optim.lr=1e-4,1e-3", "optim.lr=1e-4,1e-3"),
    ],
)
def test_commas_of_a_sweep_part_jobs(argument: str, quoted: str) -> None:
    assert quote(argument, schema.Train, sweep=True) == quoted


def test_text_and_lists_arrive_as_meant(command: Command) -> None:
    shown = command("predict", "weights=12", "--cfg", "job", "output=007", "videos=a=b.mp4").out
    for line in ("weights: '12'", "output: '007'", "videos: a=b.mp4"):
        assert line in shown
    config = composed("predict")
    OmegaConf.update(config, "save", "srt")
    OmegaConf.update(config, "videos", "/a/b.mp4")
    OmegaConf.update(config, "ray_address", 12)
    OmegaConf.update(config, "topk", 5.0)
    schema.check(config, schema.Predict)
    assert (config.save, config.videos, config.ray_address) == (["srt"], ["/a/b.mp4"], "12")
    assert isinstance(config.topk, int)


def test_a_users_own_data_set_has_keys_of_its_own() -> None:
    config = composed("train")
    OmegaConf.update(config, "data", {"_target_": "mine.splits", "root": 5, "fold": "a"}, merge=False)
    schema.check(config, schema.Train)
    assert config.data.root == 5
