"""Tests of reading a workdir for evaluation."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashvision import objectives
from hashvision.errors import UserError
from hashvision.evaluation import encoder
from hashvision.models import regnet
from hashvision.training import program, run, sharding
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.state import evaluated
from places import load

VOCABULARY = {
    "classes": [
        {"name": name, "count": 9, "tags": {name: 9}, "lemmas": []}
        for name in ("dog", "boat", "tree")
    ]
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setitem(regnet.PARAMETERS, "tiny", regnet.RegNetParameters(2, 8, 8.0, 2.0, 8))
    config = load("demo", "--config.dataset=set")
    config.model.name, config.data.crops = "tiny", ((1, 16, 0.2, 1.0),)
    run.claim(str(tmp_path / "run"), config, VOCABULARY, {})
    return tmp_path / "run"


@pytest.mark.slow
def test_the_untrained_network_follows_from_the_runs_seed(workdir):
    photos = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    network = encoder.load(str(workdir), untrained=True)
    features, scores = map(np.asarray, network.encode(photos))
    assert (network.resolution, network.step, scores.shape) == (16, 0, (4, 3))
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-5)
    assert np.ptp(features, axis=0).max() > 1e-3
    again, _ = encoder.load(str(workdir), untrained=True).encode(photos)
    np.testing.assert_array_equal(again, features)
    values = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**values, "seed": 1}))
    other, _ = encoder.load(str(workdir), untrained=True).encode(photos)
    assert np.abs(np.asarray(other) - features).max() > 1e-3


def trained(folder, recipe, *overrides):
    """Saves a run at step 7; returns its objective and its state on the host."""
    config = load(recipe, "--config.dataset=set", "--config.optimizer.average=0.9", *overrides)
    config.model.name = "tiny"
    config.data.crops = tuple((n, 16, *shares) for n, _, *shares in config.data.crops)
    objectives.fill(config, 1000.0)
    run.claim(str(folder), config, VOCABULARY, {})
    built = program.build(config, 3, 1000.0)
    state = program.initial_state(built, 3)
    moved = jax.tree.map(lambda x: x + 0.1 if x.dtype == jnp.float32 else x, state.average)
    state = state._replace(step=jnp.int32(7), average=moved)
    checkpoints = Checkpoints(str(folder))
    checkpoints.save(7, state, {"loss": 1.0})
    checkpoints.close()
    return built.objective, jax.device_get(state)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["demo", "demo_swav"])
def test_a_loaded_network_is_sharded_and_answers_like_on_one_device(
    tmp_path, monkeypatch, workdir, recipe
):
    del workdir  # only registers the tiny network
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 16)
    queue = ["--config.swav.queue=64"] if recipe == "demo_swav" else []
    objective, state = trained(tmp_path / recipe, recipe, "--config.optimizer.name=adamw", *queue)
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    network = encoder.load(str(tmp_path / recipe))
    gc.collect()
    new = [x for x in jax.live_arrays() if id(x) not in before]
    held = sum(part.data.nbytes for x in new for part in x.addressable_shards)
    needed = sum(x.nbytes for x in jax.tree.leaves(state.average))
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    # A few arrays are too small to be sharded.
    assert held < 1.5 * needed < 0.5 * whole
    network_of = [x for x in new if x.dtype == jnp.float32]  # without the uint8 photos
    assert {len(x.sharding.device_set) for x in network_of} == {8}
    assert (network.step, network.batch_size, network.leads) == (7, 64, True)

    photos = np.random.default_rng(0).integers(0, 256, (13, 16, 16, 3), np.uint8)
    params, extra = evaluated(state)
    wanted = jax.jit(objective.predict)(params, extra, photos)
    for number in (13, 8, 1):  # with one photo, seven devices have only padding
        for one, other in zip(network.encode(photos[:number]), wanted, strict=True):
            if other is None:
                assert one is None
            else:
                np.testing.assert_allclose(one, other[:number], rtol=1e-4, atol=1e-5)


def test_a_batch_has_equally_many_photos_for_each_device(monkeypatch):
    for devices, photos in ((1, 64), (8, 64), (6, 66), (512, 512)):
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        assert encoder.batch_size() == photos


def test_a_workdir_without_a_checkpoint_is_refused(workdir):
    with pytest.raises(UserError, match="checkpoint"):
        encoder.load(str(workdir))


@pytest.mark.slow
def test_a_config_of_an_earlier_version_is_upgraded(workdir):
    values = json.loads((workdir / "config.json").read_text())
    del values["augment"], values["optimizer"]["average"]
    (workdir / "config.json").write_text(json.dumps(values))
    assert encoder.load(str(workdir), untrained=True).step == 0
    (workdir / "config.json").write_text(json.dumps({**values, "resolution": 224}))
    with pytest.raises(UserError, match="config.json sets resolution, which this version"):
        encoder.load(str(workdir), untrained=True)
