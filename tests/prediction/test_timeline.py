"""Long and live videos through windows: the right frames, bounded memory, segments, what is drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import Command
from videos import numbered_frame, read_number, remux, repeat, write_numbered_video, write_video

import mvit_video as mv
from mvit_video.data.pixels import resize_for_test
from mvit_video.prediction.prediction import Segment
from mvit_video.prediction.render import annotate_video, plot_timeline
from mvit_video.prediction.saving import write_subtitles
from mvit_video.prediction.stream import iter_windows
from mvit_video.prediction.timeline import Timeline


def numbers(window) -> list[int | None]:
    return [read_number(frame) for frame in window.get_frames(range(window.num_frames))]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".webm"])
def test_windows_hold_the_frames_shown_in_them(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = write_numbered_video(tmp_path / f"v{suffix}", 53, fps=10, codec=codec, audio_seconds=1)
    windows = [(w.start, w.end, numbers(w)) for w in iter_windows(str(path), length=2, stride=1.5)]
    assert [shown for _, _, shown in windows] == [[*range(s, min(s + 20, 53))] for s in (0, 15, 30, 45)]
    assert [start for start, _, _ in windows] == [0, 1.5, 3, 4.5]
    assert [end for _, end, _ in windows] == pytest.approx([2, 3.5, 5, 5.3], abs=1e-3)


def test_windows_become_pictures_on_their_device(tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "v.mp4", 20, fps=10)
    for window in iter_windows(path, length=1, stride=1, device=torch.device("meta")):
        frames = window.get_frames([0, 9, 4])
        assert (frames.device.type, frames.dtype, frames.shape) == ("meta", torch.uint8, (3, 3, 120, 160))


@pytest.mark.gpu
def test_windows_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "v.mp4", 20, fps=10)
    windows = iter_windows(path, length=1, stride=1, device=torch.device("cuda"))
    for window, other in zip(windows, iter_windows(path, length=1, stride=1), strict=True):
        frames = window.get_frames(range(10))
        assert frames.device.type == "cuda"
        assert (frames.cpu().int() - other.get_frames(range(10)).int()).abs().max() <= 3


def test_windows_larger_than_half_of_the_memory_are_refused(
    predict: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_numbered_video(tmp_path / "good.mp4", 20, fps=10)
    with av.open(str(good)) as container:
        frame = next(container.decode(video=0))
    size = sum(plane.buffer_size for plane in frame.planes)
    monkeypatch.setattr("mvit_video.prediction.stream.memory_limit", lambda: 2 * 15 * size)
    assert len(list(iter_windows(good, length=1.0, stride=1.0))) == 2
    with pytest.raises(mv.VideoError, match="shorter window"):
        list(iter_windows(good, length=2.0, stride=1.0))
    result = predict(str(good), "window=2", "format=jsonl")
    assert "shorter window" in json.loads(result.out.splitlines()[-1])["error"]


def test_frames_are_shrunk_before_they_fill_the_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered_video(tmp_path / "large.mp4", 20, fps=10, height=480, width=640)
    recognizer = mv.Recognizer(checkpoint)
    whole = recognizer.timeline(path, length=1.5, stride=0.5)
    monkeypatch.setattr("mvit_video.prediction.stream.memory_limit", lambda: 8_000_000)  # of 17 frames
    with pytest.raises(mv.VideoError, match="shorter window"):
        list(iter_windows(path, length=1.5, stride=0.5))
    shrunk = recognizer.timeline(path, length=1.5, stride=0.5)
    assert shrunk.spans == whole.spans
    torch.testing.assert_close(shrunk.scores, whole.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(480, 640), (960, 1280)])
def test_a_window_holds_its_frames_at_the_model_s_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    height, width = size
    path = write_numbered_video(tmp_path / "large.mp4", 30, fps=10, height=height, width=width)
    whole = bytes_of(next(iter_windows(path, length=3, stride=3))._pictures[0])
    assert whole >= height * width * 3 // 2  # yuv420p
    monkeypatch.setattr("mvit_video.prediction.stream._WHOLE_BYTES", 4 * whole)
    shrink = partial(resize_for_test, spec=mv.ClipSpec(clip_frames=4, stride=1, short_side=48, crop=32))
    largest = 0
    for window in iter_windows(path, length=2.0, stride=0.5, transform=shrink):
        held = [bytes_of(picture) for picture in window._pictures]
        assert held.count(whole) <= 4
        largest = max(largest, sum(held))
        assert window.get_frames([0, window.num_frames - 1], transform=shrink).shape == (2, 3, 48, 64)
    shrunk = 4 * 3 * 48 * 64  # floats
    assert largest == 20 * shrunk


def bytes_of(picture: torch.Tensor | av.VideoFrame) -> int:
    if isinstance(picture, torch.Tensor):
        return picture.untyped_storage().nbytes()
    return sum(plane.buffer_size for plane in picture.planes)


def test_windows_of_short_files_gaps_and_odd_strides(tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "v.mp4", 3, fps=10)
    assert [numbers(w) for w in iter_windows(path, length=2, stride=1)] == [[0, 1, 2]]
    seconds = [0, 0.1, 0.2, 7.0, 7.1, 7.9]  # nothing is shown for long
    frames = (numbered_frame(i) for i in range(6))
    path = write_video(tmp_path / "gap.mp4", frames, times=seconds)
    found = [(w.start, numbers(w)) for w in iter_windows(path, length=1, stride=0.5)]
    assert found == [(0, [0, 1, 2]), (6.5, [3, 4]), (7, [3, 4, 5])]
    path = write_numbered_video(tmp_path / "sparse.mp4", 40, fps=10)
    found = [(w.start, numbers(w)) for w in iter_windows(path, length=0.5, stride=2)]
    assert found == [(0, [*range(5)]), (2, [*range(20, 25)])]
    for length, stride in ((0, 1), (1e-300, 1), (1, 1e-300)):
        with pytest.raises(mv.ConfigError, match="at least"):
            next(iter_windows(path, length=length, stride=stride))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_windows_cut_out_by_hand(
    checkpoint: Path, tmp_path: Path, batch_size: int
) -> None:
    pictures = [
        np.random.default_rng(i // 7).integers(256, size=(48, 64, 3), dtype=np.uint8) for i in range(70)
    ]
    lossless = {"codec": "ffv1", "pix_fmt": "bgr0", "fps": 20}
    whole = write_video(tmp_path / "whole.mkv", iter(pictures), **lossless)
    recognizer = mv.Recognizer(checkpoint, num_clips=2, batch_size=batch_size)
    timeline = recognizer.timeline(whole, length=1, stride=0.5)
    assert len(timeline.spans) == 6
    for index, scores in enumerate(timeline.scores):
        cut = write_video(tmp_path / "cut.mkv", iter(pictures[10 * index : 10 * index + 20]), **lossless)
        (by_hand,) = recognizer(cut)
        told = dict(zip(by_hand.classes, by_hand.scores, strict=True))
        assert [told[name] for name in recognizer.class_names] == pytest.approx(scores.tolist(), abs=1e-5)


def test_smoothing_and_segments() -> None:
    a = torch.tensor([0.9, 0.8, 0.1, 0.9, 0.9, 0.2, 0.2, 0.4])
    spans = [(float(i), i + 2.0) for i in range(7)] + [(20.0, 22.0)]  # a gap before the last
    line = Timeline("v.mp4", ("a", "b"), spans, torch.stack([a, 1 - a], 1), 1.0)
    found = [(s.start, s.end, s.class_name, round(s.score, 3)) for s in line.segments()]
    assert found == [
        (0, 2.5, "a", 0.85),
        (2.5, 3.5, "b", 0.9),
        (3.5, 5.5, "a", 0.9),
        (5.5, 8, "b", 0.8),
        (20, 22, "b", 0.6),
    ]
    smooth = line.smoothed(2.0)
    means = [a[max(i - 1, 0) : min(i + 2, 7)].mean().item() for i in range(7)]
    assert smooth.scores[:7, 0].tolist() == pytest.approx(means)
    assert smooth.scores[7, 0] == pytest.approx(0.4)  # far from all others
    assert [s.class_name for s in smooth.segments()] == ["a", "b", "b"]
    assert [(s.start, s.class_name) for s in line.segments(min_score=0.85)] == [
        (0, "a"),
        (2.5, "b"),
        (3.5, "a"),
    ]
    assert line.smoothed(0.5) is line


def test_windows_of_several_classes_have_segments_that_overlap(tmp_path: Path) -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.2, 0.6], [0.1, 0.2]])
    spans = [(float(i), i + 1.0) for i in range(4)]
    line = Timeline("v.mp4", ("a", "b"), spans, scores, 1.0, multi_label=True)
    found = [(s.start, s.end, s.class_name, round(s.score, 3)) for s in line.segments()]
    assert found == [(0, 2, "a", 0.85), (1, 3, "b", 0.65)]
    assert [s.class_name for s in line.segments(0.65)] == ["a", "b"]
    assert line.segments(0.75) == line.segments(0.65)[:1]
    plot_timeline(line, line.segments(), tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 5000
    source = write_numbered_video(tmp_path / "a.mp4", 30, fps=10, height=96, width=128)
    with mv.open_video(annotate_video(str(source), line.segments(), tmp_path / "b.mp4")) as video:
        frames = video.get_frames([5, 15, 25]).float()  # of one class, of two, of one
    one, two, other = (frames[:, 0] - frames[:, 2] > 60).any(2).sum(1).tolist()  # rows with a yellow bar
    assert two > 1.5 * one > 0
    assert other == one


def test_subtitles(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text("of a film")
    segments = [Segment(0, 2.5, "cats & <dogs>", 0.934), Segment(3599.9996, 3661.25, "birds", 0.5)]
    write_subtitles(segments, tmp_path / "a", ["srt"])
    assert (tmp_path / "a.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:02,500\ncats & <dogs> (93%)\n\n"
        "2\n01:00:00,000 --> 01:01:01,250\nbirds (50%)\n"
    )
    for _ in range(2):
        write_subtitles(segments, tmp_path / "a", ["vtt"])
    text = (tmp_path / "a.vtt").read_text()
    assert text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\ncats &amp; &lt;dogs&gt; (93%)\n\n")
    with av.open(str(tmp_path / "a.vtt")) as file:  # FFmpeg reads it
        assert [float(p.pts * p.time_base) for p in file.demux() if p.pts is not None] == [0, 3600]
    assert (tmp_path / "a.srt.former").read_text() == "of a film"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv"])
def test_annotated_copies_keep_pictures_times_and_sound(tmp_path: Path, suffix: str) -> None:
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(suffix, "libx264")
    source = write_numbered_video(
        tmp_path / f"v{suffix}",
        30,
        fps=10,
        audio_seconds=3,
        codec=codec,
        height=121 if suffix == ".mkv" else 120,
        pix_fmt="yuv444p" if suffix == ".mkv" else "yuv420p",
    )
    copy = annotate_video(str(source), [Segment(1, 2, "walking the dog", 0.5)], tmp_path / "out.mp4")
    packets = []
    for path in (source, copy):
        with av.open(str(path)) as file:
            packets.append([bytes(p) for p in file.demux(audio=0) if p.size])
    assert packets[0] == packets[1]
    with mv.open_video(source) as before, mv.open_video(copy) as after:
        assert after.num_frames == before.num_frames == 30
        assert after.frame_time(29) == pytest.approx(before.frame_time(29), abs=0.01)
        old = before.get_frames(range(30))[:, :, :120].float()
        new = after.get_frames(range(30)).float()
    assert new.shape == old.shape
    changed = (new - old).abs().mean(1)  # (30, H, W)
    assert changed[:, :90].mean() < 6
    lower = changed[:, 105:].mean((1, 2))
    assert lower[10:20].min() > 20
    assert max(lower[:10].max(), lower[20:].max()) < 6
    bar = new[15, :, -1].permute(1, 0)  # amber on the left half only
    assert (bar[:70, 0] > 150).all()
    assert (bar[90:, 0] < 120).all()


def test_a_run_keeps_what_others_left_and_the_decoder_s_limits(
    predict: Command, two_classes: Path, tmp_path: Path
) -> None:
    """Pictures and copies of the same name become .former; the copy refuses what the decoder refuses."""
    names = ["0.annotated.mp4", "0.timeline.png", "0.srt"]
    (tmp_path / "saved").mkdir()
    for name in names:
        (tmp_path / "saved" / name).write_text("mine")
    arguments = [two_classes / "cats" / "0.mp4", "window=1", "save=[srt,png,video]"]
    for _ in range(2):  # the second writes the same, which leaves nothing behind
        assert predict(*arguments).code == 0
    former = {path.name for path in (tmp_path / "saved").iterdir()}
    assert former == {*names, *(f"{name}.former" for name in names)}
    assert {(tmp_path / "saved" / f"{name}.former").read_text() for name in names} == {"mine"}
    with pytest.raises(mv.VideoError, match="max_pixels"):
        annotate_video(str(arguments[0]), [], tmp_path / "a.mp4", max_pixels=100)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mvit_video.prediction.saving.annotate_video", lambda *_, max_pixels: seen.append(max_pixels)
        )
        assert predict(*arguments, "decoder.max_pixels=5000").code == 0
    assert seen == [5000]


def test_a_copy_that_can_not_be_written_costs_no_answer(
    predict: Command, two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise av.error.OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["mvit_video.prediction.render"], "_copy_with_labels", full)
    arguments = [two_classes / "cats" / "0.mp4", "window=1", "save=[srt,video]"]
    result = predict(*arguments, "format=jsonl")
    assert result.code == 0, result.err
    assert json.loads(result.out)["segments"]
    assert "No space left" in result.err
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["0.srt"]
    result = predict("-", *arguments[1:])
    assert result.code == 1
    assert "pipe" in result.err


def test_the_command_leaves_all_of_it(predict: Command, two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    options = ["window=0.5", "save=[png,srt,vtt,video]", "smoothing=1", "output=a.jsonl", "per_clip=true"]
    result = predict(two_classes / "cats", "broken.mp4", *options)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [bool(line["error"]) for line in lines] == [False] * 6 + [True]
    for line in lines[:6]:
        assert line["segments"][0]["start"] == 0
        assert line["segments"][-1]["end"] == pytest.approx(line["clips"][-1]["end"])
        starts = [clip["start"] for clip in line["clips"]]
        assert starts == [0.25 * i for i in range(len(starts))]
    saved = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert len(saved) == 6 * 4
    assert len([p for p in saved if p.suffix == ".png" and p.read_bytes().startswith(b"\x89PNG")]) == 6


@pytest.mark.parametrize(
    "arguments", [["save=[png]"], ["window=1", "save=[gif]"], ["live=true"], ["window=-1"]]
)
def test_what_does_not_fit_is_said(predict: Command, two_classes: Path, arguments: list[str]) -> None:
    result = predict(two_classes, *arguments)
    assert result.code == 1
    assert result.err.count("\n") <= 2
    assert "window" in result.err or "gif" in result.err


def test_a_pipe_is_seen_live(checkpoint: Path, tmp_path: Path) -> None:
    path = write_numbered_video(tmp_path / "v.ts", 100, fps=25, height=48, width=64, options={"g": "10"})
    code = "from mvit_video.cli.main import predict; predict()"
    options = ["window=1", "stride=1", "live=true", "topk=1", "format=jsonl"]
    arguments = [sys.executable, "-c", code, "-", f"weights={checkpoint}", *options]
    with path.open("rb") as pipe:
        done = subprocess.run(
            arguments, stdin=pipe, capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["start"] for line in lines] == [0, 1, 2, 3]
    assert {line["classes"][0] for line in lines} <= {"cats", "dogs and birds"}


@pytest.mark.parametrize("kind", ["growing file", "pipe"])
def test_windows_come_while_the_source_still_grows(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    data = write_numbered_video(
        tmp_path / "v.ts", 250, fps=25, height=48, width=64, options={"g": "10", "bf": "0"}
    ).read_bytes()
    recognizer = mv.Recognizer(checkpoint, num_clips=1, batch_size=1)
    if kind == "pipe":
        reading, writing = os.pipe()
        source, out = os.fdopen(reading, "rb", buffering=0), os.fdopen(writing, "wb", buffering=0)
        follow = None
    else:
        source, out = str(tmp_path / "live.ts"), (tmp_path / "live.ts").open("wb", buffering=0)
        follow = 1.5
    said = deque()
    out.write(data[: len(data) // 2])

    def watch() -> None:
        for clip in recognizer.watch(source, length=1, stride=1, follow=follow):
            said.append((clip.start, time.monotonic()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    deadline = time.monotonic() + 20
    while len(said) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    grown = time.monotonic()
    out.write(data[len(data) // 2 :])
    out.close()
    watcher.join(timeout=30)
    assert [start for start, _ in said] == [*range(10)]
    assert said[1][1] < grown < said[-1][1]


def test_a_stream_over_the_network(checkpoint: Path, tmp_path: Path) -> None:
    data = write_numbered_video(tmp_path / "v.ts", 75, fps=25, height=48, width=64).read_bytes()
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(data)

        sender = threading.Thread(target=send)
        sender.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        clips = list(mv.Recognizer(checkpoint, num_clips=1).watch(address, length=1, stride=1))
        sender.join()
    assert [clip.start for clip in clips] == [0, 1, 2]
    with pytest.raises(mv.VideoError, match="can't be opened"):
        next(mv.Recognizer(checkpoint).watch(address, length=1, stride=1))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(checkpoint: Path, tmp_path: Path) -> None:
    """An hour of video peaks where five minutes do (each in a process of its own)."""
    source = write_numbered_video(tmp_path / "minute.mp4", 300, fps=5, height=48, width=64)
    code = (
        "import sys, re, pathlib, mvit_video as mv;"
        f"r = mv.Recognizer({str(checkpoint)!r}, num_clips=1);"
        "print(len(r.timeline(sys.argv[1], length=2, stride=2).spans),"
        "re.search(r'VmHWM:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])"
    )
    found = []
    for minutes in (5, 60):
        path = remux(source, tmp_path / f"{minutes}.mp4", partial(repeat, times=minutes))
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        found.append([int(word) for word in done.stdout.split()])
    (short, short_peak), (long, long_peak) = found
    assert (short, long) == (150, 1800)
    # KiB: holding on to the other 1,650 windows would take 76,000 for their frames, 650,000 for their clips.
    assert long_peak < short_peak + 50_000
