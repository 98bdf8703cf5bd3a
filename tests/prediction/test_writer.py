"""Inputs and outputs of mvit-predict: what is found, what is written, and what a second run does."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Command
from videos import write_numbered_video

import mvit_video as mv
from mvit_video.prediction.inputs import expand
from mvit_video.prediction.prediction import Prediction
from mvit_video.prediction.writer import open_output


@pytest.fixture
def videos(two_classes: Path, tmp_path: Path) -> Path:
    """Four good videos in nested folders, and a broken one."""
    root = tmp_path / "videos"
    shutil.copytree(two_classes, root / "deep" / "er")
    for path in sorted(root.rglob("*.*"))[2:6] + sorted(root.rglob("*.*"))[8:]:
        path.unlink()
    (root / "broken.mp4").write_text("no video")
    return root


def test_inputs_of_every_kind(videos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = expand("videos")
    assert len(found) == 5
    assert expand(["videos/**/*.webm"]) == [name for name in found if name.endswith(".webm")]
    assert expand("videos/d*") == [name for name in found if "deep" in name]
    (tmp_path / "list.txt").write_text("# mine\nvideos/broken.mp4\n\n  gone.mp4\nvideos/deep\n")
    listed = ["videos/broken.mp4", "gone.mp4", *found[1:]]
    assert expand("list.txt") == listed
    assert expand("@list.txt") == listed
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(listed)))
    assert expand(["videos/broken.mp4", "-"]) == listed  # each once
    for argument, reason in (
        ("no/*.mp4", "matches no file"),
        ("@no.txt", "list no.txt"),
        ("gone.mp4", "not exist"),
    ):
        with pytest.raises(mv.DataError, match=reason):
            expand(argument)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.json"])
def test_formats_tell_the_same(
    predict: Command, videos: Path, checkpoint: Path, tmp_path: Path, name: str
) -> None:
    result = predict(videos, f"output={name}", "per_clip=true", "topk=1")
    assert result.code == 0, result.err
    expected = {p.path: p for p in mv.predict([videos], checkpoint, topk=1, batch_size=3)}
    rows = rows_in(tmp_path / name)
    assert {row["path"] for row in rows} == set(expected)
    for row in rows:
        prediction = expected[row["path"]]
        if row["error"]:
            assert row["error"] == prediction.error
        elif row["part"] == "video":
            assert row["class"] == prediction.classes[0]
            assert float(row["score"]) == pytest.approx(prediction.scores[0], abs=1e-5)
        else:
            clip = next(c for c in prediction.clips if c.start == pytest.approx(float(row["start"])))
            assert row["class"] == clip.classes[0]
            assert float(row["end"]) == pytest.approx(clip.end)
    assert sum(row["part"] == "clip" for row in rows) == 4 * 5


def rows_in(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    found = json.loads(text)["videos"] if path.suffix == ".json" else map(json.loads, text.splitlines())
    rows = []
    for video in found:
        if video["error"]:
            rows.append({"path": video["path"], "part": "video", "error": video["error"]})
        for part in ({"part": "video"} | video, *({"part": "clip"} | clip for clip in video["clips"])):
            for name, score in zip(part["classes"], part["scores"], strict=True):
                row = {key: part.get(key) for key in ("part", "start", "end", "error")}
                rows.append(row | {"path": video["path"], "class": name, "score": score})
    return rows


def whole_videos(path: Path) -> list[dict]:
    return [row for row in rows_in(path) if row["part"] == "video"]


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_lines_on_standard_output_are_nothing_else(predict: Command, videos: Path, format: str) -> None:
    result = predict(videos, f"format={format}")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    if format == "jsonl":
        assert [bool(json.loads(line)["error"]) for line in lines] == [True, False, False, False, False]
    else:
        assert lines[0] == "path,part,start,end,rank,class,score,error"
        assert len(lines) == 2 + 4 * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_second_run_does_what_is_left(predict: Command, videos: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    arguments = [videos, f"output={name}", "num_workers=0"]
    assert predict(*arguments).code == 0
    complete = whole_videos(output)
    if name != "a.parquet":  # as after a kill: some videos are missing, the last line is half there
        text = output.read_text()
        output.write_text(text[: int(len(text) * 0.7)])
    write_numbered_video(videos / "new.mp4", 9, height=48, width=64)
    result = predict(*arguments)
    assert result.code == 0, result.err
    assert "in a." in result.err
    rows = whole_videos(output)
    key = [(row["path"], row.get("class")) for row in rows]
    assert len(set(key)) == len(key)
    assert len(rows) == len(complete) + 2
    told = {(row["path"], row.get("class"), row["error"] or None) for row in complete}
    assert told == {(r["path"], r.get("class"), r["error"] or None) for r in rows if "new" not in r["path"]}

    refused = predict(*arguments, "topk=1")
    assert refused.code == 1
    assert "topk 5 -> 1" in refused.err
    assert whole_videos(output) == rows
    anew = predict(*arguments, "topk=1", "resume=false")
    assert anew.code == 0, anew.err
    assert len(whole_videos(output)) == 6


def test_unknown_formats_are_refused_before_the_work(predict: Command, videos: Path) -> None:
    for argument in ("output=a.txt", "output=a.csv format=xml"):
        result = predict(videos, *argument.split())
        assert result.code == 1
        assert "parquet" in result.err


NAMES = [
    b"[x]*?.mp4",
    b"new\nline.mp4",
    b"-dash.mp4",
    b"a=b.mp4",
    b"pri$e_{$.mp4",
    b"no utf-8 \xff.mp4",
    "視頻.mp4".encode(),
]


def test_names_between_nulls_are_taken_as_they_are(tmp_path: Path) -> None:
    names = ["#1.mp4", "[1].mp4", "t.mp4 ", "~.mp4"]
    (tmp_path / "list.txt").write_bytes("\0".join(names).encode())
    assert list(expand([f"@{tmp_path / 'list.txt'}"])) == names


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_of_all_kinds_are_found_told_and_skipped(
    predict: Command, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # of the terminal
    video = write_numbered_video(tmp_path / "v.mp4", 3, height=48, width=64).read_bytes()
    (tmp_path / "in").mkdir()
    files = [os.fsencode(tmp_path / "in") + b"/" + name for name in NAMES]
    for file in files:
        Path(os.fsdecode(file)).write_bytes(video)
    (tmp_path / "list.txt").write_bytes(b"\0".join(files))  # as of find -print0
    arguments = ["window=1", "save=[srt]", f"output=a.{suffix}"]
    if suffix == "csv":  # pictures with these names once
        result = predict("in", *arguments, "save=[png]")
        assert "Glyph" not in result.err
        assert len(list((tmp_path / "saved").glob("*.png"))) == len(NAMES)
    for given in ("in", "@list.txt"):
        result = predict(given, *arguments, "resume=false")
        assert result.code == 0, result.err
        assert "7 predictions, 0 errors" in result.err
        assert "[x]*?.mp4" in result.out
    result = predict("@list.txt", *arguments)
    assert "0 predictions" in result.err
    told = {row["path"] for row in rows_in(tmp_path / f"a.{suffix}")}
    assert {Path(path).name for path in told} == {name.decode("utf-8", "backslashreplace") for name in NAMES}
    assert len(list((tmp_path / "saved").glob("*.srt"))) == len(NAMES)


def test_parquet_keeps_what_a_minute_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mvit_video.prediction.writer"], "_SECONDS_PER_PART", 0.0)
    with open_output(tmp_path / "a.parquet", [], format="parquet", settings={}) as writer:
        for number in range(3):
            writer.add(Prediction(f"{number}.mp4", ("a",), (1.0,)))
            told = [row["path"] for row in rows_in(tmp_path / "a.parquet")]
            assert told == [f"{n}.mp4" for n in range(number + 1)]
