"""Average precision of actions against the figures of both official evaluators."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from mvit_video.action_detection import mean_average_precision

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


def test_without_truth_there_is_no_mean() -> None:
    mean, precisions = mean_average_precision([], [("v", 902, 0, 0, 1, 1, 3, 0.5)], class_ids=[3])
    assert math.isnan(mean)
    assert precisions == {3: None}


@pytest.mark.parametrize("wrong", [{"order": "best"}, {"detections": [("v", 902, 0, 0, 1, 1, 3, math.nan)]}])
def test_what_can_not_be_ranked_is_refused(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"ground_truth": [], "detections": [], "class_ids": [3]}
    with pytest.raises(ValueError, match=r"order|score"):
        mean_average_precision(**(arguments | wrong))
