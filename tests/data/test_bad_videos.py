"""What a job does about videos that can't be read."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
from conftest import Command

from mvit_video.data.bad_videos import BadVideos, allowed_bad_videos
from mvit_video.data.datasets import BadVideo
from mvit_video.errors import ConfigError, DataError
from mvit_video.io.writing import keep_former


def rows(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.reader(lines))


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_run_stops_with_the_first_video_too_many(tmp_path: Path, allowed: int) -> None:
    bad = BadVideos(tmp_path / "bad.csv", allowed=allowed, total=9)
    for number in range(allowed):
        bad.note([BadVideo(f"{number}.mp4", "damaged")] * 2)
        bad.note([])
    with pytest.raises(DataError, match=rf"{allowed + 2} of 9 .*max_bad_videos"):
        bad.note([BadVideo("one, more.mp4", "damaged\nbadly"), BadVideo("last.mp4", "gone")])
    listed = rows(tmp_path / "bad.csv")
    assert listed[0] == ["path", "reason"]
    assert listed[-2:] == [["one, more.mp4", "damaged\nbadly"], ["last.mp4", "gone"]]
    assert len(listed) == allowed + 3


def test_a_resumed_job_counts_those_of_before(tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    BadVideos(file, allowed=2, total=9).note([BadVideo("a.mp4", "damaged"), BadVideo("\udcff=1.mp4", "=2+3")])
    with file.open("a") as torn:
        torn.write("b.mp4,half a li")
    resumed = BadVideos(file, allowed=2, total=9, go_on=True)
    assert rows(file)[2] == ["\\xff=1.mp4", "'=2+3"]  # safe in a spreadsheet
    resumed.note([BadVideo("\udcff=1.mp4", "=2+3")])
    assert len(resumed.found) == 2
    with pytest.raises(DataError, match="3 of 9"):
        resumed.note([BadVideo("b.mp4", "damaged")])
    assert [row[0] for row in rows(file)] == ["path", "a.mp4", "\\xff=1.mp4", "b.mp4"]


def test_several_processes_stop_by_what_they_have_found_together(tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    BadVideos(file, allowed=2, total=9).note([BadVideo("b.mp4", "of a former run")])
    ranks = [BadVideos(file, allowed=2, total=9) for _ in range(3)]
    keep_former(file)  # by the first of them, whenever it gets there
    ranks[0].note([BadVideo("a.mp4", "damaged")])
    ranks[1].note([BadVideo("a.mp4", "damaged"), BadVideo("b.mp4", "damaged")])
    with pytest.raises(DataError, match="3 of 9"):
        ranks[2].note([BadVideo("c.mp4", "damaged")])
    assert ["b.mp4", "damaged"] in rows(file)


@pytest.mark.parametrize(
    ("value", "total", "allowed"), [(0, 9, 0), (3, 9, 3), (0.5, 9, 4), (0.29, 100, 29), (1, 9, 1)]
)
def test_numbers_and_shares_of_bad_videos(value: float, total: int, allowed: int) -> None:
    assert allowed_bad_videos(value, total) == allowed


@pytest.mark.parametrize("value", [-1, 1.5, float("nan"), float("inf")])
def test_broken_numbers_of_bad_videos(value: float) -> None:
    with pytest.raises(ConfigError, match="max_bad_videos"):
        allowed_bad_videos(value, 9)


def test_an_evaluation_stops_where_it_would_fail_anyway(
    command: Command, two_classes: Path, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("cats", "dogs and birds"):
        shutil.copytree(two_classes / name, tmp_path / "data" / "train" / name)
        for number in range(10):
            broken = tmp_path / "data" / "val" / name / f"{number}.mp4"
            broken.parent.mkdir(parents=True, exist_ok=True)
            broken.write_text("no video")
    line = ["data.root=data", f"weights={checkpoint}", "num_workers=0", "hydra.run.dir=run"]
    result = command("eval", *line, "max_bad_videos=2")
    assert result.code == 1
    assert "max_bad_videos" in result.err
    assert len(rows(tmp_path / "run" / "bad_videos.csv")) == 4  # with the header: not all twenty
