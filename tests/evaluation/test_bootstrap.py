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


def test_estimate_ignores_resamples_without_a_value():
    eligible = np.arange(3) == 0  # 30% of resamples lack the only eligible photo
    estimate = bootstrap.estimate(bootstrap.mean_of(np.ones(3), eligible), 3, number=100)
    assert estimate == (1.0, 1.0, 1.0)


def test_the_interval_of_a_biased_statistic_uses_both_of_its_numbers():
    right = np.arange(500) < 200
    mean = bootstrap.mean_of(right)
    plain = bootstrap.estimate(mean, 500)
    biased = bootstrap.estimate(lambda counts: np.stack([mean(counts) + 0.1, mean(counts)]), 500)
    assert biased == pytest.approx((plain.value + 0.1, plain.low, plain.high + 0.1))


# (values, their probabilities, share of eligible photos): top-1 and precision at 1 are means of 0
# and 1, and recall is a mean of shares.
MEANS = {
    "top-1": ((0, 1), (0.7, 0.3), 1.0),
    "precision at 1": ((0, 1), (0.1, 0.9), 0.7),
    "recall at 5": ((0, 0.5, 1), (0.2, 0.5, 0.3), 0.7),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MEANS)
def test_intervals_of_means_cover_the_truth_about_95_times_in_100(kind, monkeypatch):
    values, chances, eligible = MEANS[kind]
    counts = list(bootstrap.resamples(150, number=300))
    monkeypatch.setattr(bootstrap, "resamples", lambda *_, **__: counts)  # draws them only once
    truth, covered = float(np.dot(values, chances)), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        right = rng.choice(values, 150, p=chances)
        statistic = bootstrap.mean_of(right, rng.random(150) < eligible)
        estimate = bootstrap.estimate(statistic, 150)
        covered += estimate.low <= truth <= estimate.high
    assert 0.90 <= covered / 400 <= 0.99
