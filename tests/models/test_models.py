"""Tests of the networks: parity with PyTorch, published sizes, scanned and rematerialised stages.

`python tests/golden/make_models.py` makes the goldens. They cover RegNetYs of timm and torchvision
and the smallest ResNeXt; the other networks differ only in size.
"""

import functools
import math
import re
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torch_names
import weights_rule
from hashvision import models
from hashvision.errors import UserError
from hashvision.models import layers, norm, regnet, resnext
from hashvision.models.convnet import Stage
from places import GOLDEN

PEERS = {  # golden -> (our name, naming of PyTorch's tensors, form; `blocks` compiles slowest)
    "timm_regnety_002": ("regnety_200mf", torch_names.TIMM_REGNET, "blocks"),
    "timm_regnety_008": ("regnety_800mf", torch_names.TIMM_REGNET, "packed"),
    "torchvision_regnet_y_400mf": ("regnety_400mf", torch_names.TORCHVISION_REGNET, "native"),
    "torchvision_resnext50_32x4d": ("resnext50_32x4d", torch_names.TORCHVISION_RESNEXT, "packed"),
}
EVAL_SHAPE = (2, 57, 70, 3)
TRAIN_SHAPE = (4, 33, 38, 3)

# Parameters of the trunk alone and with a 1000-way head, of timm (RegNetY) and torchvision
# (ResNeXt), as `make_models.py --counts` prints them; 10B as published.
PUBLISHED = {
    "resnet50": (23_508_032, 25_557_032),
    "resnext50_32x4d": (22_979_904, 25_028_904),
    "resnext101_32x8d": (86_742_336, 88_791_336),
    "resnext101_32x16d": (191_977_792, 194_026_792),
    "resnext101_32x32d": (466_481_472, 468_530_472),
    "resnext101_32x48d": (826_362_176, 828_411_176),
    "regnety_200mf": (2_793_996, 3_162_996),
    "regnety_400mf": (3_903_144, 4_344_144),
    "regnety_800mf": (5_494_168, 6_263_168),
    "regnety_1.6gf": (10_313_430, 11_202_430),
    "regnety_3.2gf": (17_923_338, 19_436_338),
    "regnety_8gf": (37_163_068, 39_180_068),
    "regnety_16gf": (80_565_140, 83_590_140),
    "regnety_32gf": (141_333_770, 145_046_770),
    "regnety_64gf": (276_457_786, 281_378_786),
    "regnety_128gf": (637_419_894, 644_812_894),
    "regnety_256gf": (1_272_156_138, 1_282_601_138),
    "regnety_10b": (9.32e9, None),
}

# Published widths, depths, and parameters of the trunk.
STAGES = {
    "regnety_8gf": ((168, 448, 896, 2016), (2, 4, 10, 1), "37.2M"),
    "regnety_16gf": ((224, 448, 1232, 3024), (2, 4, 11, 1), "80.6M"),
    "regnety_32gf": ((232, 696, 1392, 3712), (2, 5, 12, 1), "141.3M"),
    "regnety_64gf": ((328, 984, 1968, 4920), (2, 5, 12, 1), "276.5M"),
    "regnety_128gf": ((528, 1056, 2904, 7392), (2, 7, 17, 1), "637.4M"),
    "regnety_256gf": ((746, 1492, 4103, 10444), (2, 7, 17, 1), "1272.2M"),
    "regnety_10b": ((2020, 4040, 11110, 28280), (2, 7, 17, 1), "9.32B"),
}


@functools.cache
def abstract(name: str) -> tuple[jax.ShapeDtypeStruct, Any]:
    """Shapes of a network's features and variables, without padding of large kernels."""
    images = jnp.zeros((1, 32, 32, 3))
    model = models.build(name, group_conv="native")  # fastest to trace
    with mock.patch.object(layers, "LARGE_KERNEL", math.inf):
        return jax.eval_shape(
            lambda key: model.init_with_output(key, images, False), jax.random.key(0)
        )


def parameter_count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def load(peer: str) -> tuple[dict[str, np.ndarray], Any]:
    """The golden called `peer`, and the variables it was made with, as our tree."""
    with np.load(GOLDEN / f"{peer}.npz") as file:
        golden = dict(file)
    tensors = {}
    for name, shape in zip(golden["names"], golden["shapes"], strict=True):
        tensors[str(name)] = weights_rule.draw(str(name), tuple(int(n) for n in shape if n))
    return golden, torch_names.variables(PEERS[peer][1], tensors)


# Parity with PyTorch


