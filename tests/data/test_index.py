"""Indexes of videos from folders and lists; the videos are empty files, nothing is decoded."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mvit_video.data.index import LabelledVideo, VideoIndex, VideoSplits, find_videos, folder_splits
from mvit_video.data.lists import csv_splits, json_splits
from mvit_video.errors import ConfigError, DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def ids(index: VideoIndex) -> list[str]:
    return [video.id for video in index.videos]


def fails(message: str) -> pytest.RaisesExc[DataError]:
    return pytest.raises(DataError, match=re.escape(message))


# Folders


@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    touch(tmp_path, "train/run/b.mp4", "train/run/deep/a.WebM", "train/jump/c.avi", f"{val}/run/d.mkv")
    touch(tmp_path, "train/run/notes.txt", "train/run/.hidden.mp4", "train/.cache/x.mp4", "train/labels.csv")
    splits = folder_splits(tmp_path)
    assert splits.class_names == ("jump", "run")
    assert splits.num_classes == 2
    assert ids(splits.train) == ["train/jump/c.avi", "train/run/b.mp4", "train/run/deep/a.WebM"]
    assert [video.label for video in splits.train.videos] == [0, 1, 1]
    assert splits.val.videos == (
        LabelledVideo(path=str(tmp_path / val / "run" / "d.mkv"), label=1, id=f"{val}/run/d.mkv"),
    )


def many_videos(root: Path) -> Path:
    touch(root, *(f"{name}/{i:02}.mp4" for name in ("a", "b") for i in range(20)))
    touch(root, "pair/0.mp4", "pair/1.mp4", "single/0.mp4")
    return root


@pytest.mark.parametrize("val_fraction", [0.01, 0.2, 0.5, 0.99])
def test_hash_split_is_disjoint_complete_and_stratified(tmp_path: Path, val_fraction: float) -> None:
    splits = folder_splits(many_videos(tmp_path), val_fraction=val_fraction)
    train, val = ids(splits.train), ids(splits.val)
    assert not set(train) & set(val)
    assert len(train) + len(val) == 43
    assert splits.train.class_names == splits.val.class_names == ("a", "b", "pair", "single")
    wanted = min(max(1, round(20 * val_fraction)), 19)
    assert [video.label for video in splits.val.videos] == [0] * wanted + [1] * wanted + [2]


def test_hash_split_depends_on_seed_and_relative_paths_only(tmp_path: Path) -> None:
    first = folder_splits(many_videos(tmp_path / "here"), seed=1)
    elsewhere = folder_splits(many_videos(tmp_path / "there"), seed=1)
    assert ids(first.val) == ids(elsewhere.val)
    assert ids(first.val) != ids(folder_splits(tmp_path / "here", seed=2).val)


def test_hash_split_is_the_same_on_every_machine(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{i}.mp4" for i in range(10)))
    assert ids(folder_splits(tmp_path).val) == ["a/3.mp4", "a/7.mp4"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "does not exist"),
        (["readme.txt"], "no videos found in {root}; expected {root}/<class>/<video>.mp4"),
        (["a/0.mp4", "b/notes.txt"], "no videos found in class folder {root}/b"),
        (["a/0.mp4", "b/0.mp4"], "no class has two videos"),
        (["train/a/0.mp4"], "{root} has train/ but none of val/, validation/ and test/"),
        (["train/a/0.mp4", "val/b/0.mp4"], "{root}/val/b: unknown class 'b'; the classes are a"),
        (["train/a/0.mp4", "val/x.txt"], "no videos found in {root}/val"),
    ],
)
def test_folder_mistakes_are_named(tmp_path: Path, files: list[str], message: str) -> None:
    root = tmp_path / "videos"
    touch(root, *files)
    with fails(message.format(root=root)):
        folder_splits(root)


def test_root_must_be_a_folder_and_the_fraction_a_fraction(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    with fails("a.mp4 is not a folder"):
        folder_splits(tmp_path / "a.mp4")
    with pytest.raises(ConfigError, match="val_fraction is 1"):
        folder_splits(tmp_path, val_fraction=1.0)


# Lists


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    touch(tmp_path, "v/a.mp4", "v/b.mp4", "v/b c.mp4", "v/d, e.mp4")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "v/a.mp4 0\nv/b c.mp4 1\nv/d, e.mp4 1\n",
        "path label\nv/a.mp4\t0\n\nv/b c.mp4   1\nv/d, e.mp4 1",
        'path,label\nv/a.mp4,0\nv/b c.mp4, 1\n"v/d, e.mp4",1\n',
        '\ufeffpath,label\r\nv/a.mp4, zero\r\nv/b c.mp4,o n e\r\n"v/d, e.mp4",o n e\r\n',
    ],
    ids=["pytorchvideo", "header", "comma", "names"],
)
def test_csv_forms(videos: Path, text: str) -> None:
    file = write(videos / "train.csv", text)
    splits = csv_splits(file, file, class_names=["zero", "o n e"])
    assert splits.train == splits.val
    assert splits.train.videos == (
        LabelledVideo(str(videos / "v/a.mp4"), 0, "v/a.mp4"),
        LabelledVideo(str(videos / "v/b c.mp4"), 1, "v/b c.mp4"),
        LabelledVideo(str(videos / "v/d, e.mp4"), 1, "v/d, e.mp4"),
    )


def test_root_and_absolute_paths(videos: Path) -> None:
    file = write(videos / "train.csv", f"./a.mp4 0\n{videos}/v/x.mp4 0\n/elsewhere/y.mp4 0\n")
    touch(videos, "v/x.mp4")
    index = csv_splits(file, file, root=videos / "v", max_missing=0.5).train
    assert ids(index) == ["a.mp4", "x.mp4"]
    assert [(out.video.id, out.reason) for out in index.left_out] == [("/elsewhere/y.mp4", "no such file")]


@pytest.mark.parametrize(
    ("labels", "names"),
    [(("0", "2"), ("0", "1", "2")), (("run", "jump"), ("jump", "run"))],
    ids=["numbers", "names"],
)
def test_class_names_from_the_training_list(
    videos: Path, labels: tuple[str, str], names: tuple[str, ...]
) -> None:
    train = write(videos / "train.csv", f"v/a.mp4 {labels[0]}\nv/b.mp4 {labels[1]}\n")
    val = write(videos / "val.csv", f"v/a.mp4 {labels[1]}\n")
    splits = csv_splits(train, val)
    assert splits.class_names == names
    assert splits.val.videos[0].label == names.index(labels[1])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "run fast\n\njump\n"),
        ("names.json", '["run fast", "jump"]'),
        ("names.json", '{"jump": "1", "\\"run fast\\"": "0"}'),
    ],
)
def test_class_name_files(videos: Path, name: str, text: str) -> None:
    file = write(videos / "train.csv", "v/a.mp4,run fast\nv/b.mp4,1\n")
    splits = csv_splits(file, file, class_names=write(videos / name, text))
    assert splits.class_names == ("run fast", "jump")
    assert [video.label for video in splits.train.videos] == [0, 1]


def test_json_list(videos: Path) -> None:
    rows = [{"path": "v/a.mp4", "label": "run", "id": "first"}, {"path": "v/b c.mp4", "label": "jump"}]
    file = write(videos / "train.json", json.dumps(rows))
    splits = json_splits(file, file)
    assert splits.class_names == ("jump", "run")
    assert ids(splits.train) == ["first", "v/b c.mp4"]
    assert [video.label for video in splits.train.videos] == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv; it lists none"),
        ("v/a.mp4 0\nv/b.mp4\n", "train.csv, line 2 (v/b.mp4): it has no label"),
        ("v/a.mp4 0\nv/b,1,2\n", "train.csv, line 2: expected"),
        ("v/a.mp4 0\nv/b.mp4 2\n", "train.csv, line 2 (v/b.mp4): label 2 is out of range; "
         "2 class names allow 0 to 1"),
        ("v/a.mp4 -1\n", "label -1 is out of range"),
        ("v/a.mp4 swim\n", "line 1 (v/a.mp4): unknown class 'swim'; the classes are run, jump"),
        ("v/a.mp4 0\nv/b.mp4 0\n./v/a.mp4 1\n", "train.csv: v/a.mp4 comes twice, in line 1 and line 3"),
        ("v/a.mp4 0\n\n\nv/b.mp4 9\n", "train.csv, line 4 (v/b.mp4): label 9"),
        ("w/a.mp4 0\nw/b.mp4 0\n", "none of its 2 videos can be read, the first is {root}/w/a.mp4: "
         "no such file; relative paths start at root={root}"),
        ("v/a.mp4 0\nw/b.mp4 0\n", "1 of its 2 videos can't be read, the first is {root}/w/b.mp4: "
         "no such file; relative paths start at root={root}, or allow it: max_missing=0.2 is the share "
         "allowed"),
    ],
)  # fmt: skip
def test_csv_mistakes_are_named(videos: Path, text: str, message: str) -> None:
    file = write(videos / "train.csv", text)
    with fails(message.format(root=videos)):
        csv_splits(file, file, class_names=["run", "jump"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "train.json, line 1: not JSON"),
        (
            '{"path": "a", "label": 0}\n{"path": "b", "label": 1}',
            "line 2: not JSON: Extra data; a value a line?",
        ),
        ("{}", "train.json: expected a list of"),
        ('[{"path": "v/a.mp4", "label": 0}, {"path": "v/b.mp4"}]', "entry 2 (v/b.mp4): it has no label"),
        ('[{"path": "v/a.mp4", "label": null}]', "train.json, entry 1: expected"),
        (
            '[{"path": "v/a.mp4", "label": 0}, {"path": "v/b.mp4", "label": "x"}]',
            "labels are numbers and names",
        ),
    ],
)
def test_json_mistakes_are_named(videos: Path, text: str, message: str) -> None:
    file = write(videos / "train.json", text)
    with fails(message):
        json_splits(file, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no class names"),
        ('["a", "a"]', "class name 'a' comes twice"),
        ("[1]", "expected a list of class names"),
        ('{"a": 0, "b": 2}', "expected each index from 0 to 1 once"),
    ],
)
def test_class_name_mistakes_are_named(videos: Path, text: str, message: str) -> None:
    file = write(videos / "train.csv", "v/a.mp4 0\n")
    with fails(message):
        csv_splits(file, file, class_names=write(videos / "names.json", text))


@pytest.mark.parametrize("read", [csv_splits, json_splits])
def test_missing_and_unreadable_lists(tmp_path: Path, read: Callable[[Path, Path], VideoSplits]) -> None:
    with fails("train.csv does not exist"):
        read(tmp_path / "train.csv", tmp_path / "train.csv")
    with fails("can't be read as text"):
        read(tmp_path, tmp_path)


def test_text_and_names_that_are_not_utf8_are_named(videos: Path, tmp_path: Path) -> None:
    (videos / "train.csv").write_bytes(b"v/a.mp4 0\nv/\xff.mp4 0\n")
    with fails("train.csv, line 2: this isn't UTF-8 text (it has the byte 0xff)"):
        csv_splits(videos / "train.csv", videos / "train.csv")
    folder = tmp_path / "folder" / "a"
    folder.mkdir(parents=True)
    (folder / "b.mp4").touch()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")).touch()
    with fails(r"\xff.mp4': its name isn't UTF-8 text; rename it"):
        folder_splits(folder.parent)


def test_a_list_of_kinetics_size_is_read_in_seconds(videos: Path) -> None:
    rows = "".join(f"v/{i}.mp4 {i % 400}\n" for i in range(240_000))
    train = write(videos / "train.csv", "v/a.mp4 0\n" + rows)
    started = time.process_time()
    splits = csv_splits(train, write(videos / "val.csv", "v/a.mp4 3\n"), max_missing=1)
    assert time.process_time() - started < 10  # about 3 s where nothing else runs
    assert len(splits.train.left_out) == 240_000
    assert splits.num_classes == 400


# Prediction


def test_find_videos(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.mp4", "b/deep/1.MOV", "b/notes.txt", "a.bin")
    files = [str(tmp_path / name) for name in ("a.bin", "b/2.mp4", "b/deep/1.MOV")]
    assert find_videos([tmp_path / "a.bin", tmp_path / "b"]) == files
    assert find_videos(str(tmp_path / "a.bin")) == files[:1]


def test_find_videos_names_what_is_missing(tmp_path: Path) -> None:
    with fails(f"{tmp_path / 'none.mp4'} does not exist"):
        find_videos([tmp_path / "none.mp4"])
    with fails(f"no videos found in {tmp_path}"):
        find_videos([tmp_path])
