"""The train step on 8 simulated devices: same numbers, nothing gathered, an eighth of the work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import MODEL, accumulation_changes_nothing, batches, build, losses, same_as_alone

from hashvision import hlo
from hashvision.models import layers
from hashvision.training import mesh as meshes
from hashvision.training import state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def single():
    return losses(1, 1, name="hashtag")


@pytest.fixture(autouse=True)
def shard_everything(monkeypatch):
    """And store kernels with zeros beyond their outputs; `single`, made before, has none."""
    monkeypatch.setattr(meshes, "SMALLEST_SHARDED", 64)
    monkeypatch.setattr(layers, "LARGE_KERNEL", 64)
    monkeypatch.setattr(layers, "STORED_MULTIPLE", 24)


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_equal_one(single, data, fsdp):
    final, alone = same_as_alone(single, data, fsdp, "hashtag")
    sizes = [sum(x.size for x in jax.tree.leaves(each.params)) for each in (final, alone)]
    assert sizes[0] > sizes[1]  # zeros and all


def compiled(data, fsdp, model=MODEL):
    # Large enough that photos cost more than the update of replicated parameters, as they do.
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


def test_accumulated_gradients_are_those_of_the_whole_batch():
    accumulation_changes_nothing("hashtag")


def test_accumulating_moves_no_photos():
    """Each device goes through its own photos, part by part."""
    mesh, _, abstract, batch, step = build(8, 1, parts=2)
    with jax.set_mesh(mesh):
        text = step.lower(abstract, batch).compile().as_text()
    assert {each.kind for each in hlo.collectives(text)} == {"all-reduce"}
