"""Evaluation by the command: each video once, all views averaged, the same however it is batched."""

from __future__ import annotations

from pathlib import Path

import hydra
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command

import mvit_video as mv
from mvit_video.cli import CONF_DIR, override_protocol


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_do_not_depend_on_the_batch(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path, batch_size: int
) -> None:
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", "split=train", "views=5x3"]
    for name, more in (("a", ["num_workers=0"]), ("b", [f"batch_size={batch_size}", "num_workers=2"])):
        assert command("eval", *arguments, *more, f"hydra.run.dir={name}").code == 0
    a, b = (pq.read_table(tmp_path / name / "scores.parquet") for name in "ab")
    assert len(a) == 10 * 15
    for column in ("id", "view", "label", "start", "end"):
        assert a[column].equals(b[column])
    np.testing.assert_allclose(a["scores"].to_pylist(), b["scores"].to_pylist(), atol=1e-5)


def test_views_can_be_chosen(command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [f"data.root={two_classes}", f"weights={checkpoint}", "num_workers=0", "hydra.run.dir=run"]
    for views, count in ((["views=1x1"], 1), (["views=1x3_segment"], 3), (["views.num_clips=2"], 2)):
        assert command("eval", *arguments, *views).code == 0
        assert len(pq.read_table(tmp_path / "run" / "scores.parquet")) == 2 * count


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ("5x1", {"num_clips": 5, "num_crops": 1, "short_side": 256}),
        ("1x1", {"num_clips": 1, "num_crops": 1, "short_side": 256}),
        ("10x3", {"num_clips": 10, "num_crops": 3, "short_side": 224}),  # PySlowFast's for three crops
        ("7x3", {"num_clips": 7, "num_crops": 3, "short_side": 224}),
        ("1x3_segment", {"num_clips": 1, "num_crops": 3, "short_side": 224, "sampling": "segment"}),
        ("1x1_segment", {"num_clips": 1, "num_crops": 1, "short_side": 256, "sampling": "segment"}),
        ("torchvision", {"num_clips": 5, "short_side": 256, "pixels": "torchvision"}),
    ],
)
def test_protocols_by_name(views: str, expected: dict[str, object]) -> None:
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = hydra.compose("eval", [f"views={views}"])
    protocol = override_protocol(mv.Protocol(), config.views)
    assert {name: getattr(protocol, name) for name in expected} == expected
    config.views.short_side = 300
    assert override_protocol(mv.Protocol(), config.views).short_side == 300


def test_scoring_equals_the_model_on_hand_cut_clips(two_classes: Path, checkpoint: Path) -> None:
    model = mv.load_model(checkpoint)
    path = two_classes / "cats" / "5.mp4"
    (prediction,) = mv.predict(path, model, num_clips=3)
    with mv.open_video(path) as video:
        plan = mv.kinetics_frame_indices(video.num_frames, video.fps, clip_frames=8, stride=4, num_clips=3)
        frames = [video.get_frames(clip).float() / 255 for clip in plan]
        (view,) = mv.spatial_views(video.height, video.width, short_side=64, crop=64)
    clips = torch.stack(frames).transpose(1, 2).sub(0.45).div(0.225).flatten(0, 1)  # (V * C, T, H, W)
    clips = torch.nn.functional.interpolate(
        clips, size=(view.resized_height, view.resized_width), mode="bilinear"
    ).unflatten(0, (3, 3))
    clips = clips[..., view.top : view.top + 64, view.left : view.left + 64]
    with torch.no_grad():
        expected = model(clips).softmax(-1)
    names = {"cats": 0, "dogs and birds": 1}
    for clip, scores in zip(prediction.clips, expected, strict=True):
        for name, score in zip(clip.classes, clip.scores, strict=True):
            assert score == pytest.approx(scores[names[name]].item(), abs=1e-5)
    best = expected.mean(0).argmax().item()
    assert names[prediction.classes[0]] == best
