"""Indexes of videos from folders and lists; the videos are empty files, nothing is decoded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mvit_video.data.class_names import read_class_names
from mvit_video.data.index import (
    LabelledVideo,
    VideoIndex,
    VideoSplits,
    find_videos,
    folder_splits,
    image_folder_splits,
)
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
        (["Train/a/0.mp4", "train/a/0.mp4", "val/a/0.mp4"], "Train and train"),
        (["train/a/0.mp4", "val/a/0.mp4", "validation/a/0.mp4"], "val and validation"),
        (
            ["train/0.mp4", "val/1.mp4"],
            "videos lie directly in {root}/train; expected one sub-folder per class",
        ),
        (["0.mp4", "1.mp4"], "videos lie directly in {root}; expected one sub-folder per class"),
        (["a/0/1.jpg", "a/0/2.jpg"], "folders of frames a list"),
        (["set/a/0.mp4", "set/b/0.mp4"], "Then give data.root={root}/set"),
        (["set/train/a/0.mp4", "set/val/a/0.mp4"], "Then give data.root={root}/set"),
        (["train1/a/0.mp4", "train2/a/0.mp4", "val/a/0.mp4"], "train1 and train2"),
        (["first/a/0.mp4", "val/a/0.mp4"], "{root} has val/ but none of train/"),
        (["a/0.mp4", "a/1.mp4", "b/x/1.jpg"], "no videos found in class folder {root}/b; pictures need"),
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


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Validation"),
        ("training", "Val"),
        ("TRAIN", "test"),
        ("train", "valid"),
        ("Training", "Testing"),
        ("train_256", "val_256"),
        ("TrainingSet", "test-set"),
        ("videos_train", "videos_val"),
        ("trainval", "test_videos"),
    ],
)
def test_split_folders_in_any_spelling(tmp_path: Path, train: str, val: str) -> None:
    touch(tmp_path, f"{train}/run/a.mp4", f"{train}/jump/b.mp4", f"{val}/run/c.mp4", f"{val}/jump/d.mp4")
    splits = folder_splits(tmp_path)
    assert splits.class_names == ("jump", "run")
    assert ids(splits.val) == [f"{val}/jump/d.mp4", f"{val}/run/c.mp4"]


def test_of_split_folders_the_plain_name_counts(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/0.mp4", "train_256/a/0.mp4", "val/a/0.mp4", "val_256/a/0.mp4")
    assert ids(folder_splits(tmp_path).train) == ["train/a/0.mp4"]


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{i}.mp4" for name in ("training", "testing", "running") for i in range(2)))
    assert folder_splits(tmp_path).class_names == ("running", "testing", "training")


SUFFIXES = """mts m2ts asf f4v 3g2 vob mxf dv ogg divx h264 264 hevc h265 m2v mjpeg y4m apng dav MTS"""


@pytest.mark.parametrize("suffix", SUFFIXES.split())
def test_usual_names_of_videos_are_known(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a/0.{suffix}", f"a/1.{suffix}")
    assert len(folder_splits(tmp_path).train) == 1
    assert len(find_videos(tmp_path)) == 2


def test_what_folders_have_and_is_not_looked_at_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "train/a/0.mp4", "train/a/1.xyz", "train/a/b/2.XYZ", "train/a/notes", "train/loose.mp4")
    touch(tmp_path, "val/a/0.mp4", "val/a/.DS_Store", "extra/0.mp4")
    with caplog.at_level("INFO"):
        folder_splits(tmp_path)
        find_videos(tmp_path)
    for words in ("2 .xyz, 1 no suffix", "extra", "1 videos that lie beside"):
        assert words in caplog.text
    assert ".ds_store" not in caplog.text


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/0.mp4", "data/a/1.mp4", "elsewhere/2.mp4")
    (tmp_path / "data" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data" / "a")
    assert sorted(Path(path).name for path in find_videos(tmp_path / "data")) == ["0.mp4", "1.mp4", "2.mp4"]
    splits = folder_splits(tmp_path / "data")
    assert len(splits.train) + len(splits.val) == 3


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/0.mp4", "a/1.mp4", "a/b/2.mp4")
    scandir = os.scandir

    def forbidden(path: str) -> object:
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with fails("a/b can't be read: Permission denied"):
        folder_splits(tmp_path)


def test_pictures_of_all_kinds_are_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.JPEG", "a/1.gif", "b/0.gif", "b/1.webp")
    splits = image_folder_splits(tmp_path)
    assert len(splits.train) + len(splits.val) == 4


def test_an_empty_folder_of_a_known_class_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "train/zumba/0.mp4", "val/zumba/0.mp4", "train/yoga/notes.txt")
    splits = folder_splits(tmp_path, class_names="kinetics400")
    assert [len(splits.train), len(splits.val)] == [1, 1]
    assert "no videos found in class folder" in caplog.text


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


@pytest.mark.parametrize(
    "text",
    [
        "v/b c.mp4\tplay, guitar\nv/a.mp4\tsit\n",
        "file_name\tclass\nv/b c.mp4\tplay, guitar\nv/a.mp4\tsit\n",
        'video,label\nv/b c.mp4,"play, guitar"\nv/a.mp4,sit\n',
    ],
)
def test_names_with_spaces_and_commas(videos: Path, text: str) -> None:
    file = write(videos / "list.csv", text)
    splits = csv_splits(file, file)
    assert splits.class_names == ("play, guitar", "sit")
    assert [(video.id, video.label) for video in splits.train.videos] == [("v/b c.mp4", 0), ("v/a.mp4", 1)]


def test_columns_without_a_label(videos: Path) -> None:
    train = write(videos / "train.csv", "path,label,split\nv/a.mp4,run,train\n")
    test = write(videos / "test.csv", "split,path,label\ntest,v/b.mp4,\n")
    splits = csv_splits(train, train, test=test)
    assert splits.test is not None
    assert [(video.id, video.label) for video in splits.test.videos] == [("v/b.mp4", None)]
    with fails("test.csv, line 2 ('v/b.mp4'): it has no label"):
        csv_splits(test, test)


def test_videos_to_train_and_to_validate_on_are_told(videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = write(videos / "train.csv", "v/a.mp4 0\nv/b.mp4 1\n")
    csv_splits(train, write(videos / "val.csv", "v/b c.mp4 0\n"))
    assert not caplog.text
    csv_splits(train, write(videos / "val.csv", f"{videos}/v/a.mp4 0\n"))
    assert "1 videos are in the training and the validation list, such as" in caplog.text


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
        ("names.csv", "0,run fast\n1,jump\n"),
        ("names.csv", 'id,name\n0,"run fast"\n1,"jump"\n'),
        ("names.txt", "0: run fast\n1: jump\n"),
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
        ("v/a.mp4 0\nv/b.mp4\n", "train.csv, line 2 ('v/b.mp4'): it has no label"),
        ("v/a.mp4 0\nv/b,1,2\n", "train.csv, line 2: expected"),
        ("v/a.mp4 0\nv/b.mp4 2\n", "train.csv, line 2 ('v/b.mp4'): label 2 is out of range; "
         "2 class names allow 0 to 1"),
        ("v/a.mp4 -1\n", "label -1 is out of range"),
        ("v/a.mp4 swim\n", "line 1 ('v/a.mp4'): unknown class 'swim'; the classes are run, jump"),
        ("v/a.mp4 0\nv/b.mp4 0\n./v/a.mp4 1\n", "line 3 ('v/a.mp4'): it comes twice, "
         "first in {root}/train.csv, line 1"),
        ("v/a.mp4 0\n\n\nv/b.mp4 9\n", "train.csv, line 4 ('v/b.mp4'): label 9"),
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


def test_paths_of_windows_are_hinted_at(videos: Path) -> None:
    file = write(videos / "train.csv", "v\\a.mp4,0\nv\\b.mp4,1\n")
    with fails("where this system has `/`"):
        csv_splits(file, file)


@pytest.mark.parametrize("label", [-1, 100_000, 10**12])
def test_a_number_that_is_no_label_is_named_with_its_line(videos: Path, label: int) -> None:
    file = write(videos / "list.csv", f"v/a.mp4 {label}\n")
    with fails(f"list.csv, line 1 ('v/a.mp4'): label {label} is out of range"):
        csv_splits(file, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "train.json, line 1: not JSON"),
        ('{"path": "a"}\n{"path": "b"}', "line 2: not JSON: Extra data; a value a line?"),
        ("{}", "train.json: expected a list of"),
        ('[{"path": "v/a.mp4", "label": 0}, {"path": "v/b.mp4"}]', "entry 2 ('v/b.mp4'): it has no label"),
        ('[{"path": "v/a.mp4", "label": null}]', "train.json, entry 1: expected"),
        (
            '[{"path": "a", "label": 0}, {"path": "b", "label": "x"}]',
            "entry 2: the label 'x' is a name, that of",
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


@pytest.mark.parametrize(
    "text",
    [
        "video_path,action\n{a},run\n{b},jump\n",
        "file_name,category\n{a},run\n{b},jump\n",
        "Video Name,Class\n{a},run\n{b},jump\n",
        "filename label\n{a} run\n{b} jump\n",
        "clip;activity\n{a};run\n{b};jump\n",
        "path;label\n{a}; run\n{b}; jump\n",
        "clip,sport\n{a},run\n{b},jump\n",
        "my_column,label\n{a},run\n{b},jump\n",
        "label,path\nrun,{a}\njump,{b}\n",
        "fname,y\n{a},run\n{b},jump\n",
        "xxx yyy\n{a} run\n{b} jump\n",
        "Class\tFile Name\nrun\t{a}\njump\t{b}\n",
        "path,label,split\n{a},run,train\n{b},jump,train\n",
        "id;seconds;video path;action\n1;0.5;{a};run\n2;1;{b};jump\n",
        "# a comment, and more\n#{a2} was bad\npath,label\n{a},run\n# end\n{b},jump\n",
        "{a},run\r{b},jump\r",
        "{a};run\n{b};jump",
        '"{a}" run\n"{b}" jump',
        "{a}\trun\n{b}\tjump",
    ],
)
def test_headers_comments_and_delimiters(videos: Path, text: str) -> None:
    file = write(videos / "train.csv", text.format(a="v/a.mp4", b="v/b.mp4", a2="x"))
    splits = csv_splits(file, file)
    assert splits.class_names == ("jump", "run")
    assert [(video.id, video.label) for video in splits.train.videos] == [("v/a.mp4", 1), ("v/b.mp4", 0)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("path,label\nv/a.mp4,1\nv/b.mp4,0\n", ("0", "1")),
        ("label;path\n1;v/a.mp4\n0;v/b.mp4\n", ("0", "1")),
        ("v/a.mp4 label\nv/b.mp4 action\n", ("action", "label")),
        ("video action\nclip action\n", ("action",)),  # folders of frames
    ],
)
def test_words_of_headers_may_be_classes_and_numbers_stand_below_them(
    videos: Path, text: str, names: tuple[str, ...]
) -> None:
    touch(videos, "video/1.jpg", "clip/1.jpg")
    file = write(videos / "train.csv", text)
    splits = csv_splits(file, file)
    assert splits.class_names == names
    assert len(splits.train) == 2


@pytest.mark.parametrize(
    "name", ["a\u2028b.mp4", "a\x85b.mp4", "a\x0cb.mp4", "a\x1cb.mp4", "#1.mp4", "é.mp4"]
)
@pytest.mark.parametrize("form", ["{} 0\n", "{},0\n", "{}\t0\n"])
def test_odd_names_stay_whole(videos: Path, name: str, form: str) -> None:
    touch(videos, f"v/{name}")
    file = write(videos / "train.csv", form.format(f"v/{name}"))
    assert ids(csv_splits(file, file).train) == [f"v/{name}"]
    touch(videos, name)
    file = write(videos / "own.csv", form.format(name))
    assert ids(csv_splits(file, file).train) == [name]


def test_a_list_in_the_current_folder(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(videos)
    touch(videos, "x.mp4")
    write(videos / "l.csv", "v/a.mp4 0\nx.mp4 1\n")
    write(videos / "l.json", json.dumps([{"path": "v/a.mp4", "label": 0}, {"path": "x.mp4", "label": 1}]))
    lists = (csv_splits("l.csv", "l.csv"), csv_splits("l.csv", "l.csv", root="."))
    for splits in (*lists, json_splits("l.json", "./l.json")):
        assert ids(splits.train) == ["v/a.mp4", "x.mp4"]
        assert all(Path(video.path).is_file() for video in splits.train.videos)
    assert len(folder_splits(".", val_fraction=0.5).train) >= 1


LONG = 1_000_000


@pytest.mark.parametrize(
    "text",
    [
        "v/a\0.mp4 0\n",
        "v/a.mp4,run\0\n",
        f'"{"x" * 200_000}",run\n',
        f"v/a.mp4,{'x' * 200_000}\n",
        f"{'x,' * (LONG // 2)}\n",
        f"{'x' * LONG} 0\n",
        f"v/a.mp4 {'x' * LONG}\nv/b.mp4 0\n",
        f"path,label,split\n{'x' * LONG}\n",
        "v/a.mp4 99999999999999999999999999\nv/b.mp4 0\n",
        "v/a.mp4 0\nv/b.mp4 1e400 2\n",
        '"v/a.mp4,0\n',
        "path,label\n",
        "# nothing\n",
        "frames 99999999999 0\n",
    ],
    ids=range(14),
)
@pytest.mark.parametrize("names", [None, ["zero", "one"]], ids=["", "names"])
def test_hostile_csv_lists_end_with_a_short_error(videos: Path, text: str, names: list[str] | None) -> None:
    file = write(videos / "train.csv", text)
    with pytest.raises(DataError, match=r"train\.csv") as caught:
        csv_splits(file, file, class_names=names)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        '[{"path": "v/a.mp4", "label": "\\ud800"}]',
        '[{"path": "v/\\udcff.mp4", "label": "a"}]',
        '[{"path": "v/a.mp4", "label": "a", "id": "\\ud800"}]',
        '[{"path": "v/a\\u0000.mp4", "label": "a"}]',
        '[{"path": "", "label": "a"}]',
        '[{"path": "v/a.mp4", "label": "  "}]',
        "[" * 100_000,
        f'[{{"path": "v/a.mp4", "label": {"9" * 5000}}}]',
        f'[{{"path": "v/a.mp4", "label": {"9" * 4000}}}]',
        f'[{{"path": "{"x" * LONG}", "label": 0}}]',
        f'[{{"path": 1, "label": "{"x" * LONG}"}}]',
        '[{"path": "v/a.mp4", "label": 0, "label": 1}]',
        '[{"path": "v/a.mp4", "label": true}]',
        '[{"path": "v/a.mp4", "label": 0.5}]',
        '[{"path": "v/a.mp4", "label": NaN}]',
        '[{"path": "v/a.mp4", "label": 0, "id": ["x"]}]',
        '[{"path": "v/a.mp4", "label": 0, "id": null}]',
        '[["v/a.mp4", 0]]',
        "[null]",
        '"text"',
        "",
    ],
    ids=range(21),
)
def test_hostile_json_lists_end_with_a_short_error(videos: Path, text: str) -> None:
    file = write(videos / "train.json", text)
    with pytest.raises(DataError) as caught:
        json_splits(file, file)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.txt", b"caf\xe9\n"),
        ("n.txt", b"a\0b\n"),
        ("n.txt", b"\n \n"),
        ("n.txt", b"1,a\n2,b\n"),
        ("n.json", b'["\\ud800"]'),
        ("n.json", b'["a", " "]'),
        ("n.json", b'{"a": 0, "a": 1}'),
        ("n.json", b"[" * 100_000),
        ("n.json", b'{"a": {"b": [1]}}'),
        ("n.json", b"\xff\xfe[\0"),
    ],
)
def test_hostile_class_names_are_errors(videos: Path, name: str, content: bytes) -> None:
    file = write(videos / "train.csv", "v/a.mp4 0\n")
    (videos / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        csv_splits(file, file, class_names=videos / name)


@pytest.mark.parametrize(
    "read", [folder_splits, find_videos, read_class_names, lambda path: csv_splits(path, path)]
)
@pytest.mark.parametrize("path", ["x" * 300, "x" * 5000, "a\0b", "~nosuchuser/x", "~x.mp4", "/dev/null/x"])
def test_paths_that_cannot_be_are_errors(path: str, read: Callable[[str], object]) -> None:
    with pytest.raises(DataError) as caught:
        read(path)
    assert len(str(caught.value)) < 400


def test_a_name_may_begin_as_a_home_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "~x.mp4")
    assert find_videos("~x.mp4") == ["~x.mp4"]


def test_class_names_match_however_a_disk_composes_them(videos: Path) -> None:
    file = write(videos / "train.csv", "v/a.mp4,cafe\u0301\n")
    assert csv_splits(file, file, class_names=["tea", "caf\xe9"]).train.videos[0].label == 1


@pytest.mark.parametrize("read", [csv_splits, json_splits])
def test_missing_and_unreadable_lists(tmp_path: Path, read: Callable[[Path, Path], VideoSplits]) -> None:
    with fails("train.csv does not exist"):
        read(tmp_path / "train.csv", tmp_path / "train.csv")
    with fails("can't be read as text"):
        read(tmp_path, tmp_path)


def test_text_and_names_that_are_not_utf8_are_named(videos: Path, tmp_path: Path) -> None:
    (videos / "train.csv").write_bytes(b"v/a.mp4 0\nv/\xff.mp4 0\n")
    with fails("train.csv, line 2: this isn't UTF-8 text"):
        csv_splits(videos / "train.csv", videos / "train.csv")
    folder = tmp_path / "folder" / "a"
    folder.mkdir(parents=True)
    (folder / "b.mp4").touch()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.mp4")).touch()
    with fails(r"\udcff.mp4'): its name is no file's, or isn't UTF-8 text; rename it"):
        folder_splits(folder.parent)


def test_a_long_list_asks_the_disk_once_a_folder(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network disk each question for one of Kinetics' 240,000 files takes a millisecond."""
    asked: list[str] = []

    def counting(name: str) -> Callable[..., object]:
        function = getattr(os, name)

        def count(*args: object, **options: object) -> object:
            asked.append(name)
            return function(*args, **options)

        return count

    rows = "".join(f"v/{i}.mp4 {i % 400}\n" for i in range(20_000))
    train = write(videos / "train.csv", "v/a.mp4 0\n" + rows)
    val = write(videos / "val.csv", "v/a.mp4 3\n")
    for name in ("listdir", "scandir", "stat", "lstat"):
        monkeypatch.setattr(os, name, counting(name))
    splits = csv_splits(train, val, max_missing=1)
    assert asked.count("listdir") == 2
    assert len(asked) < 50
    assert len(splits.train.left_out) == 20_000
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
