"""Action detection by the commands, on films of moving things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from conftest import Command, error_line
from generate_actions import generate_actions
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.action_detection import ActionDetector, mean_average_precision
from mvit_video.action_detection.annotations import KeyFrame, action_splits, read_boxes
from mvit_video.action_detection.checkpoint import (
    load_action_detector,
    save_action_detector,
)
from mvit_video.action_detection.clips import ActionAugment, ActionClips, collate, frame_numbers
from mvit_video.data.decode import open_video
from mvit_video.data.pixels import finish_clips
from mvit_video.detection import save_detector
from mvit_video.errors import CheckpointError
from mvit_video.weights import METADATA_KEY, load_weights

SMALL = ("model.embed_dim=8", "model.stages=[1,1]", "model.num_frames=4", "model.crop_size=32")
SMALL += ("augment.short_side_range=[32,36]", "num_workers=0", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    generate_actions(root, train=8, val=4, size=48)
    return root


def test_films_are_trained_on_measured_and_watched(films: Path, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "train" / "checkpoints" / "best.ckpt"
    result = command(
        "train",
        "experiment=motion_actions",
        f"data.root={films}",
        "trainer.max_epochs=1",
        "batch_size=4",
        f"hydra.run.dir={tmp_path / 'train'}",
        *SMALL,
    )
    assert result.code == 0, result.err
    assert (run.parents[1] / "batch.png").stat().st_size > 1000
    detector = load_action_detector(run)
    assert detector.class_names == tuple((films / "classes.txt").read_text().split())
    assert detector.roi_stride == (4.0, 4.0)  # of a last stage that isn't strided

    folder = tmp_path / "eval"
    arguments = ("data=motion_actions", f"data.root={films}", "num_workers=0", f"hydra.run.dir={folder}")
    result = command("eval", f"weights={run}", "batch_size=3", *arguments)
    assert result.code == 0, result.err
    rows = read_boxes(folder / "detections.csv")
    assert len(rows) == 4 * 3 * 8
    found = json.loads((folder / "results.json").read_text())["evaluators"]
    truth = read_boxes(films / "val.csv")
    mean, _ = mean_average_precision(truth, rows, class_ids=range(1, 9), order="file")
    assert found["PySlowFast"]["mAP"] == pytest.approx(mean, abs=0.1)  # the file has four digits: ties
    assert (folder / "report.html").stat().st_size > 1000
    assert not (folder / "unfinished").exists()

    film = films / "videos" / "val_0001.mp4"
    persons = (f"persons={films / 'val.csv'}", "min_score=0.01")
    result = command("predict", str(film), f"weights={run}", *persons, "output=p.csv", "save=[srt,video]")
    assert result.code == 0, result.err
    own = {(*row[2:6], row.class_id): row.score for row in rows if row.video == "val_0001"}
    said = {(*row[2:6], row.class_id): row.score for row in read_boxes(tmp_path / "p.csv")}
    assert said == pytest.approx(own, abs=2e-4)
    with av.open(str(tmp_path / "saved" / "val_0001.annotated.mp4")) as copy, open_video(film) as source:
        assert sum(1 for _ in copy.decode(video=0)) == source.num_frames
    again = command("predict", str(film), f"weights={run}", *persons, "output=p.csv", "save=[srt,video]")
    assert "resuming: 1 of them" in again.err
    line = error_line(command("predict", str(film), f"weights={run}", *persons, "output=p.csv"), "predict")
    assert "save" in line
    (tmp_path / "mine.csv").write_text("years of work")
    arguments = (str(film), f"weights={run}", *persons, "output=mine.csv", "resume=false")
    assert "mine.csv" in error_line(command("predict", *arguments), "predict")
    assert (tmp_path / "mine.csv").read_text() == "years of work"
    result = command("predict", str(film), f"weights={run}", *persons, "output=p.json")
    people = json.loads((tmp_path / "p.json").read_text())
    assert [one["person"] for one in people] == [0, 1, 2]
    assert all(list(one["scores"].values()) == sorted(one["scores"].values())[::-1] for one in people)


def small_detector(**overrides: Any) -> ActionDetector:
    small: dict[str, Any] = {"embed_dim": 8, "stages": (1, 1), "crop_size": 32, "num_frames": 4}
    return mv.create_action_detector("mvitv2_nano_8x4", **(small | overrides))


def test_an_evaluation_is_resumed(films: Path, command: Command, tmp_path: Path) -> None:
    folder, weights = tmp_path / "eval", tmp_path / "detector.pyth"
    save_action_detector(small_detector(num_classes=8), weights)
    arguments = ("data=motion_actions", "num_workers=0", f"weights={weights}", f"hydra.run.dir={folder}")
    root = shutil.copytree(films, tmp_path / "films")
    whole = root / "videos" / "val_0003.mp4"
    content = whole.read_bytes()
    whole.write_bytes(content[:200])
    error = error_line(command("eval", *arguments, f"data.root={root}"), "eval")
    assert "val_0003.mp4" in error
    whole.write_bytes(content)
    result = command("eval", *arguments, f"data.root={root}", f"resume={folder}")
    assert result.code == 0, result.err
    assert "3 key frames have been scored before" in result.err + result.out
    assert len(read_boxes(folder / "detections.csv")) == 4 * 3 * 8


@pytest.mark.parametrize(
    ("name", "arguments", "key"),
    [
        ("train", ("task=action_detection", "augment=action", "data=motion_actions"), "model=action_"),
        ("train", ("experiment=motion_actions", "augment=light"), "augment"),
        ("train", ("experiment=motion_actions", "mixing=mixup_cutmix"), "mixing"),
        ("train", ("experiment=motion_actions", "data.val_boxes=other.csv"), "other.csv"),
        ("predict", ("film.mp4", "task=action_detection", "weights=none.ckpt", "save=[png]"), "save"),
        ("predict", ("film.mp4", "task=action_detection", "model=action_mvitv2_nano_8x4"), "weights="),
        ("export", ("task=action_detection", "weights=none.ckpt"), "exported"),
        (
            "predict",
            ("film.mp4", "task=action_detection", "weights=none.ckpt", "live=true", "save=[srt]"),
            "live",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(
    films: Path, command: Command, name: str, arguments: tuple[str, ...], key: str
) -> None:
    root = (f"data.root={films}",) if name == "train" else ()
    assert key in error_line(command(name, *arguments, *root), name)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Arguments: an action detector, and a detector of people; both know nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    save_action_detector(small_detector(num_classes=3), folder / "actions.pyth")
    small: dict[str, Any] = {"stages": (1, 1, 1, 1), "kv_strides": (), "embed_dim": 8, "channels": 8}
    small |= {"box_channels": 16, "min_size": 48, "max_size": 64, "box_score_thresh": 0.0}
    people = mv.create_detector("mask_rcnn_mvitv2_nano", num_classes=2, box_detections_per_img=4, **small)
    people.class_names, people.category_ids = ("person", "dog"), (1, 18)
    save_detector(people, folder / "people.pyth")
    return f"weights={folder / 'actions.pyth'}", str(folder / "people.pyth")


def test_people_are_found_and_followed(command: Command, tmp_path: Path, weights: tuple[str, str]) -> None:
    film = write_numbered_video(tmp_path / "film.mp4", 45, fps=15, height=48, width=64)
    arguments = (str(film), weights[0], f"persons={weights[1]}", "min_person_score=0", "stride=0.5")
    result = command("predict", *arguments, "output=p.json", "save=[video,vtt]", "decoder.index_cache=null")
    assert result.code == 0, result.err
    people = json.loads((tmp_path / "p.json").read_text())
    assert sorted({one["second"] for one in people}) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert all(0 < one["person_score"] < 1 and len(one["scores"]) == 3 for one in people)
    assert len({(one["second"], one["person"]) for one in people}) == len(people)
    with av.open(str(tmp_path / "saved" / "film.annotated.mp4")) as copy:
        assert sum(1 for _ in copy.decode(video=0)) == 45

    again = command("predict", *arguments, "live=true", "format=jsonl")
    assert again.code == 0, again.err
    lines = [json.loads(line) for line in again.out.splitlines()]
    spec = load_action_detector(weights[0].removeprefix("weights=")).protocol
    middle = spec.clip_frames * spec.stride / spec.target_fps / 2
    for line in lines:
        assert (line["second"] - middle) / 0.5 == pytest.approx(round((line["second"] - middle) / 0.5))
        assert 0 < line["person_score"] < 1
    assert len({line["second"] for line in lines}) == 6


def test_without_a_detector_of_people_it_is_said_how_to_get_one(
    command: Command, tmp_path: Path, weights: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = error_line(command("predict", "film.mp4", weights[0]), "predict")
    assert "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth" in line
    assert str(tmp_path) in line
    own = f"persons={weights[0].removeprefix('weights=')}"
    assert "fasterrcnn_resnet50_fpn" in error_line(command("predict", "film.mp4", weights[0], own), "predict")


@pytest.mark.parametrize("videos", [None, "videos"])
def test_a_root_may_be_relative(films: Path, monkeypatch: pytest.MonkeyPatch, videos: str | None) -> None:
    monkeypatch.chdir(films.parent)
    boxes = {"train_boxes": "train.csv", "val_boxes": "val.csv", "class_names": "classes.txt"}
    relative, absolute = (action_splits(root, videos=videos, **boxes) for root in (films.name, films))
    assert len(relative.train.key_frames) == len(absolute.train.key_frames) > 0


def test_clips_do_not_depend_on_who_makes_them(films: Path) -> None:
    splits = action_splits(films, train_boxes="train.csv", val_boxes="val.csv", class_names="classes.txt")
    spec = mv.ClipSpec(clip_frames=4, stride=4, short_side=48, crop=32)
    clips = ActionClips(splits.train.key_frames, spec, splits.num_classes, "train", seed=3)
    one, again, other = clips[0, 2], clips[0, 2], clips[1, 2]
    assert torch.equal(one.clips, again.clips)
    assert torch.equal(one.boxes, again.boxes)
    assert not torch.equal(one.boxes, other.boxes)
    assert one.clips.shape == (1, 3, 4, 32, 32)
    augment = ActionAugment(colour_jitter=0.4, lighting=0.1)
    varied = {"augment": augment, "seed": 3}
    clips, pending = (
        ActionClips(splits.train.key_frames, spec, splits.num_classes, "train", **varied, pending=pending)
        for pending in (False, True)
    )
    batches = [collate([of[0, 2], of[1, 2]]) for of in (clips, pending)]
    assert isinstance(batches[1].clips, list)
    assert torch.equal(batches[0].clips, finish_clips(batches[1].clips))
    assert one.targets.sum(1).tolist() == [1, 1, 1]
    batch = collate([one, other])
    assert batch.boxes[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    uncut = ActionClips(splits.val.key_frames, spec, splits.num_classes, "test")[0]
    assert uncut.clips.shape == (1, 3, 4, 48, 48)


def test_frames_of_thirty_a_second_are_shown_whatever_the_rate(tmp_path: Path) -> None:
    """Second 2 of films of 15 and 60 frames a second."""
    spec = mv.ClipSpec(clip_frames=4, stride=8, short_side=64, crop=64)
    for fps, expected in ((15, [22, 26, 30, 34]), (60, [88, 104, 120, 136])):
        path = write_numbered_video(tmp_path / f"{fps}.mp4", 4 * fps, fps=fps, height=64, width=80)
        frame = KeyFrame("film", str(path), 902, 900, ((0, 0, 1, 1),), ((1,),))
        with open_video(path) as video:
            assert frame_numbers(frame, video.times, spec) == expected


def test_a_second_that_is_not_shown_is_told(tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "film.mp4", 12, fps=12, height=48, width=64)
    frame = KeyFrame("film", str(path), 902, 0, ((0, 0, 1, 1),), ((1,),))
    (sample,) = [ActionClips([frame], mv.ClipSpec(), 2, "test")[0]]
    assert "start_second" in sample.bad[0].reason


def test_a_checkpoint_is_believed_only_if_it_fits(tmp_path: Path) -> None:
    detector = small_detector(num_classes=2, roi_size=3, roi_stride=5)
    file = tmp_path / "detector.pyth"
    save_action_detector(detector, file)
    again = load_action_detector(file)
    assert again.roi_options == detector.roi_options
    assert torch.equal(again.head.projection.weight, detector.head.projection.weight)
    assert load_weights(small_detector(num_classes=2), file).fresh == ()
    assert len(load_weights(small_detector(num_classes=5), file, head="new").fresh) == 2
    with pytest.raises(CheckpointError, match="action_detection"):
        mv.load_model(file)
    content = torch.load(file, weights_only=True)
    fine = {"roi_size": 3, "roi_stride": 1e-3, "aligned": True}
    for change in ({"task": "classification"}, {"roi": {"roi_size": 10**9}}, {"roi": None}, {"roi": fine}):
        torch.save({**content, METADATA_KEY: {**content[METADATA_KEY], **change}}, file)
        with pytest.raises(CheckpointError, match="detector"):
            load_action_detector(file)