def test_weights_rule_still_draws_the_goldens_weights():
    drawn = weights_rule.uniform("images", 4) * 2**31
    np.testing.assert_array_equal(drawn, [758833846, 1917268047, -990663865, 113399986])


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_torch_names_cover_every_variable(peer):
    _, variables = load(peer)
    _, ours = abstract(PEERS[peer][0])
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, ours)


@pytest.mark.parametrize(
    "peer",
    [
        "torchvision_regnet_y_400mf",
        pytest.param("timm_regnety_002", marks=pytest.mark.slow),
        pytest.param("timm_regnety_008", marks=pytest.mark.slow),
        pytest.param("torchvision_resnext50_32x4d", marks=pytest.mark.slow),
    ],
)
def test_features_equal_pytorch(peer):
    golden, variables = load(peer)
    name, _, form = PEERS[peer]
    model = models.build(name, group_conv=form)

    @jax.jit
    def forward(variables: Any, images: jax.Array) -> Any:
        return model.apply(
            variables,
            images,
            False,
            capture_intermediates=lambda module, _: isinstance(module, Stage),
            mutable=["intermediates"],
        )

    features, captured = forward(variables, weights_rule.images("images", EVAL_SHAPE))
    for number in range(1, 5):  # in order, to report the first stage that differs
        stage = np.asarray(captured["intermediates"][f"stage{number}"]["__call__"][0])
        expected = golden[f"stage{number}_slice"]
        message = f"stage {number}"
        np.testing.assert_allclose(
            stage[0, :, :, : expected.shape[-1]], expected, rtol=1e-4, atol=1e-4, err_msg=message
        )
        moments = golden[f"stage{number}_moments"]
        np.testing.assert_allclose([stage.mean(), stage.std()], moments, rtol=1e-4, err_msg=message)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, golden["features"], rtol=1e-4, atol=1e-4)


@functools.cache
def train_step() -> tuple[dict[str, np.ndarray], jax.Array, jax.Array, Any, Any]:
    """Golden, loss, features, new statistics and gradients of RegNetY-200MF in training mode."""
    golden, variables = load("timm_regnety_002")
    model = models.build("regnety_200mf", group_conv="native")
    images = jnp.asarray(weights_rule.images(str(golden["train_key"]), TRAIN_SHAPE))
    shape = golden["train_features"].shape
    weights = weights_rule.uniform("loss", golden["train_features"].size).reshape(shape)

    @jax.jit
    def step(params: Any, statistics: Any) -> Any:
        def loss(params: Any) -> Any:
            trained = {"params": params, "batch_stats": statistics}
            features, after = model.apply(trained, images, True, mutable=["batch_stats"])
            return jnp.sum(features * weights), (features, after)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (features, after)), gradients = step(variables["params"], variables["batch_stats"])
    return golden, loss, features, after, {"params": gradients}


