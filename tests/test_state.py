"""The train step on 8 simulated devices: same numbers, nothing gathered, an eighth of the work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashvision.models.regnet import RegNetParameters, RegNetY
from hashvision.objectives import hashtag
from hashvision.training import mesh as meshes
from hashvision.training import optim, state

pytestmark = pytest.mark.slow

# Two stages, the second scanned; small, since each sharding is a compilation of its own.
MODEL = RegNetY(RegNetParameters(4, 16, 8.0, 2.0, 8))
CLASSES, BATCH, SIDE, STEPS = 24, 32, 16, 10


def build(data, fsdp, model=MODEL, average=0.0, side=SIDE):
    mesh = meshes.make_mesh(fsdp, jax.devices()[: data * fsdp])
    objective = hashtag.objective(model, CLASSES)
    rate = optim.schedule("cosine", 0.05, STEPS, 2)
    tx = optim.build("sgd", rate, 1e-4)
    batch = state.abstract_batch(BATCH, side, 3, mesh)
    init = state.initializer(objective, tx, average > 0, batch)
    abstract = state.abstract_state(init, mesh)
    step = state.train_step(objective, tx, rate, abstract, mesh, 0, average)
    return mesh, init, abstract, batch, step


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield {
            "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
            "labels": np.stack(
                [rng.choice(CLASSES, 3, replace=False) for _ in range(BATCH)]
            ).astype(np.int32),
            "key": rng.integers(0, 2**32, (BATCH, 2), np.uint32),
        }


def losses(data, fsdp):
    mesh, init, abstract, _, step = build(data, fsdp)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    values = []
    current = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    with jax.set_mesh(mesh):
        for batch in batches():
            current, metrics = step(current, jax.device_put(batch, meshes.batch_sharding(mesh)))
            values.append(float(metrics["loss"]))
    return np.array(values), jax.device_get(current)


@pytest.fixture(scope="module")
def single():
    return losses(1, 1)


@pytest.fixture
def shard_everything(monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SHARDED", 64)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_equal_one(single, shard_everything, data, fsdp):
    values, final = losses(data, fsdp)
    np.testing.assert_allclose(values, single[0], rtol=1e-5)
    assert np.ptp(values) > 0.01  # it does learn
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(single[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def compiled(data, fsdp, model=MODEL):
    # Large enough that photos cost more than the update of replicated parameters, as they do.
    mesh, _, abstract, batch, step = build(data, fsdp, model, side=96)
    with jax.set_mesh(mesh):
        return step.lower(abstract, batch).compile(), abstract


@pytest.mark.parametrize(
    ("form", "data", "fsdp"), [("blocks", 8, 1), ("blocks", 2, 4), ("native", 2, 4)]
)
def test_no_activations_are_gathered_and_work_is_divided(shard_everything, data, fsdp, form):
    model = MODEL.clone(group_conv=form)
    alone, _ = compiled(1, 1, model)
    program, abstract = compiled(data, fsdp, model)
    share = program.cost_analysis()["flops"] / alone.cost_analysis()["flops"]
    assert share <= 1.05 / 8
    # Whatever is gathered has the shape of a parameter, or of a layer of a scanned stage's.
    shapes = {x.shape for x in jax.tree.leaves(abstract.params)}
    shapes |= {shape[1:] for shape in shapes}
    gathers = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather", program.as_text())
    for found in gathers:
        shape = tuple(int(side) for side in found.split(",") if side)
        assert tuple(s for s in shape if s != 1) in {
            tuple(s for s in known if s != 1) for known in shapes
        }
    assert bool(gathers) == (fsdp > 1)


def test_the_average_follows_the_parameters():
    mesh, init, _, _, step = build(1, 1, average=0.9)
    with jax.set_mesh(mesh):
        current = jax.jit(init)(jax.random.key(0))
        wanted = jax.device_get(current.params)
        for number, batch in zip(range(3), batches(), strict=False):
            current, _ = step(current, batch)
            d = min(0.9, (1 + number) / (10 + number))
            wanted = jax.tree.map(
                lambda a, p, d=d: d * a + (1 - d) * p, wanted, jax.device_get(current.params)
            )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), current.average, wanted
    )
    assert state.evaluated(current) is current.average


def test_the_abstract_state_takes_no_memory_and_matches():
    mesh, init, abstract, _, _ = build(2, 4)
    made = jax.eval_shape(init, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jnp.issubdtype(abstract.step.dtype, jnp.integer)
