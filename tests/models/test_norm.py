"""Tests of BatchNorm: its equations against plain NumPy, and what 8 devices exchange."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import weights_rule
from hashvision.models import norm
from hashvision.planning import hlo
from simulated import drawn, mesh_of_8, replicated, sharded


def rows_of(group: int, groups: int, photos: int, crops: int) -> list[int]:
    """The rows of a group's photos; each photo has `crops` neighbouring rows."""
    own = [photo for photo in range(photos) if photo % groups == group]
    return [photo * crops + crop for photo in own for crop in range(crops)]


def grouped(groups: int, rows: int, crops: int = 1) -> norm.Groups | None:
    return norm.Groups(rows // crops // groups, groups) if groups > 1 else None


def plain_batch_norm(
    x: np.ndarray,
    variables: Any,
    groups: int = 1,
    crops: int = 1,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ioffe and Szegedy's equations in float64: y, and the running mean and variance after it."""
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    output, means, variances = np.empty(x.shape), [], []
    for group in range(groups):
        rows = rows_of(group, groups, len(x) // crops, crops)
        part = x[rows].astype(np.float64)
        flat = part.reshape(-1, part.shape[-1])
        mean, var = flat.mean(0), flat.var(0)  # biased for normalising
        output[rows] = (part - mean) / np.sqrt(var + epsilon) * scale + bias
        means.append(mean)
        variances.append(flat.var(0, ddof=1))  # unbiased for running
    old = variables["batch_stats"]
    running_mean = momentum * old["mean"] + (1 - momentum) * np.mean(means, 0)
    running_var = momentum * old["var"] + (1 - momentum) * np.mean(variances, 0)
    return output, running_mean, running_var


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


def normalize(x: Any, variables: Any, relu: bool = False, **options: Any) -> tuple[jax.Array, Any]:
    """Output and statistics of a training step of BatchNorm."""
    variables, x = jax.tree.map(jnp.asarray, (variables, x))
    y, after = norm.BatchNorm(**options).apply(variables, x, True, relu, mutable=["batch_stats"])
    return y, after["batch_stats"]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("groups", "crops", "shape"),
    [(1, 1, (8, 3, 5, 6)), (2, 1, (8, 3, 5, 6)), (4, 1, (8, 3, 5, 6)), (2, 3, (12, 3, 5, 6)),
     (1, 1, (8, 6)), (2, 3, (12, 6))],
)  # fmt: skip
def test_batch_norm_equals_plain_numpy(groups, crops, shape, relu):
    x, variables = 3 * drawn("x", *shape) + 2, norm_variables(6)
    y, after = normalize(x, variables, relu, groups=grouped(groups, len(x), crops))
    plain, mean, var = plain_batch_norm(x, variables, groups, crops)
    plain = np.maximum(plain, 0) if relu else plain
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["var"], var, rtol=1e-5)


def plain_batch_norm_gradients(
    x: np.ndarray,
    scale: np.ndarray,
    dy: np.ndarray,
    groups: int,
    crops: int,
    epsilon: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ioffe and Szegedy's section 3, equation by equation, in float64: dx, dscale, dbias."""
    inputs, scales = np.empty(x.shape), []
    for group in range(groups):
        rows = rows_of(group, groups, len(x) // crops, crops)
        flat, g = (a[rows].astype(np.float64).reshape(-1, x.shape[-1]) for a in (x, dy))
        mean, var = flat.mean(0), flat.var(0)
        normal = g * scale
        dvar = (normal * (flat - mean) * -0.5 * (var + epsilon) ** -1.5).sum(0)
        dmean = (-normal / np.sqrt(var + epsilon)).sum(0) + dvar * -2 * (flat - mean).mean(0)
        dx = normal / np.sqrt(var + epsilon) + dvar * 2 * (flat - mean) / len(flat)
        inputs[rows] = (dx + dmean / len(flat)).reshape(inputs[rows].shape)
        scales.append((g * (flat - mean) / np.sqrt(var + epsilon)).sum(0))
    return inputs, np.sum(scales, 0), dy.astype(np.float64).sum((0, 1, 2))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("groups", "crops"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_gradients_of_batch_norm_equal_plain_numpy(groups, crops, relu):
    x, variables = 3 * drawn("x", 8, 3, 5, 6) + 2, norm_variables(6)
    dy, cut = drawn("dy", *x.shape), grouped(groups, len(x), crops)

    def output(x: jax.Array, params: Any) -> jax.Array:
        return normalize(x, {**variables, "params": params}, relu, groups=cut)[0]

    _, pull = jax.vjp(output, *jax.tree.map(jnp.asarray, (x, variables["params"])))
    dx, params = pull(jnp.asarray(dy))
    if relu:
        dy = np.where(plain_batch_norm(x, variables, groups, crops)[0] > 0, dy, 0)
    plain = plain_batch_norm_gradients(x, variables["params"]["scale"], dy, groups, crops)
    for ours, expected in zip((dx, params["scale"], params["bias"]), plain, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [None, norm.Groups(4, 2)])
def test_batch_norm_stores_only_its_input_for_the_gradient(groups):
    # Autodiff would store x - mean in float32, twice a network's activations, and the ReLU's mask.
    x, variables = jnp.asarray(drawn("x", 8, 4, 4, 6), jnp.bfloat16), norm_variables(6)
    options = {"groups": groups, "dtype": jnp.bfloat16}
    _, pull = jax.vjp(lambda x: normalize(x, variables, True, **options)[0], x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]


def test_batch_norm_with_two_groups_normalizes_the_halves_separately():
    x, variables = drawn("x", 8, 4, 4, 6), norm_variables(6)
    x[1::2] = 5 * x[1::2] + 7
    y, after = normalize(x, variables, groups=norm.Groups(4, 2))
    halves = [normalize(half, variables) for half in (x[::2], x[1::2])]
    for half, (alone, _) in zip((y[::2], y[1::2]), halves, strict=True):
        np.testing.assert_allclose(half, alone, atol=1e-5)
    for name in ("mean", "var"):
        average = (halves[0][1][name] + halves[1][1][name]) / 2
        np.testing.assert_allclose(after[name], average, rtol=1e-5)
    together, _ = normalize(x, variables)
    assert np.abs(np.asarray(y - together)).max() > 0.5


def test_batch_norm_in_evaluation_uses_the_running_statistics_unchanged():
    x, variables = drawn("x", 3, 2, 2, 6), norm_variables(6)
    as_jax = jax.tree.map(jnp.asarray, (variables, x))
    y, after = norm.BatchNorm().apply(*as_jax, False, mutable=["batch_stats"])
    old = variables["batch_stats"]
    plain = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5)
    plain = plain * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], old)


def test_batch_norm_does_not_cancel_far_from_zero():
    # E[x^2] - E[x]^2 would give this input a standard deviation of 15.8.
    x = (1000 + 0.05 * np.sqrt(3) * drawn("x", 32, 16, 16, 4)).astype(np.float32)
    variables = norm.BatchNorm().init(jax.random.key(0), jnp.asarray(x), True)
    y, after = normalize(x, variables)
    plain, mean, var = plain_batch_norm(x, variables)
    assert np.std(y) == pytest.approx(1, abs=0.01)
    # float32 numbers near 1000 are 6e-5 apart, which is 1e-3 standard deviations.
    np.testing.assert_allclose(y, plain, atol=5e-3)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(after["var"], var, rtol=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_have_the_groups_of_the_whole(parts):
    """Photo i goes to part i % parts, as in `train_step`; four groups of four photos."""
    x, variables = drawn("x", 32, 3, 3, 6), norm_variables(6)
    x += np.arange(32, dtype=np.float32)[:, None, None, None]  # another mean for each photo
    whole, after = normalize(x, variables, groups=norm.Groups(4, 4))
    alone, stats = [], []
    for part in range(parts):  # with two crops per photo
        rows = rows_of(part, parts, 16, 2)
        y, own = normalize(x[rows], variables, groups=norm.Groups(4, 4 // parts))
        alone.append((rows, y))
        stats.append(own)
    for rows, y in alone:
        np.testing.assert_allclose(y, whole[np.array(rows)], atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(after[name], np.mean([s[name] for s in stats], 0), rtol=1e-5)


def test_groups_do_not_depend_on_which_device_holds_which_photos():
    """Reorders the blocks of photos that devices hold; each group has photos of each block."""
    x, variables, order = (
        drawn("x", 32, 3, 3, 6),
        norm_variables(6),
        np.array([5, 2, 0, 7, 1, 6, 3, 4]),
    )
    x += np.arange(32, dtype=np.float32)[:, None, None, None]
    blocks = (4 * order[:, None] + np.arange(4)).ravel()
    whole, _ = normalize(x, variables, groups=norm.Groups(8, 4))
    moved, _ = normalize(x[blocks], variables, groups=norm.Groups(8, 4))
    np.testing.assert_allclose(moved, whole[blocks], atol=1e-5)


@pytest.mark.parametrize("deviations", [0, 1, 16, 256])
def test_one_pass_over_bfloat16_loses_less_than_rounding_to_bfloat16(deviations):
    exact = drawn("x", 64, 16, 16, 4).astype(np.float64) * np.sqrt(3) + deviations
    x = jnp.asarray(exact, jnp.bfloat16)
    rounded = np.asarray(x, np.float64)
    axes = (0, 1, 2)
    of_rounding = deviations**2 * 2**-16 / 12  # uniform over at least 2^-8 of the mean
    for near in (0, deviations):
        mean, var = norm.statistics(x, jnp.full(4, near, jnp.float32), None)
        assert mean.dtype == var.dtype == jnp.float32
        np.testing.assert_allclose(mean.ravel(), rounded.mean(axes).ravel(), rtol=1e-6, atol=1e-6)
        error = np.abs(var.ravel() / rounded.var(axes).ravel() - 1).max()
        assert error < (of_rounding if near == 0 else 0) / 5 + 1e-5


def test_batch_norm_takes_float32_statistics_of_bfloat16():
    x, variables = jnp.asarray(3 + drawn("x", 64, 8, 8, 4), jnp.bfloat16), norm_variables(4)
    y, after = normalize(x, variables, dtype=jnp.bfloat16)
    plain, mean, var = plain_batch_norm(np.asarray(x, np.float32), variables)
    assert y.dtype == jnp.bfloat16
    assert after["mean"].dtype == after["var"].dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float32), plain, atol=0.02)
    np.testing.assert_allclose(after["mean"], mean, rtol=1e-5)  # bfloat16 would be off by 4e-3
    np.testing.assert_allclose(after["var"], var, rtol=1e-5)


def test_batch_norm_init_does_not_update_the_statistics():
    x = jnp.asarray(drawn("x", 2, 2, 2, 3) + 4)
    variables = norm.BatchNorm().init(jax.random.key(0), x, True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_batch_norm_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="6 rows do not divide into 4 groups of 1 photos"):
        normalize(drawn("x", 6, 2, 2, 3), norm_variables(3), groups=norm.Groups(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4, 8, 16])
def test_batch_norm_on_8_devices_equals_one(number):
    """With more groups than devices, and with fewer; devices exchange only sums."""
    x, variables, mesh = drawn("x", 32, 3, 3, 5), norm_variables(5), mesh_of_8((4, 2))
    x += np.linspace(0, 2, 32, dtype=np.float32)[:, None, None, None]  # another mean per device
    groups = grouped(number, 32)

    def run(x: jax.Array, variables: Any) -> Any:
        def output(x: jax.Array) -> Any:
            return normalize(x, variables, groups=groups)

        y, pull, after = jax.vjp(output, jnp.asarray(x), has_aux=True)
        return y, after, pull(jnp.square(y))[0]

    with jax.set_mesh(mesh):
        arguments = sharded(mesh, x), replicated(mesh, variables)
        compiled = jax.jit(run).lower(*arguments).compile()
        results = compiled(*arguments)
    expected = run(jnp.asarray(x), variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), results, expected)
    assert {each.kind for each in hlo.collectives(compiled.as_text())} == {"all-reduce"}
