"""Tests of repeat factors against a plain transcription of the paper."""

import math

import numpy as np
import pytest

from hashvision.data import sampling


def plain_factor(tags, frequency, threshold, method):
    """Mahajan et al. 2018, section 2.2, one tag at a time."""
    phi = {"square_root": math.sqrt, "uniform": lambda x: x, "natural": lambda x: 0.0}[method]
    return max(max(1.0, phi(threshold / frequency[tag])) for tag in tags)


@pytest.mark.parametrize("method", sampling.METHODS)
def test_the_rarest_tag_has_the_largest_factor(method):
    rng = np.random.default_rng(0)
    posts, counts = 1000, np.array([600, 300, 50, 10])
    photos = [rng.choice(4, rng.integers(1, 4), replace=False) for _ in range(200)]
    rarest = np.array([counts[tags].min() for tags in photos])
    factors = sampling.repeat_factors(rarest, posts, 0.1, method)
    wanted = [plain_factor(tags, counts / posts, 0.1, method) for tags in photos]
    np.testing.assert_allclose(factors, wanted, rtol=1e-12)
    if method != "natural":
        assert factors.max() > 1.5 and factors.min() == 1


def test_repeats_average_to_the_factor():
    uniform = np.random.default_rng(0).random(200_000)
    for factor in (1.0, 1.25, 2.9):
        repeats = sampling.repeats(np.full(len(uniform), factor), uniform)
        assert set(repeats) <= {math.floor(factor), math.ceil(factor)}
        assert abs(repeats.mean() - factor) < 0.005


def test_epoch_summary_orders_the_methods():
    rarest, photos = np.array([4, 100, 900]), np.array([1, 1, 2])
    summary = sampling.epoch_summary(rarest, photos, 1000, 0.1)
    assert summary["natural"] == {"length": 4.0, "largest_repeat": 1.0}
    assert summary["square_root"] == {"length": 8.0, "largest_repeat": 5.0}
    assert summary["uniform"] == {"length": 28.0, "largest_repeat": 25.0}


def test_default_threshold_is_the_mean_frequency():
    assert sampling.default_threshold(np.array([60, 30, 30]), 100) == pytest.approx(0.4)
