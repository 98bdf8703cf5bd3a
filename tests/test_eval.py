"""Evaluation by the command: each video once, all views averaged, the same however it is batched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, TrainedRun

import mvit_video as mv
from mvit_video.data.index import LabelledVideo
from mvit_video.eval import accuracies, confusion
from mvit_video.scoring import VideoScores


@pytest.fixture
def results(command: Command, trained: TrainedRun, tmp_path: Path) -> dict:
    result = command(
        "eval",
        "data=motion",
        f"data.root={trained.data}",
        f"weights={trained.checkpoint}",
        "views=5x1",
        "hydra.run.dir=run",
    )
    assert result.code == 0, result.err
    assert "top-1" in result.out
    assert "video" in result.out
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((tmp_path / "run" / "results.json").read_text())


def test_results_follow_from_the_scores_on_disk(results: dict, tmp_path: Path) -> None:
    rows = pq.read_table(tmp_path / "run" / "scores.parquet").to_pylist()
    assert len(rows) == 64 * 5
    assert results["videos"] == 64
    assert results["bad_videos"] == []
    assert "5 clips x 1 crop" in results["protocol"]
    by_video: dict[str, list[dict]] = {}
    for row in rows:
        by_video.setdefault(row["id"], []).append(row)
    assert all([row["view"] for row in views] == [0, 1, 2, 3, 4] for views in by_video.values())
    right = [
        np.mean([row["scores"] for row in views], 0).argmax() == views[0]["label"]
        for views in by_video.values()
    ]
    assert results["video_top1"] == pytest.approx(np.mean(right))
    clips_right = [np.argmax(row["scores"]) == row["label"] for row in rows]
    assert results["clip_top1"] == pytest.approx(np.mean(clips_right))
    assert all(sum(row["scores"]) == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(0 <= row["start"] < row["end"] for row in rows)
    assert results["video_top1"] >= 0.75


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


def test_accuracies_of_a_table_with_known_answers() -> None:
    views = [
        ([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]], 1),  # the mean is right, one clip isn't
        ([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]], 2),
        ([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]], 2),
    ]
    scores = [
        VideoScores(LabelledVideo(f"{i}", label, f"{i}"), torch.tensor(rows), [(0.0, 1.0)] * 2)
        for i, (rows, label) in enumerate(views)
    ]
    found = accuracies(scores, 3)
    assert found == pytest.approx(
        {"video_top1": 2 / 3, "video_top5": 1.0, "clip_top1": 3 / 6, "clip_top5": 1.0}
    )
    assert confusion(scores, 3).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
