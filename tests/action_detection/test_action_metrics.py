"""Average precision of actions against the figures of both official evaluators."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mvit_video as mv
from mvit_video.action_detection import mean_average_precision
from mvit_video.action_detection.annotations import ActionIndex, KeyFrame
from mvit_video.action_detection.evaluation import Scored, detections_of
from mvit_video.action_detection.training import ActionDetectorTraining

CASES = json.loads((Path(__file__).parents[1] / "reference" / "ava" / "map.json").read_text())["cases"]
CLASS_IDS = (1, 3, 4, 7, 12, 79, 80)


def rows(text: str | None) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text or "")))


@pytest.mark.parametrize("order", ["file", "score"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_figures_are_the_official_ones(case: dict[str, Any], order: Any) -> None:
    expected = case["expected_pyslowfast" if order == "file" else "expected_activitynet"]
    mean, precisions = mean_average_precision(
        rows(case["groundtruth_csv"]),
        rows(case["detections_csv"]),
        class_ids=CLASS_IDS,
        excluded=rows(case["exclusions_csv"]),
        order=order,
    )
    assert mean == pytest.approx(expected["mAP"], abs=1e-9)
    assert precisions.keys() == {int(number) for number in expected["AP"]}
    for number, precision in expected["AP"].items():
        assert precisions[int(number)] == (None if precision is None else pytest.approx(precision, abs=1e-9))


def test_frames_may_come_in_any_order() -> None:
    case = CASES[1]
    detections = rows(case["detections_csv"])
    shuffled = random.Random(0).sample(detections, len(detections))
    truth = rows(case["groundtruth_csv"])
    by_score = [
        mean_average_precision(truth, some, class_ids=CLASS_IDS, order="score")
        for some in (detections, shuffled)
    ]
    assert by_score[0] == by_score[1]


def test_truth_needs_no_last_column() -> None:
    found, true = ("v", 902, 0, 0, 1, 1, 3, 0.5), ("v", 902, 0, 0, 1, 1, 3)
    for truth in (true, (*true, None), (*true, 7)):
        assert mean_average_precision([truth], [found], class_ids=[3]) == (1.0, {3: 1.0})


def test_without_truth_there_is_no_mean() -> None:
    mean, precisions = mean_average_precision([], [("v", 902, 0, 0, 1, 1, 3, 0.5)], class_ids=[3])
    assert math.isnan(mean)
    assert precisions == {3: None}


@pytest.mark.parametrize("wrong", [{"order": "best"}, {"detections": [("v", 902, 0, 0, 1, 1, 3, math.nan)]}])
def test_what_can_not_be_ranked_is_refused(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"ground_truth": [], "detections": [], "class_ids": [3]}
    with pytest.raises(ValueError, match=r"order|score"):
        mean_average_precision(**(arguments | wrong))


NAMES = {1: "walk", 2: "talk"}
CASE = [  # boxes and scores of key frames, in the order of their files, which isn't that of their names
    ("z", 903.0, ((0.1, 0.1, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)), [[0.5, 0.5], [0.5, 0.25]]),
    ("z", 904.0, ((0.1, 0.1, 0.4, 0.4),), [[0.5, 0.75]]),
    ("a", 902.0, ((0.2, 0.1, 0.4, 0.4), (0.5, 0.2, 0.9, 0.9)), [[0.5, 0.5], [0.75, 0.5]]),
    ("m", 902.0, ((0.3, 0.1, 0.4, 0.4),), [[0.5, 0.5]]),
]
SCORED = [
    Scored(KeyFrame(video, video, second, 0.0, boxes, tuple((1,) for _ in boxes)), torch.tensor(scores))
    for video, second, boxes, scores in CASE
]
TRUTH = [("z", 903.0, *CASE[0][2][1], 1), ("z", 904.0, *CASE[1][2][0], 1), ("a", 902.0, *CASE[2][2][0], 1)]
TRUTH += [("z", 904.0, *CASE[1][2][0], 2), ("a", 902.0, *CASE[2][2][1], 2)]


def validated(rank: int, size: int) -> float:
    """The mAP that a process logs which has scored every ``size``-th key frame."""
    small: dict[str, Any] = {"embed_dim": 8, "stages": (1, 1), "crop_size": 32, "num_frames": 4}
    model = mv.create_action_detector("mvitv2_nano_8x4", num_classes=2, **small)
    module = ActionDetectorTraining(model, optimizer=torch.optim.SGD, lr=0.1)
    module.validation = ActionIndex(tuple(one.key_frame for one in SCORED), tuple(TRUTH))
    module.names, module._scored = NAMES, SCORED[rank::size]
    logged: dict[str, float] = {}
    module.log = logged.__setitem__  # type: ignore[assignment,method-assign]
    trainer = {"world_size": size, "global_rank": rank, "sanity_checking": False}
    module._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    module.val_means.add({"val/loss": torch.tensor(0.5)}, 1)
    module.on_validation_epoch_end()
    return logged["val/mAP"]


@pytest.mark.parametrize("size", [2, 3])
def test_equal_scores_are_ranked_alike_whoever_gave_them(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    expected, _ = mean_average_precision(TRUTH, detections_of(SCORED, NAMES), class_ids=NAMES, order="file")
    assert 0 < expected < 1
    assert validated(0, 1) == expected
    parts = [{one.key: one for one in SCORED[rank::size]} for rank in range(size)]
    monkeypatch.setattr("mvit_video.data.ranks.Ranks.all_gather", lambda *_: parts[::-1])
    assert validated(0, size) == expected


def gather(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    (folder / f"{rank}.txt").write_text(repr(validated(rank, 2)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=gather, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2)] == [validated(0, 1)] * 2
