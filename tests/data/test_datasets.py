"""Small copies of the public data sets in each of their layouts, from lists to frames."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command
from PIL import Image
from videos import numbered_frame, read_number, write_numbered_video

import mvit_video as mv
from mvit_video.data.class_names import read_class_names
from mvit_video.data.clips import read_test_views
from mvit_video.data.fixed_folds import hmdb51_splits, ucf101_splits
from mvit_video.data.index import VideoIndex, VideoSplits, folder_splits, image_folder_splits
from mvit_video.data.kinetics import Clip, kinetics_splits, parse_clip_name
from mvit_video.data.lists import csv_splits
from mvit_video.data.ssv2 import ssv2_splits
from mvit_video.data.table import index_splits
from mvit_video.errors import DataError, VideoError
from mvit_video.model.clip_spec import IMAGENET_MEAN, IMAGENET_STD

SMALL_IMAGE_MODEL = ("model.embed_dim=16", "model.stages=[1,1]", "model.crop_size=32")
SMALL_MODEL = (*SMALL_IMAGE_MODEL, "model.num_frames=4")
TRAINING = ("trainer.max_epochs=1", "batch_size=2", "num_workers=0", "hydra.run.dir=run")


@pytest.fixture(scope="session")
def a_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Puts the same short video under any name of a suffix."""
    folder = tmp_path_factory.mktemp("encoded")
    sources = {
        suffix: write_numbered_video(folder / f"v{suffix}", 8, codec=codec, height=48, width=64, fps=12)
        for suffix, codec in ((".mp4", "libx264"), (".webm", "libvpx-vp9"), (".avi", "mpeg4"))
    }

    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources[path.suffix], path)
        return path

    return put


PutVideo = Callable[[Path], Path]


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def labels(index: VideoIndex) -> dict[str, int | None]:
    return {video.id: video.label for video in index.videos}


def files(index: VideoIndex, root: Path) -> list[str]:
    return [Path(video.path).relative_to(root).as_posix() for video in index.videos]


def fails(message: str) -> pytest.RaisesExc[DataError]:
    return pytest.raises(DataError, match=re.escape(message))


# Class names


@pytest.mark.parametrize(
    ("name", "count", "known"),
    [
        ("kinetics400", 400, {0: "abseiling", 1: "air drumming", 77: "crawling baby", 399: "zumba"}),
        ("kinetics600", 600, {0: "abseiling", 1: "acting in play", 58: "bull fighting", 599: "zumba"}),
        ("kinetics700", 700, {13: "arresting", 18: "baby waking up", 699: "zumba"}),
        (
            "ssv2",
            174,
            {0: "Approaching something with your camera", 173: "Wiping something off of something"},
        ),
    ],
)
def test_shipped_class_names(name: str, count: int, known: dict[int, str]) -> None:
    names = read_class_names(name)
    assert len(names) == len(set(names)) == count
    assert list(names) == sorted(names)  # labels are positions in the alphabet
    assert {label: names[label] for label in known} == known


def test_kinetics_400_is_the_list_of_torchvision() -> None:
    from torchvision.models.video import MViT_V2_S_Weights

    assert list(read_class_names("kinetics400")) == MViT_V2_S_Weights.DEFAULT.meta["categories"]


# Kinetics

HEADER = "label,youtube_id,time_start,time_end,split"
ABSEILING, ZUMBA = 0, 399


def official_kinetics(
    root: Path, put: PutVideo, *, val: str = "val", annotations: str = "annotations"
) -> Path:
    """As the cvdf mirror lays it out: flat folders, zeros in front of the times."""
    write(
        root / annotations / "train.csv",
        HEADER,
        "abseiling,-3B32lodo2M,59,69,train",
        "zumba,a_b_c,0,10,train",
        "zumba,AAAAAAAAAAA,1,11,train",
        "zumba,gone_from_YT,5,15,train",
    )
    write(root / annotations / f"{val}.csv", HEADER, f"zumba,vvvvvvvvvvv,12,22,{val}")
    write(root / annotations / "test.csv", HEADER.removeprefix("label,"), "ttttttttttt,7,17,test")
    put(root / "train" / "-3B32lodo2M_000059_000069.mp4")
    put(root / "train" / "a_b_c_000000_000010.mp4")
    put(root / "train" / "AAAAAAAAAAA_000001_000011.mp4")
    put(root / val / "vvvvvvvvvvv_000012_000022.mp4")
    put(root / "test" / "ttttttttttt_000007_000017.mp4")
    return root


