"""What an accuracy is compared with."""

import numpy as np
import pytest

from fastfsl.data.baselines import standing, text_accuracy, wilson_interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # R: prop.test(right, count, correct = FALSE)$conf.int
        (5, 10, 0.2365931, 0.7634069),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (81, 263, 0.2552886, 0.3662020),
    ],
)
def test_the_interval_is_wilsons(right, count, low, high):
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=2e-4)


def test_the_interval_covers_the_true_share_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.9):
        drawn = rng.binomial(40, share, 4000)
        covered = [low <= share <= high for low, high in (wilson_interval(right / 40, 40) for right in drawn)]
        assert 0.92 < np.mean(covered) < 0.98
    assert wilson_interval(0.5, 0) == (0.0, 1.0)


def test_chance_majority_and_zero_shot():
    found = standing(0.5, 4, np.array([0, 2, 2, 2]), ("a", "b", "c"), 0.25)
    assert found.chance == pytest.approx(1 / 3)
    assert (found.majority_class, found.majority_share, found.below_majority) == ("c", 0.75, True)
    assert set(found.fields()) == {
        "interval", "chance", "majority_class", "majority_share", "zero_shot_accuracy", "below_majority",
    }  # fmt: skip
    for words in ("accuracy 50.0 %", "4 samples", "zero-shot 25.0 %", "majority class 'c' 75.0 %", "chance 33.3 %"):
        assert words in found.sentence()
    assert "below the majority class" in str(found.warning())
    assert found.doubt() is None


def test_a_classifier_that_may_be_no_better_than_the_majority_is_doubted_not_warned_of():
    found = standing(0.8, 10, np.array([0] * 7 + [1] * 3), ("a", "b"))
    assert found.warning() is None
    assert "not certain" in found.sentence()
    assert "zero-shot unknown" in found.sentence()
    sure = standing(0.95, 1000, np.arange(1000) % 2, ("a", "b"))
    assert sure.warning() is sure.doubt() is None


def test_where_nothing_was_measured_nothing_is_claimed():
    found = standing(None, 0, np.array([0, 1]), ("a", "b"), 1.0)
    assert [found.interval, found.below_majority, found.warning(), found.doubt()] == [None] * 4
    assert "nothing could be held out" in found.sentence("held-out accuracy")


def test_zero_shot_is_the_nearest_text():
    texts = np.array([[2.0, 0.0], [0.0, 0.1]])
    assert text_accuracy(np.array([[1.0, 0.5], [0.2, 3.0]]), texts, np.array([0, 0])) == 0.5
