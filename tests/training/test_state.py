"""Tests of the training step on 8 simulated devices: the results of one, an eighth of its work."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashvision.models import Variables, from_module, layers
from hashvision.models.norm import BatchNorm
from hashvision.objectives import hashtag
from hashvision.planning import hlo
from hashvision.training import optim, sharding, state
from steps import MODEL, SMALLEST, batches, build, losses, parts_change_nothing, same_as_alone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def single():
    return losses(1, 1, name="hashtag")


@pytest.fixture(autouse=True)
def shard_everything(monkeypatch):
    """Shards small arrays, and pads small kernels; `single` is computed before, without both."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 64)
    monkeypatch.setattr(layers, "LARGE_KERNEL", 64)
    monkeypatch.setattr(layers, "STORED_MULTIPLE", 24)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_equal_one(single, data, fsdp):
    final, alone = same_as_alone(single, data, fsdp, "hashtag")
    sizes = [sum(x.size for x in jax.tree.leaves(each.params)) for each in (final, alone)]
    assert sizes[0] > sizes[1]  # kernels are padded


@functools.cache
def compiled(data, fsdp, model=MODEL):
    # Large enough that photos cost more than the update of replicated parameters, as in practice.
    mesh, _, abstract, batch, step = build(data, fsdp, model, side=96)
    with jax.set_mesh(mesh):
        return step.lower(abstract, batch).compile(), abstract


@pytest.mark.parametrize(
    ("form", "data", "fsdp"), [("blocks", 8, 1), ("blocks", 2, 4), ("native", 2, 4)]
)
def test_no_activations_are_gathered_and_work_is_divided(data, fsdp, form):
    model = MODEL.clone(group_conv=form)
    alone, _ = compiled(1, 1, model)
    program, abstract = compiled(data, fsdp, model)
    share = program.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share <= 1.05 / 8
    # Only arrays of the shape of a parameter, or of one layer of a stacked one, are gathered.
    shapes = {x.shape for x in jax.tree.leaves(abstract.params)}
    shapes |= {shape[1:] for shape in shapes}
    gathers = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather", program.as_text())
    for found in gathers:
        shape = tuple(int(side) for side in found.split(",") if side)
        assert tuple(s for s in shape if s != 1) in {
            tuple(s for s in known if s != 1) for known in shapes
        }
    assert bool(gathers) == (fsdp > 1)


def test_the_moving_average_covers_parameters_and_statistics():
    mesh, init, _, _, step = build(1, 1, average=0.9)
    with jax.set_mesh(mesh):
        current = jax.jit(init)(jax.random.key(0))
        wanted = jax.device_get(state.averaged(current.params, current.extra))
        for number, batch in zip(range(3), batches(), strict=False):
            current, _ = step(current, batch)
            d = min(0.9, (1 + number) / (10 + number))
            now = jax.device_get(state.averaged(current.params, current.extra))
            wanted = jax.tree.map(lambda a, x, d=d: d * a + (1 - d) * x, wanted, now)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), current.average, wanted
    )
    params, extra = state.evaluated(current)
    assert params is current.average["params"]
    assert extra["trunk"] is current.average["trunk"]


def test_the_averaged_network_has_averaged_statistics():
    """A weight grows by 1% per step, so its average is far below it and needs other statistics."""
    layer = from_module(BatchNorm())
    x = jnp.asarray(1 + np.random.default_rng(0).standard_normal((64, 4), np.float32))

    def apply(params, stats, train):
        return layer.apply(Variables(params["norm"], stats), params["weight"] * x, train)

    def init(rng, batch):
        made = layer.init(rng, x)
        params = {"norm": made.params, "weight": jnp.ones(())}
        return params, {"trunk": made.statistics}

    def loss(params, extra, batch, rng, step):
        stats = apply(jax.lax.stop_gradient(params), extra["trunk"], True)[1]
        return -0.5 * params["weight"] ** 2, ({"trunk": stats}, {})

    objective = hashtag.objective(from_module(SMALLEST), 2)._replace(init=init, loss=loss)
    mesh, same = sharding.make_mesh(1, jax.devices()[:1]), lambda batch: batch
    rate = optim.schedule("constant", 0.01, total_steps=600, warmup_steps=0)
    tx = optim.build("sgd", rate, weight_decay=0.0, momentum=0.0)
    batch = {"key": jnp.zeros((8, 2), jnp.uint32)}
    first = state.initializer(objective, tx, average=True, batch=batch, cut=same)
    step = state.train_step(
        objective,
        same,
        tx=tx,
        rate=rate,
        abstract=state.abstract_state(first, mesh),
        mesh=mesh,
        seed=0,
        decay=0.99,
    )
    current = jax.jit(first)(jax.random.key(0))
    for _ in range(600):
        current, _ = step(current, batch)
    params, extra = state.evaluated(current)
    features = np.asarray(apply(params, extra["trunk"], False)[0])
    assert params["weight"] < 0.7 * current.params["weight"]
    assert abs(features.std() - 1) < 0.1 and abs(features.mean()) < 0.15
    off = np.asarray(apply(params, current.extra["trunk"], False)[0])
    assert off.std() < 0.75  # the last step's statistics would normalise them wrongly


def test_the_abstract_state_has_the_shapes_and_dtypes_of_the_state():
    mesh, init, abstract, _, _ = build(2, 4)
    made = jax.eval_shape(init, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jnp.issubdtype(abstract.step.dtype, jnp.integer)


@pytest.mark.parametrize(("data", "fsdp", "parts"), [(1, 1, 4), (8, 1, 2), (2, 4, 4)])
def test_accumulating_over_parts_learns_the_same_as_the_whole_batch(data, fsdp, parts):
    parts_change_nothing("hashtag", data, fsdp, parts)


def test_accumulating_moves_no_photos_between_devices():
    mesh, _, abstract, batch, step = build(8, 1, parts=2)
    with jax.set_mesh(mesh):
        text = step.lower(abstract, batch).compile().as_text()
    assert {each.kind for each in hlo.collectives(text)} == {"all-reduce"}
