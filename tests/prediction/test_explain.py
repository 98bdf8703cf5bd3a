"""Explanations point at what decides: maps over a clip, importance over time, pictures and videos of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Command
from torch import Tensor

import mvit_video as mv
from mvit_video.model import MViT, MViTConfig
from mvit_video.prediction.explain import attention_rollout, explain, grad_cam, overlays, write_strip
from mvit_video.prediction.render import plot_timeline

SMALL = MViTConfig(
    num_classes=3,
    num_frames=8,
    crop_size=64,
    embed_dim=16,
    stages=(1, 1, 1),
    kv_stride=(1, 4, 4),
    drop_path=0.0,
    head_dropout=0.0,
)
LAYOUTS = {
    "class token": SMALL,
    "no class token": replace(SMALL, class_token=False),
    "mean of all": replace(SMALL, mean_pooling=True),
    "joint positions": replace(SMALL, rel_pos_joint="space_time"),
    "another size": replace(SMALL, num_frames=4, crop_size=72),
}


def made(config: MViTConfig) -> MViT:
    torch.manual_seed(0)
    model = MViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def random_clip(model: MViT) -> Tensor:
    return torch.randn(1, 3, *model.config.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_attention_weights_give_the_attention(config: MViTConfig) -> None:
    """Weights times values is what the fused attention gives, for a block of one head."""
    model = made(config)
    tokens, grid = model.embed(random_clip(model))
    attention = model.blocks[0].attn
    weights, q_grid, k_grid = attention.weights(tokens, grid)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    q, _, v, _, _ = attention._queries_keys_values(tokens, grid)
    first = int(config.class_token)
    x = weights @ v[:, :, 0]
    x[:, first:] += q[:, first:, 0]
    torch.testing.assert_close(attention.proj(x), attention(tokens, grid)[0], atol=1e-4, rtol=1e-4)
    sizes = tuple(first + torch.Size(grid).numel() for grid in (q_grid, k_grid))
    assert weights.shape[1:] == sizes


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_rollout_shares_out_the_whole(config: MViTConfig) -> None:
    model = made(config)
    shares = attention_rollout(model, random_clip(model))
    t, h, w = config.input_size
    assert shares.shape == (t // 2, h // 4, w // 4)
    assert (shares >= 0).all()
    assert shares.sum() == pytest.approx(1, abs=1e-4) if not config.class_token else 0 < shares.sum() < 1


def test_windows_have_grad_cam_only(two_classes: Path) -> None:
    model = made(replace(SMALL, attention="pooling_shifted_window", window=(2, 4, 4)))
    with mv.open_video(two_classes / "cats" / "0.mp4") as video:
        assert explain(video, model).maps.shape == (8, 64, 64)
        with pytest.raises(mv.ConfigError, match="gradcam"):
            explain(video, model, method="rollout")
        with pytest.raises(mv.ConfigError, match="gradcam, rollout"):
            explain(video, model, method="tea leaves")


class Aside(torch.nn.Module):
    """A block's attention that lets nothing pass between tokens."""

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
        return x, grid


def test_grad_cam_finds_what_decides() -> None:
    """Of a model that can only look token by token, the map is bright where the class's evidence is."""
    model = made(replace(SMALL, stages=(2,), class_token=False, kv_stride=(1, 2, 2)))
    for block in model.blocks:
        block.attn = Aside()
    clip = torch.zeros(1, 3, 8, 64, 64)
    clip[:, :, 2:4, 16:32, 40:56] = 4.0
    with torch.no_grad():
        change = model(clip) - model(torch.zeros_like(clip))
    label = int(change.argmax())
    (cam,) = grad_cam(model, clip, [label])
    inside = torch.zeros(cam.shape, dtype=torch.bool)
    inside[0:3, 3:9, 9:15] = True  # the overlapping patches that see the bright box
    cam = cam / cam.max()
    assert cam[~inside].max() - cam[~inside].min() < 1e-3
    assert cam[1, 5, 11] > cam[~inside].max() + 0.2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["gradcam", "rollout"])
def test_the_command_leaves_pictures_and_videos(
    predict: Command, two_classes: Path, checkpoint: Path, tmp_path: Path, method: str
) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    files = [two_classes / "cats" / "5.mp4", "broken.mp4"]
    result = predict(*files, f"explain={method}")
    assert result.code == 0, result.err
    saved = sorted(path.name for path in (tmp_path / "saved").rglob("*.*"))
    assert saved == [f"5.{method}.mp4", f"5.{method}.png"]
    (video,) = (tmp_path / "saved").rglob(f"5.{method}.mp4")
    explanation = mv.Recognizer(checkpoint).explain(files[0], method=method)
    with mv.open_video(video) as shown:
        assert shown.num_frames == 8
        start, end = explanation.span
        assert shown.frame_time(7) == pytest.approx(end - start, abs=0.05)
        frames = shown.get_frames(range(8)).float()
    assert (frames - overlays(explanation).float()).abs().mean() < 12
    assert 0 <= explanation.maps.min() <= explanation.maps.max() <= 1
    assert explanation.importance.shape == (2, 8)


def test_names_are_no_formulas(two_classes: Path, checkpoint: Path, tmp_path: Path) -> None:
    model = mv.load_model(checkpoint)
    model.class_names = ("$\\frac{", "_" * 20 + "$^$")
    recognizer = mv.Recognizer(model, num_clips=1)
    video = two_classes / "cats" / "0.mp4"
    (tmp_path / "strip.png").write_text("mine")
    write_strip(recognizer.explain(video), tmp_path / "strip.png")
    assert (tmp_path / "strip.png.former").read_text() == "mine"
    (tmp_path / "strip.png.former").unlink()
    timeline = recognizer.timeline(video, length=1, stride=1)
    plot_timeline(timeline, timeline.segments(), tmp_path / "timeline.png")
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}


def test_what_can_not_be_explained_is_said(predict: Command, two_classes: Path) -> None:
    for arguments in (["explain=why"], ["explain=gradcam", "window=1"]):
        result = predict(two_classes, *arguments)
        assert result.code == 1
        assert "explain" in result.err
