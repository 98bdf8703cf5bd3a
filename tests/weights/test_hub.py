"""Models on the Hugging Face Hub, from a folder laid out as the Hub's cache; nothing goes over a network."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import Command, error_line
from huggingface_hub import ModelCard, constants

import mvit_video as mv
from mvit_video.errors import CheckpointError, ConfigError
from mvit_video.weights import save_weights
from mvit_video.weights.model_card import model_card, write_repository

NAMES = ("wave", "clap", "a|b\x1b[31m")
RESULTS = {
    "video_top1": 0.75, "video_top1_interval": [0.5, 0.9], "video_top5": 1.0, "clip_top1": 0.5,
    "mean_class_accuracy": 0.7, "data": {"root": "/data/gestures"}, "videos": 12, "model_sha256": "ab12",
}  # fmt: skip


def tiny() -> mv.MViT:
    torch.manual_seed(0)
    model = mv.create_model("mvitv2_nano_8x4", 3, embed_dim=8, stages=(1, 1), crop_size=16, num_frames=2)
    model.class_names = NAMES
    return model.eval()


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of ``hf://me/gestures`` in the Hub's cache, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--me--gestures"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    write_repository(tiny(), folder, "me/gestures", results=RESULTS, licence="apache-2.0")
    save_weights(tiny(), folder / "other.pyth")
    return folder


@pytest.mark.parametrize("rest", ["", "@main", "/other.pyth", "@main/model.safetensors"])
def test_a_model_comes_from_the_cache_whole(snapshot: Path, rest: str) -> None:
    model, clips = mv.load_model(f"hf://me/gestures{rest}"), torch.randn(1, 3, 2, 16, 16)
    torch.testing.assert_close(model(clips), tiny()(clips), rtol=0, atol=0)
    assert model.class_names == NAMES
    assert model.protocol == tiny().protocol


def test_commands_take_its_address(snapshot: Path, command: Command) -> None:
    result = command("predict", "missing.mp4", "weights=hf://me/gestures")
    assert "missing.mp4" in result.err
    assert "hf://me/absent" in error_line(command("predict", "a.mp4", "weights=hf://me/absent"), "predict")


@pytest.mark.parametrize(
    "address",
    [
        "hf://me",
        "hf://me/gestures/absent.pyth",
        "hf://../gestures",
        "hf://me/gestures@none",
        "hf://a/b c",
        "hf://",
    ],
)
def test_what_is_not_there_is_one_line(snapshot: Path, address: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        mv.load_model(address)
    assert len(str(caught.value).splitlines()) == 1


def test_files_from_there_are_not_run(snapshot: Path) -> None:
    torch.save({"model_state": print}, snapshot / "evil.pyth")
    with pytest.raises(CheckpointError, match="refused"):
        mv.load_model("hf://me/gestures/evil.pyth")


def test_the_card_is_read_by_the_hub(snapshot: Path) -> None:
    card = ModelCard.load(snapshot / "README.md")
    assert card.data.license == "apache-2.0"
    assert {found.metric_name: found.metric_value for found in card.data.eval_results} == {
        "video_top1": 0.75,
        "video_top5": 1.0,
    }
    assert "| video_top1 | 0.7500 | 0.5000 to 0.9000 |" in card.text
    assert "\x1b" not in card.text
    assert json.loads((snapshot / "config.json").read_text())["mvit_video"]["class_names"] == list(NAMES)
    assert "hasn't been evaluated" in model_card(tiny(), "me/x")
    several = model_card(tiny(), "me/x", {"map": 0.625, "data_path": "/home/me/charades", "videos": 12})
    (entry,) = ModelCard(several).data.eval_results
    assert (entry.dataset_name, entry.metric_type, entry.metric_value) == ("charades", "mAP", 0.625)
    assert "| map | 0.6250 |" in several


def test_export_uploads_what_can_be_loaded(
    snapshot: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}

    class Api:
        endpoint = "https://hub"

        def create_repo(self, repo: str, **options: Any) -> None:
            calls["made"] = (repo, options)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            calls["files"] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    arguments = ["weights=hf://me/gestures", "output=hf://me/new"]
    result = command("export", *arguments, f"results={tmp_path / 'results.json'}", "licence=mit")
    assert result.code == 0, result.err
    assert "https://hub/me/new" in result.out
    assert calls["made"] == ("me/new", {"private": True, "exist_ok": True})
    assert calls["files"].keys() == {"model.safetensors", "config.json", "README.md"}
    (tmp_path / "again.safetensors").write_bytes(calls["files"]["model.safetensors"])
    assert mv.load_model(tmp_path / "again.safetensors").class_names == NAMES
    (tmp_path / "list.json").write_text("[]")
    assert "results=" in error_line(
        command("export", *arguments, f"results={tmp_path / 'list.json'}"), "export"
    )
    assert "user/name" in error_line(command("export", arguments[0], "output=hf://me/new/file"), "export")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"mvit-video\[hub\]"):
        mv.load_model("hf://me/gestures")