@pytest.mark.parametrize("val", ["val", "validate"])
@pytest.mark.parametrize("annotations", ["annotations", "."])
def test_kinetics_by_the_official_csv(
    tmp_path: Path, a_video: PutVideo, val: str, annotations: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = official_kinetics(tmp_path, a_video, val=val, annotations=annotations)
    with caplog.at_level(logging.WARNING):
        splits = kinetics_splits(root, class_names="kinetics400", max_missing=0.25)
    assert splits.num_classes == 400
    assert labels(splits.train) == {
        "-3B32lodo2M_000059_000069": ABSEILING,
        "a_b_c_000000_000010": ZUMBA,
        "AAAAAAAAAAA_000001_000011": ZUMBA,
    }
    assert files(splits.val, root) == [f"{val}/vvvvvvvvvvv_000012_000022.mp4"]
    assert [out.video.id for out in splits.train.left_out] == ["gone_from_YT_000005_000015"]
    assert "1 of its 4 videos can't be read" in caplog.text
    assert splits.test is not None
    assert labels(splits.test) == {"ttttttttttt_000007_000017": None}


def test_kinetics_names_without_zeros_in_class_folders_and_replacements(
    tmp_path: Path, a_video: PutVideo
) -> None:
    root = official_kinetics(tmp_path, a_video)
    shutil.rmtree(root / "train")
    a_video(root / "train_256" / "abseiling" / "-3B32lodo2M_59_69.mp4")
    a_video(root / "train_256" / "zumba" / "a_b_c_0_10.mp4")
    a_video(root / "val_256" / "zumba" / "AAAAAAAAAAA_1_11.mp4")
    a_video(root / "train_256" / "zumba" / "AAAAAAAAAAA_1_11.mp4")  # of its own split
    a_video(root / "replacement" / "a_b_c_000000_000010.mp4")  # of a file that is corrupt
    splits = kinetics_splits(root, class_names="kinetics400", max_missing=0.25)
    assert files(splits.train, root) == [
        "train_256/abseiling/-3B32lodo2M_59_69.mp4",
        "replacement/a_b_c_000000_000010.mp4",
        "train_256/zumba/AAAAAAAAAAA_1_11.mp4",
    ]


@pytest.mark.parametrize(
    ("stem", "clip"),
    [
        ("-3B32lodo2M_000059_000069", Clip("-3B32lodo2M", 59, 69)),
        ("a_b__9_000010_20", Clip("a_b__9", 10, 20)),
        ("nothing", None),
        ("one_5", None),
    ],
)
def test_clip_names(stem: str, clip: Clip | None) -> None:
    assert parse_clip_name(stem) == clip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("zumbaa,x,0,10,train", " ('x_000000_000010'): unknown class 'zumbaa' (did you"),
        ("zumba,x,0,10", f": expected {HEADER}"),
        ("zumba,a_b_c,0,10,train", " ('a_b_c_000000_000010'): it comes twice, first in"),
        *(
            (f"zumba,x,{time},10,train", f": expected {HEADER}")
            for time in ("soon", "inf", "nan", "-1", "1e300", "")
        ),
        (",x,0,10,train", " ('x_000000_000010'): it has no label"),
    ],
)
def test_mistakes_of_the_official_csv_are_named(
    tmp_path: Path, a_video: PutVideo, row: str, message: str
) -> None:
    root = official_kinetics(tmp_path, a_video)
    with (root / "annotations" / "train.csv").open("a") as file:
        file.write(f"\n{row}")
    with fails(f"train.csv, line 6{message}"):
        kinetics_splits(root, class_names="kinetics400", max_missing=0.5)


def test_too_many_missing_videos(tmp_path: Path, a_video: PutVideo) -> None:
    root = official_kinetics(tmp_path, a_video)
    with fails("1 of its 4 videos can't be read, the first is"):
        kinetics_splits(root, class_names="kinetics400", max_missing=0.2)
    shutil.rmtree(root / "train")
    with fails("none of its 4 videos can be read"):
        kinetics_splits(root, class_names="kinetics400", max_missing=1)


@pytest.mark.parametrize(
    ("file", "base", "line"),
    [
        ("{}.csv", ".", "{path} {label}"),
        ("{}.csv", ".", "{path},{label}"),
        ("kinetics400_{}_list_videos.txt", "videos", "{name} {label}"),
        ("annotations/{}.csv", ".", "{absolute} {label}"),
    ],
    ids=["pyslowfast", "comma", "mmaction2", "absolute"],
)
def test_kinetics_by_lists_of_paths(
    tmp_path: Path, a_video: PutVideo, file: str, base: str, line: str
) -> None:
    for split in ("train", "val"):
        folder = f"{base}_{split}" if base == "videos" else split
        lines = []
        for name, label in (("abseiling/x y_000001_000011.mp4", 0), ("zumba/z.mp4", 399)):
            path = a_video(tmp_path / folder / name)
            lines.append(line.format(path=f"{folder}/{name}", name=name, absolute=path, label=label))
        write(tmp_path / file.format(split), *lines)
    splits = kinetics_splits(tmp_path, class_names="kinetics400")
    assert [video.label for video in splits.train.videos] == [0, 399]
    assert all(Path(video.path).is_file() for video in splits.train.videos + splits.val.videos)


