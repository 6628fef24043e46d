"""Tests of weighted nearest neighbours."""

import math

import numpy as np

from hashvision.evaluation import knn


def naive_predict(train, labels, test, classes, k, temperature):
    """Wu et al. 2018, section 3.4, photo by photo."""
    predicted = []
    for photo in test:
        similar = [
            float(photo @ other / (np.linalg.norm(photo) * np.linalg.norm(other)))
            for other in train
        ]
        neighbours = sorted(range(len(train)), key=lambda i: (-similar[i], i))[:k]
        votes = [0.0] * classes
        for i in neighbours:
            votes[labels[i]] += math.exp(similar[i] / temperature)
        predicted.append(votes.index(max(votes)))
    return predicted


def test_predict_against_the_equation(monkeypatch):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(80, 6)), rng.normal(size=(33, 6))
    labels = rng.integers(0, 5, 80)
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 1.0), (79, 0.5)):
        expected = naive_predict(train, labels, test, 5, k, temperature)
        options = {"classes": 5, "k": k, "temperature": temperature}
        np.testing.assert_array_equal(knn.predict(train, labels, test, **options), expected)
        with monkeypatch.context() as patch:  # in chunks of 4 test photos
            patch.setattr(knn, "_CHUNK_SIMILARITIES", 80 * 4)
            chunked = knn.predict(train, labels, test, **options)
        np.testing.assert_array_equal(chunked, expected)


def test_the_scale_of_features_does_not_matter():
    rng = np.random.default_rng(1)
    train, test, labels = rng.normal(size=(50, 4)), rng.normal(size=(20, 4)), rng.integers(0, 3, 50)
    expected = knn.predict(train, labels, test, classes=3)
    np.testing.assert_array_equal(
        knn.predict(train * 1e3, labels, test * 1e-3, classes=3), expected
    )


def test_a_larger_k_than_training_photos_uses_all_of_them():
    rng = np.random.default_rng(2)
    train, test, labels = rng.normal(size=(7, 3)), rng.normal(size=(9, 3)), rng.integers(0, 2, 7)
    np.testing.assert_array_equal(
        knn.predict(train, labels, test, classes=2, k=20),
        knn.predict(train, labels, test, classes=2, k=7),
    )


def test_ties_go_to_the_lower_column_and_class():
    similarities = np.array([[0.5, 0.9, 0.5, 0.5, 0.1], [1.0, 1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(knn.nearest(similarities, 3), [[0, 1, 2], [0, 1, 2]])
    train = np.array([[0.0, 1.0], [0.0, 1.0]])
    assert knn.predict(train, np.array([1, 0]), np.array([[0.0, 2.0]]), classes=2, k=2)[0] == 0
    assert knn.predict(train, np.array([1, 0]), np.array([[0.0, 2.0]]), classes=2, k=1)[0] == 1


def test_nearest_against_sorting():
    similarities = np.random.default_rng(3).normal(size=(12, 40)).round(1)  # many ties
    expected = np.sort(np.argsort(-similarities, axis=1, kind="stable")[:, :9], axis=1)
    np.testing.assert_array_equal(knn.nearest(similarities, 9), expected)


def test_zero_features_are_handled():
    train = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    predicted = knn.predict(
        train, np.array([0, 1, 2]), np.array([[1.0, 0.1], [0.0, 0.0]]), classes=3, k=1
    )
    np.testing.assert_array_equal(predicted, [1, 0])
