"""Prediction by the command and from Python, on files of many kinds."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Command, error_line
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.cli import predict as predict_module
from mvit_video.cli.arguments import split_files, split_options
from mvit_video.prediction.inputs import expand
from mvit_video.prediction.saving import output_names
from mvit_video.prediction.timeline import Timeline


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
def test_any_file_that_pyav_reads(predict: Command, tmp_path: Path, name: str, options: dict) -> None:
    write_numbered_video(tmp_path / name, 20, **options)
    result = predict(name, "num_workers=0", "output=answer.json")
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
    predict: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    predict(two_classes, "output=answer.json", "views=1x3_segment")
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
    options, rest = split_options(
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
            too_long_for_a_name := f"videos=[{','.join(['a.mp4'] * 100)}]",
        ]
    )
    assert options == ["--config-dir", "my/conf", "-m", "--cfg", "job"]
    overrides = ["topk=3", "weights=w.ckpt", too_long_for_a_name]
    assert split_files(rest) == (["a.mp4", "-b.mp4", "x=1.mp4", "folder"], overrides)


def test_a_place_that_can_not_be_written_is_said(predict: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = [two_classes / "cats" / "0.mp4", "num_workers=0"]
    for options in (
        ["window=1", "save=[srt]", "save_dir=file/saved"],
        ["explain=gradcam", "save_dir=file/saved"],
        ["window=1", "live=true", "output=file/live"],
        ["window=1", "output=file/a.csv"],
    ):
        result = predict(*arguments, *options)
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
    predict: Command, two_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(predict_module, "_predict_here", broken)
    result = predict(two_classes, "format=jsonl")
    assert result.code == 1
    assert "mvit-predict: error: " in result.err


@pytest.fixture
def overflowing_weights(checkpoint: Path, tmp_path: Path) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.head.projection.weight"].fill_(3e38)  # whose products overflow
    torch.save(content, tmp_path / "huge.ckpt")
    return tmp_path / "huge.ckpt"


@pytest.mark.parametrize(
    "options", [["output=a.json"], ["output=a.jsonl"], ["format=csv"], ["window=1", "format=jsonl"]]
)
def test_scores_that_are_not_finite_are_errors(
    command: Command, two_classes: Path, overflowing_weights: Path, tmp_path: Path, options: list[str]
) -> None:
    result = command("predict", two_classes / "cats", f"weights={overflowing_weights}", *options)
    assert "NaN" in error_line(result, "predict")
    text = (tmp_path / options[0].partition("=")[2]).read_text() if options[0][:3] == "out" else result.out
    assert text.count("NaN or infinite scores") == 6
    if not text.startswith("path,"):
        for document in [text] if options == ["output=a.json"] else text.splitlines():
            json.loads(document, parse_constant=pytest.fail)
    assert "nan," not in text


def test_scores_that_are_not_finite_in_python(two_classes: Path, overflowing_weights: Path) -> None:
    recognizer = mv.Recognizer(overflowing_weights)
    clips = torch.zeros(2, 3, 8, 64, 64)
    assert [(p.classes, "NaN" in str(p.error)) for p in recognizer(clips)] == [((), True)] * 2
    with pytest.raises(mv.VideoError, match="NaN"):
        list(recognizer.watch(two_classes / "cats" / "0.mp4", length=1, stride=1))
    with pytest.raises(mv.VideoError, match="NaN"):
        recognizer.explain(two_classes / "cats" / "0.mp4")


LINKS = ["d1/x.mp4", "d2/x.mp4"]


@pytest.mark.parametrize(
    ("videos", "names"),
    [
        (LINKS, ["d1/x", "d2/x"]),
        (["a.mp4", "a.webm", "a.mp4.avi", "b.mp4"], ["a.mp4", "a.webm", "a.mp4.avi", "b"]),
        (["a.mp4"], ["a"]),
        (["in/a.mp4", "a.mp4"], ["in/a", "a"]),
    ],
)
def test_each_video_saves_to_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, videos: list[str], names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    for link in ("d1", "d2"):
        (tmp_path / link).symlink_to("real")
    assert [str(path) for path in output_names(videos).values()] == names


def test_names_that_are_too_long_for_a_suffix(predict: Command, two_classes: Path, tmp_path: Path) -> None:
    source = two_classes / "cats" / "0.mp4"
    for letter in "ab":
        shutil.copy(source, tmp_path / f"{'x' * 245}{letter}.mp4")
    shutil.copy(source, tmp_path / "~x.mp4")
    arguments = ["~x.mp4", "~y.mp4", "@list.txt", "window=1", "save=[srt,png]"]
    (tmp_path / "list.txt").write_text("\n".join(sorted(p.name for p in tmp_path.glob("*.mp4"))))
    assert "~y.mp4 does not exist" in error_line(predict(*arguments), "predict")
    result = predict(*arguments[:1], *arguments[2:])
    assert result.code == 0, result.err
    assert "3 predictions, 0 errors" in result.err
    assert str(tmp_path / "saved") in result.err
    assert len(list((tmp_path / "saved").iterdir())) == 6


@pytest.mark.parametrize("suffix", [".ts", ".mp4", ".webm"])
def test_a_video_on_standard_input_is_no_list(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = write_numbered_video(tmp_path / f"v{suffix}", 40, height=48, width=64, codec=codec)
    with path.open("rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(file))
        with pytest.raises(mv.DataError, match="window="):
            expand("-")


def test_an_address_needs_a_window_and_keeps_its_secrets(predict: Command, tmp_path: Path) -> None:
    arguments = ["http://me:secret@127.0.0.1:9/live", "output=a.csv"]
    assert "window=" in error_line(predict(*arguments), "predict")
    result = predict(*arguments, "window=1", "save=[srt]", "resume=false")
    assert "127.0.0.1:9/live" in error_line(result, "predict")
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in written + result.err + result.out


def test_errors_are_counted_and_shown(predict: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    result = predict(two_classes / "cats", "broken.mp4")
    assert result.code == 0
    assert "7 predictions, 1 error" in result.err
    assert "1 of 7 videos failed, the first: broken.mp4" in result.err


def test_names_do_nothing_on_a_terminal_or_in_a_spreadsheet(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["mvit_video"]["class_names"] = ["=cmd()\x1b[2J", "-1+1\n\n9\n00:00:00,000 --> 00:09:00,000\nx"]
    torch.save(content, tmp_path / "w.ckpt")
    shutil.copy(two_classes / "cats" / "5.mp4", tmp_path / "=1+1\x1b]0;x\x07.mp4")
    arguments = ["=1+1\x1b]0;x\x07.mp4", "weights=w.ckpt", "window=0.5", "save=[srt,vtt,png]"]
    shown = command("predict", *arguments, "output=a.csv")
    assert shown.code == 0, shown.err
    assert "\x1b" not in shown.out + shown.err
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert not [cell for row in rows for cell in row.values() if cell.startswith(tuple("=+-@"))]
    for subtitles in (tmp_path / "saved").glob("*.srt"):
        blocks = subtitles.read_text().rstrip("\n").split("\n\n")
        assert [len(block.splitlines()) for block in blocks] == [3] * len(blocks)
    live = command("predict", *arguments[:3], "live=true")
    assert live.code == 0, live.err
    assert "\x1b" not in live.out + live.err


@pytest.mark.parametrize("values", [{"smoothing": math.nan}, {"smoothing": -1.0}, {"smoothing": math.inf}])
def test_smoothing_is_a_length_of_time(values: dict) -> None:
    with pytest.raises(mv.ConfigError, match="smoothing"):
        Timeline("a", ("x",), [(0.0, 1.0)], torch.ones(1, 1), 1.0).smoothed(values["smoothing"])


@pytest.mark.parametrize("min_score", [math.nan, -0.1, 1.1])
def test_min_score_is_a_score(min_score: float) -> None:
    with pytest.raises(mv.ConfigError, match="min_score"):
        Timeline("a", ("x",), [(0.0, 1.0)], torch.ones(1, 1), 1.0).segments(min_score)


def test_the_module_does_not_hide_the_function() -> None:
    from mvit_video.prediction import render

    assert callable(mv.predict)
    assert callable(render.annotate_video)


@pytest.mark.parametrize(
    "options", [["format=csv"], pytest.param(["window=1", "live=true"], marks=pytest.mark.slow)]
)
def test_a_locale_without_the_letters(
    two_classes: Path, checkpoint: Path, tmp_path: Path, options: list
) -> None:
    shutil.copy(two_classes / "cats" / "0.mp4", tmp_path / "\u8996\u983b ü.mp4")
    program = [sys.executable, "-m", "mvit_video.predict", "\u8996\u983b ü.mp4", f"weights={checkpoint}"]
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*program, *options], cwd=tmp_path, env=latin, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    if options == ["format=csv"]:
        assert "\u8996\u983b ü.mp4,video" in done.stdout.decode("utf-8")