def test_kinetics_by_class_folders(tmp_path: Path, a_video: PutVideo) -> None:
    a_video(tmp_path / "train" / "zumba" / "b.mp4")
    a_video(tmp_path / "train" / "passing_American_football_(in_game)" / "a.mp4")
    a_video(tmp_path / "val" / "zumba" / "c.mp4")
    splits = kinetics_splits(tmp_path, class_names="kinetics400")
    names = read_class_names("kinetics400")
    found = [names[video.label or 0] for video in splits.train.videos]
    assert found == ["passing American football (in game)", "zumba"]
    a_video(tmp_path / "val" / "sleeping in" / "c.mp4")
    with fails(f"{tmp_path / 'val' / 'sleeping in'}: unknown class 'sleeping in'"):
        kinetics_splits(tmp_path, class_names="kinetics400")


def test_kinetics_without_anything_says_what_is_expected(tmp_path: Path, a_video: PutVideo) -> None:
    a_video(tmp_path / "train" / "AAAAAAAAAAA_000001_000011.mp4")
    with fails("has neither lists (train.csv"):
        kinetics_splits(tmp_path, class_names="kinetics400")


@pytest.mark.slow
@pytest.mark.parametrize("number", [400, 600, 700])
def test_kinetics_is_trained_and_evaluated_by_command(
    command: Command, tmp_path: Path, a_video: PutVideo, number: int
) -> None:
    root = official_kinetics(tmp_path / "k", a_video, val="validate")
    where = [f"data.root={root}", "data.max_missing=0.25"]
    recipe = f"experiment=k{number}_mvitv2_s_16x4"
    trained = command("train", recipe, *where, *SMALL_MODEL, *TRAINING)
    data = [f"data=kinetics{number}", *where]
    assert trained.code == 0, trained.err
    assert f"{number} classes, 3 training and 1 validation videos" in trained.out
    model = mv.load_model("run/checkpoints/last.ckpt")
    assert model.class_names == read_class_names(f"kinetics{number}")
    assert command("eval", *data, "weights=run/checkpoints/last.ckpt", "num_workers=0").code == 0


def test_a_test_split_without_labels_is_scored(
    command: Command, tmp_path: Path, a_video: PutVideo, checkpoint: Path
) -> None:
    for name in ("train/cats/0.mp4", "val/dogs and birds/0.mp4", "test/x.mp4", "test/y.mp4"):
        a_video(tmp_path / "d" / name)
    a_video(tmp_path / "d" / "train" / "dogs and birds" / "0.mp4")
    arguments = [f"data.root={tmp_path / 'd'}", f"weights={checkpoint}", "num_workers=0", "views=5x1"]
    result = command("eval", *arguments, "split=test", "hydra.run.dir=run")
    assert result.code == 0, result.err
    rows = pq.read_table("run/scores.parquet").to_pylist()
    assert {row["id"] for row in rows} == {"test/x.mp4", "test/y.mp4"}
    assert len(rows) == 10
    assert all(row["label"] is None for row in rows)
    assert not Path("run/results.json").exists()
    shutil.rmtree(tmp_path / "d" / "test")
    result = command("eval", *arguments, "split=test")
    assert result.code == 1
    assert "split=test: the data set has no such split" in result.err


def test_an_evaluation_tells_which_videos_were_left_out(
    command: Command, tmp_path: Path, two_classes: Path, checkpoint: Path
) -> None:
    names = ["cats/0.mp4", "dogs and birds/0.webm", "cats/gone.mp4"]
    write(tmp_path / "list.csv", *(f"{name},{name.split('/')[0]}" for name in names))
    data = ["data=csv", "data.train=list.csv", "data.val=list.csv", f"data.root={two_classes}"]
    line = [*data, "data.max_missing=0.4", f"weights={checkpoint}", "num_workers=0", "hydra.run.dir=run"]
    result = command("eval", *line)
    assert result.code == 0, result.err
    results = json.loads(Path("run/results.json").read_text())
    assert results["videos"] == 2
    assert [video["id"] for video in results["left_out_videos"]] == ["cats/gone.mp4"]


# Something-Something v2


TEMPLATES = ("Closing something", "Holding something behind something", "Opening something")


def official_ssv2(root: Path, put: PutVideo | None, *, prefix: str = "") -> Path:
    folder = root / "labels"
    write(folder / f"{prefix}labels.json", json.dumps({name: str(i) for i, name in enumerate(TEMPLATES)}))
    rows = {
        "train": [
            {"id": "78687", "template": "Closing [something]", "label": "x", "placeholders": ["a box"]},
            {"id": "42326", "label": "x", "template": "Holding [something] behind [something]"},
            {"id": "100904", "label": "y", "template": "Opening [something]"},
        ],
        "validation": [{"id": "74225", "label": "opening a door", "template": "Opening [something]"}],
        "test": [{"id": "1420"}],
    }
    for split, entries in rows.items():
        write(folder / f"{prefix}{split}.json", json.dumps(entries))
        for entry in entries:
            if put is not None:
                put(root / "20bn-something-something-v2" / f"{entry['id']}.webm")
    return root


