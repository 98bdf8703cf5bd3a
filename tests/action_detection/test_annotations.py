"""Box files as PySlowFast reads them (287ec007), and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from from_cvat import read_tracks, rows_of
from videos import write_numbered_video

from mvit_video.action_detection.annotations import (
    ActionSplits,
    action_splits,
    read_actions,
    read_boxes,
    write_boxes,
)
from mvit_video.action_detection.clips import frame_numbers
from mvit_video.errors import DataError
from mvit_video.model import ClipSpec

REFERENCE = Path(__file__).parents[1] / "reference" / "ava"
CASES = json.loads((REFERENCE / "data.json").read_text())["cases"]
ORDERS = {"train": ("vidA", "vidB"), "val": ("vidB", "vidA")}
OWN = "film,2,0.1,0.1,0.5,0.9,1,0\nfilm,2,0.1,0.1,0.5,0.9,3,0\nfilm,1.5,0.2,0.2,0.4,0.4,,0\n"


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PySlowFast's frame lists, and the folders that they name."""
    root = tmp_path_factory.mktemp("ava")
    for split, videos in ORDERS.items():
        lines = ["original_vido_id video_id frame_id path labels"]
        for k, video in enumerate(videos):
            (root / "FRAMES" / video).mkdir(parents=True, exist_ok=True)
            lines += [f'{video} {k} {n} {video}/{video}_{n + 1:06d}.jpg ""' for n in (0, 1, 27029)]
        (root / f"{split}.csv").write_text("\n".join(lines))
    (root / "actions.pbtxt").write_text('item {\n  name: "stand"\n  id: 12\n}\nitem { name: "watch" id: 80 }')
    return root


def official(root: Path, case: dict[str, Any]) -> ActionSplits:
    for name, text in case["files"].items():
        (root / name).write_text(text)
    persons = case["predicted_box_files"]
    return action_splits(
        root,
        train_boxes="gt.csv",
        val_boxes="gt.csv",
        train_persons=persons or None,
        val_persons=persons or None,
        frame_lists=["train.csv", "val.csv"],
        videos="FRAMES",
        class_names="actions.pbtxt",
        min_person_score=case["score_threshold"],
        start_second=900,
        seconds=[902, 1798],
        val_every=4,
    )


@pytest.mark.parametrize("case", [case for case in CASES if "items" in case], ids=lambda case: case["case"])
def test_items_are_the_official_ones(frames: Path, case: dict[str, Any]) -> None:
    splits = official(frames, case)
    index = splits.train if case["mode"] == "train" else splits.val
    if case["mode"] == "val" and not case["full_test_on_val"]:
        index = index.every(splits.val_every)
    assert len(index.key_frames) == len(case["items"])
    for frame, item in zip(index.key_frames, case["items"], strict=True):
        assert (frame.video, frame.second) == (item["video"], item["second"])
        assert [list(box) for box in frame.boxes] == item["boxes"]
        assert [sorted(set(ids)) for ids in frame.class_ids] == item["labels"]
        times = [number / 30 for number in range(27030)]
        numbers = frame_numbers(frame, times, ClipSpec(clip_frames=16, stride=4))
        assert numbers == item["sequence"]
        assert frame.path == str(frames / "FRAMES" / frame.video / f"{frame.video}_[000001-027030].jpg")
    assert splits.num_classes == 80
    assert splits.names == {12: "stand", 80: "watch"}


def test_a_second_out_of_range_is_named(frames: Path) -> None:
    case = next(case for case in CASES if case.get("raises", "").startswith("KeyError"))
    with pytest.raises(DataError, match="second 901 of vidA"):
        official(frames, case)


def own_videos(root: Path, text: str = OWN, **options: Any) -> ActionSplits:
    (root / "boxes.csv").write_text(text)
    return action_splits(root, **({"train_boxes": "boxes.csv", "val_boxes": "boxes.csv"} | options))


