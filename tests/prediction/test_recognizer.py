"""The recognizer: loaded once, asked often, by many threads, about files and clips."""

from __future__ import annotations

import doctest
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import mvit_video as mv
from mvit_video.data.index import LabelledVideo
from mvit_video.evaluation.run import score_videos
from mvit_video.prediction import recognizer as module
from mvit_video.prediction.recognizer import prefetch


def test_examples_in_docstrings(checkpoint: Path, two_classes: Path) -> None:
    names = {
        "checkpoint": checkpoint,
        "folder": two_classes,
        "torch": torch,
        "recognizer": mv.Recognizer(checkpoint, topk=2),
    }
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for test in finder.find(module, extraglobs=names):
        runner.run(test)
    assert runner.summarize().attempted >= 6
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_scores_are_those_of_the_evaluation(
    checkpoint: Path, two_classes: Path, tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    (tmp_path / "broken.mp4").write_text("no video")
    files = [tmp_path / "broken.mp4", *sorted(two_classes.rglob("*.*"))[4:9], tmp_path / "broken.mp4"]
    model = mv.load_model(checkpoint)
    batches = []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    recognizer = mv.Recognizer(model, batch_size=batch_size, num_workers=num_workers)
    found = list(recognizer.iterate([str(file) for file in files]))
    assert batches == [min(batch_size, 25 - start) for start in range(0, 25, batch_size)]  # all full
    videos = [LabelledVideo(str(file), None, str(file)) for file in files]
    for prediction, (views, rows) in zip(found, score_videos(model, videos), strict=True):
        assert prediction.path == views.video.path
        assert prediction.error == views.error
        if views.error is None:
            scores = dict(zip(prediction.classes, prediction.scores, strict=True))
            assert [scores[name] for name in recognizer.class_names] == pytest.approx(
                rows.mean(0).tolist(), abs=1e-6
            )


def test_threads_get_their_own_answers(checkpoint: Path, two_classes: Path) -> None:
    recognizer = mv.Recognizer(checkpoint, batch_size=3)
    files = sorted(two_classes.rglob("*.*"))
    alone = {file: recognizer(file)[0] for file in files}
    start = threading.Barrier(4)

    def ask(turn: int) -> bool:
        start.wait()
        order = files[turn * 3 :] + files[: turn * 3]
        return all(
            found.classes == alone[file].classes
            and found.scores == pytest.approx(alone[file].scores, abs=1e-6)
            for file, found in zip(order, recognizer(order), strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_clips_as_tensors(checkpoint: Path, two_classes: Path) -> None:
    recognizer = mv.Recognizer(checkpoint, num_clips=1)
    file = two_classes / "cats" / "5.mp4"
    with mv.open_video(file) as video:
        (indices,) = mv.kinetics_frame_indices(video.num_frames, video.fps, clip_frames=8, num_clips=1)
        frames = video.get_frames(indices)
    (from_file,), (from_frames,) = recognizer(file), recognizer(frames.transpose(0, 1)[None])
    assert from_frames.scores == pytest.approx(from_file.scores, abs=1e-6)
    torch.testing.assert_close(recognizer.embed(file), recognizer.embed(frames.transpose(0, 1)[None]))
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        recognizer(frames)


def test_embeddings_find_the_same_video_again(checkpoint: Path, two_classes: Path, tmp_path: Path) -> None:
    recognizer = mv.Recognizer(checkpoint)
    vectors = recognizer.embed(two_classes)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(12))
    query = recognizer.embed(two_classes / "cats" / "3.mp4")
    assert (vectors @ query[0]).argmax() == 3
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(mv.VideoError, match="broken"):
        recognizer.embed(tmp_path / "broken.mp4")


@pytest.mark.parametrize("wrong", [{"topk": 0}, {"batch_size": 0}, {"num_workers": -1}, {"num_crops": 2}])
def test_numbers_out_of_range(checkpoint: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mv.Recognizer(checkpoint, **wrong)


def test_the_thread_ahead_keeps_order_errors_and_ends() -> None:
    closed = threading.Event()

    def numbers(count: int, wait: threading.Event | None = None) -> Iterator[int]:
        try:
            yield from range(count)
            if wait is not None:
                wait.set()
            if count == 5:
                raise mv.VideoError("a.mp4", "gone")
        finally:
            closed.set()

    assert list(prefetch(numbers(100), 3)) == [*range(100)]
    found = prefetch(numbers(5), 2)
    assert [next(found) for _ in range(5)] == [*range(5)]
    with pytest.raises(mv.VideoError, match="gone"):
        next(found)
    closed.clear()
    early = prefetch(numbers(1000), 2)
    next(early)
    early.close()
    assert closed.wait(5)
    all_made = threading.Event()
    late = prefetch(numbers(50, all_made), 1, drop=True)
    first = next(late)
    assert all_made.wait(5)
    found = [first, *late]
    assert found == sorted(set(found))
    assert found[-1] == 49
    assert len(found) <= 3