def write_frames(folder: Path, count: int, *, name: str = "{i:06}.jpg", first: int = 1) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(numbered_frame(i, 48, 64)).save(folder / name.format(i=i + first), quality=95)
    return folder


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2_by_the_official_files(tmp_path: Path, a_video: PutVideo, prefix: str) -> None:
    splits = ssv2_splits(official_ssv2(tmp_path, a_video, prefix=prefix))
    assert splits.class_names == TEMPLATES
    assert labels(splits.train) == {"78687": 0, "42326": 1, "100904": 2}
    assert labels(splits.val) == {"74225": 2}
    assert splits.test is not None
    assert labels(splits.test) == {"1420": None}


def test_a_root_may_be_relative(tmp_path: Path, a_video: PutVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    official_ssv2(tmp_path / "ssv2", a_video)
    official_kinetics(tmp_path / "k400", a_video)
    monkeypatch.chdir(tmp_path)
    assert labels(ssv2_splits("ssv2").train) == {"78687": 0, "42326": 1, "100904": 2}
    splits = kinetics_splits("k400", class_names="kinetics400", max_missing=0.25)
    assert files(splits.val, tmp_path) == ["k400/val/vvvvvvvvvvv_000012_000022.mp4"]


def test_ssv2_uses_the_shipped_templates_without_a_labels_file(tmp_path: Path, a_video: PutVideo) -> None:
    root = official_ssv2(tmp_path, a_video)
    (root / "labels" / "labels.json").unlink()
    splits = ssv2_splits(root)
    assert splits.num_classes == 174
    assert tuple(splits.class_names[video.label or 0] for video in splits.train.videos) == TEMPLATES


def test_ssv2_without_the_test_videos(tmp_path: Path, a_video: PutVideo) -> None:
    root = official_ssv2(tmp_path, a_video)
    (root / "20bn-something-something-v2" / "1420.webm").unlink()
    assert ssv2_splits(root).test is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "5", "template": "Swallowing [something]"}, " ('5'): unknown class 'Swallowing something'"),
        ({"id": "78687", "template": "Closing [something]"}, " ('78687'): it comes twice, first in"),
        ({"template": "Closing [something]"}, ': expected {"id": ..., "template": ...}'),
        ({"id": "5"}, ": expected"),
    ],
)
def test_mistakes_of_ssv2_are_named(
    tmp_path: Path, a_video: PutVideo, entry: dict[str, str], message: str
) -> None:
    root = official_ssv2(tmp_path, a_video)
    file = root / "labels" / "train.json"
    write(file, json.dumps([*json.loads(file.read_text()), entry]))
    with pytest.raises(DataError, match=f"{re.escape(str(file))}.*entry 4{re.escape(message)}"):
        ssv2_splits(root, max_missing=0.5)


def slowfast_frame_list(file: Path, videos: dict[str, list[str]]) -> Path:
    lines = ["original_vido_id video_id frame_id path labels"]
    for number, (video, paths) in enumerate(videos.items()):
        lines += [f'{video} {number} {frame} {path} ""' for frame, path in enumerate(paths)]
    return write(file, *lines)


def ssv2_frames(root: Path, *, counts: tuple[int, ...] = (5, 12, 9, 7)) -> Path:
    """As PySlowFast prepares it: frames/<id>/<id>_000001.jpg ... and lists of them."""
    official_ssv2(root, None, prefix="something-something-v2-")
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    for video, count in zip(("78687", "42326", "100904", "74225"), counts, strict=True):
        write_frames(root / "frames" / video, count, name=video + "_{i:06}.jpg")
        paths = [f"{video}/{video}_{i:06}.jpg" for i in range(1, count + 1)]
        lists["val" if video == "74225" else "train"][video] = paths
    for split, videos in lists.items():
        slowfast_frame_list(root / f"{split}.csv", videos)
    return root


def test_ssv2_frame_lists_give_exactly_their_frames(tmp_path: Path) -> None:
    root = ssv2_frames(tmp_path)
    write_frames(tmp_path / "x", 1, name="78687_000006.jpg")
    shutil.move(tmp_path / "x" / "78687_000006.jpg", root / "frames" / "78687")  # on disk, not in the list
    splits = ssv2_splits(root, frame_lists=("train.csv", "val.csv"))
    assert labels(splits.train) == {"78687": 0, "42326": 1, "100904": 2}
    for video, count in zip(splits.train.videos, (5, 12, 9), strict=True):
        with mv.open_video(video.path) as frames:
            assert (frames.num_frames, frames.height, frames.width) == (count, 48, 64)
            wanted = [count - 1, 0, 2, 2]
            assert [read_number(frame) for frame in frames.get_frames(wanted)] == wanted
            assert frames.fps == 30


