"""Tests of the layers: equations against plain NumPy, and the work of 8 devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import weights_rule
from hashvision.models import layers
from hashvision.training import optim
from simulated import collectives, drawn, flops, mesh_of_8, replicated, sharded

FORMS = {
    form: functools.partial(layers.grouped_conv, form=form)
    for form in ("blocks", "packed", "native")
}
# Channels and channels per group: odd numbers of groups, groups that divide a block or the lanes,
# that do not, or that are wider, and a single group.
CHANNELS = [(24, 8), (56, 8), (40, 4), (48, 24), (264, 88), (16, 16)]


# Grouped convolution


def plain_grouped_conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Each group's products summed over the window, position by position, in float64."""
    size, _, group, features = kernel.shape
    pad = (size - 1) // 2
    groups = x.shape[-1] // group
    out = features // groups
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (-(-n // stride) for n in x.shape[1:3])
    y = np.zeros((len(x), height, width, features))
    for row in range(height):
        for column in range(width):
            top, left = row * stride, column * stride
            window = padded[:, top : top + size, left : left + size]
            for g in range(groups):
                ins, outs = slice(g * group, (g + 1) * group), slice(g * out, (g + 1) * out)
                y[:, row, column, outs] = np.tensordot(
                    window[..., ins], kernel[..., outs].astype(np.float64), 3
                )
    return y


def plain_gradients(
    x: np.ndarray, kernel: np.ndarray, stride: int, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The transpose of `plain_grouped_conv` in x and in kernel, term by term, in float64."""
    size, _, group, features = kernel.shape
    pad = (size - 1) // 2
    groups = x.shape[-1] // group
    out = features // groups
    padded = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    dx, dkernel = np.zeros_like(padded), np.zeros(kernel.shape)
    for row in range(cotangent.shape[1]):
        for column in range(cotangent.shape[2]):
            rows = slice(row * stride, row * stride + size)
            columns = slice(column * stride, column * stride + size)
            for g in range(groups):
                ins, outs = slice(g * group, (g + 1) * group), slice(g * out, (g + 1) * out)
                c = cotangent[:, row, column, outs]
                dx[:, rows, columns, ins] += np.einsum("bo,hwio->bhwi", c, kernel[..., outs])
                dkernel[..., outs] += np.einsum("bo,bhwi->hwio", c, padded[:, rows, columns, ins])
    return dx[:, pad:-pad, pad:-pad], dkernel


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "group"), CHANNELS)
def test_grouped_forms_equal_plain_numpy(channels, group, stride):
    x, kernel = drawn("x", 2, 5, 6, channels), drawn("kernel", 3, 3, group, channels)
    y = plain_grouped_conv(x, kernel, stride)
    cotangent = drawn("cotangent", *y.shape)
    expected = y, *plain_gradients(x, kernel, stride, cotangent)

    @jax.jit
    def all_forms(x: jax.Array, kernel: jax.Array) -> Any:
        results = {}
        for name, form in FORMS.items():
            value, pull = jax.vjp(functools.partial(form, stride=stride), x, kernel)
            results[name] = value, *pull(cotangent)
        return results

    for name, results in all_forms(x, kernel).items():
        for what, ours, plain in zip(("y", "dx", "dkernel"), results, expected, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4, err_msg=f"{name} {what}")


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_dense_conv_equals_plain_numpy(size, stride):
    x, kernel = drawn("x", 2, 7, 8, 3), drawn("kernel", size, size, 3, 5)
    y = layers.conv(jnp.asarray(x), jnp.asarray(kernel), stride)
    plain = plain_grouped_conv(x, kernel, stride)
    np.testing.assert_allclose(y, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_1x1_convolution_equal_plain_numpy(stride):
    x, kernel = drawn("x", 2, 7, 6, 5), drawn("kernel", 1, 1, 5, 3)
    conv = functools.partial(layers.conv, stride=stride)
    y, pull = jax.vjp(conv, jnp.asarray(x), jnp.asarray(kernel))
    dy = drawn("dy", *y.shape)
    plain_dx = np.zeros(x.shape)
    plain_dx[:, ::stride, ::stride] = dy.astype(np.float64) @ kernel[0, 0].T
    plain_dkernel = np.einsum("bhwc,bhwd->cd", x[:, ::stride, ::stride].astype(np.float64), dy)
    dx, dkernel = pull(jnp.asarray(dy))
    np.testing.assert_allclose(dx, plain_dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dkernel[0, 0], plain_dkernel, rtol=1e-5, atol=1e-6)


def compiled_kernel_gradient(product: Any) -> str:
    """The CPU program of the gradient in the kernel, between operations as in a network."""
    x, kernel, dy = drawn("x", 8, 16, 16, 64), drawn("kernel", 64, 32), drawn("dy", 8, 16, 16, 32)

    def gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(product, jnp.maximum(x, 0), kernel)[1](dy * 2 + 1)[1]

    return jax.jit(gradient).lower(x, kernel, dy).compile().as_text()


def test_the_gradient_of_a_1x1_convolution_is_not_transposed_in_memory():
    # The copies made ResNeXt-50's step a fifth slower. When the second assertion fails, XLA no
    # longer makes them, and `matmul` can be removed.
    assert "copy" not in compiled_kernel_gradient(layers.matmul)
    assert "copy" in compiled_kernel_gradient(lambda x, kernel: x @ kernel)


def plain_max_pool(x: np.ndarray, dy: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Each window's maximum, and dy at the first maximum of each window, position by position."""
    batch, height, width, channels = x.shape
    y = np.zeros((batch, -(-height // 2), -(-width // 2), channels))
    dx = np.zeros(x.shape)
    for b, row, column, c in np.ndindex(y.shape):
        top, left = max(2 * row - 1, 0), max(2 * column - 1, 0)
        window = x[b, top : 2 * row + 2, left : 2 * column + 2, c]
        y[b, row, column, c] = window.max()
        if dy is not None:
            first = np.unravel_index(window.argmax(), window.shape)
            dx[b, top + first[0], left + first[1], c] += dy[b, row, column, c]
    return y, dx


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 2)])
@pytest.mark.parametrize("equal", [False, True], ids=["drawn", "many equal"])
def test_max_pool_and_its_gradient_equal_plain_numpy(size, equal):
    x = drawn("x", 2, *size, 3)
    x = np.round(x) if equal else x - 2  # negative, so that zero padding would show
    y, pull = jax.vjp(layers.max_pool, jnp.asarray(x))
    dy = drawn("dy", *y.shape)
    plain, plain_dx = plain_max_pool(x, dy)
    np.testing.assert_array_equal(y, plain)
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], plain_dx, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_group_conv_module_has_one_kernel_shape_in_every_form(form):
    module = layers.GroupConv(24, 3, 2, groups=3, form=form, dtype=jnp.bfloat16)
    x = drawn("x", 2, 6, 6, 24)
    y, variables = module.init_with_output(jax.random.key(0), jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    kernel = variables["params"]["kernel"]
    assert kernel.dtype == jnp.float32 and kernel.shape == (3, 3, 8, 24)
    plain = plain_grouped_conv(x, np.asarray(kernel), 2)
    np.testing.assert_allclose(y.astype(jnp.float32), plain, atol=0.05)


@pytest.mark.parametrize(("groups", "separate"), [(layers.TPU_BLOCKS, True), (18, False)])
def test_few_merged_groups_are_separate_convolutions_and_many_are_one(groups, separate):
    x, kernel = drawn("x", 2, 4, 4, groups * 4), drawn("kernel", 3, 3, 2, groups * 4)
    packed = functools.partial(layers.packed_conv, stride=1, lanes=4)
    plain = plain_grouped_conv(x, kernel, 1)
    y = packed(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(packed)(x, kernel))
    assert text.count("conv_general_dilated") == (groups if separate else 1)


def test_group_conv_refuses_groups_that_change_width():
    # The forms that merge groups would compute something else than a grouped convolution.
    module = layers.GroupConv(8, 3, groups=2)
    with pytest.raises(ValueError, match="16 channels in and 8 out differ"):
        module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))


def xla_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's grouped convolution, sharded by XLA's partitioner."""
    return layers.conv(x, kernel, stride, groups=x.shape[-1] // kernel.shape[2])


def conv_and_gradients(form: Any, x: jax.Array, kernel: jax.Array) -> Any:
    """The convolution of x, and the gradients of half its squared sum in x and kernel."""
    y, pull = jax.vjp(functools.partial(form, stride=1), x, kernel)
    return y, *pull(y)


@functools.cache
def partitioned(form: str, gradients: bool) -> tuple[float, Any, Any, Any]:
    """FLOPs on one device, the program for 8 devices, and the results of both."""
    conv = {**FORMS, "xla": xla_conv}[form]
    x, kernel = drawn("x", 16, 8, 8, 64), drawn("kernel", 3, 3, 8, 64)
    forward = functools.partial(conv, stride=1)
    step = functools.partial(conv_and_gradients, conv) if gradients else forward
    one = jax.jit(step).lower(x, kernel).compile()
    mesh = mesh_of_8((4, 2))
    with jax.set_mesh(mesh):
        arguments = sharded(mesh, x), replicated(mesh, kernel)
        eight = jax.jit(step).lower(*arguments).compile()
        return flops(one), eight, one(x, kernel), eight(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("form", FORMS)
def test_eight_devices_share_a_grouped_convolution(form, gradients):
    flops_of_one, eight, expected, results = partitioned(form, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-4), results, expected)
    assert not collectives(eight, "all-gather")
    assert flops(eight) < 1.02 / 8 * flops_of_one


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_xlas_partitioner_does_not_share_a_grouped_convolution(gradients):
    # grouped_conv uses shard_map since otherwise every device gathers the whole batch (openxla/xla
    # issue 47945). When this test fails, XLA has fixed that, and the shard_map can be removed.
    flops_of_one, eight, _, _ = partitioned("xla", gradients)
    assert collectives(eight, "all-gather")
    assert flops(eight) > 5 / 8 * flops_of_one


# Squeeze and excitation


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_squeeze_excite_equals_plain_numpy(dtype):
    x = drawn("x", 3, 4, 5, 12)
    module = layers.SqueezeExcite(3, dtype)
    shapes = jax.eval_shape(lambda key: module.init(key, jnp.asarray(x, dtype)), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
    variables = jax.tree.map_with_path(
        lambda path, leaf: weights_rule.draw(jax.tree_util.keystr(path), leaf.shape), shapes
    )
    reduce, expand = (variables["params"][name] for name in ("reduce", "expand"))
    pooled = x.mean((1, 2))
    hidden = np.maximum(pooled @ reduce["kernel"] + reduce["bias"], 0)
    gates = 1 / (1 + np.exp(-(hidden @ expand["kernel"] + expand["bias"])))
    y = module.apply(jax.tree.map(jnp.asarray, variables), jnp.asarray(x, dtype))
    assert isinstance(y, jax.Array) and y.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(
        y.astype(jnp.float32), x * gates[:, None, None, :], rtol=tolerance, atol=tolerance
    )


def test_gradients_of_gates_equal_plain_numpy():
    x, gates, dy = drawn("x", 3, 4, 5, 6), drawn("gates", 3, 6), drawn("dy", 3, 4, 5, 6)
    _, pull = jax.vjp(layers.gated, jnp.asarray(x), jnp.asarray(gates))
    dx, dgates = pull(jnp.asarray(dy))
    np.testing.assert_allclose(dx, dy * gates[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(dgates, (dy * x).sum((1, 2)), rtol=1e-5)


def test_gradients_of_blocks_are_concatenated_and_not_padded():
    """Padding each block's gradient to the full width and adding them took a third of a step."""
    x, kernel = jnp.ones((2, 5, 5, 40)), jnp.ones((3, 3, 8, 40))
    gradient = jax.make_jaxpr(jax.grad(lambda x: layers.block_conv(x, kernel, 1).sum()))(x)
    assert " pad[" not in str(gradient) and "concatenate[" in str(gradient)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "larc", "adamw"])
