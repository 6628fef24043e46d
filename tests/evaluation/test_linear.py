"""Tests of the linear probe."""

import numpy as np
import pytest
from scipy import optimize

from hashvision.evaluation import linear


def clusters(photos, classes, features, spread, seed=0):
    """Gaussian clusters whose features have very different scales; one feature is constant."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, features))
    labels = rng.permutation(np.arange(photos) % classes)
    drawn = centres[labels] + spread * rng.normal(size=(photos, features))
    drawn *= np.logspace(-3, 3, features)
    return np.concatenate([drawn, np.full((photos, 1), 7.0)], axis=1).astype(np.float32), labels


def naive_loss(flat, standard, labels, classes, l2):
    """The mean cross-entropy of the softmax plus l2 / 2 |W|^2."""
    weights = flat[: standard.shape[1] * classes].reshape(standard.shape[1], classes)
    logits = standard @ weights + flat[weights.size :]
    log_sum = np.log(np.exp(logits).sum(axis=1))
    cross_entropy = np.mean(log_sum - logits[np.arange(len(labels)), labels])
    return cross_entropy + l2 / 2 * np.sum(weights**2)


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_fit_minimises_the_equation(l2):
    features, labels = clusters(60, 3, 4, 1.0)
    probe = linear.fit(features, labels, 3, grid=(l2,))
    standard = (features - features.mean(axis=0)) / np.where(
        features.std(axis=0) > 0, features.std(axis=0), 1
    )
    args = (standard.astype(np.float64), labels, 3, l2)
    best = optimize.minimize(naive_loss, np.zeros(5 * 3 + 3), args=args)
    fitted = np.concatenate([probe.weights.ravel(), probe.bias])
    assert naive_loss(fitted, *args) == pytest.approx(best.fun, abs=1e-4)
    np.testing.assert_allclose(probe.weights, best.x[:15].reshape(5, 3), atol=0.02)


def test_two_classes_are_one_logistic_regression():
    features, labels = clusters(200, 2, 3, 1.0)
    probe = linear.fit(features, labels, 2, grid=(0.1,))
    mean, scale = linear.standardization(features)
    standard = (features - mean) / scale

    def loss(flat):
        signed = np.where(labels == 1, 1, -1) * (standard @ flat[:-1] + flat[-1])
        return np.mean(np.log1p(np.exp(-signed))) + 0.1 / 2 * np.sum(flat[:-1] ** 2)

    best = optimize.minimize(loss, np.zeros(5)).x
    np.testing.assert_allclose(probe.weights[:, 1] - probe.weights[:, 0], best[:-1], atol=0.01)
    np.testing.assert_allclose(probe.bias[1] - probe.bias[0], best[-1], atol=0.01)
    np.testing.assert_array_equal(probe.predict(features), standard @ best[:-1] + best[-1] > 0)


def test_l2_is_the_grids_best_on_held_out_photos():
    noisy, labels = clusters(200, 4, 60, 6.0)
    chosen_noisy = linear.fit(noisy, labels, 4)
    clear, labels = clusters(200, 4, 60, 2.0)
    chosen_clear = linear.fit(clear, labels, 4)
    assert chosen_noisy.l2 in linear.L2_GRID
    assert set(chosen_noisy.held_out) == set(linear.L2_GRID)
    assert max(chosen_noisy.held_out.values()) == chosen_noisy.held_out[chosen_noisy.l2]
    assert max(chosen_clear.held_out.values()) > max(chosen_noisy.held_out.values())
    # The strongest of equals is chosen.
    equals = [l2 for l2, top in chosen_clear.held_out.items() if top == 1.0]
    assert not equals or chosen_clear.l2 == max(equals)


def test_fit_is_deterministic():
    features, labels = clusters(90, 3, 8, 3.0)
    first, second = linear.fit(features, labels, 3), linear.fit(features, labels, 3)
    assert first.l2 == second.l2
    np.testing.assert_array_equal(first.weights, second.weights)


def test_a_class_without_photos_is_never_predicted():
    features, labels = clusters(60, 3, 4, 0.5)
    probe = linear.fit(features, labels * 2, 6)
    assert set(probe.predict(features)) == {0, 2, 4}
    np.testing.assert_array_equal(probe.predict(features), labels * 2)


def test_one_photo_per_class_can_be_fitted():
    features, labels = clusters(5, 5, 4, 0.1)
    probe = linear.fit(features, labels, 5)
    assert not probe.held_out
    np.testing.assert_array_equal(probe.predict(features), labels)


def test_held_out_is_a_quarter_of_each_class():
    labels = np.repeat([0, 1, 2, 3], [40, 15, 2, 1])
    marks = linear.held_out(labels)
    np.testing.assert_array_equal(np.bincount(labels[marks], minlength=4), [10, 4, 1, 0])
    np.testing.assert_array_equal(marks, linear.held_out(labels))
    assert not np.array_equal(marks, linear.held_out(labels, seed=1))


def test_the_noise_of_constant_features_is_not_amplified():
    features = np.full((50, 2), 1e6, np.float32)
    features[:, 1] += np.random.default_rng(0).normal(size=50).astype(np.float32) * 1e-3
    mean, scale = linear.standardization(features)
    np.testing.assert_array_equal(scale, 1)
    assert np.abs((features - mean) / scale).max() < 0.1
