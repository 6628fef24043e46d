"""Tests of the hashtag objective against plain equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashvision.objectives import hashtag

B, K, T = 6, 9, 4


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((B, K)).astype(np.float32)
    labels = np.full((B, T), hashtag.NO_LABEL, np.int32)
    for photo in range(B):
        count = rng.integers(1, T + 1)
        labels[photo, :count] = rng.choice(K, count, replace=False)
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_equals_the_plain_equation(data, smoothing):
    logits, labels = data
    for photo, loss in enumerate(hashtag.softmax_loss(*map(jnp.array, data), smoothing)):
        tags = [c for c in labels[photo] if c >= 0]
        target = np.full(K, smoothing / K)
        for tag in tags:
            target[tag] += (1 - smoothing) / len(tags)
        probabilities = np.exp(logits[photo]) / np.exp(logits[photo]).sum()
        np.testing.assert_allclose(loss, -(target * np.log(probabilities)).sum(), rtol=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_equals_the_plain_equation(data, smoothing):
    logits, labels = data
    for photo, loss in enumerate(hashtag.sigmoid_loss(*map(jnp.array, data), smoothing)):
        wanted = 0.0
        for c in range(K):
            target = (1 - smoothing) * (c in labels[photo]) + smoothing / 2
            p = 1 / (1 + np.exp(-float(logits[photo, c])))
            wanted -= target * np.log(p) + (1 - target) * np.log(1 - p)
        np.testing.assert_allclose(loss, wanted, rtol=2e-6)


@pytest.mark.parametrize("loss", [hashtag.softmax_loss, hashtag.sigmoid_loss])
def test_losses_stay_finite_at_large_logits(data, loss):
    logits, labels = data
    value, grad = jax.value_and_grad(lambda x: loss(x, jnp.array(labels)).sum())(1e4 * logits)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("loss", [hashtag.softmax_loss, hashtag.sigmoid_loss])
def test_the_loss_of_a_photo_does_not_depend_on_its_batch(data, loss):
    logits, labels = map(jnp.array, data)
    alone = jnp.concatenate([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(B)])
    np.testing.assert_allclose(loss(logits, labels), alone, rtol=1e-6)


@pytest.mark.parametrize("loss", [hashtag.softmax_loss, hashtag.sigmoid_loss])
def test_gradients_use_no_scatter(data, loss):
    """A scatter on a TPU's SparseCore makes the compiled program unreadable for `plan`."""
    logits, labels = map(jnp.array, data)
    gradient = jax.jit(jax.grad(lambda logits: loss(logits, labels).sum()))
    text = gradient.lower(logits).as_text()
    assert "scatter" not in text and "gather" not in text


@pytest.mark.slow
def test_the_sigmoid_head_starts_at_the_prior():
    from hashvision import models
    from hashvision.models.regnet import RegNetParameters, RegNetY

    assert "regnety_200mf" in models.names()
    model = RegNetY(RegNetParameters(2, 8, 8.0, 2.0, 8))
    objective = hashtag.objective(models.from_module(model), 50, loss="sigmoid")
    batch = {"crops0": jnp.zeros((2, 1, 16, 16, 3), jnp.uint8)}
    params, extra = jax.jit(objective.init)(jax.random.key(0), batch)
    _, scores = jax.jit(objective.predict)(params, extra, batch["crops0"][:, 0])
    np.testing.assert_allclose(np.exp(scores), 1 / 50, rtol=0.3)
