"""Metrics of tables whose answers are known, and statistics against other ways to compute them."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from synthetic_scores import score_table, table_of_400_classes
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from mvit_video.errors import DataError
from mvit_video.evaluation.metrics import (
    accuracy_by_views,
    bootstrap_intervals,
    compare,
    measure,
    most_confused,
    paired_interval,
    reliability,
    wilson_interval,
    worst_mistakes,
)
from mvit_video.evaluation.scores import Combination, combine


@pytest.fixture(scope="module")
def of_400():
    table = table_of_400_classes()
    return table, measure(table)


def test_400_classes_with_known_answers(of_400) -> None:
    table, metrics = of_400
    assert metrics.accuracy == {
        "video_top1": 0.866,
        "video_top5": 1.0,
        "clip_top1": pytest.approx(0.866 + 0.134 / 3, abs=1e-12),
        "clip_top5": 1.0,
    }
    low, high = metrics.intervals["video_top1"]
    deviation = 1.96 * math.sqrt(0.866 * 0.134 / 4000)
    assert (low, high) == pytest.approx((0.866 - deviation, 0.866 + deviation), abs=1e-3)
    assert metrics.intervals["video_top5"] == (pytest.approx(1 / (1 + 1.96**2 / 4000), abs=1e-6), 1.0)
    assert metrics.per_class.tolist() == [0.6 if index % 3 == 0 else 1.0 for index in range(400)]
    assert metrics.mean_class_accuracy == pytest.approx(0.866)
    assert int(metrics.confusion.sum()) == 4000
    assert metrics.confusion[3].nonzero()[:, 0].tolist() == [3, 4]
    # Right ones say 0.8, wrong ones (0.75 + 0.75 + 0.35) / 3: all of a bin are right, or wrong.
    expected = 0.866 * (1 - 0.8) + 0.134 * (0.75 + 0.75 + 0.35) / 3
    assert metrics.calibration_error == pytest.approx(expected, abs=1e-4)
    assert metrics.by_views[-1] == pytest.approx(0.866)
    assert metrics.by_views[0] == pytest.approx(metrics.accuracy["clip_top1"], abs=0.01)
    pairs = most_confused(metrics.confusion, table.class_names, 200)
    assert len(pairs) == 134
    assert pairs[0] == ("class 0", "class 1", 4, pytest.approx(0.4))
    assert all(pair.videos == 4 for pair in pairs)
    worst = worst_mistakes(metrics.scores, metrics.labels, 1000)
    assert len(worst) == 536
    assert not metrics.correct[worst].any()


def test_classes_without_videos_do_not_count() -> None:
    metrics = measure(score_table(torch.eye(4)[[0, 1, 0]][:, None], [0, 1, 1]))
    assert metrics.per_class[:2].tolist() == [1.0, 0.5]
    assert metrics.per_class[2:].isnan().all()
    assert metrics.mean_class_accuracy == 0.75
    assert metrics.accuracy["video_top5"] == 1.0  # four classes: all of them


def test_one_class_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match=r"only one class \(class 0\)"):
        measure(score_table(torch.ones(2, 1, 1), [0, 0]))


# Of "Newcombe, Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
# table I, method 3; 6 of 6 by 1 / (1 + z^2 / n).
@pytest.mark.parametrize(
    ("correct", "number", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (6, 6, (0.6097, 1))],
)
def test_intervals_of_shares_are_wilson_s(correct: int, number: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(correct, number) == pytest.approx(expected, abs=1e-4)


def test_models_that_always_agree_have_an_interval() -> None:
    low, high = paired_interval(0, 0, 6)
    assert -1 < low < 0 < high < 1
    assert paired_interval(0, 0, 6000).high < 0.001
    assert paired_interval(0, 6, 6).high == 1


def test_the_interval_of_a_difference_covers_it() -> None:
    """Of many pairs of models, 95 % of the intervals hold the true difference, as they say."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(200, [0.15, 0.08, 0.77], 2000)
    found = [paired_interval(first, second, 200) for first, second, _ in drawn.tolist()]
    assert 0.935 < np.mean([low <= 0.08 - 0.15 <= high for low, high in found]) < 0.97


def test_calibration_and_confusion_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(500, 6, generator=generator) * 2).softmax(-1)
    labels = torch.randint(0, 6, (500,), generator=generator)
    metrics = measure(score_table(scores[:, None], labels.tolist()))
    error = multiclass_calibration_error(scores, labels, 6, n_bins=15, norm="l1")
    assert metrics.calibration_error == pytest.approx(float(error), abs=1e-5)
    assert sum(b.videos for b in reliability(scores, labels)) == 500
    assert torch.equal(metrics.confusion, multiclass_confusion_matrix(scores, labels, 6))


