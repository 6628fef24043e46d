"""Tests of mAP, precision@1, recall@5 and their baselines."""

import itertools

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import average_precision_score

from hashvision.evaluation import bootstrap, multilabel


def drawn(photos=60, classes=7, seed=0, decimals=None):
    """Sparse positives, and scores that are higher for them; rounded scores have ties."""
    rng = np.random.default_rng(seed)
    positives = rng.random((photos, classes)) < np.linspace(0.02, 0.5, classes)
    positives[0] = True
    scores = rng.normal(size=positives.shape) + positives
    scores = scores if decimals is None else scores.round(decimals)
    return scores.astype(np.float32), positives


@pytest.mark.parametrize("decimals", [None, 0])
def test_average_precision_equals_scikit_learns(decimals):
    scores, positives = drawn(decimals=decimals)
    expected = [
        average_precision_score(positives[:, c], scores[:, c]) for c in range(scores.shape[1])
    ]
    np.testing.assert_allclose(
        multilabel.average_precision(scores, positives)[0], expected, rtol=1e-6
    )


def naive_weighted(scores, positives, counts, itself=True):
    """The equation in the docstring of average_precision for one class, photo by photo."""
    total, weight = 0.0, 0
    for i in range(len(scores)):
        if not positives[i] or not counts[i]:
            continue
        found, seen = int(itself), int(itself)  # photo i itself, once
        for j in range(len(scores)):
            if j != i and scores[j] >= scores[i]:
                found += counts[j] * positives[j]
                seen += counts[j]
        total += counts[i] * (found / seen if seen else 1)
        weight += counts[i]
    return total / weight if weight else np.nan


@pytest.mark.parametrize("decimals", [None, 0])
def test_average_precision_of_resamples_against_the_equation(decimals):
    scores, positives = drawn(30, 5, decimals=decimals)
    counts = next(bootstrap.resamples(30, number=6))
    expected = [
        [naive_weighted(scores[:, c], positives[:, c], row.astype(int)) for c in range(5)]
        for row in counts
    ]
    found = multilabel.average_precision(scores, positives, counts)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    without = [
        [naive_weighted(scores[:, c], positives[:, c], row.astype(int), False) for c in range(5)]
        for row in counts
    ]
    found = multilabel.mean_average_precision(scores, positives)(counts)
    np.testing.assert_allclose(found[0], np.nanmean(expected, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found[1], np.nanmean(without, axis=1), rtol=1e-6)


def test_average_precision_without_positives_is_undefined():
    scores, positives = drawn()
    positives[:, 2] = False
    precision = multilabel.average_precision(scores, positives)[0]
    assert np.isnan(precision[2]) and np.isnan(precision).sum() == 1
    mean = multilabel.mean_average_precision(scores, positives)(np.ones((1, len(scores)), int))
    assert mean.shape == (2, 1) and mean[0, 0] == pytest.approx(np.nanmean(precision))


def test_the_interval_of_map_contains_its_value_for_rare_classes():
    # With plain weighted AP, copies of a class's only photo would lift resamples above the value.
    rng = np.random.default_rng(1)
    positives = rng.random((300, 60)) < 0.006
    positives[0, 0] = True
    scores = (rng.normal(size=positives.shape) + positives).astype(np.float32)
    estimate = multilabel.estimates(scores, positives)["mAP"]
    assert estimate.low < estimate.value < estimate.high


def infinite_average_precision(share, shift):
    """AP on infinitely many photos with scores N(0, 1), or N(shift, 1) for a share of positives."""
    thresholds = np.linspace(-8, 8 + shift, 20_001)
    recall = scipy.stats.norm.sf(thresholds, shift)
    precision = share * recall / (share * recall + (1 - share) * scipy.stats.norm.sf(thresholds))
    return -np.trapezoid(precision, recall)


# Shares of the classes, shifts of their scores, and number of photos.
TEST_SETS = {
    "five classes": (np.array([0.1, 0.2, 0.3, 0.2, 0.25]), np.array([1, 1.5, 0.5, 2, 1]), 200),
    "good scores": (np.geomspace(0.02, 0.2, 12), np.full(12, 3.0), 150),
    "few positives": (np.geomspace(0.015, 0.2, 12), np.linspace(0.3, 2, 12), 250),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEST_SETS)
def test_intervals_cover_the_truth_about_95_times_in_100(kind, monkeypatch):
    """They cover mAP on infinitely many photos and the higher mean over test sets of this size."""
    shares, shifts, photos = TEST_SETS[kind]
    infinite = np.mean(list(map(infinite_average_precision, shares, shifts)))
    counts = list(bootstrap.resamples(photos, number=150))
    monkeypatch.setattr(bootstrap, "resamples", lambda *_, **__: counts)  # draws them only once
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        positives = rng.random((photos, len(shares))) < shares
        scores = rng.normal(size=positives.shape) + positives * shifts
        statistic = multilabel.mean_average_precision(scores, positives)
        found.append(bootstrap.estimate(statistic, photos))
    values, lows, highs = map(np.array, zip(*found, strict=True))
    assert np.mean(values) > infinite + 0.2 * np.std(values)
    for truth in (infinite, np.mean(values)):
        assert 0.90 <= np.mean((lows <= truth) & (truth <= highs)) <= 0.99
    assert np.all((lows < values) & (values < highs))


def test_precision_and_recall_against_plain_loops():
    scores, positives = drawn(40, 9, seed=2, decimals=0)
    positives[3] = False
    for i in range(40):
        order = sorted(range(9), key=lambda c: (-scores[i, c], c))
        own = {c for c in range(9) if positives[i, c]}
        assert multilabel.precision_at_1(scores, positives)[i] == (order[0] in own)
        recall = len(own & set(order[:5])) / len(own) if own else 0
        assert multilabel.recall_at_k(scores, positives, 5)[i] == pytest.approx(recall)


def test_precision_and_recall_ignore_photos_without_a_class():
    scores = np.array([[2.0, 1.0], [1.0, 2.0], [5.0, 4.0]])
    positives = np.array([[True, False], [True, False], [False, False]])
    estimates = multilabel.estimates(scores, positives)
    assert estimates["precision_at_1"].value == 0.5
    assert estimates["recall_at_5"].value == 1.0
    assert estimates["mAP"].value == pytest.approx((1 / 2 + 2 / 3) / 2)  # photo 2 ranks first


@pytest.mark.parametrize(("positives", "photos"), [(1, 6), (2, 6), (4, 6), (6, 6), (1, 1)])
def test_random_average_precision_against_all_orders(positives, photos):
    precisions = []
    for places in itertools.combinations(range(photos), positives):
        hits = np.isin(np.arange(photos), places)
        precisions.append(np.mean([hits[: place + 1].sum() / (place + 1) for place in places]))
    expected = multilabel.random_average_precision(positives, photos)
    assert expected == pytest.approx(np.mean(precisions))


def test_baselines():
    positives = np.zeros((10, 4), bool)
    positives[:6, 0] = positives[5:8, 1] = positives[8, 2] = (
        True  # class 3 has no photo, and photo 9 no class
    )
    found = multilabel.baselines(positives)
    assert found["prevalence"] == pytest.approx((0.6 + 0.3 + 0.1) / 3)
    assert found["random_mAP"] == pytest.approx(
        np.mean(multilabel.random_average_precision(np.array([6, 3, 1]), 10))
    )
    assert found["constant_precision_at_1"] == pytest.approx(6 / 9)
    assert found["constant_recall_at_5"] == 1.0
