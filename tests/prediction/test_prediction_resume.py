"""What a run finds from before: it goes on with the same work, and deletes nothing that it didn't make."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, error_line
from test_writer import rows_in
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.io import fingerprint as fingerprint_module
from mvit_video.io import journal as journal_module
from mvit_video.prediction import writer as writer_module
from mvit_video.prediction.prediction import Prediction
from mvit_video.prediction.writer import open_output, rows_of_files

GROWING = ["a.jsonl", "a.csv", "a.parquet"]


def videos_in(folder: Path, count: int) -> list[str]:
    for number in range(count):
        (folder / f"{number}.mp4").write_bytes(b"x" * (number + 1))
    return [str(folder / f"{number}.mp4") for number in range(count)]


def write(path: Path, videos: list[str], *, resume: bool = True, name: str = "cats", **settings: str) -> int:
    """Predicts nothing but ``name``; returns how many videos were left to do."""
    format = path.suffix.removeprefix(".")
    with open_output(path, videos, format=format, settings=settings, resume=resume) as writer:
        for video in writer.todo:
            writer.add(Prediction(video, (name,), (1.0,)))
    return len(writer.todo)


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
    with open_output(tmp_path / name, videos, format=name[2:], settings={}) as writer:
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
    free = ["decoder.index_cache=cache", "decoder.max_pixels=100000"]
    for options in ([f"weights={checkpoint}"], ["weights=other.ckpt", *free]):
        result = command("predict", two_classes / "cats" / "0.mp4", "output=a.csv", *options)
        assert result.code == 0, result.err
    assert "0 predictions" in result.err


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    (path / "part-00000.parquet").write_text("not ours either")


def make_file(path: Path) -> None:
    path.write_text("years of work\n")


@pytest.mark.parametrize("resume", ["true", "false"])
@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("make", [make_folder, make_file])
def test_what_others_made_stays(
    predict: Command,
    two_classes: Path,
    tmp_path: Path,
    make: Callable[[Path], None],
    format: str,
    resume: bool,
) -> None:
    make(tmp_path / "precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [two_classes / "cats" / "0.mp4", "output=precious", f"format={format}", f"resume={resume}"]
    assert "precious" in error_line(predict(*arguments), "predict")
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
    assert write(tmp_path / "a.parquet", videos) == 0  # the journal has its predictions
    assert classes_in(tmp_path / "a.parquet") == {f"{number}.mp4": "cats" for number in range(3)}


@pytest.mark.parametrize("name", GROWING)
def test_one_run_at_a_time(tmp_path: Path, name: str) -> None:
    videos = videos_in(tmp_path, 2)
    (tmp_path / "link").symlink_to(tmp_path / name)
    with open_output(tmp_path / name, videos, format=name[2:], settings={}) as first:
        for path in (tmp_path / name, tmp_path / "link"):
            with (
                pytest.raises(mv.ConfigError, match="another run"),
                open_output(path, videos, format=name[2:], settings={}),
            ):
                pass
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
@pytest.mark.parametrize("of", ["output", "journal", "both"])
def test_what_a_power_loss_left_is_set_aside(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], of: str
) -> None:
    videos = videos_in(tmp_path, 6)
    write(tmp_path / name, videos[:3])
    write(tmp_path / name, videos)
    output, journal = tmp_path / name, tmp_path / f"{name}.videos.jsonl"
    output = sorted(output.iterdir())[0] if output.is_dir() else output
    whole = output.read_bytes()
    for file in {"output": [output], "journal": [journal], "both": [output, journal]}[of]:
        file.write_bytes(damage(file.read_bytes()))
    left = output.read_bytes()
    journal.write_bytes(journal.read_bytes() + b'\0\0\0{\n{"path": 3}\n{"crc32": 1, "stamp": {}}\n[]\n')
    todo = write(tmp_path / name, videos)
    assert todo == 0 if of == "output" else 0 < todo <= 6
    assert classes_in(tmp_path / name) == {f"{number}.mp4": "cats" for number in range(6)}
    aside = [path.read_bytes() for path in tmp_path.rglob("*.damaged")]
    is_known = {"output": whole.startswith(left) and name != "a.parquet", "journal": name == "a.parquet"}
    assert left in aside or not left or is_known.get(of)
    assert write(tmp_path / name, videos) == 0


def write_until(moment: int, *arguments: Any, **settings: Any) -> bool:
    """``write`` in a process that is killed before its ``moment``-th step; False where it ends before."""
    pid = os.fork()
    if pid == 0:
        try:
            calls = iter(range(moment))

            def dying(call: Callable[..., object]) -> Callable[..., object]:
                def counted(*args: object, **kwargs: object) -> object:
                    if next(calls, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(*args, **kwargs)

                return counted

            for module in (writer_module, journal_module, fingerprint_module):
                for what in {"append", "replacing", "set_aside", "write_json"} & vars(module).keys():
                    setattr(module, what, dying(getattr(module, what)))
            Path.unlink = dying(Path.unlink)  # type: ignore[method-assign]
            write(*arguments, **settings)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WTERMSIG(status) or os.WEXITSTATUS(status) == 0
    return bool(os.WTERMSIG(status))


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_a_kill_at_any_moment_loses_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_CLIPS_PER_PART", 2)
    videos, journal = videos_in(tmp_path, 5), tmp_path / f"{name}.videos.jsonl"
    most, moment = 0, 1
    while write_until(moment, tmp_path / name, videos, protocol="5x1"):
        kept = len(set(re.findall(r"\d.mp4", journal.read_text()))) if journal.exists() else 0
        assert kept >= most - 1 or (tmp_path / "a.json").exists()
        most, moment = max(most, kept), moment + 1
        os.utime(videos[moment % 5], ns=(moment, moment))  # one to do again
    assert write(tmp_path / name, videos, protocol="5x1") in (0, 5)  # a document that is whole begins anew
    assert classes_in(tmp_path / name) == {f"{number}.mp4": "cats" for number in range(5)}
    assert moment > 5


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet"])
def test_a_new_start_that_is_killed_mixes_nothing(tmp_path: Path, name: str) -> None:
    videos = videos_in(tmp_path, 2)
    for moment in range(1, 9):
        output = tmp_path / str(moment) / name
        write_until(7, output, videos, protocol="old")
        write_until(moment, output, videos, protocol="new", name="dogs", resume=False)
        with contextlib.suppress(mv.ConfigError):  # the old run's still
            write(output, videos, protocol="new", name="dogs")
            assert set(classes_in(output).values()) == {"dogs"}


@pytest.mark.parametrize("name", ["link", "fifo", "."])
@pytest.mark.parametrize("live", ["format=csv", "live=true"])
def test_a_device_is_no_output(
    predict: Command, two_classes: Path, tmp_path: Path, name: str, live: str
) -> None:
    (tmp_path / "link").symlink_to(os.devnull)
    os.mkfifo(tmp_path / "fifo")
    before = set(tmp_path.iterdir())
    video = two_classes / "cats" / "0.mp4"
    result = predict(video, f"output={name}", "window=1", live)
    assert str((tmp_path / name).resolve()) in error_line(result, "predict")
    assert set(tmp_path.iterdir()) == before


def test_what_is_seen_live_goes_behind_what_was_seen_so(
    predict: Command, two_classes: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of\nwork")
    arguments = [two_classes / "cats" / "0.mp4", "window=1", "live=true"]
    refused = predict(*arguments, "output=thesis.txt", "resume=false")
    assert "thesis.txt" in error_line(refused, "predict")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["years of\nwork"]
    for _ in range(2):
        assert predict(*arguments, "output=a.jsonl").code == 0
    assert "topk" in error_line(predict(*arguments, "output=a.jsonl", "topk=1"), "predict")
    first, second = (tmp_path / "a.jsonl").read_text().splitlines()
    assert first == second
    assert predict(*arguments, "output=a.jsonl", "topk=1", "resume=false").code == 0
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(json.loads(line)["classes"]) == 1


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_full_disk_names_the_file_and_loses_nothing(
    predict: Command, two_classes: Path, tmp_path: Path, name: str
) -> None:
    """Here files can't grow beyond some bytes."""
    arguments = [two_classes, f"output={name}", "per_clip=true"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        result = predict(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert name in error_line(result, "predict")
    assert not list(tmp_path.glob(".unfinished*"))
    result = predict(*arguments)
    assert result.code == 0, result.err
    assert "resuming" in result.err
    assert len({row["path"] for row in rows_in(tmp_path / name)}) == 12


def test_a_document_replaces_one_of_before(predict: Command, two_classes: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        video = two_classes / "cats" / f"{number}.mp4"
        assert predict(video, "output=a.json").code == 0
        told = json.loads((tmp_path / "a.json").read_text())
        assert [Path(v["path"]).name for v in told["videos"]] == [f"{number}.mp4"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_run_that_is_asked_to_end_writes_what_it_has(checkpoint: Path, tmp_path: Path) -> None:
    """Parquet keeps predictions for a minute, but a service manager's SIGTERM doesn't cost them."""
    (tmp_path / "videos").mkdir()
    first = write_numbered_video(tmp_path / "videos" / "000.mp4", 30, height=48, width=64)
    for number in range(1, 100):
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
    assert 4 <= len({row["path"] for row in rows_in(tmp_path / "a.parquet")}) < 100
    assert not [path for path in tmp_path.rglob("*") if ".unfinished" in path.name or path.suffix == ".lock"]


@pytest.mark.parametrize("left", [None, "", "{", "[1]"])
def test_a_journal_of_unknown_settings_does_not_count(tmp_path: Path, left: str | None) -> None:
    videos = videos_in(tmp_path, 2)
    with (
        contextlib.suppress(MemoryError),
        open_output(tmp_path / "a.json", videos, format="json", settings={}) as out,
    ):
        out.add(Prediction(videos[0], ("cats",), (1.0,)))
        raise MemoryError
    run_file = tmp_path / "a.json.run.json"
    run_file.unlink() if left is None else run_file.write_text(left)
    assert write(tmp_path / "a.json", videos, name="dogs", topk="1", protocol="5x1") == 2
    assert set(classes_in(tmp_path / "a.json").values()) == {"dogs"}
    assert (tmp_path / "a.json.videos.jsonl.former").exists()


def test_what_another_version_left_is_refused(tmp_path: Path) -> None:
    videos = videos_in(tmp_path, 1)
    write(tmp_path / "a.csv", videos)
    (tmp_path / "a.csv.run.json").write_text('{"weights": "best.ckpt"}')
    with pytest.raises(mv.ConfigError, match=r"version.*resume=false"):
        write(tmp_path / "a.csv", videos, weights="best.ckpt")
    assert classes_in(tmp_path / "a.csv") == {"0.mp4": "cats"}


def look_at(
    path: Path, files: list[str], *, dies_in: str = "", replaces: bool = False, **options: Any
) -> list[str]:
    """Two rows of each file, the second after a kill in ``dies_in``; returns which files were left to do."""

    def write(target: Path, rows: Iterator[dict[str, Any]]) -> None:
        target.write_text("".join(f"{row['file']} {row['row']} {row['made']}\n" for row in rows))

    options = {"settings": {"topk": 1}, "resume": True, "made": "first"} | options
    made = options.pop("made")
    with rows_of_files(path, files, write=write, replaces=replaces, **options) as rows:
        for file in rows.todo:
            for row in (0, 1):
                rows.add(file, [{"file": Path(file).name, "row": row, "made": made}])
                if file.endswith(dies_in or "nothing"):
                    raise MemoryError("killed")
            rows.finish(file)
    return [Path(file).name for file in rows.todo]


@pytest.mark.parametrize("replaces", [False, True])
def test_rows_of_files_are_taken_up_and_mixed_with_nothing(tmp_path: Path, replaces: bool) -> None:
    path, files = tmp_path / "a.csv", [str(tmp_path / f"{number}.mp4") for number in range(4)]
    for file in files:
        Path(file).write_text(file)
    journal_file = tmp_path / "a.csv.objects.jsonl"
    journal_file.write_text("somebody's")
    with pytest.raises(MemoryError):
        look_at(path, files[:3], dies_in="1.mp4", replaces=replaces)
    assert not path.exists()
    assert (tmp_path / "a.csv.objects.jsonl.former").read_text() == "somebody's"
    assert look_at(path, files[:3], made="second", replaces=replaces) == ["1.mp4", "2.mp4"]
    expected = ["0.mp4 first", "1.mp4 second", "2.mp4 second"]
    assert path.read_text().splitlines() == [f"{n[:5]} {row}{n[5:]}" for n in expected for row in (0, 1)]

    Path(files[0]).write_text("another")
    Path(files[1]).unlink()  # its rows stay
    assert look_at(path, [*files[:2], files[3]], made="third", replaces=replaces) == ["0.mp4", "3.mp4"]
    found = set(path.read_text().splitlines()[::2])
    assert found == {"0.mp4 0 third", "1.mp4 0 second", "3.mp4 0 third"} | (
        set() if replaces else {"2.mp4 0 second"}
    )
    with pytest.raises(mv.ConfigError, match="topk 1 -> 2"):
        look_at(path, files, settings={"topk": 2})
    assert look_at(path, files[2:], settings={"topk": 2}, resume=False) == ["2.mp4", "3.mp4"]
    assert set(path.read_text().split()[::3]) == {"2.mp4", "3.mp4"}
    (tmp_path / "a.csv.run.json").unlink()
    with pytest.raises(mv.ConfigError, match="hasn't written it"):
        look_at(path, files, resume=False)
