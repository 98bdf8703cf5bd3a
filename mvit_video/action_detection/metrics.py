"""Frame-level mean average precision of boxes with actions, as on AVA.

Two evaluators are in use, which differ where a person has several boxes of one class, or a frame very many:
PySlowFast's (``utils/ava_eval_helper.py`` and ``ava_evaluation`` at 287ec007) and the ActivityNet challenge's
(``Evaluation/get_ava_performance.py`` of activitynet/ActivityNet at 1212804).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IOU_THRESHOLD = 0.5

Row = Sequence[Any]  # video, second, x1, y1, x2, y2, class id, score (or nothing, in the ground truth)
Moment = tuple[str, float]  # video and second
_Entry = tuple[float, int, float, float, float, float]  # score, class id, y1, x1, y2, x2


def mean_average_precision(
    ground_truth: Iterable[Row],
    detections: Iterable[Row],
    *,
    class_ids: Iterable[int],
    excluded: Iterable[Sequence[Any]] = (),
    order: Literal["score", "file"] = "score",
    max_per_frame: int = 50,
) -> tuple[float, dict[int, float | None]]:
    """Mean over the classes of the average precision at an IoU of 0.5 (Pascal VOC's, all points).

    A detection is right where the true box that it overlaps most has an IoU of at least 0.5 with it and
    wasn't found by an earlier one. A class that is never true has no average precision, and one that is never
    detected 0. Detections without an area count for nothing.

    Args:
        ground_truth, detections: rows of video, second, x1, y1, x2, y2 (of any unit), class id, score. The
            last may be left out of the ground truth.
        class_ids: the classes that are evaluated; rows of others are passed over.
        excluded: (video, second) of frames that are left out on both sides.
        order: who is first among the detections of a frame: "score", the most likely, as in ActivityNet's
            challenge; "file", the first row, as in PySlowFast.
        max_per_frame: with "score", so many of a frame's rows count, the most likely. "file" takes all.

    Returns:
        The mean, NaN where no class is ever true; and of each class its average precision, or None.

    Raises:
        ValueError: for another order, or a score that isn't a finite number.
    """
    if order not in ("score", "file"):
        raise ValueError(f"order must be 'score' or 'file', got {order!r}")
    known = dict.fromkeys(map(int, class_ids))  # each once, in order
    left_out = {_moment(row) for row in excluded}
    by_score = order == "score"
    truth = _by_frame(ground_truth, known, left_out, by_score=by_score)
    found = _by_frame(detections, known, left_out, by_score=by_score, most=max_per_frame)
    num_true = Counter(number for frame in truth.values() for _, number, *_ in frame)
    marks = _mark(truth, found)
    precisions = {
        number: _average_precision(marks[number], num_true[number]) if num_true[number] else None
        for number in known
    }
    defined = [value for value in precisions.values() if value is not None]
    return (float(np.mean(defined)) if defined else math.nan), precisions


def _moment(row: Row) -> Moment:
    return str(row[0]), float(row[1])


def _by_frame(
    rows: Iterable[Row],
    wanted: Collection[int],
    left_out: set[Moment],
    *,
    by_score: bool,
    most: float = math.inf,
) -> dict[Moment, list[_Entry]]:
    """The boxes of each frame in the order in which they are matched, with ``by_score`` at ``most``."""
    frames: dict[Moment, list[_Entry]] = defaultdict(list)
    for row in rows:
        if row[6] in (None, ""):  # a person without an action
            continue
        number = int(row[6])
        if number not in wanted or (moment := _moment(row)) in left_out:
            continue
        x1, y1, x2, y2 = map(float, row[2:6])
        score = 1.0 if len(row) < 8 or row[7] is None else float(row[7])
        if not math.isfinite(score):
            raise ValueError(f"the score of class {number} in {moment} is {score}")
        entry, frame = (score, number, y1, x1, y2, x2), frames[moment]
        # A heap even where all are kept: equal scores then come in the evaluator's own order.
        if not by_score:
            frame.append(entry)
        elif len(frame) < most:
            heapq.heappush(frame, entry)
        elif score > frame[0][0]:
            heapq.heapreplace(frame, entry)
    if by_score:
        for frame in frames.values():
            frame.sort(key=lambda entry: -entry[0])
    return frames


def _mark(
    truth: Mapping[Moment, list[_Entry]], found: Mapping[Moment, list[_Entry]]
) -> dict[int, list[tuple[float, bool]]]:
    """Of each class, score and rightness of every detection."""
    marks: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for moment, frame in found.items():
        people: dict[int, list[_Entry]] = defaultdict(list)
        for entry in truth.get(moment, ()):
            people[entry[1]].append(entry)
        taken: set[tuple[int, int]] = set()
        for entry in frame:
            score, number, y1, x1, y2, x2 = entry
            if x1 >= x2 or y1 >= y2:
                continue
            overlaps = [(_iou(entry, person), -index) for index, person in enumerate(people[number])]
            overlap, best = max(overlaps, default=(0.0, 0))  # of equal ones the first
            right = overlap >= IOU_THRESHOLD and (number, best) not in taken
            if right:
                taken.add((number, best))
            marks[number].append((score, right))
    return marks


def _iou(one: _Entry, other: _Entry) -> float:
    (_, _, top, left, bottom, right), (_, _, y1, x1, y2, x2) = one, other
    both = max(min(bottom, y2) - max(top, y1), 0.0) * max(min(right, x2) - max(left, x1), 0.0)
    either = (bottom - top) * (right - left) + (y2 - y1) * (x2 - x1) - both
    return both / either if either > 0 else 0.0


def _average_precision(marks: Sequence[tuple[float, bool]], num_true: int) -> float:
    """Area under the falling envelope of precision over recall."""
    scores, right = np.array([*marks]).reshape(-1, 2).T
    # Of equal scores the last is first, as in both evaluators where numpy's sort keeps their order.
    right = right[np.argsort(scores, kind="stable")[::-1]].astype(bool)
    hits: npt.NDArray[np.int64] = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / num_true)
