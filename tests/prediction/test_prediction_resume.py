"""What a run finds from before: it goes on with the same work, and deletes nothing that it didn't make."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command, error_line
from test_writer import rows_in
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.prediction.prediction import Prediction
from mvit_video.prediction.writer import PredictionWriter

GROWING = ["a.jsonl", "a.csv", "a.parquet"]


def videos_in(folder: Path, count: int) -> list[str]:
    for number in range(count):
        (folder / f"{number}.mp4").write_bytes(b"x" * (number + 1))
    return [str(folder / f"{number}.mp4") for number in range(count)]


def write(path: Path, videos: list[str], *, resume: bool = True, name: str = "cats", **settings: str) -> int:
    """Predicts nothing but ``name``; returns how many videos were left to do."""
    format = path.suffix.removeprefix(".")
    with PredictionWriter(path, format=format, settings=settings, resume=resume) as writer:
        todo = writer.remaining(videos)
        for video in todo:
            writer.add(Prediction(video, (name,), (1.0,)))
    return len(todo)


def classes_in(path: Path) -> dict[str, str]:
    rows = rows_in(path)
    found = {Path(row["path"]).name: row["class"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("name", GROWING)
def test_a_video_that_was_replaced_is_predicted_again(tmp_path: Path, name: str) -> None:
    videos = videos_in(tmp_path, 4)
    assert write(tmp_path / name, videos) == 4
    Path(videos[1]).write_bytes(b"another, longer one")
    os.utime(videos[2], ns=(1, 1))
    Path(videos[3]).unlink()  # its prediction stays
    assert write(tmp_path / name, videos, name="dogs") == 2
    expected = {"0.mp4": "cats", "1.mp4": "dogs", "2.mp4": "dogs", "3.mp4": "cats"}
    assert classes_in(tmp_path / name) == expected
    assert write(tmp_path / name, videos) == 0


@pytest.mark.parametrize("name", GROWING)
def test_errors_are_tried_again(tmp_path: Path, name: str) -> None:
    videos = videos_in(tmp_path, 2)
    with PredictionWriter(tmp_path / name, format=name[2:], settings={}) as writer:
        writer.remaining(videos)
        writer.add(Prediction(videos[0], error="no permission"))
        writer.add(Prediction(videos[1], ("cats",), (1.0,)))
    assert write(tmp_path / name, videos) == 1
    assert classes_in(tmp_path / name) == {"0.mp4": "cats", "1.mp4": "cats"}


@pytest.mark.parametrize(
    "change",
    [
        "weights",
        "precision=bf16",
        "per_clip=true",
        "decoder.backend=auto",
        "views.num_clips=2",
        "topk=1",
        "window=1",
        "explain=gradcam",
    ],
)
def test_other_work_is_refused(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path, change: str
) -> None:
    weights = shutil.copy(checkpoint, tmp_path / "w.ckpt")
    arguments = [two_classes / "cats" / "0.mp4", f"weights={weights}", "output=a.csv", "precision=fp32"]
    assert command("predict", *arguments).code == 0
    before = (tmp_path / "a.csv").read_bytes()
    if change == "weights":
        content = torch.load(weights, weights_only=True)
        next(iter(content["state_dict"].values())).add_(1)
        torch.save(content, weights)
        result = command("predict", *arguments)
    else:
        kept = arguments[:3] if change.startswith("precision") else arguments
        result = command("predict", *kept, change)
    named = error_line(result, "predict")
    assert change.partition("=")[0].split(".")[-1] in named
    assert "resume=false" in named
    assert (tmp_path / "a.csv").read_bytes() == before


def test_the_same_weights_elsewhere_go_on(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copy(checkpoint, tmp_path / "other.ckpt")
    for weights in (checkpoint, "other.ckpt"):
        result = command("predict", two_classes / "cats" / "0.mp4", f"weights={weights}", "output=a.csv")
        assert result.code == 0, result.err
    assert "0 predictions" in result.err


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    (path / "part-00000.parquet").write_text("not ours either")


def make_file(path: Path) -> None:
    path.write_text("years of work\n")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("make", [make_folder, make_file])
def test_what_others_made_stays(
    command: Command,
    two_classes: Path,
    checkpoint: Path,
    tmp_path: Path,
    make: Callable[[Path], None],
    format: str,
    resume: bool,
) -> None:
    make(tmp_path / "precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [
        two_classes / "cats" / "0.mp4",
        f"weights={checkpoint}",
        "output=precious",
        f"format={format}",
    ]
    assert "precious" in error_line(command("predict", *arguments, f"resume={resume}"), "predict")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_new_start_leaves_what_others_put_beside_the_parts(tmp_path: Path) -> None:
    videos = videos_in(tmp_path, 2)
    write(tmp_path / "a.parquet", videos)
    (tmp_path / "a.parquet" / "notes.txt").write_text("mine")
    assert write(tmp_path / "a.parquet", videos, resume=False, topk="1") == 2
    assert sorted(p.name for p in (tmp_path / "a.parquet").iterdir()) == ["notes.txt", "part-00000.parquet"]


def test_a_part_that_is_gone_costs_no_other(tmp_path: Path) -> None:
    videos = videos_in(tmp_path, 3)
    for number in range(1, 4):
        write(tmp_path / "a.parquet", videos[:number])
    (tmp_path / "a.parquet" / "part-00000.parquet").unlink()
    assert write(tmp_path / "a.parquet", videos, name="dogs") == 1
    assert classes_in(tmp_path / "a.parquet") == {"0.mp4": "dogs", "1.mp4": "cats", "2.mp4": "cats"}


@pytest.mark.parametrize("name", GROWING)
def test_one_run_at_a_time(tmp_path: Path, name: str) -> None:
    videos = videos_in(tmp_path, 2)
    with PredictionWriter(tmp_path / name, format=name[2:], settings={}) as first:
        with pytest.raises(mv.ConfigError, match="another run"):
            write(tmp_path / name, videos)
        first.remaining(videos)
        first.add(Prediction(videos[0], ("cats",), (1.0,)))
    assert write(tmp_path / name, videos) == 1


def damage_middle(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines[:2], b"\0" * 40 + b"\n", *lines[3:]])


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda content: content[: len(content) * 4 // 9], damage_middle],
    ids=["empty", "torn", "zeros"],
)
def test_what_a_power_loss_left_is_set_aside(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    videos = videos_in(tmp_path, 6)
    write(tmp_path / name, videos[:3])
    write(tmp_path / name, videos)
    damaged = tmp_path / name
    damaged = sorted(damaged.iterdir())[0] if damaged.is_dir() else damaged
    content = damage(damaged.read_bytes())
    damaged.write_bytes(content)
    journal = tmp_path / f"{name}.videos.jsonl"
    journal.write_bytes(journal.read_bytes() + b'\0\0\0{\n{"path": 3}\n')
    todo = write(tmp_path / name, videos)
    assert 0 < todo <= 6
    assert classes_in(tmp_path / name) == {f"{number}.mp4": "cats" for number in range(6)}
    kept = [path for path in tmp_path.rglob("*") if ".damaged" in path.name or ".torn" in path.name]
    assert kept or not content
    assert write(tmp_path / name, videos) == 0


def limited(*arguments: str, cwd: Path, size: int | None) -> subprocess.CompletedProcess[str]:
    """Runs mvit-predict where files can't grow beyond ``size`` bytes, as on a full disk."""

    def limit() -> None:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    program = [sys.executable, "-m", "mvit_video.predict", *arguments]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=300, preexec_fn=limit)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_full_disk_names_the_file_and_loses_nothing(
    two_classes: Path, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    arguments = [str(two_classes), f"weights={checkpoint}", f"output={name}", "per_clip=true"]
    done = limited(*arguments, cwd=tmp_path, size=5000)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert name in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob(".unfinished*"))
    done = limited(*arguments, cwd=tmp_path, size=None)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert len({row["path"] for row in rows_in(tmp_path / name)}) == 12


