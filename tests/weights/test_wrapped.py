"""Weights of a wrapped model, of another model, of another number of classes: found, or said what to type."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, error_line
from small_models import small_model
from torch import nn

import mvit_video as mv
from mvit_video.model.baselines import create_baseline
from mvit_video.weights import METADATA_KEY, save_weights, weights_sha256
from mvit_video.weights.description import as_overrides


class Wrapper(nn.Module):
    def __init__(self, **members: nn.Module) -> None:
        super().__init__()
        for name, member in members.items():
            self.add_module(name, member)


def inside_blocks(model: mv.MViT) -> dict[str, Any]:
    """As where each block was compiled on its own."""
    return {
        name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in model.state_dict().items()
    }


WRAPPED = {
    "DataParallel": (lambda model: nn.DataParallel(model).state_dict(), "module."),
    "compiled": (lambda model: torch.compile(model).state_dict(), "_orig_mod."),
    "compiled blocks": (inside_blocks, "_orig_mod."),
    "averaged": (lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(), "module."),
    "net": (lambda model: Wrapper(net=model).state_dict(), "net."),
    "model": (lambda model: Wrapper(model=model).state_dict(), "model."),
    "both": (lambda model: nn.DataParallel(Wrapper(model=model)).state_dict(), "module.model."),
    "a member of several": (
        lambda model: {"state_dict": Wrapper(model=model, loss=nn.Linear(2, 2)).state_dict()},
        "model.",
    ),
}
CONTAINERS: dict[str, Any] = {
    "alone": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3},
    "net": lambda weights: {"net": weights},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {}},
    "averages": lambda weights: {"state_dict_ema": weights, "epoch": 3},
    "averages beside them": lambda weights: {
        "model": weights,
        "model_ema": {"norm.bias": torch.zeros(16)},
    },
    "nested": lambda weights: {"model": {"state_dict": weights}},
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize(("wrap", "prefix"), WRAPPED.values(), ids=WRAPPED)
def test_prefixes_are_removed_and_said(tmp_path: Path, wrap: Any, prefix: str, contain: Any) -> None:
    source, model = small_model(1), small_model(2)
    torch.save(contain(wrap(source)), tmp_path / "model.pth")
    report = mv.load_weights(model, tmp_path / "model.pth")
    assert report.prefix == prefix
    assert prefix in str(report)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_has_no_prefix_says_nothing() -> None:
    report = mv.load_weights(small_model(2), small_model(1).state_dict())
    assert report.prefix == ""
    assert "prefix" not in str(report)


def test_baselines_are_wrapped_too() -> None:
    source = create_baseline("r2plus1d_18", 3, num_frames=4, crop_size=32)
    model = create_baseline("r2plus1d_18", 3, num_frames=4, crop_size=32)
    for weights in (source.state_dict(), source.net.state_dict(), nn.DataParallel(source).state_dict()):
        mv.load_weights(model, {"model": weights})
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module."])
def test_two_tensors_for_one_name_are_refused(wrapper: str) -> None:
    weights = small_model().state_dict()
    weights[f"{wrapper}norm.bias"] = torch.zeros(16)
    with pytest.raises(mv.CheckpointError, match="twice"):
        mv.load_weights(small_model(), weights)


# Another model, another number of classes


@pytest.mark.parametrize("name", ["small.ckpt", "small.pyth", "small.safetensors"])
@pytest.mark.parametrize("head", ["strict", "new"])
def test_a_file_of_another_model_names_that_model(tmp_path: Path, name: str, head: Any) -> None:
    small = small_model()
    save_weights(small, tmp_path / name)
    if name == "small.pyth":  # PySlowFast's description alone
        content = torch.load(tmp_path / name, weights_only=True)
        del content[METADATA_KEY]
        torch.save(content, tmp_path / name)
    other = mv.create_model("mvitv2_s_16x4", num_classes=3, stages=(1, 1, 1, 1))
    with pytest.raises(mv.CheckpointError, match=r"model=mvitv2_\w+ .*model\.embed_dim=8") as caught:
        mv.load_weights(other, tmp_path / name, head=head)
    assert "model.stages=[1,1]" in str(caught.value)


@pytest.mark.parametrize("name", ["mvitv2_s_16x4", "mvitv2_l_224", "mvitv1_b_32x3"])
def test_a_named_model_needs_no_fields(name: str) -> None:
    with torch.device("meta"):
        assert as_overrides(mv.create_model(name, num_classes=7).config) == f"model={name}"


def test_what_is_told_to_type_works(command: Command, tmp_path: Path, two_classes: Path) -> None:
    """From the message of one command to the command that it asks for."""
    save_weights(small_model(num_classes=2), tmp_path / "small.ckpt")
    arguments = ["experiment=motion", f"data.root={two_classes}", "weights=small.ckpt", "batch_size=4"]
    arguments += ["num_workers=0", "trainer.max_epochs=1", "views.clip_frames=4"]
    line = error_line(command("train", *arguments), "train")
    typed = [word for word in line.split() if word.startswith("model")]
    assert any(word.startswith("model.embed_dim=") for word in typed)
    done = command("train", *arguments, *[word.rstrip(";,") for word in typed if "=" in word])
    assert done.code == 0, done.err


def test_bare_weights_bring_their_number_of_classes(
    command: Command, tmp_path: Path, two_classes: Path
) -> None:
    torch.save(mv.create_model("mvitv2_nano_8x4", num_classes=8).state_dict(), tmp_path / "bare.pth")
    arguments = [two_classes, "weights=bare.pth", "num_workers=0", "topk=9", "output=answers.json"]
    line = error_line(command("predict", *arguments), "predict")
    assert "model=mvitv2_nano_8x4" in line
    done = command("predict", *arguments, "model=mvitv2_nano_8x4")
    assert done.code == 0, done.err
    assert len(json.loads((tmp_path / "answers.json").read_text())["videos"][0]["scores"]) == 8


# Files that are none


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "best.ckpt").touch()
    (tmp_path / "model.onnx").touch()
    for path, named in (
        (tmp_path / "absent.pt", "no such file"),
        (tmp_path, "a folder"),
        (folder, "best.ckpt"),
        (f"{tmp_path}/{'x' * 300}", "can't be read"),
        ("https://example.org/model.pth", "download"),
        (tmp_path / "model.onnx", "mvit-predict"),
        (f"{tmp_path}/a\0b", "no such file"),
    ):
        for read in (mv.load_model, mv.from_slowfast, lambda path: mv.load_weights(small_model(), path)):
            with pytest.raises(mv.CheckpointError, match=named) as caught:
                read(path)
            assert str(path) in str(caught.value)


def test_permission_and_device_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.ckpt").touch()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(mv.CheckpointError, match=r"model\.ckpt: can't be read \(Permission denied\)"):
        mv.load_model(tmp_path / "model.ckpt")


# Saving


@pytest.mark.parametrize("name", ["model.pyth", "model.safetensors"])
def test_saving_replaces_whole_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(small_model(1), tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(small_model(2), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


def test_another_normalisation_is_said(caplog: pytest.LogCaptureFixture) -> None:
    source, model = small_model(1), small_model(2)
    content = {"model_state": source.state_dict(), METADATA_KEY: mv.weights.model_metadata(source)}
    content[METADATA_KEY]["protocol"]["mean"] = [0.1, 0.2, 0.3]
    with caplog.at_level(logging.WARNING):
        mv.load_weights(model, content)
    assert "(0.1, 0.2, 0.3)" in caplog.text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["crane", "a", "crane", "b"], ("crane (0)", "a", "crane (2)", "b")),
        (["a", " ", "", "a "], ("a (0)", "class (1)", "class (2)", "a (3)")),
        (["a", "b", "c", "A"], ("a", "b", "c", "A")),
        (["a", "a", "a (0)", "c"], None),
    ],
)
def test_class_names_of_a_file_are_told_apart(
    tmp_path: Path, names: list[str], expected: tuple[str, ...] | None
) -> None:
    model = mv.create_model("mvitv2_nano_8x4", num_classes=4, embed_dim=8, stages=(1,))
    model.class_names = tuple(names)
    save_weights(model, tmp_path / "model.pth")
    if expected is None:
        with pytest.raises(mv.CheckpointError, match="class_names"):
            mv.load_model(tmp_path / "model.pth")
    else:
        assert mv.load_model(tmp_path / "model.pth").class_names == expected


# Which weights these are: by content, not by the name of a file


def test_the_same_weights_through_another_format_are_the_same(tmp_path: Path) -> None:
    model = small_model(0)
    for name in ("a.ckpt", "b.safetensors"):
        save_weights(model, tmp_path / name)
        assert weights_sha256(mv.load_model(tmp_path / name)) == weights_sha256(model)
    assert weights_sha256(torch.compile(model)) == weights_sha256(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_more_or_less_is_another_identity(dtype: torch.dtype) -> None:
    model = small_model(0).to(dtype)
    before = weights_sha256(model)
    assert before == weights_sha256(small_model(0).to(dtype)) != weights_sha256(small_model(1).to(dtype))
    with torch.no_grad():
        model.norm.bias[0] += 1
    assert weights_sha256(model) != before
