"""A small detector through mvit-train, mvit-eval and mvit-predict."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, Result, error_line
from make_shapes import generate
from PIL import Image
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.detection import save_detector
from mvit_video.detection.coco import coco_splits
from mvit_video.detection.training import DetectorTraining
from mvit_video.errors import CheckpointError

SMALL = [
    "model.stages=[1,1,1,1]",
    "model.kv_strides=[]",
    "model.embed_dim=8",
    "model.channels=8",
    "model.box_channels=16",
    "model.min_size=48",
    "model.max_size=64",
    "model.box_score_thresh=0.0",
    "model.drop_path=0.1",
    "augment.short_sides=[48]",
    "batch_size=2",
    "num_workers=0",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "logger=csv",
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    generate(root, "train", 6)
    generate(root, "val", 3)
    (root / "train" / "00003.png").write_bytes(b"no image")
    return root


@pytest.fixture
def train(command: Command, shapes: Path) -> Callable[..., Result]:
    def run(folder: str, *more: str) -> Result:
        own = [f"data.root={shapes}", f"hydra.run.dir={folder}", "max_bad_videos=1"]
        return command("train", "experiment=shapes", *SMALL, *own, *more)

    return run


@pytest.fixture(scope="module")
def detector_file(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector whose boxes and masks are something."""
    torch.manual_seed(0)
    detector = mv.create_detector(
        "mask_rcnn_mvitv2_nano",
        num_classes=3,
        stages=(1, 1, 1, 1),
        kv_strides=(),
        embed_dim=8,
        channels=8,
        box_channels=16,
        min_size=48,
        max_size=64,
        box_score_thresh=0.0,
        box_detections_per_img=5,
    )
    coco = coco_splits(str(shapes)).train
    detector.class_names, detector.category_ids = coco.class_names, coco.category_ids
    path = tmp_path_factory.mktemp("detector") / "detector.ckpt"
    save_detector(detector, path)
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return mv.load_detector(path).state_dict()


