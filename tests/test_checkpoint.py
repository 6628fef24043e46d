import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashvision.errors import UserError
from hashvision.training import mesh as meshes
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.state import State


def make(seed=0):
    rng = np.random.default_rng(seed)
    params = {"layer": {"kernel": rng.standard_normal((8, 16), np.float32), "bias": np.zeros(16)}}
    moments = ({"trace": rng.standard_normal((8, 16), np.float32)}, ())
    return State(jnp.int32(seed), params, {"batch_stats": np.ones(3)}, moments, ())


def abstract(state, fsdp):
    mesh = meshes.make_mesh(fsdp)
    shardings = meshes.state_shardings(state, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


@pytest.fixture(autouse=True)
def shard_everything(monkeypatch):
    monkeypatch.setattr(meshes, "SMALLEST_SHARDED", 16)


@pytest.mark.slow
def test_restores_under_another_mesh_shape(tmp_path):
    state = make()
    for before, after in ((1, 8), (8, 2), (4, 1)):
        folder = str(tmp_path / f"{before}-{after}")
        placed = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract(state, before)))
        with_before = Checkpoints(folder)
        with_before.save(7, placed, {"loss": 1.0})
        with_before.close()
        wanted = abstract(placed, after)
        again = Checkpoints(folder)
        restored = again.restore(wanted)
        again.close()
        for a, b, shape in zip(*map(jax.tree.leaves, (restored, state, wanted)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.sharding == shape.sharding


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    for step, loss in enumerate([5.0, 1.0, 3.0, 4.0, 2.0, 6.0]):
        checkpoints.save(step, make(), {"loss": loss})
    checkpoints.wait()
    assert checkpoints.latest_step() == 5
    checkpoints.close()
    assert sorted(int(p.name) for p in pathlib.Path(tmp_path / "checkpoints").iterdir()) == [
        1,
        4,
        5,
    ]


def test_saving_does_not_see_later_donated_steps(tmp_path):
    """The copy is taken before `save` returns, though the write goes on behind."""
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make())
    wanted = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state, {"loss": 0.0})
    for _ in range(20):
        state = add(state)
    restored = checkpoints.restore(abstract(wanted, 1))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, wanted)


def test_what_is_still_being_written_is_waited_for(tmp_path):
    state = make()._replace(average={"large": jnp.zeros((4096, 1024), jnp.float32)})
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state, {"loss": 0.0})
    restored = checkpoints.restore(abstract(state, 1))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_what_does_not_fit_is_named(tmp_path):
    state = make()
    checkpoints = Checkpoints(str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.restore(abstract(state, 1))
    checkpoints.save(3, state, {"loss": 0.0})
    checkpoints.wait()
    wider = state._replace(extra={"batch_stats": np.ones(4)})
    with pytest.raises(UserError, match=r"extra/batch_stats is \(3,\) there and \(4,\) here"):
        checkpoints.restore(abstract(wider, 1))
    checkpoints.close()


def test_read_only_leaves_a_write_in_progress_alone(tmp_path):
    writer = Checkpoints(str(tmp_path))
    writer.save(1, make(), {"loss": 0.0})
    writer.wait()
    partial = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    partial.mkdir()
    reader = Checkpoints(str(tmp_path), read_only=True)
    assert reader.latest_step() == 1
    reader.close()
    assert partial.exists()
    writer.close()
