"""A file is read whole once: after that, opening it and decoding a clip cost the same for any length."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from test_decode import X264, numbers, settle
from videos import remux, repeat, write_numbered_video

from mvit_video.data.decode import index_cache, open_video
from mvit_video.data.decode.reader import PacketReader


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "_memory", index_cache._Memory())


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read whole."""
    paths: list[str] = []
    read = PacketReader.read_all

    def noted(reader: PacketReader) -> Any:
        paths.append(reader._path)
        return read(reader)

    monkeypatch.setattr(PacketReader, "read_all", noted)
    return paths


def test_a_changed_file_is_read_again(tmp_path: Path, num_read: list[str]) -> None:
    path = write_numbered_video(tmp_path / "a.mp4", 20)
    with open_video(path):
        pass
    write_numbered_video(path, 30)  # within a tick of the clock that files are stamped with
    with open_video(path) as video:
        assert video.num_frames == 30
    settle(path)
    for _ in range(2):
        with open_video(path, index_cache=str(tmp_path / "kept")) as video:
            assert video.num_frames == 30
    content = path.read_bytes()
    write_numbered_video(path, 25)
    with open_video(path, index_cache=str(tmp_path / "kept")) as video:
        assert video.num_frames == 25
    assert len(num_read) == 4
    assert len(content) != path.stat().st_size


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_index_is_made_anew(
    tmp_path: Path, damage: bytes | None, num_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered_video(tmp_path / "a.mp4", 20)
    settle(path)
    for _ in range(2):
        with open_video(path, index_cache=str(tmp_path / "kept")) as video:
            assert numbers(video.get_frames([19, 3])) == [19, 3]
        (file,) = (tmp_path / "kept").rglob("*.npz")
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage is None else damage)
        monkeypatch.setattr(index_cache, "_memory", index_cache._Memory())
    assert len(num_read) == 2


Change = Callable[[Any], Any]

# What an archive of whole parts may hold: (part, or key of the part "about"), what becomes of it.
CONTRADICTIONS: dict[str, tuple[str, Change]] = {
    "fewer columns": ("packets", lambda steps: steps[:3]),
    "no packets": ("packets", lambda steps: steps[:, :0]),
    "no numbers": ("packets", lambda steps: steps.astype(str)),
    "times that fall": ("packets", lambda steps: -steps),
    "a size that the file doesn't have": ("size", lambda size: 10**9),
    "a size that is text": ("size", lambda size: "/etc"),
    "a version to come": ("version", lambda made_with: [made_with[0] + 1, *made_with[1:]]),
    "another FFmpeg": ("version", lambda made_with: [*made_with[:2], "7.0.1"]),
    "no stamp": ("stamp", lambda stamp: [1]),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_index_that_contradicts_itself_is_made_anew(
    tmp_path: Path, name: str, num_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered_video(tmp_path / "a.mp4", 20, options=X264 | {"g": "5"})
    settle(path)
    with open_video(path, index_cache=tmp_path / "kept"):
        pass
    (file,) = (tmp_path / "kept").rglob("*.npz")
    with np.load(file) as archive:
        parts = dict(archive)
    key, change = CONTRADICTIONS[name]
    if key in parts:
        parts[key] = change(parts[key])
    else:
        about = json.loads(parts["about"].tobytes())
        about[key] = change(about[key])
        parts["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(file, **parts)
    monkeypatch.setattr(index_cache, "_memory", index_cache._Memory())
    with open_video(path, index_cache=tmp_path / "kept") as video:
        assert numbers(video.get_frames(range(20))) == list(range(20))
    assert len(num_read) == 2


@pytest.mark.parametrize("folder", ["a_file", "a_file/in_it", "null\0byte"])
def test_where_indices_can_not_be_kept_is_said_once(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("x")
    for number in range(3):
        path = write_numbered_video(tmp_path / f"{number}.mp4", 5)
        settle(path)
        with open_video(path, index_cache=folder) as video:
            assert video.num_frames == 5
    assert len([record for record in caplog.records if "can't be kept" in record.getMessage()]) == 1


def test_the_folder_may_be_given_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_numbered_video(tmp_path / "a.mp4", 5)
    settle(path)
    with open_video(path, index_cache="~/kept"):
        pass
    assert list((tmp_path / "kept").rglob("*.npz"))


def test_memory_of_kept_indices_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "_MAX_FRAMES", 50)
    for number in range(4):
        path = write_numbered_video(tmp_path / f"{number}.mp4", 20)
        settle(path)
        with open_video(path):
            pass
    assert index_cache._memory._num_frames == 40
    assert len(index_cache._memory._entries) == 2


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_clip_of_a_long_file_costs_no_more(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds against ten minutes: in packets, and in memory but for a few bytes a frame."""
    options = X264 | {"g": "25", "bf": "2"}
    short = write_numbered_video(tmp_path / "base.mp4", 50, height=64, width=64, options=options)
    demuxed = [0]
    demux = PacketReader._demux

    def counted(reader: PacketReader, container: Any) -> Any:
        for packet in demux(reader, container):
            demuxed[0] += 1
            yield packet

    monkeypatch.setattr(PacketReader, "_demux", counted)
    costs, peaks, kept = [], [], tmp_path / "kept"
    for repeats in (5, 300):
        path = remux(short, tmp_path / f"{repeats}{suffix}", partial(repeat, times=repeats))
        settle(path)
        tracemalloc.start()
        with open_video(path, index_cache=kept) as video:
            video.get_frames([0])
        monkeypatch.setattr(index_cache, "_memory", index_cache._Memory())
        demuxed[0] = 0
        for share in (0.1, 0.35, 0.6, 0.85):
            with open_video(path, index_cache=kept) as video:
                assert video.num_frames == 50 * repeats
                start = int(share * video.num_frames)
                indices = list(range(start, start + 32, 2))
                assert numbers(video.get_frames(indices)) == [index % 50 for index in indices]
        costs.append(demuxed[0])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert costs[1] <= 1.5 * costs[0]
    assert peaks[1] - peaks[0] < 200 * video.num_frames
    assert sum(file.stat().st_size for file in kept.rglob("*.npz")) < 3 * 15_250


def test_prepare_keeps_the_indices_for_later_runs(
    command: Command,
    two_classes: Path,
    tmp_path: Path,
    num_read: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [file for file in two_classes.rglob("*") if file.is_file()]
    for file in files:
        settle(file)
    kept = tmp_path / "kept"
    command(
        *("data", "prepare", "data=folder", f"data.root={two_classes}", f"index={tmp_path / 'i.parquet'}"),
        *(f"index_cache={kept}", "num_workers=0"),
    )
    assert len(num_read) == len(files)
    monkeypatch.setattr(index_cache, "_memory", index_cache._Memory())
    for file in files:
        with open_video(file, index_cache=str(kept)) as video:
            assert video.get_frames([video.num_frames - 1]).shape[0] == 1
    assert len(num_read) == len(files)
