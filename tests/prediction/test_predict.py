"""Prediction by the command and from Python, on files of many kinds."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Command
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.cli import predict as predict_module
from mvit_video.cli.arguments import split_arguments


def test_random_weights_are_said_to_be_random(command: Command, two_classes: Path, tmp_path: Path) -> None:
    result = command(
        "predict", two_classes / "cats" / "0.mp4", "model=mvitv2_nano_8x4", "num_workers=0", "output=a.json"
    )
    assert result.code == 0, result.err
    assert "random weights" in result.out
    assert json.loads((tmp_path / "a.json").read_text())["weights"] == "random"
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("with sound.mp4", {"audio_seconds": 3.0}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("hevc.mkv", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
        ("a=b, {c}'s.mp4", {}),
        ("square.mp4", {"height": 64, "width": 64}),
        ("upright.mp4", {"height": 96, "width": 48}),
    ],
)
def test_any_file_that_pyav_reads(
    command: Command, checkpoint: Path, tmp_path: Path, name: str, options: dict
) -> None:
    write_numbered_video(tmp_path / name, 20, **options)
    result = command("predict", name, f"weights={checkpoint}", "num_workers=0", "output=answer.json")
    assert result.code == 0, result.err
    (video,) = json.loads((tmp_path / "answer.json").read_text())["videos"]
    assert video["path"] == name
    assert video["error"] is None
    assert sum(video["scores"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 5, 300])
def test_any_length(checkpoint: Path, tmp_path: Path, num_frames: int) -> None:
    path = write_numbered_video(tmp_path / "v.mp4", num_frames, height=48, width=64)
    (prediction,) = mv.predict(path, checkpoint)
    assert prediction.error is None
    assert len(prediction.clips) == 5
    assert prediction.clips[-1].end <= num_frames / 25
    if num_frames == 300:
        starts = [clip.start for clip in prediction.clips]
        assert starts == sorted(set(starts))


def test_python_gives_what_the_command_gives(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command("predict", two_classes, f"weights={checkpoint}", "output=answer.json", "views=1x3_segment")
    told = json.loads((tmp_path / "answer.json").read_text())["videos"]
    model = mv.load_model(checkpoint)
    protocol = model.protocol
    predictions = mv.predict([two_classes], model, num_clips=2, num_crops=3, batch_size=5)
    assert model.protocol is protocol
    assert [p.path for p in predictions] == [video["path"] for video in told]
    assert len(predictions) == 12
    assert all(len(p.clips) == 2 for p in predictions)
    for prediction in predictions:
        assert math.fsum(prediction.scores) == pytest.approx(1, abs=1e-5)
        mean = sum(dict(zip(c.classes, c.scores, strict=True))["cats"] for c in prediction.clips) / 2
        assert dict(zip(prediction.classes, prediction.scores, strict=True))["cats"] == pytest.approx(mean)


def test_python_names_what_is_wrong(checkpoint: Path, two_classes: Path, tmp_path: Path) -> None:
    with pytest.raises(mv.DataError, match="gone"):
        mv.predict(tmp_path / "gone.mp4", checkpoint)
    with pytest.raises(mv.CheckpointError, match="no such file"):
        mv.predict(two_classes, tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match="topk"):
        mv.predict(two_classes, checkpoint, topk=0)
    with pytest.raises(ValueError, match="num_crops"):
        mv.predict(two_classes, checkpoint, num_crops=2)


def test_arguments_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x=1.mp4").touch()
    files, others = split_arguments(
        [
            "a.mp4",
            "-b.mp4",
            "topk=3",
            "--config-dir",
            "my/conf",
            "x=1.mp4",
            "-m",
            "folder",
            "weights=w.ckpt",
            "--cfg",
            "job",
        ]
    )
    assert files == ["a.mp4", "-b.mp4", "x=1.mp4", "folder"]
    assert others == ["topk=3", "--config-dir", "my/conf", "-m", "weights=w.ckpt", "--cfg", "job"]


def test_a_place_that_can_not_be_written_is_said(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    arguments = [two_classes / "cats" / "0.mp4", f"weights={checkpoint}", "num_workers=0"]
    for options in (
        ["window=1", "save=[srt]", "save_dir=file/saved"],
        ["explain=gradcam", "save_dir=file/saved"],
        ["window=1", "live=true", "output=file/live"],
        ["window=1", "output=file/a.csv"],
    ):
        result = command("predict", *arguments, *options)
        assert result.code == 1
        assert "mvit-predict: error: " in result.err
        assert "file/" in result.err
        assert "Traceback" not in result.err


def test_a_reader_that_has_had_enough_ends_it(two_classes: Path, checkpoint: Path) -> None:
    program = [sys.executable, "-m", "mvit_video.predict", str(two_classes), f"weights={checkpoint}"]
    with subprocess.Popen(
        [*program, "format=jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 141, told
    assert "Error" not in told
    assert "Traceback" not in told


def test_a_pipe_that_breaks_elsewhere_is_an_error(
    command: Command, two_classes: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(predict_module, "_predictions", broken)
    result = command("predict", two_classes, f"weights={checkpoint}", "format=jsonl")
    assert result.code == 1
    assert "mvit-predict: error: " in result.err