def test_precision_recall_and_f1_are_those_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(300, 8, generator=generator).softmax(-1)
    labels = torch.randint(0, 5, (300,), generator=generator)  # classes 5 and 6 have no videos
    scores[:, 6:] = 0  # 6 and 7 are never predicted
    labels[:3] = 7
    metrics = measure(score_table(scores[:, None], labels.tolist()))
    functions = (multiclass_precision, multiclass_recall, multiclass_f1_score)
    for found, function in zip(metrics.rates, functions, strict=True):
        expected = function(scores, labels, 8, average="none")
        assert found.nan_to_num(0).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert metrics.rates.f1.isnan().tolist() == [False] * 6 + [True, False]
    assert metrics.macro_f1 == pytest.approx(float(multiclass_f1_score(scores, labels, 8)), abs=1e-6)


def test_bootstrap_intervals_of_shares_are_as_wide_as_theory_says() -> None:
    labels = torch.arange(400) % 2
    predicted = torch.where(torch.arange(400) < 80, 1 - labels, labels)  # 0.8 in each class
    share = (predicted == labels).double()
    found = bootstrap_intervals(labels, predicted, 2, {"clip_top1": share}, seed=0)
    deviation = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    for interval in found.values():
        assert interval == pytest.approx((0.8 - deviation, 0.8 + deviation), abs=0.008)
    assert set(found) == {"clip_top1", "mean_class_accuracy", "macro_f1"}
    assert found == bootstrap_intervals(labels, predicted, 2, {"clip_top1": share}, seed=0)
    assert found != bootstrap_intervals(labels, predicted, 2, {"clip_top1": share}, seed=1)


def test_the_interval_of_macro_f1_holds_its_value_with_few_videos_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, held = torch.arange(20).repeat_interleave(5), 0
    rights = torch.linspace(0.3, 0.9, 20)[labels]
    many = labels.repeat(2000)
    wrong = torch.randint(20, many.shape, generator=generator)
    guesses = torch.where(torch.rand(many.shape, generator=generator) < rights.repeat(2000), many, wrong)
    truth = multiclass_f1_score(guesses, many, 20, average="macro")
    for trial in range(60):
        predicted = guesses[100 * trial : 100 * trial + 100]
        low, high = bootstrap_intervals(labels, predicted, 20, {}, seed=trial)["macro_f1"]
        held += low <= truth <= high
    assert held >= 50


def test_a_bootstrap_says_nothing_of_perfect_scores() -> None:
    metrics = measure(score_table(torch.eye(2)[[0, 1, 1]][:, None], [0, 1, 1]))
    assert set(metrics.intervals) == {"video_top1", "video_top5"}
    assert metrics.intervals["video_top1"].low < 1


@pytest.mark.parametrize("how", get_args(Combination))
def test_accuracy_against_views_ends_at_that_of_all_views(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    views = (torch.randn(200, 6, 8, generator=generator) * 2).softmax(-1)
    views[:, :, 0] += 0.3
    labels = torch.zeros(200, dtype=torch.int64)
    before = views.clone()
    found = accuracy_by_views(views, labels, how, seed=0)
    assert torch.equal(views, before)
    assert len(found) == 6
    assert found[-1] == pytest.approx(float((combine(views, how).argmax(-1) == 0).double().mean()))
    single = (views.argmax(-1) == 0).double().mean()
    assert found[0] == pytest.approx(float(single), abs=0.05)
    assert found[0] < found[-1]


def test_two_models_are_compared_by_mcnemars_test() -> None:
    labels = [0] * 20 + [1] * 20
    right, wrong = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    first = torch.stack([right] * 15 + [wrong] * 5 + [wrong] * 20)  # 15 + 20 right
    second = torch.stack([right] * 5 + [wrong] * 10 + [right] * 5 + [wrong] * 18 + [right] * 2)  # 10 + 18
    a, b = (measure(score_table(scores[:, None], labels)) for scores in (first, second))
    found = compare(a, b)
    assert (found.only_first, found.only_second) == (12, 5)
    assert found.difference == pytest.approx(28 / 40 - 35 / 40)
    # Two-sided exact binomial test of 5 of 17.
    expected = 2 * sum(math.comb(17, k) for k in range(6)) / 2**17
    assert found.p_value == pytest.approx(expected)
    assert found.interval.low < found.difference < found.interval.high
    assert found.per_class.tolist() == pytest.approx([10 / 20 - 15 / 20, 18 / 20 - 1])
    same = compare(a, a)
    assert (same.p_value, same.difference) == (1.0, 0.0)
    assert same.interval.low < 0 < same.interval.high
