"""Odd values on the command lines of all commands: each ends well or with one line, never with a trace."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import Command

import mvit_video as mv
from mvit_video.cli.conf import groups
from mvit_video.cli.main import JOBS
from mvit_video.cli.schema import kinds_of
from mvit_video.weights import model_metadata
from mvit_video.weights.export import ExportedModel

# How a key is given, and how often each way is tried.
FORMS = {"{}={}": 12, "+{}={}": 1, "++{}={}": 1, "{}.x={}": 1, "~{}": 1, "{}": 1}
VALUES = [
    "", "null", "0", "-1", "1", "2.5", "1e9", "1e400", "nan", "-inf", "true", "abc", "[]", "[1,a]", "[[[]]]",
    "{a:1}", "'1'", '""', "~", "a=b", "a,b", "ü", "${x}", "???", "a'b", "[", "*", "/", ".", "\\", "0x10",
    "1_000", "%s", "#", "-",
]  # fmt: skip


def odd_lines(count: int) -> list[tuple[str, str]]:
    """Commands in turn, each with a key or group at random that gets a value at random."""
    choose = random.Random(0)
    lines = []
    for number in range(count):
        command = list(JOBS)[number % len(JOBS)]
        (form,) = choose.choices(list(FORMS), list(FORMS.values()))
        key = choose.choice([*kinds_of(command), *groups(command)])
        lines.append((command, form.format(key, choose.choice(VALUES))))
    return lines


@pytest.fixture
def works(two_classes: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Arguments that are right for each command, which ends where the long part of its work would begin."""
    metadata = json.dumps(model_metadata(mv.load_model(checkpoint)))
    monkeypatch.setattr("mvit_video.training.run.fit", lambda *_: None)
    monkeypatch.setattr("mvit_video.cli.demo.launch", lambda *_, **__: None)
    monkeypatch.setattr("mvit_video.cli.export.export_model", lambda *_, **__: None)
    monkeypatch.setattr(
        "mvit_video.cli.export.load_exported",
        lambda path, **_: ExportedModel(mv.load_model(checkpoint), metadata, path),
    )
    data, weights = f"data.root={two_classes}", f"weights={checkpoint}"
    return {
        "train": [data, "model=mvitv2_nano_8x4", "num_workers=0", "logger=csv"],
        "eval": [data, weights, "num_workers=0", "worst_mistakes=0"],
        "predict": [str(two_classes / "cats" / "0.mp4"), weights, "num_workers=0"],
        "info": ["model=mvitv2_nano_8x4"],
        "data": ["prepare", data, "index=index.parquet", "num_workers=0"],
        "export": [weights, "runs=1", "batch_size=1"],
        "demo": [weights, "port=null", "num_workers=0"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument"), odd_lines(150))
def test_any_value_ends_well_or_with_one_line(
    command: Command, works: dict[str, list[str]], name: str, argument: str
) -> None:
    result = command(name, *works[name], argument)
    errors = [line for line in result.err.splitlines() if line.startswith(f"mvit-{name}: error: ")]
    assert "Traceback" not in result.out + result.err
    assert (result.code, len(errors)) in ((0, 0), (1, 1), (2, 1)), result  # 2: of Python's argument parser


@pytest.mark.parametrize(
    ("name", "argument", "words"),
    [
        ("info", "model.num_frames=nan", "model.num_frames is nan"),
        ("info", "model/position=[1,a]", "space_time"),
        ("info", "model=null", "mvitv2_s_16x4"),
        ("info", "views=3", "has no group 'views'"),
        ("info", "model.pool_first=1,2", "--multirun"),
        ("data", "num_workers=${x}", "num_workers: "),
        ("data", "data.path=3", "data=index"),
        ("data", "~index", "~index"),
        ("export", "model.patch_2d=true", "without model="),
        ("export", "views=???", "5x1"),
        ("export", "views.num_clips=???", "views.num_clips isn't set"),
        ("export", "weights.x=1", "weights is a value (null)"),
        ("demo", "+model.dropout=0", "model=NAME"),
        ("demo", "port=1e9", "port is 1000000000"),
        ("train", "optim=2.5", "adamw, "),
        ("train", "optim.optimizer=5", "optim.optimizer is 5"),
        ("train", "optim.optimizer.momentum=0.3", "optim=sgd"),
        ("train", "hydra.run=3", "hydra.run: "),
        ("train", "~trainer.limit_train_batches", "null"),
        ("train", "foo", "'foo' isn't KEY=VALUE"),
        ("train", "logger.csv.save_dir.x=1", "logger.csv.save_dir is a value"),
    ],
)
def test_an_odd_value_is_explained(
    command: Command, works: dict[str, list[str]], name: str, argument: str, words: str
) -> None:
    arguments = [word for word in works[name] if word.partition("=")[0] != argument.partition("=")[0]]
    result = command(name, *arguments, argument)
    assert result.code == 1
    assert words in result.err
    assert result.err.count(f"mvit-{name}: error: ") == 1


def test_null_is_possible_for_a_group_that_is_null_by_default(command: Command) -> None:
    shown = command("train", "experiment=null", "--cfg", "job")
    assert (shown.code, shown.out) == (0, command("train", "--cfg", "job").out)