def test_a_document_replaces_one_of_before(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for number in (0, 1):
        video = two_classes / "cats" / f"{number}.mp4"
        assert command("predict", video, f"weights={checkpoint}", "output=a.json").code == 0
        told = json.loads((tmp_path / "a.json").read_text())
        assert [Path(v["path"]).name for v in told["videos"]] == [f"{number}.mp4"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_run_that_is_asked_to_end_writes_what_it_has(checkpoint: Path, tmp_path: Path) -> None:
    """Parquet keeps predictions for a minute, but a service manager's SIGTERM doesn't cost them."""
    (tmp_path / "videos").mkdir()
    first = write_numbered_video(tmp_path / "videos" / "000.mp4", 30, height=48, width=64)
    for number in range(1, 400):
        os.link(first, tmp_path / "videos" / f"{number:03}.mp4")
    program = [sys.executable, "-m", "mvit_video.predict", "videos", f"weights={checkpoint}"]
    program += ["window=1", "save=[srt]", "output=a.parquet"]
    with subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and len(list((tmp_path / "saved").glob("*.srt"))) < 5:
            time.sleep(0.02)
        run.terminate()
        _, err = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert 4 <= len({row["path"] for row in rows_in(tmp_path / "a.parquet")}) < 400
    assert not [path for path in tmp_path.rglob("*") if ".unfinished" in path.name or path.suffix == ".lock"]


def test_what_another_version_left_is_refused(tmp_path: Path) -> None:
    videos = videos_in(tmp_path, 1)
    write(tmp_path / "a.csv", videos)
    (tmp_path / "a.csv.run.json").write_text('{"weights": "best.ckpt"}')
    with pytest.raises(mv.ConfigError, match="resume=false"):
        write(tmp_path / "a.csv", videos, weights="best.ckpt", topk="5")
    assert classes_in(tmp_path / "a.csv") == {"0.mp4": "cats"}