def test_a_run_that_was_killed_ends_with_the_same_weights(
    train: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an average of the weights, and an image that can't be read."""
    assert train("whole", "ema=0.9").code == 0
    whole = tmp_path / "whole"
    assert (whole / "batch.png").stat().st_size > 1000
    with (whole / "bad_videos.csv").open() as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["00003.png"]
    detector = mv.load_detector(whole / "checkpoints" / "best.ckpt")
    assert detector.class_names == ("triangle", "star", "disc")
    assert detector.category_ids == (1, 2, 3)
    (metrics,) = whole.glob("**/metrics.csv")
    assert "val/mask_AP50" in metrics.read_text().splitlines()[0]

    learn = DetectorTraining.training_losses

    def killed(self: DetectorTraining, batch: Any, batch_index: int) -> Any:
        if self.global_step == 4:
            raise MemoryError("killed")
        return learn(self, batch, batch_index)

    monkeypatch.setattr(DetectorTraining, "training_losses", killed)
    with pytest.raises(MemoryError):
        train("parts", "ema=0.9", "save_every_n_steps=1")
    monkeypatch.setattr(DetectorTraining, "training_losses", learn)
    assert train("parts", "ema=0.9", "ckpt_path=last").code == 0
    ours, theirs = (weights_of(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("whole", "parts"))
    assert all(value.equal(theirs[name]) for name, value in ours.items())


def test_a_trained_detector_starts_another(
    train: Callable[..., Result], detector_file: Path, tmp_path: Path
) -> None:
    fast = ["trainer.max_steps=1", "trainer.limit_val_batches=0", f"weights={detector_file}"]
    assert train("again", *fast, "optim.lr=0", "freeze=backbone").code == 0
    before, after = (weights_of(f) for f in (detector_file, tmp_path / "again" / "checkpoints" / "last.ckpt"))
    assert all(value.equal(after[name]) for name, value in before.items())
    line = error_line(train("other", *fast, "model.channels=16"), "train")
    assert "backbone.fpn" in line
    assert "another model" in line


def evaluate(command: Command, shapes: Path, weights: Path, *more: str) -> Result:
    return command("eval", f"weights={weights}", "data=shapes", f"data.root={shapes}", "num_workers=0", *more)


def test_an_evaluation_goes_on_where_it_was_killed(
    command: Command, shapes: Path, detector_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(command, shapes, detector_file, "hydra.run.dir=whole")
    assert whole.code == 0, whole.err
    assert "AP50" in whole.out
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["images"] == 3
    assert set(results["per_class"]) == {"triangle", "star", "disc"}
    assert 0 <= results["box"]["AP50"] <= 1
    assert results["mask"]["APL"] is None  # there is no large object
    page = (tmp_path / "whole" / "report.html").read_text()
    assert page.count("data:image/png") >= 2
    assert not (tmp_path / "whole" / "unfinished").exists()

    looked = mv.detection.Detector.forward  # type: ignore[attr-defined]
    seen = []

    def killed(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise MemoryError("killed")
        return looked(self, *arguments, **options)

    monkeypatch.setattr("mvit_video.detection.detector.Detector.forward", killed)
    with pytest.raises(MemoryError):
        evaluate(command, shapes, detector_file, "hydra.run.dir=parts")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # which the error has left
    line = error_line(evaluate(command, shapes, detector_file, "split=train", "resume=parts"), "eval")
    assert "images" in line
    seen.clear()
    os.utime(sorted((shapes / "val").rglob("*.png"))[0])  # which was replaced
    result = evaluate(command, shapes, detector_file, "resume=parts")
    assert result.code == 0
    assert "1 results don't count" in result.out
    assert len(seen) == 2
    first, second = (
        json.loads((tmp_path / run / "detections.json").read_text()) for run in ("whole", "parts")
    )
    assert first == second


def test_an_unreadable_image_counts(command: Command, shapes: Path, detector_file: Path) -> None:
    line = error_line(evaluate(command, shapes, detector_file, "split=train"), "eval")
    assert "00003.png" in line
    assert evaluate(command, shapes, detector_file, "split=train", "max_bad_videos=1").code == 0


def test_pictures_and_videos_are_looked_at(
    command: Command,
    shapes: Path,
    detector_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mvit_video.detection.recognizer.LIKELY", 0.0)  # an untrained detector is never sure
    folder = tmp_path / "in"
    folder.mkdir()
    picture = Image.open(shapes / "val" / "00000.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(folder / "turned.jpg", exif=exif)
    (folder / "broken.png").write_bytes(b"no image")
    write_numbered_video(folder / "video.mp4", 6, codec="libx264", height=48, width=64, fps=6)
    arguments = [str(folder), f"weights={detector_file}", "stride=0.5"]
    files = {}
    for suffix in ("json", "csv", "jsonl", "parquet"):
        result = command("predict", *arguments, f"output=out.{suffix}", "save=[png,video]")
        assert result.code == 0, result.err
        assert "broken.png" in result.err
        files[suffix] = tmp_path / f"out.{suffix}"
    rows = json.loads(files["json"].read_text())
    assert {Path(row["file_name"]).name for row in rows} == {"turned.jpg", "video.mp4"}
    assert {row["frame"] for row in rows} == {None, 0, 3}
    assert {row["category_id"] for row in rows} <= {1, 2, 3}
    assert all((row["track"] is None) == (row["frame"] is None) for row in rows)
    sizes = {Path(row["file_name"]).name: tuple(row["segmentation"]["size"]) for row in rows}
    assert sizes == {"turned.jpg": (128, 96), "video.mp4": (48, 64)}
    table = pq.read_table(files["parquet"]).to_pylist()
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert len(table) == len(lines) == len(files["jsonl"].read_text().splitlines()) == len(rows) + 1
    assert [row["track"] for row in table if not row["error"]] == [row["track"] for row in rows]
    assert [row["score"] for row in table if row["score"]] == pytest.approx([row["score"] for row in rows])
    assert Image.open(tmp_path / "saved" / "turned.png").size == (96, 128)
    with av.open(tmp_path / "saved" / "video.mp4") as video:
        assert len(list(video.decode(video=0))) == 2

    line = error_line(command("predict", *arguments, "output=out.json", "min_score=0.5"), "predict")
    assert "min_score" in line
    one = [str(folder / "turned.jpg"), *arguments[1:], "save=[png,video]"]
    line = error_line(command("predict", str(folder / "video.mp4"), *one, f"save_dir={folder}"), "predict")
    assert "video.mp4" in line  # which a drawn copy would take the place of
    (tmp_path / "mine.csv").write_text("years of work")
    refused = command("predict", *one, "output=mine.csv", "resume=false")
    assert "mine.csv" in error_line(refused, "predict")
    assert (tmp_path / "mine.csv").read_text() == "years of work"
    for suffix in ("csv", "json"):  # a document has the files of its own run alone
        assert command("predict", *one, f"output=out.{suffix}").code == 0
        assert ("video.mp4" in files[suffix].read_text()) == (suffix == "csv")
    assert "resuming" in command("predict", *arguments, "output=out.json", "save=[png,video]").err


@pytest.mark.parametrize("option", ["window=1", "explain=gradcam", "save=[srt]", "engine=ray", "live=true"])
def test_options_of_classification_are_named(command: Command, detector_file: Path, option: str) -> None:
    line = error_line(command("predict", "a.png", f"weights={detector_file}", option), "predict")
    assert option.partition("=")[0] in line


def test_python_draws_what_it_found(shapes: Path, detector_file: Path) -> None:
    recognizer = mv.ObjectRecognizer(detector_file)
    (found,) = recognizer.predict(shapes / "val" / "00000.png")
    assert found.error is None
    assert found.masks.shape == (len(found.boxes), 96, 128)
    assert found.class_names == ("triangle", "star", "disc")
    drawn = found.draw(min_score=0.0)
    assert drawn.shape == found.image.shape
    assert not drawn.equal(found.image)
    assert found.draw(min_score=1.1).equal(found.image)
    with pytest.raises(CheckpointError, match=r"task"):
        mv.load_model(detector_file)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "classification"},
        {"config": {}},
        {"config": 5},
        {"class_names": ["a"]},
        {"category_ids": ["a", "b", "c"]},
        {"category_ids": [1, 2, 1]},
        {"category_ids": [1, 2, 2**70]},
        {"backbone": {"stages": (10**9,)}},
        {"backbone": {"embed_dim": 10**9}},
        {"field": {"channels": 10**12}},
        {"field": {"min_size": "large"}},
        {"field": {"min_size": 2**16}},
        {"field": {"rpn_post_nms_top_n_test": 0.5}},
        {"field": {"cascade": 7}},
    ],
    ids=str,
)
def test_checkpoints_that_lie_are_refused(
    detector_file: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    checkpoint = torch.load(detector_file, weights_only=True)
    metadata = checkpoint["mvit_video"]
    config = metadata["config"]
    config["backbone"] |= change.pop("backbone", {})
    config |= change.pop("field", {})
    checkpoint["mvit_video"] = metadata | change
    path = tmp_path / "lying.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"lying\.ckpt"):
        mv.load_detector(path)


@pytest.mark.parametrize(
    "part",
    ["proposal_generator.head.cls_logits", "roi_heads.box_predictor.0.bbox_pred", "roi_heads.mask_predictor"],
)
def test_what_is_not_finite_is_no_answer(shapes: Path, detector_file: Path, part: str) -> None:
    detector = mv.load_detector(detector_file)
    for parameter in detector.get_submodule(part).parameters():
        parameter.data.fill_(torch.inf)
    (found,) = mv.ObjectRecognizer(detector).predict(shapes / "val" / "00001.png")
    assert "NaN or infinite" in (found.error or "")


def test_masks_are_told_as_other_tools_read_them(shapes: Path, detector_file: Path) -> None:
    from pycocotools import mask as coco_mask

    (found,) = mv.ObjectRecognizer(detector_file).predict(shapes / "val" / "00001.png")
    rows = found.rows((1, 2, 3))
    decoded = np.stack([coco_mask.decode(row["segmentation"]) for row in rows]).astype(bool)
    assert (decoded == found.masks.numpy()).all()
    x, y, width, height = rows[0]["bbox"]
    assert [x, y, x + width, y + height] == pytest.approx(found.boxes[0].tolist(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_backbone_is_exported_with_equal_maps(
    command: Command, detector_file: Path, tmp_path: Path, suffix: str
) -> None:
    size = ["image_size=[64,96]", f"output=maps.{suffix}"]
    result = command("export", f"weights={detector_file}", *size, "tolerance=1e-4")
    assert result.code == 0, result.err
    assert (tmp_path / f"maps.{suffix}").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("option", "said"),
    [("part=detector", "part=backbone"), ("image_size=[64,70]", "32"), ("output=maps.bin", ".onnx")],
)
def test_what_cannot_be_exported_is_said(
    command: Command, detector_file: Path, option: str, said: str
) -> None:
    arguments = [f"weights={detector_file}", "output=maps.pt2", "image_size=[64,96]"]
    assert said in error_line(command("export", *arguments, option), "export")


def test_data_are_checked(command: Command, shapes: Path, tmp_path: Path) -> None:
    line = error_line(command("data", "check", "data=shapes", f"data.root={shapes}"), "data")
    assert "00003.png" in line
    (problems,) = tmp_path.glob("outputs/**/problems.csv")
    assert len(problems.read_text().splitlines()) == 2


def two_processes(folder: Path, *program: str) -> list[int]:
    """What the ranks of one job return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *program],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    return [process.wait(timeout=600) for process in ranks]


@pytest.mark.slow
def test_processes_share_an_evaluation(
    command: Command, shapes: Path, detector_file: Path, tmp_path: Path
) -> None:
    """Two processes find and measure what one does."""
    data = ["data=shapes", f"data.root={shapes}", "num_workers=0"]
    assert evaluate(command, shapes, detector_file, "hydra.run.dir=one").code == 0
    two = ["-m", "mvit_video.eval", f"weights={detector_file}", *data, "hydra.run.dir=two"]
    assert two_processes(tmp_path, *two) == [0, 0]
    one, both = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert one == both


KILLED = """
from mvit_video.cli.main import train
from mvit_video.detection.training import DetectorTraining

learn = DetectorTraining.training_losses


def killed(self, batch, index):
    if self.global_step == 2:
        raise MemoryError("killed")
    return learn(self, batch, index)


DetectorTraining.training_losses = killed
train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_share_a_training(command: Command, shapes: Path, tmp_path: Path, strategy: str) -> None:
    """Killed and resumed, two processes end with the same weights; their validation is that of one."""
    job = ["experiment=shapes", *SMALL, f"data.root={shapes}", "max_bad_videos=1", "save_every_n_steps=1"]
    job += ["trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}", "batch_size=1"]
    assert two_processes(tmp_path, "-m", "mvit_video.train", *job, "hydra.run.dir=whole") == [0, 0]
    assert 0 not in two_processes(tmp_path, "-c", KILLED, *job, "hydra.run.dir=parts")
    again = ["hydra.run.dir=parts", "ckpt_path=last"]
    assert two_processes(tmp_path, "-m", "mvit_video.train", *job, *again) == [0, 0]
    ours, theirs = (tmp_path / run / "checkpoints" / "last.ckpt" for run in ("whole", "parts"))
    resumed = weights_of(theirs)
    assert all(value.equal(resumed[name]) for name, value in weights_of(ours).items())

    assert evaluate(command, shapes, ours, "hydra.run.dir=one").code == 0
    (metrics,) = (tmp_path / "whole").glob("**/metrics.csv")
    with metrics.open() as file:
        validated = [row["val/box_AP"] for row in csv.DictReader(file) if row["val/box_AP"]]
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert float(validated[-1]) == pytest.approx(results["box"]["AP"], abs=1e-6)