@pytest.mark.slow
def test_training_step_equals_pytorch_in_features_and_statistics():
    golden, loss, features, after, _ = train_step()
    np.testing.assert_allclose(features, golden["train_features"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, golden["train_loss"], rtol=1e-4)
    kept = [key.removeprefix("after/") for key in golden if key.startswith("after/")]
    assert len(kept) == 10
    for name in kept:  # means and unbiased variances
        ours = torch_names.find(torch_names.TIMM_REGNET, after, name)
        np.testing.assert_allclose(
            ours, golden[f"after/{name}"], rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
def test_training_step_equals_pytorch_in_gradients():
    golden, _, _, _, gradients = train_step()
    kept = [key.removeprefix("gradient/") for key in golden if key.startswith("gradient/")]
    assert len(kept) == 8
    for name in kept:
        path, _ = torch_names.place(torch_names.TIMM_REGNET, name)
        expected = torch_names.layout(path, golden[f"gradient/{name}"])
        ours = torch_names.find(torch_names.TIMM_REGNET, gradients, name)
        atol = 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(
            ours[..., : expected.shape[-1]], expected, rtol=1e-3, atol=atol, err_msg=name
        )
    names = [str(name) for name in golden["gradient_names"]]
    norms = [
        np.linalg.norm(torch_names.find(torch_names.TIMM_REGNET, gradients, name)) for name in names
    ]
    assert len(names) == sum("running_" not in name for name in golden["names"])
    np.testing.assert_allclose(norms, golden["gradient_norms"], rtol=1e-3)


# Published sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_parameter_counts_equal_the_published_ones(name):
    trunk, with_head = PUBLISHED[name]
    features, variables = abstract(name)
    ours = parameter_count(variables["params"])
    if with_head is None:
        assert ours == pytest.approx(trunk, rel=5e-4)
        return
    assert ours == trunk
    assert ours + (features.shape[-1] + 1) * 1000 == with_head


@pytest.mark.parametrize("name", STAGES)
def test_widths_and_depths_equal_the_published_ones(name):
    widths, depths, parameters = STAGES[name]
    shapes = regnet.stage_shapes(regnet.PARAMETERS[name])
    assert tuple(width for width, _, _ in shapes) == widths
    assert tuple(depth for _, depth, _ in shapes) == depths
    assert all(width % group == 0 for width, _, group in shapes)
    count = parameter_count(abstract(name)[1]["params"])
    billions = parameters.endswith("B")
    digits = f"{count / 1e9:.2f}B" if billions else f"{count / 1e6:.1f}M"
    assert digits == parameters


def test_an_unknown_name_is_refused_with_the_known_names():
    with pytest.raises(UserError, match=r"resnet51.*resnext50_32x4d.*regnety_10b"):
        models.build("resnet51")


# Stages


class ToyBlock(nn.Module):
    """A residual block with all layers of a real one, but fast to compile."""

    stride: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = layers.GroupConv(self.width, 1, dtype=self.dtype, name="conv1")(x)
        y = layers.GroupConv(self.width, 3, self.stride, 2, dtype=self.dtype, name="conv2")(y)
        y = norm.BatchNorm(dtype=self.dtype, name="norm")(y, train, relu=True)
        y = layers.SqueezeExcite(2, self.dtype, name="squeeze_excite")(y)
        if x.shape != y.shape:
            x = layers.GroupConv(self.width, 1, self.stride, name="shortcut", dtype=self.dtype)(x)
        return x + y


def toy_stage(depth: int, **options: Any) -> Stage:
    return Stage(functools.partial(ToyBlock, width=16), depth, 2, **options)


TOY_IMAGES = jnp.asarray(weights_rule.images("toy", (4, 10, 12, 8)))


@functools.cache
def toy_variables(depth: int) -> Any:
    """Variables of the toy stage; all blocks differ, so that a wrong order shows."""
    shapes = jax.eval_shape(
        lambda key: toy_stage(depth).init(key, TOY_IMAGES, False), jax.random.key(0)
    )

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = weights_rule.draw(jax.tree_util.keystr(path), leaf.shape)
        return jnp.asarray(np.abs(drawn) + 0.1)

    return jax.tree.map_with_path(draw, shapes)


@functools.cache
def toy_step(depth: int, **options: Any) -> Any:
    """The compiled gradient of a stage in training: params -> (loss, statistics), gradients."""
    variables = toy_variables(depth)
    stage = toy_stage(depth, **options)

    def loss(params: Any) -> Any:
        trained = {"params": params, "batch_stats": variables["batch_stats"]}
        y, after = stage.apply(trained, TOY_IMAGES, True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y)), after

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return step.lower(variables["params"]).compile()


def count_convolutions(compiled: Any) -> int:
    return len(re.findall(r" convolution\(", compiled.as_text()))


def assert_trees_close(left: Any, right: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), left, right)


def plain_stage(variables: Any, x: jax.Array, depth: int) -> tuple[jax.Array, list[Any]]:
    """The stage as a Python loop over its blocks, in training mode."""
    statistics = []
    for number in range(depth):
        block = ToyBlock(stride=1 if number else 2, width=16)
        if number:
            own = jax.tree.map(
                lambda leaf, row=number - 1: leaf[row],
                {kind: tree["rest"] for kind, tree in variables.items()},
            )
        else:
            own = {kind: tree["first"] for kind, tree in variables.items()}
        x, after = block.apply(own, x, True, mutable=["batch_stats"])
        statistics.append(after["batch_stats"])
    return x, statistics


@pytest.mark.slow
def test_a_stage_equals_its_blocks_one_after_another():
    variables = toy_variables(3)
    y, after = jax.jit(
        lambda variables: toy_stage(3).apply(variables, TOY_IMAGES, True, mutable=["batch_stats"])
    )(variables)
    plain, statistics = jax.jit(lambda variables: plain_stage(variables, TOY_IMAGES, 3))(variables)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    assert_trees_close(after["batch_stats"]["first"], statistics[0])
    rest = jax.tree.map(lambda *leaves: np.stack(leaves), *statistics[1:])
    assert_trees_close(after["batch_stats"]["rest"], rest)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("unroll", [0, 1])
def test_unrolled_and_remat_equal_scanned(unroll, remat):
    params = toy_variables(3)["params"]
    scanned = toy_step(3, unroll=1, remat=False)(params)
    assert_trees_close(toy_step(3, unroll=unroll, remat=remat)(params), scanned)


