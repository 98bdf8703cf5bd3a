"""mvit-data: every video is probed once, what is wrong is said, training and evaluation read the index."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command
from PIL import Image
from videos import write_numbered_video

from mvit_video.data import prepare as prepare_module
from mvit_video.data.index import LabelledVideo
from mvit_video.data.probe import PROBE, probe, settings
from mvit_video.data.table import Entry, FileInfo, Table, index_splits, read_table, write_table
from mvit_video.errors import DataError
from mvit_video.io.writing import sole_writer

BAD = ["cut.mp4", "empty.mp4", "text.webm"]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are probed."""
    names: list[str] = []

    def noted(path: str, *options: Any) -> FileInfo:
        names.append(Path(path).name)
        return probe(path, *options)

    monkeypatch.setattr(prepare_module, "probe", noted)
    return names


@pytest.fixture
def data(two_classes: Path, tmp_path: Path) -> Path:
    """Twelve good videos in two classes and two splits, five to mend, and a list that names one more."""
    root = tmp_path / "data"
    shutil.copytree(two_classes, root)
    cats = sorted((root / "cats").iterdir())
    shutil.copy(cats[0], root / "cats" / "copy.mp4")
    shutil.copy(cats[1], root / "dogs and birds" / "cat.mp4")
    (root / "cats" / "cut.mp4").write_bytes(cats[2].read_bytes()[:1000])
    (root / "cats" / "empty.mp4").touch()
    (root / "dogs and birds" / "text.webm").write_text("no video")
    videos = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
    names = {"cats": 0, "dogs and birds": 1}
    rows = [f"{path},{names[path.split('/')[0]]}" for path in [*videos, "cats/gone.mp4"]]
    (root / "train.csv").write_text("\n".join(rows[::2]))
    (root / "val.csv").write_text("\n".join(rows[1::2]))
    return root


def arguments(root: Path) -> list[str]:
    names = "data.class_names=[cats,dogs and birds]"
    return ["data=csv", f"data.train={root}/train.csv", f"data.val={root}/val.csv", names]


def prepare(command: Command, root: Path, *more: str) -> str:
    result = command("data", "prepare", *arguments(root), "num_workers=0", "hydra.run.dir=report", *more)
    assert result.code == 0, result.err
    return result.out


def problems(report: Path) -> set[tuple[str, str]]:
    with (report / "problems.csv").open(newline="") as file:
        return {(row["kind"], Path(row["path"]).name) for row in csv.DictReader(file)}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report_names_everything_that_is_wrong(
    command: Command, data: Path, tmp_path: Path, workers: int
) -> None:
    out = prepare(command, data, f"num_workers={workers}")
    found = problems(tmp_path / "report")
    bad = {name for kind, name in found if kind in ("missing", "corrupt")}
    assert bad == {"gone.mp4", "cut.mp4", "empty.mp4", "text.webm"}
    assert ("missing", "gone.mp4") in found
    twins = [{name for kind, name in found if kind == wanted} for wanted in ("duplicate", "label mismatch")]
    assert len(twins[0]) == 2
    assert len(twins[0] & {"0.mp4", "copy.mp4"}) == 1
    assert len(twins[0] & {"1.mp4", "cat.mp4"}) == 1
    assert twins[1] == twins[0] & {"1.mp4", "cat.mp4"}
    for reason in ("the file is empty", "no such file", "not a video file", "cut.mp4"):
        assert reason in out
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    counts = summary["splits"]
    assert sum(split["videos"] for split in counts.values()) == 14
    assert sum(split["corrupt"] for split in counts.values()) == 3
    assert sum(sum(splits.values()) for splits in summary["classes"].values()) == 14
    assert summary["codecs"] == {"h264": 8, "vp9": 6}
    assert summary["seconds"]["shortest"] == pytest.approx(1)
    assert (tmp_path / "report" / "durations.png").read_bytes()[:4] == b"\x89PNG"


