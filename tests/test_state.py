"""The train step on 8 simulated devices: same numbers, nothing gathered, an eighth of the work."""

import re

import collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashvision.data.crops import Crops
from hashvision.models import ProjectionHead
from hashvision.models.regnet import RegNetParameters, RegNetY
from hashvision.objectives import hashtag, swav
from hashvision.training import mesh as meshes
from hashvision.training import optim, state

pytestmark = pytest.mark.slow

# Two stages, the second scanned; small, since each sharding is a compilation of its own.
MODEL = RegNetY(RegNetParameters(4, 16, 8.0, 2.0, 8))
SMALLEST = RegNetY(RegNetParameters(2, 8, 8.0, 2.0, 8))
CLASSES, BATCH, SIDE, STEPS = 24, 32, 16, 10


# Milder than SwAV's own, and learning more slowly: with those a perturbation of 1e-7 grows to a
# percent in ten steps, on one device too.
SWAV = swav.Settings(
    batch_size=BATCH, prototypes=24, temperature=0.3, epsilon=0.2, iterations=3, assigned=2,
    frozen_steps=2, queue=2, queue_start=3, strength=1.0,
)  # fmt: skip
CROPS = {"hashtag": [Crops(1, SIDE)], "swav": [Crops(2, SIDE), Crops(2, SIDE // 2)]}


def build(data, fsdp, model=MODEL, average=0.0, side=SIDE, name="hashtag", parts=1, norm=True):
    mesh = meshes.make_mesh(fsdp, jax.devices()[: data * fsdp])
    if name == "hashtag":
        objective = hashtag.objective(model, CLASSES)
    else:
        model = SMALLEST if model is MODEL else model  # it goes through the network twice
        objective = swav.objective(model, ProjectionHead((32, 16), norm), SWAV)
    rate = optim.schedule("cosine", 0.05 if name == "hashtag" else 5e-4, STEPS, 2)
    tx = optim.build("sgd", rate, 1e-4)
    sizes = [crops._replace(size=crops.size * side // SIDE) for crops in CROPS[name]]
    batch = state.abstract_batch(BATCH, sizes, 3, mesh)
    init = state.initializer(objective, tx, average > 0, batch)
    abstract = state.abstract_state(init, mesh)
    step = state.train_step(objective, tx, rate, abstract, mesh, 0, average, parts)
    return mesh, init, abstract, batch, step


def batches(name="hashtag"):
    """Photos of four coloured quarters each: noise alone looks the same to a network everywhere."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        quarters = rng.integers(0, 216, (BATCH, 1, 2, 2, 3))
        batch = {}
        for number, (count, side, *_) in enumerate(CROPS[name]):
            noise = rng.integers(0, 40, (BATCH, count, side, side, 3))
            large = quarters.repeat(side // 2, 2).repeat(side // 2, 3)
            batch[f"crops{number}"] = (large + noise).astype(np.uint8)
        labels = [rng.choice(CLASSES, 3, replace=False) for _ in range(BATCH)]
        batch["labels"] = np.stack(labels).astype(np.int32)
        batch["key"] = rng.integers(0, 2**32, (BATCH, 2), np.uint32)
        yield batch


def losses(data, fsdp, **options):
    mesh, init, abstract, _, step = build(data, fsdp, **options)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    values = []
    current = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    with jax.set_mesh(mesh):
        for batch in batches(options.get("name", "hashtag")):
            current, metrics = step(current, jax.device_put(batch, meshes.batch_sharding(mesh)))
            values.append(float(metrics["loss"]))
    return np.array(values), jax.device_get(current)


@pytest.fixture(scope="module", params=["hashtag", "swav"])
def single(request):
    return request.param, *losses(1, 1, name=request.param)


@pytest.fixture
def shard_everything(monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SHARDED", 64)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_equal_one(single, shard_everything, data, fsdp):
    name, wanted, alone = single
    values, final = losses(data, fsdp, name=name)
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    assert np.ptp(values) > 0.01  # it does learn
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    if name == "swav":
        assert np.abs(alone.extra["queue"]).max() > 0.1  # full since step 5, and counted
        np.testing.assert_allclose(final.extra["queue"], alone.extra["queue"], atol=1e-3)


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


class Frozen:
    """A network whose BatchNorm stays as it is, for parts of a batch share no statistics."""

    def __init__(self, model):
        self.model = model

    def init(self, rng, images, train):
        return self.model.init(rng, images, train=train)

    def apply(self, variables, images, train, mutable=()):
        found = self.model.apply(variables, images, train=False)
        return (found, {"batch_stats": variables["batch_stats"]}) if train else found


@pytest.mark.parametrize("name", ["hashtag", "swav"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    model = Frozen(SMALLEST)
    whole, after = losses(2, 2, model=model, name=name, norm=False)
    summed, final = losses(2, 2, model=model, name=name, norm=False, parts=4)
    np.testing.assert_allclose(summed, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_accumulating_moves_no_photos():
    """Each device goes through its own photos, part by part."""
    mesh, _, abstract, batch, step = build(8, 1, parts=2)
    with jax.set_mesh(mesh):
        text = step.lower(abstract, batch).compile().as_text()
    assert {kind for kind, _ in collectives.of(text)} == {"all-reduce"}