@pytest.mark.slow
def test_compiled_size_does_not_grow_with_depth():
    three, nine = (count_convolutions(toy_step(depth, unroll=1, remat=False)) for depth in (3, 9))
    assert three == nine > 0
    assert count_convolutions(toy_step(3, unroll=0, remat=False)) == 1.5 * nine


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "unroll"), [(1, 1), (3, 1), (3, 0)])
def test_remat_computes_every_block_again(depth, unroll):
    # Unless prevented, XLA merges a block's two forward passes, and remat saves nothing.
    kept = count_convolutions(toy_step(depth, unroll=unroll, remat=False))
    again = count_convolutions(toy_step(depth, unroll=unroll, remat=True))
    blocks = min(depth, 2) if unroll else depth  # in the program, where scanned blocks count once
    assert again == kept + blocks


@pytest.mark.slow
def test_remat_of_a_scanned_stage_saves_memory():
    kept, again = (
        toy_step(9, unroll=1, remat=remat).memory_analysis().temp_size_in_bytes
        for remat in (False, True)
    )
    assert again < 0.7 * kept


@pytest.mark.slow
def test_a_loop_stores_only_its_input_and_the_outputs_of_convolutions():
    # It stores neither a ReLU's input or mask nor the inputs of convolutions.
    variables = toy_variables(5)

    def output(params: Any) -> jax.Array:
        trained = {**variables, "params": params}
        return toy_stage(5).apply(trained, TOY_IMAGES, True, mutable=["batch_stats"])[0]

    _, pull = jax.vjp(output, variables["params"])
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert [shape for shape in shapes if shape[:4] == (4, 4, 5, 6)] == [(4, 4, 5, 6, 16)] * 3


# Initial values and dtypes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["regnet", "resnext"])
def test_initial_values(family):
    last_norm = functools.partial(norm.BatchNorm, scale_init=nn.initializers.zeros)
    parts = {"norm": norm.BatchNorm, "last_norm": last_norm, "conv": layers.GroupConv}
    if family == "regnet":
        block = functools.partial(regnet.YBlock, width=96, group=16, dtype=jnp.float32, **parts)
    else:
        block = functools.partial(resnext.Bottleneck, inner=96, width=64, groups=6, **parts)
    stage = Stage(block, 4, 2)
    key = jax.random.key(0, impl="rbg")  # compiles fastest
    images = jnp.zeros((1, 4, 4, 32))
    params = jax.jit(lambda key: stage.init(key, images, False))(key)["params"]
    rest = params["rest"]
    # Fan-out normal; PyTorch counts all output channels, even of a grouped kernel.
    for leaf in (rest["conv2"]["kernel"], params["first"]["conv1"]["kernel"]):
        height, width, _, features = leaf.shape[-4:]
        assert np.std(leaf) == pytest.approx(np.sqrt(2 / (height * width * features)), rel=0.05)
    assert not np.allclose(rest["conv2"]["kernel"][0], rest["conv2"]["kernel"][1])
    for name, expected in {"norm1": 1.0, "norm2": 1.0, "norm3": 0.0}.items():
        np.testing.assert_array_equal(rest[name]["scale"], expected)
        np.testing.assert_array_equal(rest[name]["bias"], 0)


def test_residual_branches_start_at_zero_in_resnext_but_not_in_regnety():
    assert models.build("resnext50_32x4d").zero_scale
    assert not models.build("regnety_200mf").zero_scale


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnety_200mf", "resnext50_32x4d"])
def test_bfloat16_keeps_parameters_statistics_and_features_in_float32(name):
    model = models.build(name, group_conv="native", dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda images: model.init(key, images, False), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    features, after = jax.eval_shape(
        lambda variables, images: model.apply(variables, images, True, mutable=["batch_stats"]),
        variables,
        images,
    )
    assert features.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {np.dtype(np.float32)}
    compute = jax.make_jaxpr(
        lambda variables, images: model.apply(variables, images, True, mutable=["batch_stats"])
    )(variables, images)
    convolutions = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", str(compute))
    assert set(convolutions) == {"bf16"}


@pytest.mark.slow
def test_bfloat16_features_are_close_to_float32_features():
    golden, variables = load("timm_regnety_002")
    model = models.build("regnety_200mf", group_conv="native", dtype=jnp.bfloat16)
    images = jnp.asarray(weights_rule.images("images", EVAL_SHAPE))
    features = jax.jit(lambda variables: model.apply(variables, images, False))(variables)
    np.testing.assert_allclose(features, golden["features"], atol=0.05)
