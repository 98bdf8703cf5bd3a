"""The learning rate and the parameter groups against the official ones."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import mvit_video as mv
from mvit_video.recipe import Classifier, learning_rate, parameter_groups

REFERENCE = Path(__file__).parent / "reference"
SCHEDULES = json.loads((REFERENCE / "protocol.json").read_text())["lr"]
GROUPS = json.loads((REFERENCE / "train_facts.json").read_text())["weight_decay_groups"][0]["groups"]


@pytest.mark.parametrize("case", SCHEDULES, ids=lambda case: case["config"])
def test_the_learning_rate_is_the_official_one(case: dict) -> None:
    for epoch, expected in case["lr"]:
        found = learning_rate(
            epoch,
            lr=case["base_lr"],
            epochs=case["epochs"],
            warmup_epochs=case["warmup"],
            warmup_start_lr=case["start"],
            end_lr=case["end"],
        )
        assert found == pytest.approx(expected, rel=1e-9)


def test_no_warmup_and_one_step_work() -> None:
    schedule = partial(learning_rate, lr=1.0, warmup_start_lr=0.1, end_lr=0.0)
    assert schedule(0, epochs=10, warmup_epochs=0) == 1.0
    assert schedule(1, epochs=1, warmup_epochs=0) == 0.0
    assert schedule(12, epochs=10, warmup_epochs=2) == 0.0


def test_weight_decay_groups_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = mv.create_model("mvitv2_s_16x4")
    groups = parameter_groups(model, 0.05)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [
        (g["tensors"], g["weight_decay"]) for g in GROUPS
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].split(".", 2)[2] for p in groups[1]["params"] if "blocks." in names[id(p)]}
    assert kinds <= set(GROUPS[1]["kinds"])


def test_frozen_parameters_are_left_out() -> None:
    model = mv.create_model("mvitv2_nano_8x4")
    model.patch_embed.requires_grad_(False)
    held = sum(len(group["params"]) for group in parameter_groups(model, 0.05))
    assert held == len(list(model.parameters())) - 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1), ("warmup", 1.0), ("warmup", -0.1), ("label_smoothing", 1.0), ("weight_decay", -1)],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    values = {"lr": 0.1, name: value}
    with pytest.raises(ValueError, match=f"{name} must .*{value}"):
        Classifier(mv.create_model("mvitv2_nano_8x4"), optimizer=torch.optim.SGD, **values)