@pytest.mark.parametrize(
    ("name", "start"), [("film.mp4", 0), ("some/film.webm", 0), ("c/film_000012_000022.mp4", 12), ("film", 0)]
)
def test_videos_are_found_by_name(tmp_path: Path, name: str, start: float) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"") if path.suffix else path.mkdir()
    splits = own_videos(tmp_path)
    assert [(f.path, f.second, f.start) for f in splits.val.key_frames] == [
        (str(path), 1.5, start),
        (str(path), 2, start),
    ]
    assert splits.class_names == ("1", "2", "3")
    assert splits.val.key_frames[1].class_ids == ((1, 3),)
    assert len(splits.val.ground_truth) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("film,2,0.1,0.1,0.5\n", "line 1"),
        ("film,two,0.1,0.1,0.5,0.9,1,0\n", "'two'"),
        ("film,2,0.1,0.1,nan,0.9,1,0\n", "'nan'"),
        ("film,2,10,10,50,90,1,0\n", "shares"),
        ("film,2,0.5,0.1,0.1,0.9,1,0\n", "x1 <= x2"),
        ("film,2,0.1,0.1,0.5,0.9,run,0\n", "'run'"),
        ("film,2,0.1,0.1,0.5,0.9,9,0\n", "action 9"),
        (f"film,2,0.1,0.1,0.5,0.9,{'9' * 5000},0\n", "'999.*is no number of an action"),
        ("other,2,0.1,0.1,0.5,0.9,1,0\n", "'other'"),
        ("video,second,x1,y1,x2,y2,action\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_rows_that_can_not_be_used_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        own_videos(tmp_path, text, class_names=["a", "b"])
    with pytest.raises(DataError, match="from 1"):
        own_videos(tmp_path, "film,2,0.1,0.1,0.5,0.9,0,0\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "video,second,x1,y1,x2,y2,action,person\n" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace(",", ", ").replace("film", '"film"') + "\n\n",
    ],
    ids=["columns", "Windows", "spaces"],
)
def test_files_of_spreadsheets_are_read(tmp_path: Path, change: Callable[[str], str]) -> None:
    (tmp_path / "film.mp4").write_bytes(b"")
    plain = own_videos(tmp_path)
    (tmp_path / "boxes.csv").write_bytes(change(OWN).encode())
    own = action_splits(tmp_path, train_boxes="boxes.csv", val_boxes="boxes.csv")
    assert own.train == plain.train


def test_boxes_are_written_as_officially(tmp_path: Path) -> None:
    arrays = json.loads((REFERENCE / "map.json").read_text())["arrays"]
    lines = arrays["written_detections_first_rows"]
    (tmp_path / "detections.csv").write_text("\n".join(lines))
    rows = read_boxes(tmp_path / "detections.csv")
    write_boxes(tmp_path / "again.csv", [*rows, ("film", 2.5, 0, 0, 1, 1, None, 0.5)])
    written = (tmp_path / "again.csv").read_text().splitlines()
    assert written[:-1] == lines
    assert written[-1] == "film,2.5,0.000,0.000,1.000,1.000,,0.5000"


def test_both_kinds_of_lists_of_actions(tmp_path: Path) -> None:
    text = (
        'label { name: "hit (a \\"person\\")" label_id: 64 label_type: PERSON_MOVEMENT }\nlabel { name: "x" }'
    )
    (tmp_path / "list.pbtxt").write_text(text)
    assert read_actions(tmp_path / "list.pbtxt") == {64: 'hit (a "person")'}
    (tmp_path / "list.pbtxt").write_text("stand\n")
    with pytest.raises(DataError, match=r"list\.pbtxt"):
        read_actions(tmp_path / "list.pbtxt")


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><name>film</name></task></meta>
<track id="0" label="person" source="manual">
  <box frame="0" outside="0" keyframe="1" xtl="8" ytl="12" xbr="16" ybr="24" z_order="0">
    <attribute name="action">walk, talk</attribute><attribute name="sits">false</attribute></box>
  <box frame="20" outside="1" keyframe="1" xtl="28" ytl="12" xbr="36" ybr="24" z_order="0">
    <attribute name="action">__undefined__</attribute><attribute name="sits">true</attribute></box>
</track>
<track id="1" label="wave" source="manual">
  <box frame="20" outside="0" keyframe="1" xtl="-4" ytl="0" xbr="64" ybr="48" z_order="0"></box></track>
</annotations>"""


def test_exports_of_cvat_become_rows(tmp_path: Path) -> None:
    film = write_numbered_video(tmp_path / "film.mp4", 30, fps=10, height=48, width=64)
    (tmp_path / "annotations.xml").write_text(CVAT)
    names = ["sits", "walk"]
    rows = list(rows_of(read_tracks(tmp_path / "annotations.xml"), film, names))
    assert names == ["sits", "walk", "talk", "wave"]
    first, between = ["0.1250", "0.2500", "0.2500", "0.5000"], ["0.2812", "0.2500", "0.4062", "0.5000"]
    assert rows == [
        ["film", "0", *first, 2, "0"],
        ["film", "0", *first, 3, "0"],
        ["film", "1", *between, 2, "0"],
        ["film", "1", *between, 3, "0"],
        ["film", "2", "0.0000", "0.0000", "1.0000", "1.0000", 4, "1"],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><annotations>&a;</annotations>', "document type"),
        (CVAT.replace('xtl="8"', 'xtl="left"'), "no export"),
        (CVAT[:300], "no export"),
        (CVAT.replace('id="1"', 'id="1" task_id="7"'), "several videos"),
        ("<annotations></annotations>", "no tracks"),
    ],
    ids=["entities", "text", "cut", "project", "empty"],
)
def test_other_files_are_not_taken_for_exports(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "annotations.xml").write_text(text)
    with pytest.raises(DataError, match=message):
        read_tracks(tmp_path / "annotations.xml")
