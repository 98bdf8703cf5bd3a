"""The whole path on the motion data set: train, evaluate, predict, and only motion tells the classes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import generate as motion
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command

import mvit_video as mv
from mvit_video.data.datasets import ViewDataset
from mvit_video.data.index import folder_splits

pytestmark = pytest.mark.slow  # the training takes a minute

OPPOSITE = {
    "moving_left": "moving_right",
    "moving_up": "moving_down",
    "rotating_clockwise": "rotating_counterclockwise",
    "growing": "shrinking",
}
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}


class TrainedRun(NamedTuple):
    data: Path
    output: Path
    checkpoint: Path
    log: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A nano model after some epochs of the motion data set, trained by the installed command."""
    data, work = tmp_path_factory.mktemp("motion"), tmp_path_factory.mktemp("work")
    motion.generate(data, train_per_class=60, val_per_class=8, size=48)
    command = [
        str(Path(sys.executable).parent / "mvit-train"),
        "experiment=motion",
        f"data.root={data}",
        "trainer.max_epochs=8",
        "model.crop_size=48",
        "num_workers=0",
        "hydra.run.dir=run",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    output = work / "run"
    return TrainedRun(data, output, output / "checkpoints" / "best.ckpt", done.stdout + done.stderr)


def test_a_run_leaves_checkpoints_logs_and_a_learning_curve(trained: TrainedRun) -> None:
    assert {path.name for path in (trained.output / "checkpoints").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    }
    assert (trained.output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((trained.output / "tensorboard").rglob("events.out.tfevents.*"))
    with (trained.output / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    accuracy = [float(row["val/top1"]) for row in rows if row["val/top1"]]
    assert len(accuracy) == 8
    assert accuracy[-1] > accuracy[0]
    assert (trained.output / ".hydra" / "config.yaml").is_file()
    said = re.findall(r"epoch (\d+)/8: train/loss [\d.]+, train/top1 [\d.]+, val/loss", trained.log)
    assert said == [str(epoch) for epoch in range(1, 9)]


def test_a_checkpoint_knows_its_model_classes_and_protocol(trained: TrainedRun) -> None:
    model = mv.load_model(trained.checkpoint)
    assert model.class_names == tuple(sorted(motion.CLASSES))
    assert model.config.num_classes == len(motion.CLASSES)
    assert (model.protocol.clip_frames, model.protocol.stride, model.protocol.crop) == (8, 4, 48)
    assert not model.training


def test_only_the_order_of_the_frames_gives_the_class_away(trained: TrainedRun) -> None:
    """The trained model tells opposite motions apart; on shuffled frames, or on one, it has to guess."""
    model = mv.load_model(trained.checkpoint)
    splits = folder_splits(trained.data)
    views = list(ViewDataset(splits.val.videos, model.protocol))
    names = splits.class_names
    generator = torch.Generator().manual_seed(0)

    def accuracy(rearrange) -> tuple[float, float]:
        """Share of right videos; share of right ones among those taken for the class or its opposite."""
        right = opposite = 0
        for video in views:
            with torch.inference_mode():
                scores = model(rearrange(video.clips)).softmax(-1).mean(0)
            label = video.video.label
            other = names.index(OPPOSITE[names[label]])
            right += scores.argmax().item() == label
            opposite += (scores[label] > scores[other]).item()
        return right / len(views), opposite / len(views)

    in_order, directions = accuracy(lambda clips: clips)
    _, shuffled = accuracy(lambda clips: clips[:, :, torch.randperm(8, generator=generator)])
    single, _ = accuracy(lambda clips: clips[:, :, 3:4].expand(-1, -1, 8, -1, -1))
    reversed_right, _ = accuracy(lambda clips: clips.flip(2))
    assert in_order >= 0.7
    assert directions >= 0.85
    assert shuffled <= 0.68  # chance is 0.5
    assert single <= 0.3  # chance is 0.125
    assert reversed_right <= 0.2  # a clip played backwards is its opposite


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
    assert results["video_top1"] >= 0.7


def test_a_trained_model_names_the_motion(command: Command, trained: TrainedRun, tmp_path: Path) -> None:
    result = command(
        "predict",
        trained.data / "val",
        f"weights={trained.checkpoint}",
        "topk=3",
        "per_clip=true",
        "output=sub/answer.json",
    )
    assert result.code == 0, result.err
    assert "moving_left" in result.out
    assert "random" not in result.out
    videos = json.loads((tmp_path / "sub" / "answer.json").read_text())["videos"]
    assert len(videos) == 64
    right = [video["classes"][0] == Path(video["path"]).parent.name for video in videos]
    assert sum(right) >= 0.7 * 64
    for video in videos:
        assert video["scores"] == sorted(video["scores"], reverse=True)
        assert len(video["classes"]) == 3
        assert len(video["clips"]) == 5
        assert all(0 <= clip["start"] < clip["end"] for clip in video["clips"])