@pytest.mark.parametrize(
    "change",
    [
        lambda paths: paths[::2],
        lambda paths: [paths[1], paths[0], *paths[2:]],
        lambda paths: [paths[0], *paths[5:1:-1], *paths[6:]],
        lambda paths: [*paths[:-1], "else/where.jpg"],
        lambda paths: [paths[0], paths[-1].replace("12", "9" * 12)],
    ],
    ids=["gaps", "order", "order inside", "elsewhere", "huge"],
)
def test_frame_lists_that_skip_frames_are_refused(
    tmp_path: Path, change: Callable[[list[str]], list[str]]
) -> None:
    root = ssv2_frames(tmp_path)
    paths = [f"42326/42326_{i:06}.jpg" for i in range(1, 13)]
    slowfast_frame_list(root / "train.csv", {"42326": change(paths)})
    with fails("train.csv, line 2: the"):
        ssv2_splits(root, frame_lists=("train.csv", "val.csv"), max_missing=1)


@pytest.mark.parametrize(
    "content", [b"", b"\xe9", b"1 0 0 a_{} x\n", b"1 0 0 a_\xe9.jpg x\n", b"1 0 0 a\0.jpg x\n"]
)
def test_hostile_lists_of_frames_are_errors(tmp_path: Path, content: bytes) -> None:
    root = ssv2_frames(tmp_path)
    header = (root / "train.csv").read_bytes().partition(b"\n")[0] + b"\n"
    (root / "train.csv").write_bytes(header + content.replace(b"{}", b"9" * 5000))
    with fails("train.csv"):
        ssv2_splits(root, frame_lists=("train.csv", "val.csv"))


def test_frames_that_are_missing_on_disk_and_lists_from_another_folder(tmp_path: Path) -> None:
    root = ssv2_frames(tmp_path)
    for split in ("train", "val"):
        file = root / f"{split}.csv"
        write(file, re.sub(r" (\d+/)", r" frames/\1", file.read_text()))  # paths start in the root
    shutil.rmtree(root / "frames" / "42326")
    splits = ssv2_splits(root, frame_lists=("train.csv", "val.csv"), max_missing=0.5)
    assert labels(splits.train) == {"78687": 0, "100904": 2}
    assert [out.video.id for out in splits.train.left_out] == ["42326"]
    with mv.open_video(splits.train.videos[1].path) as frames:
        assert read_number(frames.get_frames([8])[0]) == 8


def test_ssv2_frames_without_lists(tmp_path: Path) -> None:
    splits = ssv2_splits(ssv2_frames(tmp_path))
    with mv.open_video(splits.train.videos[1].path) as frames:
        assert [read_number(frame) for frame in frames.get_frames(range(12))] == list(range(12))


def test_mmaction2_lists_of_frames(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_frames(tmp_path / "frames" / name, 6, name="img_{i:05}.jpg")
    file = write(tmp_path / "list.txt", "a 6 0\nb 5 1\n")
    splits = csv_splits(file, file, root=tmp_path / "frames")
    with mv.open_video(splits.train.videos[1].path) as frames:
        assert frames.num_frames == 5
        assert read_number(frames.get_frames([4])[0]) == 4


@pytest.mark.parametrize("data", [pytest.param("ssv2", marks=pytest.mark.slow), "ssv2_frames"])
def test_ssv2_is_trained_and_evaluated_by_command(
    command: Command, tmp_path: Path, a_video: PutVideo, data: str
) -> None:
    root = official_ssv2(tmp_path / "s", a_video) if data == "ssv2" else ssv2_frames(tmp_path / "s")
    arguments = [f"data={data}", f"data.root={root}", "views=1x3_segment"]
    recipe = ["experiment=ssv2_mvitv2_s_16x4", "model.weights=null", *arguments]
    trained = command("train", *recipe, *SMALL_MODEL, *TRAINING)
    assert trained.code == 0, trained.err
    assert "3 classes, 3 training and 1 validation videos" in trained.out
    evaluated = command("eval", *arguments, "weights=run/checkpoints/last.ckpt", "num_workers=0")
    assert evaluated.code == 0, evaluated.err


# Pictures


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "f", 12, name="frame{i}.png", first=0)
    with mv.open_video(folder, frame_rate=12) as video:
        assert (video.num_frames, video.fps, video.duration, video.codec) == (12, 12, 1, "png")
        assert [read_number(frame) for frame in video.get_frames([11, 2, 10])] == [11, 2, 10]
        assert video.frame_time(6) == 0.5
        with pytest.raises(ValueError, match="frame 12 was asked"):
            video.get_frames([12])


