"""Batch normalisation: its equations beside plain NumPy, and what it costs on 8 devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import weights_rule
from simulated import collectives, drawn, mesh_of_8, replicated, sharded

from hashvision.models import norm


def plain_batch_norm(
    x: np.ndarray, variables: Any, groups: int = 1, momentum: float = 0.9, epsilon: float = 1e-5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ioffe and Szegedy's equations in float64: y, and the running mean and variance after it."""
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    outputs, means, variances = [], [], []
    for part in np.split(x.astype(np.float64), groups):
        flat = part.reshape(-1, part.shape[-1])
        mean, var = flat.mean(0), flat.var(0)  # biased for normalising
        outputs.append((part - mean) / np.sqrt(var + epsilon) * scale + bias)
        means.append(mean)
        variances.append(flat.var(0, ddof=1))  # unbiased for running
    old = variables["batch_stats"]
    running_mean = momentum * old["mean"] + (1 - momentum) * np.mean(means, 0)
    running_var = momentum * old["var"] + (1 - momentum) * np.mean(variances, 0)
    return np.concatenate(outputs), running_mean, running_var


def norm_variables(channels: int) -> Any:
    shape = (channels,)
    return {
        "params": {
            "scale": weights_rule.draw("weight", shape),
            "bias": weights_rule.draw("bias", shape),
        },
        "batch_stats": {
            "mean": weights_rule.draw("running_mean", shape),
            "var": weights_rule.draw("running_var", shape),
        },
    }


def normalise(x: Any, variables: Any, relu: bool = False, **options: Any) -> tuple[jax.Array, Any]:
    """Output and statistics of a training step of BatchNorm."""
    y, after = norm.BatchNorm(**options).apply(variables, x, True, relu, mutable=["batch_stats"])
    return y, after["batch_stats"]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_equals_plain_numpy(groups, relu):
    x, variables = 3 * drawn("x", 8, 3, 5, 6) + 2, norm_variables(6)
    y, after = normalise(x, variables, relu, groups=groups)
    plain, mean, var = plain_batch_norm(x, variables, groups)
    plain = np.maximum(plain, 0) if relu else plain
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["var"], var, rtol=1e-5)


def plain_batch_norm_gradients(
    x: np.ndarray, scale: np.ndarray, dy: np.ndarray, groups: int, epsilon: float = 1e-5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ioffe and Szegedy's section 3, equation by equation, in float64: dx, dscale, dbias."""
    inputs, scales = [], []
    for part, gradient in zip(np.split(x, groups), np.split(dy, groups), strict=True):
        flat, g = (a.astype(np.float64).reshape(-1, x.shape[-1]) for a in (part, gradient))
        mean, var = flat.mean(0), flat.var(0)
        normal = g * scale
        dvar = (normal * (flat - mean) * -0.5 * (var + epsilon) ** -1.5).sum(0)
        dmean = (-normal / np.sqrt(var + epsilon)).sum(0) + dvar * -2 * (flat - mean).mean(0)
        dx = normal / np.sqrt(var + epsilon) + dvar * 2 * (flat - mean) / len(flat)
        inputs.append((dx + dmean / len(flat)).reshape(part.shape))
        scales.append((g * (flat - mean) / np.sqrt(var + epsilon)).sum(0))
    return np.concatenate(inputs), np.sum(scales, 0), dy.astype(np.float64).sum((0, 1, 2))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_of_batch_norm_equal_plain_numpy(groups, relu):
    x, variables = 3 * drawn("x", 8, 3, 5, 6) + 2, norm_variables(6)
    dy = drawn("dy", *x.shape)

    def output(x: jax.Array, params: Any) -> jax.Array:
        return normalise(x, {**variables, "params": params}, relu, groups=groups)[0]

    dx, params = jax.vjp(output, x, variables["params"])[1](dy)
    if relu:
        dy = np.where(plain_batch_norm(x, variables, groups)[0] > 0, dy, 0)
    plain = plain_batch_norm_gradients(x, variables["params"]["scale"], dy, groups)
    for ours, expected in zip((dx, params["scale"], params["bias"]), plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_keeps_its_input_alone_for_its_gradient():
    # Autodiff would keep x - mean in float32, twice the activations of a network, and ReLU's mask.
    x, variables = jnp.asarray(drawn("x", 8, 4, 4, 6), jnp.bfloat16), norm_variables(6)
    _, pull = jax.vjp(lambda x: normalise(x, variables, True, dtype=jnp.bfloat16)[0], x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


def test_batch_norm_of_two_groups_normalises_the_halves_apart():
    x, variables = drawn("x", 8, 4, 4, 6), norm_variables(6)
    x[4:] = 5 * x[4:] + 7
    y, after = normalise(x, variables, groups=2)
    halves = [normalise(half, variables) for half in np.split(x, 2)]
    np.testing.assert_allclose(y, np.concatenate([half for half, _ in halves]), atol=1e-5)
    for name in ("mean", "var"):
        average = (halves[0][1][name] + halves[1][1][name]) / 2
        np.testing.assert_allclose(after[name], average, rtol=1e-5)
    together, _ = normalise(x, variables)
    assert np.abs(np.asarray(y - together)).max() > 0.5


def test_batch_norm_in_evaluation_uses_and_keeps_the_running_statistics():
    x, variables = drawn("x", 3, 2, 2, 6), norm_variables(6)
    y, after = norm.BatchNorm().apply(variables, x, False, mutable=["batch_stats"])
    old = variables["batch_stats"]
    plain = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5)
    plain = plain * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], old)


