"""Tests of saving and restoring states: meshes, damage, and checkpoints of earlier versions."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hashvision.errors import UserError
from hashvision.training import checkpoint, sharding
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.state import State, averaged, evaluated


def make(seed=0):
    rng = np.random.default_rng(seed)
    params = {"layer": {"kernel": rng.standard_normal((8, 16), np.float32), "bias": np.zeros(16)}}
    moments = ({"trace": rng.standard_normal((8, 16), np.float32)}, ())
    return State(jnp.int32(seed), params, {"trunk": np.ones(3)}, moments, ())


def abstract(state, fsdp):
    mesh = sharding.make_mesh(fsdp)
    shardings = sharding.state_shardings(state, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


@pytest.fixture(autouse=True)
def shard_everything(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 16)


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


def test_steps_that_donate_the_state_do_not_change_a_save_in_progress(tmp_path):
    """`save` copies the state before it returns, and writes it in the background."""
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


def test_restore_waits_for_a_save_in_progress(tmp_path):
    state = make()._replace(average={"params": jnp.zeros((4096, 1024)), "trunk": {}})
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state, {"loss": 0.0})
    restored = checkpoints.restore(abstract(state, 1))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_missing_checkpoint_and_another_shape_are_refused(tmp_path):
    state = make()
    checkpoints = Checkpoints(str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.restore(abstract(state, 1))
    checkpoints.save(3, state, {"loss": 0.0})
    checkpoints.wait()
    wider = state._replace(extra={"trunk": np.ones(4)})
    with pytest.raises(UserError, match=r"extra/trunk is \(3,\) there and \(4,\) here"):
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


def saved(folder, steps=(1, 2, 3)):
    checkpoints = Checkpoints(str(folder))
    for step in steps:
        checkpoints.save(step, in_float32(step), {"loss": 1.0})
    checkpoints.close()
    return folder / "checkpoints"


def in_float32(seed):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make(seed))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


# When one of Orbax's coroutines fails, others are never awaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize("harm", [truncate, flip, pathlib.Path.unlink])
@pytest.mark.parametrize("file", ["default/d/*", "default/_METADATA", "fingerprints/metadata"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_read(tmp_path, capsys, file, harm):
    folder = saved(tmp_path)
    for path in (folder / "3").glob(file):
        harm(path)
    checkpoints = Checkpoints(str(tmp_path))
    restored = checkpoints.restore(abstract(in_float32(2), 2))
    jax.tree.map(np.testing.assert_array_equal, restored, in_float32(2))
    assert "step 3 is damaged, moved to" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["3.0"]
    checkpoints.save(3, in_float32(3), {"loss": 1.0})  # the step can be saved again
    restored = checkpoints.restore(abstract(in_float32(3), 2))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, in_float32(3))


def test_valid_files_with_other_arrays_are_detected_by_fingerprints(tmp_path, capsys):
    folder = saved(tmp_path)
    shutil.rmtree(folder / "3" / "default")
    shutil.copytree(folder / "1" / "default", folder / "3" / "default")
    checkpoints = Checkpoints(str(tmp_path), read_only=True)
    restored = checkpoints.restore(abstract(in_float32(2), 1))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, in_float32(2))
    assert "step 3 is damaged, left where it is" in capsys.readouterr().out
    assert (folder / "3").exists()


def test_a_checkpoint_without_fingerprints_is_read(tmp_path):
    folder = saved(tmp_path, steps=(1,))
    shutil.rmtree(folder / "1" / "fingerprints")
    checkpoints = Checkpoints(str(tmp_path))
    restored = checkpoints.restore(abstract(in_float32(1), 2))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, in_float32(1))


def with_average(seed):
    """A state with a head and a moving average that differs from the last step."""
    trunk = {"kernel": jnp.full((8, 16), float(seed))}
    params = {"trunk": trunk, "head": {"bias": jnp.ones(16)}}
    extra = {"trunk": {"mean": jnp.full(16, seed + 0.5)}, "queue": jnp.zeros((8, 2))}
    average = jax.tree.map(lambda x: x + 1, averaged(params, extra))
    return State(jnp.int32(seed), params, extra, (), average)


def of_trunk(wanted):
    return {"params": wanted.params["trunk"], "trunk": wanted.extra["trunk"]}


def test_the_trunk_of_an_average_comes_with_its_statistics(tmp_path):
    state = with_average(3)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state, {"loss": 1.0})
    step, trunk = checkpoints.restore_network(of_trunk(abstract(state, 1)), "trunk")
    checkpoints.close()
    assert step == 1
    np.testing.assert_array_equal(trunk["params"]["kernel"], 4)
    np.testing.assert_array_equal(trunk["trunk"]["mean"], 4.5)


@pytest.mark.parametrize("average", [True, False])
def test_restore_network_reads_only_the_network(tmp_path, monkeypatch, average):
    """It also shards the arrays that are large enough over all devices."""
    state = with_average(3)._replace(opt_state={"trace": jnp.ones((8, 16))})
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(5, state if average else state._replace(average=()), {"loss": 1.0})
    asked, restore = [], ocp.PyTreeCheckpointer.restore

    def noted(self, path, args):
        asked.append(jax.tree.map(lambda x: x.sharding, args.item))
        return restore(self, path, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", noted)
    wanted = abstract(averaged(state.params, state.extra), 8)
    step, found = checkpoints.restore_network(wanted)
    wider = abstract(averaged({**state.params, "head": {"bias": jnp.ones(24)}}, state.extra), 8)
    with pytest.raises(UserError, match=r"head/bias is \(16,\) there and \(24,\) here"):
        checkpoints.restore_network(wider)
    checkpoints.close()
    assert step == 5
    expected = state.average if average else averaged(state.params, state.extra)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shardings = jax.tree.map(lambda x: x.sharding, wanted)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings
    if average:
        assert asked == [{"average": shardings}]
    else:
        statistics = {"trunk": shardings["trunk"]}
        assert asked == [{"params": shardings["params"], "extra": statistics}]


def test_an_average_of_parameters_alone_is_read(tmp_path):
    """An average of an earlier version: it gets the statistics of the last step, as it had then."""
    state = with_average(3)
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, state._replace(average=state.average["params"]), {"loss": 1.0})
    restored = checkpoints.restore(abstract(state, 2))
    params, extra = evaluated(restored)
    jax.tree.map(np.testing.assert_array_equal, params, state.average["params"])
    jax.tree.map(np.testing.assert_array_equal, extra, state.extra)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    leaves = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(on_one_device(restored))]
    assert len({*leaves}) == len(leaves)  # the step donates each buffer, so none may be shared
    _, trunk = checkpoints.restore_network(of_trunk(abstract(state, 1)), "trunk")
    checkpoints.close()
    np.testing.assert_array_equal(trunk["params"]["kernel"], 4)
    np.testing.assert_array_equal(trunk["trunk"]["mean"], 3.5)


def on_one_device(tree):
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def test_a_workdir_with_only_damaged_checkpoints_is_refused(tmp_path):
    folder = saved(tmp_path, steps=(1,))
    shutil.rmtree(folder / "1" / "default")
    checkpoints = Checkpoints(str(tmp_path))
    with pytest.raises(UserError, match="only damaged"):
        checkpoints.restore(abstract(in_float32(1), 1))
    checkpoints.close()


def test_fingerprints_equal_the_equation_on_every_mesh():
    def plain(x):
        kind = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
        bits = [int(each) for each in np.ascontiguousarray(x).view(kind).ravel()]
        return sum(each * (2 * place + 1) for place, each in enumerate(bits)) % 2**32

    rng = np.random.default_rng(0)
    tree = {
        "matrix": rng.standard_normal((16, 24, 8), np.float32),
        "half": jnp.asarray(rng.standard_normal((8, 16)), jnp.bfloat16),
        "step": np.int32(-7),
    }
    wanted = {name: plain(np.asarray(x)) for name, x in tree.items()}
    for fsdp in (1, 2, 8):
        shardings = jax.tree.map(lambda x: x.sharding, abstract(tree, fsdp))
        found = checkpoint._fingerprints(jax.device_put(tree, shardings))
        assert {name: int(value) for name, value in found.items()} == wanted
    swapped = tree["matrix"][:, ::-1]
    assert int(checkpoint._fingerprints({"x": swapped})["x"]) != wanted["matrix"]


@pytest.mark.parametrize("average", [True, False])
def test_a_checkpoint_with_former_names_of_statistics_is_read(tmp_path, average):
    """Earlier versions had other names for the statistics of trunk and head."""
    state = with_average(3)
    state = state._replace(extra={**state.extra, "head": {"mean": jnp.full(4, 9.0)}})
    if not average:
        state = state._replace(average=())
    former = {"batch_stats": state.extra["trunk"], "head_stats": state.extra["head"]}
    old = state._replace(extra={**former, "queue": state.extra["queue"]})
    if average:
        old = old._replace(
            average={"params": state.average["params"], "batch_stats": state.average["trunk"]}
        )
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, old, {"loss": 1.0})
    checkpoints.wait()
    restored = checkpoints.restore(abstract(state, 8))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    _, network = checkpoints.restore_network(abstract(averaged(*evaluated(state)), 8))
    wanted = state.average if average else averaged(state.params, state.extra)
    jax.tree.map(np.testing.assert_array_equal, network, wanted)
    checkpoints.close()