def test_damaged_folders_of_frames_are_named(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "f", 5)
    small = Image.new("RGB", (32, 32))
    content = (folder / "000004.jpg").read_bytes()
    damages: list[tuple[Callable[[Path], object], str]] = [
        (lambda file: file.write_bytes(content[: len(content) // 2]), "(is damaged|can't be read)"),
        (lambda file: file.write_bytes(b"no picture"), "is no picture"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: small.save(file), "is 32x32, the first picture 64x48"),
    ]
    for damage, message in damages:
        damage(folder / "000004.jpg")
        with mv.open_video(folder) as video:
            video.get_frames([0, 1, 2, 4])
            with pytest.raises(VideoError, match=f"000004.jpg {message}"):
                video.get_frames([3])
    (folder / "000004.jpg").unlink()
    with pytest.raises(VideoError, match=r"picture 4 is missing before 000005.jpg"):
        mv.open_video(folder)
    with (
        mv.open_video(f"{folder}/[000001-000005].jpg") as video,
        pytest.raises(VideoError, match=r"000004.jpg is missing"),
    ):
        video.get_frames([3])


def test_a_picture_is_a_video_of_one_upright_frame(tmp_path: Path) -> None:
    turned = Image.fromarray(numbered_frame(5, 48, 64)).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned clockwise by a quarter
    turned.save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(numbered_frame(6, 48, 64)[:, :, 0]).save(tmp_path / "gray.png")
    for name, number in (("a.jpg", 5), ("gray.png", 6)):
        with mv.open_video(tmp_path / name) as video:
            assert (video.num_frames, video.height, video.width) == (1, 48, 64)
            frames = video.get_frames([0])
            assert frames.shape == (1, 3, 48, 64)
            assert frames.dtype == torch.uint8
            assert read_number(frames[0]) == number


def imagenet(root: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("n01440764", "n01443537")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = numbered_frame(10 * label + i, 60 + i, 80)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{i}.JPEG", quality=95)
    (root / "test").mkdir()
    Image.fromarray(numbered_frame(1, 50, 50)).save(root / "test" / "ILSVRC2012_test_00000001.JPEG")
    return root


def test_imagenet_folders(tmp_path: Path) -> None:
    splits = image_folder_splits(imagenet(tmp_path))
    assert splits.class_names == ("n01440764", "n01443537")
    assert [len(splits.train), len(splits.val)] == [6, 4]
    assert splits.test is not None
    assert labels(splits.test) == {"test/ILSVRC2012_test_00000001.JPEG": None}


@pytest.mark.parametrize(("height", "width"), [(300, 401), (401, 300), (256, 256), (100, 77)])
def test_test_pixels_of_pictures_are_those_of_torchvision(tmp_path: Path, height: int, width: int) -> None:
    from torchvision.transforms import v2

    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width // 3, height // 3)).resize((width, height)).save(tmp_path / "a.png")
    resize = v2.Resize(int(224 / 0.875), interpolation=v2.InterpolationMode.BICUBIC)
    reference = v2.Compose([resize, v2.CenterCrop(224), v2.PILToTensor()])
    expected = reference(Image.open(tmp_path / "a.png")).float()  # through Pillow
    with torch.device("meta"):
        protocol = mv.create_model("mvitv2_t_224").protocol
    with mv.open_video(tmp_path / "a.png") as video:
        clips, _ = read_test_views(video, protocol)
    assert clips.shape == (1, 3, 1, 224, 224)
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    levels = (clips[0, :, 0] * std + mean) * 255
    difference = (levels - expected).abs()
    assert difference.max() < 1.01  # Pillow rounds its coefficients
    assert (difference > 0.01).float().mean() < 0.05


def test_an_image_model_is_trained_and_evaluated_by_the_same_commands(
    command: Command, tmp_path: Path
) -> None:
    root = imagenet(tmp_path / "i")
    trained = command("train", "experiment=in1k_mvitv2_t", f"data.root={root}", *SMALL_IMAGE_MODEL, *TRAINING)
    assert trained.code == 0, trained.err
    assert "2 classes, 6 training and 4 validation videos" in trained.out
    line = ["weights=run/checkpoints/last.ckpt", "num_workers=0"]
    evaluated = command("eval", "data=imagenet", f"data.root={root}", *line)
    assert evaluated.code == 0, evaluated.err
    predicted = command("predict", str(root / "test"), *line)
    assert predicted.code == 0, predicted.err
    assert "n01443537" in predicted.out


# UCF101 and HMDB51


def ucf101(root: Path, put: PutVideo) -> Path:
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup\r\n2 YoYo\r\n")
    for group, split in (("01", "test"), ("08", "train")):
        lines = []
        for label, name in enumerate(("ApplyEyeMakeup", "YoYo"), start=1):
            path = f"{name}/v_{name}_g{group}_c01.avi"
            put(root / "UCF-101" / path)
            lines.append(f"{path} {label}" if split == "train" else path)
        write(lists / f"{split}list01.txt", "\r\n".join(lines))
    return root


def test_ucf101(tmp_path: Path, a_video: PutVideo) -> None:
    splits = ucf101_splits(ucf101(tmp_path, a_video))
    assert splits.class_names == ("ApplyEyeMakeup", "YoYo")
    names = [f"{name}/v_{name}_g08_c01.avi" for name in splits.class_names]
    assert labels(splits.train) == {names[0]: 0, names[1]: 1}
    assert [video.label for video in splits.val.videos] == [0, 1]
    with fails("trainlist02.txt does not exist"):
        ucf101_splits(tmp_path, fold=2)
    write(tmp_path / "ucfTrainTestlist" / "trainlist01.txt", "YoYo/v_YoYo_g08_c01.avi 1\n")
    with fails("trainlist01.txt, line 1: label 1 isn't 'YoYo' in classInd.txt"):
        ucf101_splits(tmp_path)


def hmdb51(root: Path, put: PutVideo) -> Path:
    for name in ("brush_hair", "wave"):
        lines = []
        for number, mark in enumerate((1, 2, 0)):
            put(root / name / f"{name}_{number}#1.avi")
            lines.append(f"{name}_{number}#1.avi {mark} ")
        write(root / "testTrainMulti_7030_splits" / f"{name}_test_split1.txt", *lines)
    return root


def test_hmdb51(tmp_path: Path, a_video: PutVideo) -> None:
    splits = hmdb51_splits(hmdb51(tmp_path, a_video))
    assert splits.class_names == ("brush_hair", "wave")
    assert labels(splits.train) == {"brush_hair/brush_hair_0#1.avi": 0, "wave/wave_0#1.avi": 1}
    assert labels(splits.val) == {"brush_hair/brush_hair_1#1.avi": 0, "wave/wave_1#1.avi": 1}
    write(tmp_path / "testTrainMulti_7030_splits" / "wave_test_split1.txt", "wave_0.avi 3\n")
    with fails("wave_test_split1.txt, line 1: expected a file name and 0, 1 or 2"):
        hmdb51_splits(tmp_path)
    write(tmp_path / "testTrainMulti_7030_splits" / "wave_test_split1.txt", "\n \n")
    with fails("wave_test_split1.txt marks no video to train on"):
        hmdb51_splits(tmp_path)


@pytest.mark.parametrize("one", ["climb", "kick", "sword"])
def test_hmdb51_classes_are_in_the_order_of_their_names(tmp_path: Path, a_video: PutVideo, one: str) -> None:
    """As in torchvision and `data=folder`: the ends of the files' names would give another."""
    other = {"climb": "climb_stairs", "kick": "kick_ball", "sword": "sword_exercise"}[one]
    for name in (other, one, "wave"):
        for number in range(2):
            a_video(tmp_path / name / f"{number}.avi")
        write(tmp_path / "splits" / f"{name}_test_split1.txt", "0.avi 1\n1.avi 2\n")
    splits = hmdb51_splits(tmp_path)
    assert splits.class_names == (one, other, "wave")
    assert labels(splits.train) == {f"{one}/0.avi": 0, f"{other}/0.avi": 1, "wave/0.avi": 2}


def test_copies_of_hmdb51_splits(tmp_path: Path, a_video: PutVideo) -> None:
    root = hmdb51(tmp_path, a_video)
    folder = root / "testTrainMulti_7030_splits"
    before = hmdb51_splits(root)
    (folder / "._wave_test_split1.txt").write_bytes(b"\0\5\x16\7")
    shutil.copytree(folder, folder / "copy")
    assert hmdb51_splits(root) == before
    write(folder / "copy" / "wave_test_split1.txt", "wave_0#1.avi 2\n")
    with fails("copy/wave_test_split1.txt"):
        hmdb51_splits(root)
    shutil.rmtree(folder / "copy")
    write(folder / "wave_test_split1.txt", "wave_0#1.avi 0\nwave_1#1.avi 0\n")
    with fails("wave_test_split1.txt marks no video to train on"):
        hmdb51_splits(root)
    write(folder / "wave_test_split1.txt", "wave_0#1.avi 1\nwave_0#1.avi 1\n")
    with fails("wave_test_split1.txt, line 2 ('wave/wave_0#1.avi'): it comes twice, first in"):
        hmdb51_splits(root)


def test_names_of_ucf101_with_spaces(tmp_path: Path, a_video: PutVideo) -> None:
    root = ucf101(tmp_path, a_video)
    for split, line in (("train", "YoYo/v YoYo 1.avi 2"), ("test", "YoYo/v YoYo 2.avi")):
        a_video(root / "UCF-101" / line.removesuffix(" 2"))
        write(root / "ucfTrainTestlist" / f"{split}list01.txt", f"{line}\n")
    splits = ucf101_splits(root)
    assert labels(splits.train) == {"YoYo/v YoYo 1.avi": 1}
    assert labels(splits.val) == {"YoYo/v YoYo 2.avi": 1}
    for odd in (f"{'9' * 5000} YoYo", "2  ApplyEyeMakeup"):
        write(root / "ucfTrainTestlist" / "classInd.txt", f"1 ApplyEyeMakeup\n{odd}\n")
        with fails("classInd.txt, line 2"):
            ucf101_splits(root)


def test_ucf101_classes_are_in_the_order_of_their_index(tmp_path: Path, a_video: PutVideo) -> None:
    """classInd.txt has Hammering before HammerThrow, which a sort by bytes has not."""
    for name in ("Hammering", "HammerThrow"):
        for number in range(2):
            a_video(tmp_path / "UCF-101" / name / f"{number}.avi")
    write(tmp_path / "classInd.txt", "1 Hammering\n2 HammerThrow\n")
    write(tmp_path / "trainlist01.txt", "HammerThrow/0.avi 2\nHammering/0.avi 1\n")
    write(tmp_path / "testlist01.txt", "HammerThrow/1.avi\nHammering/1.avi\n")
    assert labels(ucf101_splits(tmp_path).val) == {"HammerThrow/1.avi": 1, "Hammering/1.avi": 0}


@pytest.mark.parametrize(
    ("make", "index"),
    [
        (official_kinetics, partial(kinetics_splits, class_names="kinetics400", max_missing=0.3)),
        (lambda root, _: ssv2_frames(root), partial(ssv2_splits, frame_lists=("train.csv", "val.csv"))),
        (ucf101, ucf101_splits),
        (hmdb51, hmdb51_splits),
    ],
    ids=["kinetics", "frames", "ucf101", "hmdb51"],
)
def test_lists_as_windows_leaves_them(
    tmp_path: Path, a_video: PutVideo, make: Any, index: Callable[[Path], VideoSplits]
) -> None:
    make(tmp_path, a_video)
    before = index(tmp_path)
    for file in [*tmp_path.rglob("*.csv"), *tmp_path.rglob("*.txt")]:
        text = file.read_text().replace("\n", "\r\n") + "\r\n\r\n \r\n"
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte-order mark
    assert index(tmp_path) == before


@pytest.mark.parametrize(
    ("data", "make"), [("ucf101", ucf101), pytest.param("hmdb51", hmdb51, marks=pytest.mark.slow)]
)
def test_fixed_folds_are_trained_on_by_command(
    command: Command, tmp_path: Path, a_video: PutVideo, data: str, make: Callable[[Path, PutVideo], Path]
) -> None:
    root = make(tmp_path / "data", a_video)
    trained = command("train", f"data={data}", f"data.root={root}", *SMALL_MODEL, *TRAINING)
    assert trained.code == 0, trained.err
    assert "2 classes, 2 training and 2 validation videos" in trained.out
    refused = command("train", f"data={data}", f"data.root={root}", "data.fold=4", *SMALL_MODEL)
    assert refused.code == 1
    assert "fold is 4" in refused.err


def test_a_test_folder_beside_val_is_the_test_split(tmp_path: Path, a_video: PutVideo) -> None:
    for name in ("train/a/0.mp4", "train/b/0.mp4", "val/a/0.mp4", "test/x.mp4", "test/y.mp4"):
        a_video(tmp_path / name)
    splits = folder_splits(tmp_path)
    assert splits.test is not None
    assert labels(splits.test) == {"test/x.mp4": None, "test/y.mp4": None}
    a_video(tmp_path / "test" / "b" / "0.mp4")
    splits = folder_splits(tmp_path)
    assert splits.test is not None
    assert labels(splits.test) == {"test/b/0.mp4": 1}


# mvit-data on them


@pytest.mark.parametrize("data", ["kinetics400", "ssv2", "ssv2_frames", "imagenet", "hmdb51"])
def test_each_data_set_can_be_prepared(
    command: Command, tmp_path: Path, a_video: PutVideo, data: str
) -> None:
    root = tmp_path / "root"
    if data in ("ssv2_frames", "imagenet"):
        {"ssv2_frames": ssv2_frames, "imagenet": imagenet}[data](root)
    else:
        {"kinetics400": official_kinetics, "ssv2": official_ssv2, "hmdb51": hmdb51}[data](root, a_video)
    more = ["num_workers=0", "hydra.run.dir=report"]
    result = command("data", "prepare", f"data={data}", f"data.root={root}", *more)
    assert result.code == 0, result.err
    counts = json.loads(Path("report/summary.json").read_text())["splits"]
    assert sum(split["missing"] for split in counts.values()) == (data == "kinetics400")
    assert sum(split["corrupt"] for split in counts.values()) == 0
    checked = command("data", "check", "data=index", f"data.path={root}")
    assert checked.code == 0, checked.err
    kinds = {"kinetics400": kinetics_splits, "ssv2": ssv2_splits, "imagenet": image_folder_splits}
    options: dict[str, object] = {"class_names": data, "max_missing": 0.25} if data == "kinetics400" else {}
    if data in kinds:
        assert index_splits(root, max_missing=0.25) == kinds[data](root, **options)