def test_batch_norm_does_not_cancel_far_from_zero():
    # With E[x^2] - E[x]^2 this input came out with a deviation of 15.8 (RECIPES part 4).
    x = (1000 + 0.05 * np.sqrt(3) * drawn("x", 32, 16, 16, 4)).astype(np.float32)
    variables = norm.BatchNorm().init(jax.random.key(0), x, True)
    y, after = normalise(x, variables)
    plain, mean, var = plain_batch_norm(x, variables)
    assert np.std(y) == pytest.approx(1, abs=0.01)
    # The mean rounds to float32 near 1000 (6e-5 apart), which is 1e-3 deviations.
    np.testing.assert_allclose(y, plain, atol=5e-3)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(after["var"], var, rtol=1e-4)


@pytest.mark.parametrize("deviations", [0, 1, 16, 256])
def test_one_pass_over_bfloat16_costs_less_than_rounding_to_it_did(deviations):
    exact = drawn("x", 1, 64, 16, 16, 4).astype(np.float64) * np.sqrt(3) + deviations
    x = jnp.asarray(exact, jnp.bfloat16)
    rounded = np.asarray(x, np.float64)
    axes = (1, 2, 3)
    of_rounding = deviations**2 * 2**-16 / 12  # evenly drawn, and 2^-8 of the mean wide at least
    for near in (0, deviations):
        mean, var = norm.statistics(x, jnp.full(4, near, jnp.float32))
        assert mean.dtype == var.dtype == jnp.float32
        np.testing.assert_allclose(mean.ravel(), rounded.mean(axes).ravel(), rtol=1e-6, atol=1e-6)
        error = np.abs(var.ravel() / rounded.var(axes).ravel() - 1).max()
        assert error < (of_rounding if near == 0 else 0) / 5 + 1e-5


def test_batch_norm_takes_float32_statistics_of_bfloat16():
    x, variables = jnp.asarray(3 + drawn("x", 64, 8, 8, 4), jnp.bfloat16), norm_variables(4)
    y, after = normalise(x, variables, dtype=jnp.bfloat16)
    plain, mean, var = plain_batch_norm(np.asarray(x, np.float32), variables)
    assert y.dtype == jnp.bfloat16
    assert after["mean"].dtype == after["var"].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), plain, atol=0.02)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-5)  # bfloat16 would be off by 4e-3
    np.testing.assert_allclose(after["var"], var, rtol=1e-5)


def test_batch_norm_init_leaves_the_statistics_at_their_start():
    variables = norm.BatchNorm().init(jax.random.key(0), drawn("x", 2, 2, 2, 3) + 4, True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_batch_norm_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4 groups"):
        normalise(drawn("x", 6, 2, 2, 3), norm_variables(3), groups=4)


def normalise_on_8(x: np.ndarray, variables: Any, groups: int, statistics: bool) -> tuple[Any, Any]:
    """The compiled program of 8 devices, and what it returns."""
    mesh = mesh_of_8((4, 2))

    def run(x: jax.Array, variables: Any) -> Any:
        y, after = normalise(x, variables, groups=groups)
        return (y, after) if statistics else y

    with jax.set_mesh(mesh):
        arguments = sharded(mesh, x), replicated(mesh, variables)
        compiled = jax.jit(run).lower(*arguments).compile()
        return compiled, compiled(*arguments)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_batch_norm_on_8_devices_equals_one(groups):
    x, variables = drawn("x", 16, 3, 3, 5), norm_variables(5)
    x += np.linspace(0, 2, 16, dtype=np.float32)[:, None, None, None]  # each device another mean
    compiled, results = normalise_on_8(x, variables, groups, statistics=True)
    expected = normalise(x, variables, groups=groups)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), results, expected)
    assert not collectives(compiled, "all-gather")


def test_batch_norm_of_a_group_a_device_sends_no_statistics():
    x, variables = drawn("x", 16, 3, 3, 5), norm_variables(5)
    compiled, _ = normalise_on_8(x, variables, groups=8, statistics=False)
    assert not collectives(compiled, "all-reduce")
    compiled, _ = normalise_on_8(x, variables, groups=1, statistics=False)
    assert collectives(compiled, "all-reduce")
