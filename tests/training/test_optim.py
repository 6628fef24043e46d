"""Tests of the optimisers and schedules against plain NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hashvision.training import optim


def test_cosine_with_warmup():
    rate = optim.schedule("cosine", 2.0, total_steps=110, warmup_steps=10, final=0.1)
    np.testing.assert_allclose([rate(s) for s in (0, 4, 9)], [0.2, 1.0, 2.0], rtol=1e-6)
    for step in (10, 35, 60, 109):
        wanted = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100)))
        assert float(rate(step)) == pytest.approx(wanted, rel=1e-5)
    assert float(rate(110)) == pytest.approx(0.2)


def test_the_warmup_starts_from_warmup_start():
    rate = optim.schedule("constant", 4.8, total_steps=100, warmup_steps=10, warmup_start=0.3)
    np.testing.assert_allclose([rate(s) for s in (0, 4, 9, 50)], [0.75, 2.55, 4.8, 4.8], rtol=1e-6)
    low = optim.schedule("constant", 0.2, total_steps=100, warmup_steps=10, warmup_start=0.3)
    assert {round(float(low(step)), 6) for step in range(20)} == {0.2}  # never above the peak
    none = optim.schedule("constant", 4.8, total_steps=100, warmup_steps=0, warmup_start=0.3)
    assert float(none(0)) == pytest.approx(4.8)


def test_a_warmup_from_zero_equals_the_plain_product():
    for kind in ("cosine", "halving", "constant"):
        rate = optim.schedule(kind, 1.7, total_steps=1000, warmup_steps=37, final=0.01)
        for step in (0, 5, 36, 37, 500, 999):
            decay = np.float32(
                optim.schedule(kind, 1.0, total_steps=1000, warmup_steps=37, final=0.01)(
                    max(step, 37)
                )
            )
            risen = np.minimum(np.float32(step + 1) / np.float32(37), np.float32(1))
            assert float(rate(step)) == np.float32(1.7) * risen * decay


def test_halvings_are_evenly_spaced():
    rate = optim.schedule("halving", 1.0, total_steps=44, warmup_steps=0, halvings=10)
    rates = [float(rate(step)) for step in range(44)]
    assert rates == [0.5 ** (step // 4) for step in range(44)]


def test_constant_keeps_the_peak():
    assert float(
        optim.schedule("constant", 0.3, total_steps=10, warmup_steps=0)(7)
    ) == pytest.approx(0.3)


def tree(rng):
    return {
        "stage1": {
            "first": {"conv1": {"kernel": rng.standard_normal((3, 3, 2, 4))}},
            "rest": {
                "conv1": {"kernel": rng.standard_normal((5, 3, 3, 2, 4))},
                "norm1": {"scale": rng.standard_normal((5, 4)), "bias": np.zeros((5, 4))},
            },
        },
        "head": {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)},
    }


def trees():
    rng = np.random.default_rng(0)
    as_jax = lambda t: jax.tree.map(lambda x: jnp.array(x, jnp.float32), t)  # noqa: E731
    return as_jax(tree(rng)), [as_jax(tree(rng)) for _ in range(4)]


def run(tx, params, grads):
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_sgd_equals_pytorchs_nesterov_with_decay_on_kernels_only():
    params, grads = trees()
    rate = lambda step: 0.1 * (step + 1)  # noqa: E731
    got = run(optim.build("sgd", rate, weight_decay=0.01), params, grads)

    def plain(path, p):
        decay = 0.01 if path[-1].key == "kernel" else 0.0
        p, trace = np.asarray(p, np.float64), 0.0
        for step, grad in enumerate(grads):
            for key in path:
                grad = grad[key.key]
            g = np.asarray(grad, np.float64) + decay * p
            trace = 0.9 * trace + g
            p = p - rate(step) * (g + 0.9 * trace)
        return p

    wanted = jax.tree_util.tree_map_with_path(plain, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


@pytest.mark.slow
def test_larc_equals_apexs_layer_by_layer():
    params, grads = trees()
    rate = lambda step: 2.0 - step  # noqa: E731
    got = run(optim.build("larc", rate, weight_decay=0.01), params, grads)

    def plain_layer(p, gradients):
        p, trace = np.asarray(p, np.float64), 0.0
        for step, g in enumerate(gradients):
            g = np.asarray(g, np.float64)
            p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
            if p_norm and g_norm:
                g = 0.001 * p_norm / (g_norm + 0.01 * p_norm + 1e-8) * (g + 0.01 * p)
            trace = 0.9 * trace + g
            p = p - rate(step) * trace
        return p

    def plain(path, p):
        gradients = []
        for grad in grads:
            for key in path:
                grad = grad[key.key]
            gradients.append(grad)
        if any(key.key == "rest" for key in path):  # five layers in one array
            layers = [plain_layer(p[i], [g[i] for g in gradients]) for i in range(5)]
            return np.stack(layers)
        return plain_layer(p, gradients)

    wanted = jax.tree_util.tree_map_with_path(plain, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


@pytest.mark.slow
def test_clipping_bounds_the_global_norm():
    params, grads = trees()
    tx = optim.build(
        "sgd", lambda step: 1.0, weight_decay=0.0, momentum=0.0, nesterov=False, clip=0.5
    )
    updates, _ = tx.update(grads[0], tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.slow
def test_plateau_halves_the_rate_when_the_loss_stops_falling():
    """Means of 4 steps; three in a row without a fall halve the rate."""
    rate = optim.schedule("plateau", 0.5, total_steps=100, warmup_steps=0)
    tx = optim.build("sgd", rate, weight_decay=0.0, momentum=0.0, plateau_steps=4)
    params = {"norm": {"scale": jnp.ones(2)}}  # the plateau's state also has a field `scale`
    state = tx.init(params)
    gradients = {"norm": {"scale": jnp.ones(2)}}
    scales, moves = [], []
    losses = [3.0 - 0.1 * step for step in range(12)] + [2.0] * 20
    for loss in losses:
        updates, state = tx.update(gradients, state, params, value=loss)
        scales.append(float(optim.plateau_scale(state)))
        moves.append(float(updates["norm"]["scale"][0]))
    # The means fall for 12 steps, and once more since 2.0 is below the last; then they stay equal.
    assert scales == [1.0] * 27 + [0.5] * 5
    np.testing.assert_allclose(moves, [-0.5 * scale for scale in scales])
    plain = optim.build("sgd", rate, weight_decay=0.0)
    assert float(optim.plateau_scale(plain.init(params))) == 1.0
    plain.update(gradients, plain.init(params), params, value=1.0)  # accepts and ignores the loss
