"""Tests of the networks: parity with PyTorch, published sizes, scanned and rematerialised stages.

The goldens are made by `python tests/golden/make_models.py`, which says how.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import torch_names, weights_rule

from hashvision import models
from hashvision.models import layers, regnet, resnext
from hashvision.models.stages import Stage

GOLDEN = Path(__file__).parent / "golden"
PEERS = {  # golden -> (our name, how its PyTorch tensors are named)
    "timm_regnety_002": ("regnety_200mf", torch_names.TIMM_REGNET),
    "timm_regnety_008": ("regnety_800mf", torch_names.TIMM_REGNET),
    "torchvision_regnet_y_400mf": ("regnety_400mf", torch_names.TORCHVISION_REGNET),
    "torchvision_resnext50_32x4d": ("resnext50_32x4d", torch_names.TORCHVISION_RESNEXT),
}
EVAL_SHAPE = (2, 57, 70, 3)
TRAIN_SHAPE = (4, 57, 70, 3)

# Trunk, and with a 1000-way head: timm (RegNetY) and torchvision (ResNeXt), as
# `make_models.py --counts` prints them; the 10B one from RECIPES part 2, in its digits.
PUBLISHED = {
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

# RECIPES part 2: widths, depths, parameters of the trunk in millions; 10B in billions.
RECIPES = {
    "regnety_8gf": ((168, 448, 896, 2016), (2, 4, 10, 1), "37.2M"),
    "regnety_16gf": ((224, 448, 1232, 3024), (2, 4, 11, 1), "80.6M"),
    "regnety_32gf": ((232, 696, 1392, 3712), (2, 5, 12, 1), "141.3M"),
    "regnety_64gf": ((328, 984, 1968, 4920), (2, 5, 12, 1), "276.5M"),
    "regnety_128gf": ((528, 1056, 2904, 7392), (2, 7, 17, 1), "637.4M"),
    "regnety_256gf": ((746, 1492, 4103, 10444), (2, 7, 17, 1), "1272.2M"),
    "regnety_10b": ((2020, 4040, 11110, 28280), (2, 7, 17, 1), "9.32B"),
}


def initialise(model: nn.Module, abstract: bool = True) -> Any:
    """The variables of `model`; shapes alone if `abstract`."""
    images = jnp.zeros((1, 32, 32, 3))
    run = jax.eval_shape if abstract else lambda function, key: jax.jit(function)(key)
    return run(lambda key: model.init(key, images, False), jax.random.key(0))


@functools.cache
def abstract_variables(name: str) -> Any:
    """Shapes of the network called `name`."""
    return initialise(models.build(name))


def parameter_count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def load(peer: str) -> tuple[dict[str, np.ndarray], Any]:
    """The golden called `peer`, and the variables it was made with, in our tree."""
    with np.load(GOLDEN / f"{peer}.npz") as file:
        golden = dict(file)
    tensors = {}
    for name, shape in zip(golden["names"], golden["shapes"], strict=True):
        tensors[str(name)] = weights_rule.draw(str(name), tuple(int(n) for n in shape if n))
    return golden, torch_names.variables(PEERS[peer][1], tensors)


# Parity with PyTorch


def test_weights_rule_is_the_one_the_goldens_were_made_with():
    # SplitMix or PCG would do as well; what matters is that these never change.
    np.testing.assert_array_equal(
        weights_rule.uniform("images", 4) * 2**31,
        [0, 0, 0, 0],
    )


@pytest.mark.parametrize("peer", PEERS)
def test_naming_covers_every_variable(peer):
    _, variables = load(peer)
    ours = abstract_variables(PEERS[peer][0])
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, ours)


@pytest.mark.parametrize("peer", PEERS)
def test_features_equal_pytorch(peer):
    golden, variables = load(peer)
    model = models.build(PEERS[peer][0])

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
    for number in range(1, 5):  # in order, so that the first stage that differs is the one named
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
    """Golden, loss, features, statistics after and gradients of RegNetY-200MF in training mode."""
    golden, variables = load("timm_regnety_002")
    model = models.build("regnety_200mf")
    images = weights_rule.images("train images", TRAIN_SHAPE)
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
    for name in kept:  # means and, unbiased, variances
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
    assert len(names) == len(golden["names"]) * 149 // 227 or len(names) > 100
    np.testing.assert_allclose(norms, golden["gradient_norms"], rtol=1e-3)


# Published sizes


@pytest.mark.parametrize("name", models.NAMES)
def test_parameter_counts_are_the_published(name):
    trunk, with_head = PUBLISHED[name]
    ours = parameter_count(abstract_variables(name)["params"])
    if with_head is None:
        assert ours == pytest.approx(trunk, rel=5e-4)
        return
    assert ours == trunk
    features = jax.eval_shape(
        lambda images: models.build(name).init_with_output(jax.random.key(0), images, False)[0],
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    assert ours + (features.shape[-1] + 1) * 1000 == with_head


@pytest.mark.parametrize("name", RECIPES)
def test_widths_and_depths_are_those_of_recipes(name):
    widths, depths, parameters = RECIPES[name]
    shapes = regnet.stage_shapes(regnet.PARAMETERS[name])
    assert tuple(width for width, _, _ in shapes) == widths
    assert tuple(depth for _, depth, _ in shapes) == depths
    assert all(width % group == 0 for width, _, group in shapes)
    count = parameter_count(abstract_variables(name)["params"])
    billions = parameters.endswith("B")
    digits = f"{count / 1e9:.2f}B" if billions else f"{count / 1e6:.1f}M"
    assert digits == parameters


def test_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"resnet50.*resnext50_32x4d.*regnety_10b"):
        models.build("resnet50")


# Stages


class ToyBlock(nn.Module):
    """A residual block with everything that a real one has, and fast to compile."""

    stride: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        groups = self.width // 8
        y = layers.GroupConv(self.width, 3, self.stride, groups, dtype=self.dtype, name="conv")(x)
        y = layers.BatchNorm(dtype=self.dtype, name="norm")(y, train)
        y = layers.SqueezeExcite(2, self.dtype, name="squeeze_excite")(nn.relu(y))
        if x.shape != y.shape:
            x = layers.GroupConv(self.width, 1, self.stride, name="shortcut", dtype=self.dtype)(x)
        return x + y


def toy_stage(depth: int = 4, **options: Any) -> Stage:
    return Stage(functools.partial(ToyBlock, width=16), depth, 2, **options)


TOY_IMAGES = weights_rule.images("toy", (4, 10, 12, 8))


def toy_variables(depth: int = 4) -> Any:
    """Variables of the toy stage, every leaf random: a mistaken order of blocks shows."""
    variables = jax.jit(toy_stage(depth).init, static_argnums=2)(
        jax.random.key(0), TOY_IMAGES, False
    )
    return jax.tree.map_with_path(
        lambda path, leaf: leaf + 0.2 * (1 + weights_rule.uniform(str(path), leaf.size)).reshape(
            leaf.shape
        ).astype(np.float32),
        variables,
    )


def toy_step(stage: Stage, depth: int = 4) -> Callable[[Any], Any]:
    """A function of parameters to loss, statistics and gradients of `stage` in training mode."""
    statistics = toy_variables(depth)["batch_stats"]

    def loss(params: Any) -> Any:
        y, after = stage.apply(
            {"params": params, "batch_stats": statistics}, TOY_IMAGES, True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(y)), (y, after)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def count_convolutions(compiled: Any) -> int:
    return len(re.findall(r"= \S+ convolution\(", compiled.as_text()))
