"""Intervals of paired differences: what they hold, and how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from fastfsl.fit.compare import paired_difference

SEEDS, SAMPLES = 3, 400


def test_by_hand():
    d = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, -1.0, 1.0]])
    found = paired_difference(d)
    by_seed = np.var([0.5, 0.0], ddof=1) / 2
    by_sample = np.var([0.5, 0.0, -0.5, 1.0], ddof=1) / 4
    df = (by_seed + by_sample) ** 2 / (by_seed**2 / 1 + by_sample**2 / 3)
    half = t.ppf(0.975, df) * np.sqrt(by_seed + by_sample)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert found.within_noise


def test_one_seed_tells_of_the_test_samples_alone():
    d = np.array([[1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0]])
    found = paired_difference(d)
    half = t.ppf(0.975, 7) * d.std(ddof=1) / np.sqrt(8)
    assert (found.low, found.high) == pytest.approx((0.125 - half, 0.125 + half))


def test_methods_that_never_disagree_do_not_differ():
    found = paired_difference(np.zeros((3, 50)))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert found.within_noise


def test_a_difference_that_every_seed_and_sample_shows_is_none_of_noise():
    assert not paired_difference(np.ones((3, 50))).within_noise


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_turned_around_it_is_the_same_difference(seeds, samples, seed):
    d = np.random.default_rng(seed).integers(-1, 2, size=(seeds, samples)).astype(np.float64)
    there, back = paired_difference(d), paired_difference(-d)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert there.low <= there.mean <= there.high


# Standard deviations of what a seed adds to all samples: none; as much as the samples do; most of it.
@pytest.mark.parametrize("seed_sd", [0.0, 0.01, 0.03])
def test_intervals_hold_the_truth_about_as_often_as_they_say(seed_sd):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1500):
        d = 0.02 + seed_sd * rng.normal(size=(SEEDS, 1)) + 0.2 * rng.normal(size=(1, SAMPLES))
        found = paired_difference(d + 0.2 * rng.normal(size=(SEEDS, SAMPLES)))
        held += found.low <= 0.02 <= found.high
    assert 0.92 <= held / 1500 <= 0.985


def test_coverage_with_right_and_wrong_answers():
    # Two classifiers that are right on a sample with its own probability; the seeds move all probabilities a little.
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        easy = rng.beta(4, 2, size=(1, SAMPLES))
        right = [
            rng.random((SEEDS, SAMPLES)) < np.clip(easy + shift + 0.02 * rng.normal(size=(SEEDS, 1)), 0, 1)
            for shift in (0.0, 0.0)
        ]
        held += paired_difference(right[0].astype(np.float64) - right[1]).within_noise
    assert 0.92 <= held / 1000 <= 0.985
