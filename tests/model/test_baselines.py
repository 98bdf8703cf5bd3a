"""Models of pytorchvideo and torchvision behind our commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Command
from pytorchvideo.models import hub
from torchvision.models import video as torchvision_models

import mvit_video as mv
from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.model.baselines import BASELINES, Baseline, create_baseline
from mvit_video.weights import load_weights, save_weights

SMALL = {"num_frames": 8, "crop_size": 64}
ORIGINALS = {
    "x3d_s": hub.x3d_s,
    "slow_r50": hub.slow_r50,
    "slowfast_r50": hub.slowfast_r50,
    "mvit_base_16x4": hub.mvit_base_16x4,
    "mvit_v2_s": torchvision_models.mvit_v2_s,
    "r2plus1d_18": torchvision_models.r2plus1d_18,
}


@pytest.mark.parametrize("name", BASELINES)
def test_weights_of_the_libraries_own_models_fit(name: str) -> None:
    """Built as published, names and shapes are those of the originals."""
    original = ORIGINALS[name]()
    weights = original.state_dict()
    baseline = create_baseline(name)
    report = load_weights(baseline, {"model_state": weights})
    assert len(report.loaded) == len(weights)
    assert all(torch.equal(baseline.net.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", ["x3d_s", "slowfast_r50", "r2plus1d_18"])
def test_logits_are_the_originals(name: str) -> None:
    original = ORIGINALS[name]().eval()
    baseline = create_baseline(name).eval()
    load_weights(baseline, original.state_dict())
    protocol = baseline.protocol
    clips = torch.randn(1, 3, protocol.clip_frames, protocol.crop, protocol.crop)
    with torch.inference_mode():
        if name == "slowfast_r50":  # as pytorchvideo's tutorial packs the pathways
            slow = clips[:, :, torch.linspace(0, 31, 8).long()]
            expected = original([slow, clips])
        else:
            expected = original(clips)
        logits = baseline(clips)
    if name == "x3d_s":  # published with a softmax
        logits = logits.softmax(-1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_another_size_another_head_and_a_new_one(name: str, tmp_path: Path) -> None:
    baseline = create_baseline(name, 7, **SMALL).eval()
    clips = torch.randn(2, 3, 8, 64, 64)
    with torch.inference_mode():
        logits = baseline(clips)
    assert logits.shape == (2, 7)
    assert not torch.allclose(logits.sum(-1), torch.ones(2))  # no softmax

    baseline.class_names = tuple("abcdefg")
    save_weights(baseline, tmp_path / "baseline.pth")
    again = mv.load_model(tmp_path / "baseline.pth")
    assert isinstance(again, Baseline)
    assert again.class_names == baseline.class_names
    assert again.protocol == baseline.protocol
    with torch.inference_mode():
        assert torch.equal(again(clips), logits)

    other = create_baseline(name, 3, **SMALL)
    with pytest.raises(CheckpointError, match="its head has 7 classes, the model has 3"):
        load_weights(other, tmp_path / "baseline.pth")
    report = load_weights(other, tmp_path / "baseline.pth", head="new")
    assert report.fresh == (f"{other.classifier}.weight", f"{other.classifier}.bias")


@pytest.mark.parametrize(
    "name",
    [name if name == "x3d_s" else pytest.param(name, marks=pytest.mark.slow) for name in BASELINES],
)
def test_the_commands_train_evaluate_and_predict(
    name: str, command: Command, two_classes: Path, tmp_path: Path
) -> None:
    trained = command(
        "train",
        f"model={name}",
        f"data.root={two_classes}",
        *(f"model.{key}={value}" for key, value in SMALL.items()),
        "batch_size=2",
        "num_workers=0",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=1",
        "logger=csv",
        "hydra.run.dir=run",
    )
    assert trained.code == 0, trained.err
    weights = tmp_path / "run" / "checkpoints" / "last.ckpt"
    evaluated = command(
        "eval",
        f"weights={weights}",
        f"data.root={two_classes}",
        "views.num_clips=1",
        "views.num_crops=1",
        "num_workers=0",
        "hydra.run.dir=eval",
    )
    assert evaluated.code == 0, evaluated.err
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["videos"] == 2
    video = two_classes / "cats" / "0.mp4"
    predicted = command("predict", video, f"weights={weights}", "views.num_clips=1", "num_workers=0")
    assert predicted.code == 0, predicted.err
    assert "dogs and birds" in predicted.out


def test_a_linear_probe_of_a_baseline(command: Command, two_classes: Path, tmp_path: Path) -> None:
    save_weights(create_baseline("x3d_s", 5, **SMALL), tmp_path / "five.pth")
    result = command(
        "train",
        "experiment=linear_probe",
        "model=x3d_s",
        f"data.root={two_classes}",
        *(f"model.{key}={value}" for key, value in SMALL.items()),
        "weights=five.pth",
        "batch_size=2",
        "num_workers=0",
        "trainer.max_epochs=1",
        "logger=csv",
        "hydra.run.dir=run",
    )
    assert result.code == 0, result.err
    before = mv.load_model(tmp_path / "five.pth").state_dict()
    after = mv.load_model(tmp_path / "run" / "checkpoints" / "last.ckpt").state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"net.blocks.5.proj.weight", "net.blocks.5.proj.bias"}  # no batch statistics either


def test_info_describes_a_baseline(command: Command) -> None:
    shown = command("info", "model=x3d_s")
    assert shown.code == 0, shown.err
    assert "3,794,274 parameters" in shown.out


def test_what_there_is_not_is_named(command: Command) -> None:
    with pytest.raises(ConfigError, match=r"unknown baseline 'x3d' \(did you mean 'x3d_s'\?\)"):
        create_baseline("x3d")
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        create_baseline("slowfast_r50", num_frames=6)
    with pytest.raises(ValueError, match=r"crop_size must be .* got 0"):
        create_baseline("x3d_s", crop_size=0)
    with pytest.raises(ConfigError, match="weights of x3d_s aren't known by name"):
        create_baseline("x3d_s", weights="kinetics400")
    refused = command("train", "model=x3d_s", "optim.layer_decay=0.5", "data.root=nowhere")
    assert refused.code == 1
    assert "optim: layer_decay needs an MViT, Baseline has no known layers" in refused.err