def test_the_index_holds_the_info_of_each_file(command: Command, data: Path) -> None:
    prepare(command, data)
    rows = {row["id"]: row for row in pq.read_table(data / "index.parquet").to_pylist()}
    assert len(rows) == 18
    row = rows["cats/5.mp4"]
    assert (row["path"], row["label"], row["error"]) == ("cats/5.mp4", 0, None)
    assert (row["frames"], row["height"], row["width"], row["codec"]) == (17, 48, 64, "h264")
    assert (row["fps"], row["duration"]) == (pytest.approx(12), pytest.approx(17 / 12))
    assert row["size"] == (data / "cats" / "5.mp4").stat().st_size
    assert rows["cats/gone.mp4"]["error"] == "no such file"


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    file = write_numbered_video(tmp_path / "a.mp4", 60, options={"g": "30", "bf": "0"})
    assert probe(str(file)).error is None
    content = bytearray(file.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (content.index(b"moov") - start) * 45 // 100
    content[middle : middle + 400] = bytes(400)
    file.write_bytes(content)
    info = probe(str(file))
    assert info.error is not None
    assert "frame" in info.error
    assert info.frames == 60


def test_an_evaluation_reads_the_index(
    command: Command, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    prepare(command, data)
    moved = tmp_path / "moved"
    data.rename(moved)  # paths in it are relative
    line = ["data=index", f"data.path={moved}", f"weights={checkpoint}", "num_workers=0", "hydra.run.dir=run"]
    evaluated = command("eval", *line, "data.max_missing=0.5")
    assert evaluated.code == 0, evaluated.err
    assert not (tmp_path / "run" / "bad_videos.csv").exists()
    assert index_splits(moved, max_missing=0.5) == index_splits(moved / "index.parquet", max_missing=0.5)
    refused = command("eval", *line, "data.max_missing=0.1")
    assert refused.code == 1
    assert "videos can't be read" in refused.err
    assert "max_missing=0.1" in refused.err


def test_a_second_run_reads_only_what_changed(command: Command, data: Path, read: list[str]) -> None:
    prepare(command, data)
    assert len(read) == 17
    first = pq.read_table(data / "index.parquet")
    read.clear()
    prepare(command, data)
    assert sorted(read) == BAD  # which may have been mended otherwise
    assert pq.read_table(data / "index.parquet").equals(first)
    write_numbered_video(data / "cats" / "0.mp4", 9, height=48, width=64)
    shutil.copy(data / "cats" / "0.mp4", data / "cats" / "gone.mp4")
    (data / "cats" / "3.mp4").unlink()
    read.clear()
    prepare(command, data)
    assert sorted(read) == sorted(["0.mp4", "gone.mp4", *BAD])
    rows = {row["id"]: row for row in pq.read_table(data / "index.parquet").to_pylist()}
    assert rows["cats/0.mp4"]["frames"] == rows["cats/gone.mp4"]["frames"] == 9
    assert rows["cats/3.mp4"]["error"] == "no such file"


def num_done(place: Path) -> int:
    """Of an unfinished run, without an error."""
    file = place / "index.parquet.unfinished"
    return sum(entry.info.error is None for entry in read_table(file).entries) if file.exists() else 0


def test_a_killed_run_goes_on_where_it_was(
    command: Command, data: Path, tmp_path: Path, read: list[str]
) -> None:
    script = (
        "import sys, time, mvit_video.data.prepare as p; from mvit_video.cli.main import data as main\n"
        "probe = p.probe\n"
        "def slow(path, *more): time.sleep(0.1); return probe(path, *more)\n"
        "p.probe, p.SAVE_EVERY_S = slow, 0; sys.argv[0] = 'mvit-data'; main()"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", script, "prepare", *arguments(data), "num_workers=0"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and num_done(data) < 2:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    done = num_done(data)
    assert 2 <= done < 17
    assert not (data / "index.parquet").exists()
    assert f"{done} videos are done" in prepare(command, data)
    assert len(read) == 17 - done
    assert not (data / "index.parquet.unfinished").exists()
    assert len(pq.read_table(data / "index.parquet")) == 18


def test_a_process_that_dies_is_told_and_nothing_is_lost(
    command: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crashing(path: str, open_file: Callable[[str], Any]) -> FileInfo:
        with open_file(path) if path.endswith("cats/4.mp4") else nullcontext() as video:
            if video:
                os.kill(os.getpid(), signal.SIGKILL)
        return probe(path, open_file)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "probe", crashing)
        result = command("data", "prepare", *arguments(data), "num_workers=1")
    assert "was killed by SIGKILL while it read" in result.err
    assert "4.mp4" in result.err
    assert result.code == 1
    assert result.err.count("mvit-data: error") == 1
    done = num_done(data)
    assert done > 0
    assert f"{done} videos are done" in prepare(command, data)


def test_check_compares_with_the_disk(command: Command, two_classes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(two_classes, root)
    (root / "cats" / "notes.txt").touch()
    assert command("data", "prepare", f"data.root={root}", "num_workers=0").code == 0
    same = command("data", "check", f"data.root={root}")
    assert same.code == 0, same.err
    assert "agrees with the disk" in same.out
    (root / "cats" / "0.mp4").unlink()
    os.utime(root / "cats" / "1.mp4", (1, 1))
    shutil.copy(root / "cats" / "2.mp4", root / "cats" / "9.mp4")
    differs = command("data", "check", "data=index", f"data.path={root}", "hydra.run.dir=check")
    assert differs.code == 1
    assert "1 missing, 1 changed, 0 returned, 1 new" in differs.err
    with (tmp_path / "check" / "changes.csv").open(newline="") as file:
        rows = {(kind, Path(path).name) for kind, path in csv.reader(file)}
    assert rows == {("kind", "path"), ("missing", "0.mp4"), ("changed", "1.mp4"), ("new", "9.mp4")}
    assert command("data", "prepare", f"data.root={root}", "num_workers=0").code == 0
    assert command("data", "check", f"data.root={root}").code == 0


def test_files_that_no_list_names_are_counted_and_never_new(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "ucf"
    for name in ("v_YoYo_g08_c01", "v_YoYo_g01_c01", "v_YoYo_g02_c01"):
        (root / "UCF-101" / "YoYo").mkdir(parents=True, exist_ok=True)
        write_numbered_video(root / "UCF-101" / "YoYo" / f"{name}.avi", 4, codec="mpeg4", height=48, width=64)
    (root / "classInd.txt").write_text("1 YoYo\n")
    (root / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 1\n")
    (root / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    result = command("data", "prepare", "data=ucf101", f"data.root={root}", "num_workers=0")
    assert result.code == 0, result.err
    assert "1 files on disk aren't in the data set" in result.out
    assert command("data", "check", f"data.root={root}").code == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["prepare"], "data.root isn't set; give data.root=..."),
        (["prepare", "data=index", "data.path=x"], "data=index is what prepare makes"),
        (["prepare", "data=csv"], "data.train isn't set"),
        (["prepare", "data.root=12"], "12 does not exist"),
        (["check", "index=12"], "12 does not exist"),
        (["check", "data=index", "data.path=nowhere"], "nowhere does not exist"),
        (["check", "index=two.csv"], "two.csv is no index of mvit-data prepare"),
        (["prepair"], "unknown command 'prepair': prepare or check"),
        ([], "missing command: prepare or check"),
        (["prepare", "data.root=.", "num_workers=-1"], "num_workers is -1"),
    ],
)
def test_mistakes_end_with_one_line(command: Command, tmp_path: Path, line: list[str], message: str) -> None:
    (tmp_path / "two.csv").write_text("no Parquet")
    result = command("data", *line)
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1


def test_help(command: Command) -> None:
    assert "mvit-data prepare data=kinetics400" in command("data", "--help").out


def big_table(count: int) -> Table:
    info = FileInfo(1_000_000, 10**18, 300, 29.97, 10.01, 256, 340, "h264", "0" * 64)
    entries = [
        Entry(
            "train" if i % 10 else "val", LabelledVideo(f"/data/train/{i:06}.mp4", i % 400, f"{i:06}"), info
        )
        for i in range(count)
    ]
    return Table(entries, tuple(f"class {i}" for i in range(400)))


def test_of_an_index_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "index.parquet", big_table(20_000))
    read: list[list[str]] = []

    class Counting(pq.ParquetFile):  # type: ignore[misc]
        def read(self, columns: list[str]) -> pa.Table:
            read.append(columns)
            return super().read(columns=columns)

    monkeypatch.setattr(pq, "ParquetFile", Counting)
    splits = index_splits(tmp_path)
    assert read == [["split", "id", "path", "label", "error"]]
    assert (len(splits.train), len(splits.val)) == (18_000, 2_000)
    assert splits.train.videos[0] == LabelledVideo("/data/train/000001.mp4", 1, "000001")


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = [
        Entry(
            "train",
            LabelledVideo(str(tmp_path / "a.mp4"), 0, "a"),
            FileInfo(1, 2, 3, 4.5, 6.5, 7, 8, "av1", "f"),
        ),
        Entry("val", LabelledVideo("/elsewhere/b.mp4", 1, "b"), FileInfo(error="no such file")),
        Entry("test", LabelledVideo(str(tmp_path / "c" / "d.mp4"), None, "c"), FileInfo(5)),
    ]
    table = Table(entries, ("x", "y"), str(tmp_path), (str(tmp_path / "left.mp4"),))
    write_table(tmp_path / "index.parquet", table)
    assert read_table(tmp_path / "index.parquet") == table
    with pytest.raises(DataError, match="none of its 1 videos can be read"):
        index_splits(tmp_path)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "index.parquet"
    write_table(file, big_table(10))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"index.parquet is no index of mvit-data prepare, or damaged"):
        index_splits(file)
    other: dict[str, Any] = {"split": ["train"], "id": ["a"]}
    pq.write_table(pa.table(other), file)
    with pytest.raises(DataError, match=r"index.parquet is no index of mvit-data prepare"):
        index_splits(file)


# What goes on must be the same work


def info_of(place: Path) -> dict[str, FileInfo]:
    return {Path(entry.video.path).name: entry.info for entry in read_table(place / "index.parquet").entries}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A list of a film, a folder of frames and a picture."""
    root = tmp_path / "mixed"
    (root / "frames").mkdir(parents=True)
    write_numbered_video(root / "film.mp4", 6, height=48, width=64, fps=12)
    for number in range(6):
        Image.new("RGB", (64, 48)).save(root / "frames" / f"{number}.png")
    Image.new("RGB", (64, 48)).save(root / "picture.png")
    (root / "list.csv").write_text("film.mp4 0\nframes 0\npicture.png 1\n")
    return root


def prepare_mixed(root: Path) -> list[str]:
    return [
        "prepare",
        "data=csv",
        f"data.train={root}/list.csv",
        f"data.val={root}/list.csv",
        "num_workers=0",
    ]


def test_another_frame_rate_counts_for_folders_of_pictures(
    command: Command, mixed: Path, read: list[str]
) -> None:
    line = prepare_mixed(mixed)
    assert command("data", *line).code == 0
    assert info_of(mixed)["frames"].duration == pytest.approx(6 / 30)
    read.clear()
    again = command("data", *line, "frame_rate=12")
    assert "frame_rate 30.0 -> 12.0" in again.out
    assert sorted(read) == ["frames", "picture.png"]
    found = info_of(mixed)
    assert (found["frames"].fps, found["frames"].duration) == (12, pytest.approx(0.5))
    assert found["film.mp4"].duration == pytest.approx(0.5)


def test_an_index_cache_is_filled_though_the_index_knows_the_videos(
    command: Command, mixed: Path, read: list[str], tmp_path: Path
) -> None:
    for cache, expected in (("null", 3), (f"{tmp_path}/kept", 3), (f"{tmp_path}/kept", 0), ("null", 0)):
        read.clear()
        assert command("data", *prepare_mixed(mixed), f"index_cache={cache}").code == 0
        assert len(read) == expected


def test_an_index_of_another_version_is_told_or_read_anew(command: Command, mixed: Path) -> None:
    line = prepare_mixed(mixed)
    assert command("data", *line).code == 0
    table = read_table(mixed / "index.parquet")
    for key, old, expected in (("ffmpeg", "1.0", "film.mp4"), ("probe", 1, "nothing")):
        former = {**table.made_with, key: old}
        entries = [entry._replace(info=entry.info._replace(frames=99)) for entry in table.entries]
        write_table(mixed / "index.parquet", replace(table, entries=entries, made_with=former))
        again = command("data", *line)
        assert f"{key} {old} -> " in again.out
        kept = {name for name, info in info_of(mixed).items() if info.frames == 99}
        assert ("film.mp4" in kept) == (expected == "film.mp4")
        assert read_table(mixed / "index.parquet").made_with == table.made_with


def test_an_error_that_passed_is_seen_and_the_file_read_again(
    command: Command, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: str, *options: Any) -> FileInfo:
        info = probe(path, *options)
        return info._replace(sha256="", error="permission denied") if path.endswith("cats/0.mp4") else info

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "probe", forbidden)
        prepare(command, data)
    assert info_of(data)["0.mp4"].error == "permission denied"
    differs = command("data", "check", f"index={data}/index.parquet", "data=index", f"data.path={data}")
    assert differs.code == 1
    assert "1 returned" in differs.err
    prepare(command, data)
    assert info_of(data)["0.mp4"].error is None


def test_two_runs_on_one_index_are_refused_and_one_beside_it_is_not(command: Command, data: Path) -> None:
    with sole_writer(data / "index.parquet"):
        refused = command("data", "prepare", *arguments(data), "num_workers=0")
        assert refused.code == 1
        assert "index.parquet: another run is writing there" in refused.err
        prepare(command, data, f"index={data}/other.parquet")
    assert not (data / "index.parquet").exists()
    prepare(command, data)


def test_what_no_unfinished_run_has_left_is_kept(command: Command, data: Path) -> None:
    unfinished = data / "index.parquet.unfinished"
    unfinished.write_text("precious")
    prepare(command, data)
    assert (data / "index.parquet.unfinished.damaged").read_text() == "precious"
    others_index(unfinished, size=["a", "b"])
    content = unfinished.read_bytes()
    prepare(command, data)
    assert (data / "index.parquet.unfinished.damaged.1").read_bytes() == content
    (data / "precious.parquet").write_text("precious")
    refused = command("data", "prepare", *arguments(data), "num_workers=0", f"index={data}/precious.parquet")
    assert refused.code == 1
    assert (data / "precious.parquet").read_text() == "precious"


def test_an_index_is_a_file(command: Command, data: Path) -> None:
    os.mkfifo(data / "pipe")
    refused = command("data", "prepare", *arguments(data), "num_workers=0", f"index={data}/pipe")
    assert refused.code == 1
    assert "pipe is no file" in refused.err
    assert (data / "pipe").is_fifo()
    prepare(command, data, f"index={data}/cats")
    assert (data / "cats" / "index.parquet").is_file()


def test_an_unfinished_run_of_other_settings_is_not_gone_on_with(command: Command, mixed: Path) -> None:
    line = prepare_mixed(mixed)
    stat = (mixed / "film.mp4").stat()
    info = FileInfo(stat.st_size, stat.st_mtime_ns, 99, 1.0, 9.0, 4, 4, "h264", "0" * 64)
    entry = Entry("train", LabelledVideo(str(mixed / "film.mp4"), 0, "film.mp4"), info)
    for number, frames in ((1, 6), (PROBE, 99)):
        made_with = {**settings(30), "probe": number}
        write_table(mixed / "index.parquet.unfinished", Table([entry], ("0", "1"), made_with=made_with))
        assert command("data", *line).code == 0
        assert info_of(mixed)["film.mp4"].frames == frames
        (mixed / "index.parquet").unlink()


# Files from outside are data


def others_index(file: Path, **change: Any) -> None:
    """An index as another program might write it."""
    columns: dict[str, Any] = {
        "split": ["train", "val"],
        "id": ["a", "b"],
        "path": ["a.mp4", "b.mp4"],
        "label": [0, 1],
        "error": pa.array([None, None], pa.string()),
    }
    metadata: dict[str, Any] = {"class_names": ["x", "y"], "root": None, "unlisted": [], "made_with": {}}
    for key, value in change.items():
        (metadata if key in metadata else columns)[key] = value
    columns = {key: value for key, value in columns.items() if value is not None}
    metadata = {key: value for key, value in metadata.items() if value != "none"}
    table = pa.table(columns).replace_schema_metadata({b"mvit_video": json.dumps(metadata).encode()})
    pq.write_table(table, file)


@pytest.mark.parametrize(
    "change",
    [
        {"label": ["0", "1"]},
        {"label": [0.5, 1.0]},
        {"label": [True, False]},
        {"label": [0, 2]},
        {"label": [-1, 0]},
        {"label": [0, None]},
        {"path": ["a.mp4", None]},
        {"path": [1, 2]},
        {"path": ["", "b.mp4"]},
        {"path": ["a\0.mp4", "b.mp4"]},
        {"split": ["train", "dev"]},
        {"split": ["val", "val"]},
        {"split": ["train", None]},
        {"id": ["a", None]},
        {"id": [b"\xff", b"b"]},
        {"split": ["train", "train"], "id": ["a", "a"]},
        {"error": [1, 2]},
        {"error": None},
        {"split": None},
        {"class_names": "xy"},
        {"class_names": ["x", "x"]},
        {"class_names": ["x", ""]},
        {"class_names": [0, 1]},
        {"class_names": "none"},
        {"root": "none"},
        {"root": 1},
        {"unlisted": "none"},
        {"unlisted": [1]},
    ],
    ids=str,
)
def test_an_index_that_others_wrote_is_read_with_care(tmp_path: Path, change: dict[str, Any]) -> None:
    others_index(tmp_path / "i.parquet", **change)
    with pytest.raises(DataError, match=r"i\.parquet|no label|no videos found"):
        index_splits(tmp_path / "i.parquet")


NOT_UTF8 = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffb"))


@pytest.mark.parametrize(
    "change",
    [
        {"made_with": [1]},
        {"made_with": None},
        {"duration": [None, 1.0]},
        {"fps": [math.nan, 1.0]},
        {"size": [None, 1]},
        {"sha256": ["", None]},
        {"label": ["0", "1"]},
        {"id": NOT_UTF8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_jobs_on_an_index_of_others_end_with_one_line(
    command: Command, data: Path, change: dict[str, Any]
) -> None:
    info = {name: [0, 0] for name in ("size", "mtime_ns", "frames", "height", "width")}
    info |= {"fps": [1.0, 1.0], "duration": [1.0, 1.0], "codec": ["", ""], "sha256": ["", ""]}
    others_index(data / "index.parquet", **{**info, **change})
    before = (data / "index.parquet").read_bytes()
    jobs = (["prepare", *arguments(data), "num_workers=0"], ["check", f"index={data}"])
    for line in jobs:
        result = command("data", *line)
        assert (result.code, result.err.count("\n"), "Traceback" in result.err) == (1, 1, False)
    assert (data / "index.parquet").read_bytes() == before


def test_an_index_that_others_wrote_well_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "split=val"  # such a name isn't a column
    folder.mkdir()
    others_index(folder / "i.parquet", error=pa.nulls(2))
    splits = index_splits(folder / "i.parquet")
    assert splits.train.videos == (LabelledVideo(str(folder / "a.mp4"), 0, "a"),)


def test_pipes_and_devices_are_no_videos(command: Command, two_classes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(two_classes, root)
    os.mkfifo(root / "cats" / "pipe.mp4")
    (root / "cats" / "zero.mp4").symlink_to("/dev/zero")
    result = command("data", "prepare", f"data.root={root}", "num_workers=0", "hydra.run.dir=report")
    assert result.code == 0, result.err
    assert problems(tmp_path / "report") == {("corrupt", "pipe.mp4"), ("corrupt", "zero.mp4")}
    assert info_of(root)["zero.mp4"].error == "this is no regular file"


def test_names_do_nothing_on_a_terminal_or_in_a_spreadsheet(command: Command, tmp_path: Path) -> None:
    escape = "\x1b]0;owned\x07"
    for name in ("=1+2", f"red\x1b[31m{escape}"):
        for number in range(2):
            file = tmp_path / "data" / name / f"{escape}{number}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("no video")
    result = command("data", "prepare", "data.root=data", "num_workers=0", "hydra.run.dir=report")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out + result.err
    assert "\\x1b]0;owned" in result.out
    with (tmp_path / "report" / "problems.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
    assert any(cell.startswith("'=1+2") for cell in cells)