def test_padding_of_large_kernels_changes_nothing_and_stays_zero(monkeypatch, optimizer):
    """Three steps with and without padding give the same features and parameters."""
    tx = optim.build(
        optimizer, optim.schedule("constant", 0.1, total_steps=9, warmup_steps=0), weight_decay=0.1
    )
    x = jnp.asarray(weights_rule.uniform("padded", 4 * 6 * 6 * 6), jnp.float32).reshape(4, 6, 6, 6)

    def three_steps():
        module = layers.GroupConv(10, 3)
        params = module.init(jax.random.key(0), x)
        state = tx.init(params)
        for _ in range(3):
            grads = jax.grad(lambda p: jnp.square(module.apply(p, x) - 1).sum())(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["params"]["kernel"], module.apply(params, x)

    kernel, features = three_steps()
    monkeypatch.setattr(layers, "LARGE_KERNEL", kernel.size)
    monkeypatch.setattr(layers, "STORED_MULTIPLE", 8)
    padded, same = three_steps()
    assert kernel.shape == (3, 3, 6, 10) and padded.shape == (3, 3, 6, 16)
    np.testing.assert_array_equal(padded[..., 10:], 0)
    np.testing.assert_allclose(padded[..., :10], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(same, features, rtol=1e-5, atol=1e-6)
