"""Tests of bootstrap intervals."""

import numpy as np
import pytest

from hashvision.evaluation import bootstrap


def test_resamples_do_not_depend_on_the_chunk():
    whole = np.concatenate(list(bootstrap.resamples(37, number=50)))
    parts = list(bootstrap.resamples(37, number=50, chunk=7))
    assert [len(part) for part in parts] == [7] * 7 + [1]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(whole.sum(axis=1), 37)
    assert not np.array_equal(whole[0], whole[1])


def test_resamples_are_keyed_by_the_seed():
    first = next(bootstrap.resamples(20, number=5, seed=1))
    np.testing.assert_array_equal(first, next(bootstrap.resamples(20, number=5, seed=1)))
    assert not np.array_equal(first, next(bootstrap.resamples(20, number=5, seed=2)))


def test_mean_of_against_repeating_the_photos():
    rng = np.random.default_rng(0)
    values, eligible = rng.random(15), rng.random(15) < 0.6
    counts = rng.integers(0, 3, (4, 15))
    expected = [
        np.mean(
            [
                value
                for value, n, e in zip(values, row, eligible, strict=True)
                if e
                for _ in range(n)
            ]
        )
        for row in counts
    ]
    np.testing.assert_allclose(bootstrap.mean_of(values, eligible)(counts), expected)


def test_estimate_is_near_the_binomial_interval():
    right = np.arange(1000) < 600
    estimate = bootstrap.estimate(bootstrap.mean_of(right), 1000)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 1000)
    assert estimate.value == pytest.approx(0.6)
    assert estimate.low == pytest.approx(0.6 - half, abs=0.004)
    assert estimate.high == pytest.approx(0.6 + half, abs=0.004)


def test_estimate_leaves_out_resamples_that_define_no_value():
    eligible = np.arange(3) == 0  # in 30% of resamples the one eligible photo is missing
    estimate = bootstrap.estimate(bootstrap.mean_of(np.ones(3), eligible), 3, number=100)
    assert estimate == (1.0, 1.0, 1.0)


def test_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(100):
        right = np.random.default_rng(seed).random(200) < 0.3
        estimate = bootstrap.estimate(bootstrap.mean_of(right), 200, number=200, seed=seed)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 88 <= covered <= 100
