"""Runs of the real loop as processes of their own: killed, stopped, broken and restarted."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import datasets
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytestmark = pytest.mark.slow

REPO = pathlib.Path(__file__).resolve().parents[1]

TINY = """
import base
from hashvision.models import regnet

regnet.PARAMETERS["tiny"] = regnet.RegNetParameters(3, 8, 8.0, 2.0, 8)


def get_config():
    config = base.get_config()
    config.batch_size = 16
    config.steps = 24
    config.data.resolution = 24
    config.data.smallest_crop = 0.3
    config.model.name = "tiny"
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 0.2
    config.optimizer.average = 0.9
    config.log_every = 1
    config.checkpoint.every = 5
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset, a tiny config beside a copy of the schema, and room for runs."""
    folder = tmp_path_factory.mktemp("runs")
    datasets.write(folder / "dataset")
    (folder / "base.py").write_text((REPO / "configs" / "base.py").read_text())
    (folder / "tiny.py").write_text(TINY)
    return folder


def start(place, run, *overrides, dataset="dataset"):
    command = [sys.executable, "-m", "hashvision", "train", f"--config={place / 'tiny.py'}"]
    command += [f"--workdir={place / run}", f"--config.dataset={place / dataset}", *overrides]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(REPO),
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def until(process, path, step):
    """Waits until the run has told of `step`, and no longer than it takes to fail."""
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and any(
            json.loads(line)["step"] >= step for line in path.read_text().splitlines()[:-1]
        ):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def curve(place, run):
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["learning_rate"]) for line in lines}


def arrays(place, run, step=24):
    path = place / run / "checkpoints" / str(step) / "default"
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata.tree
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), found
        )
        return jax.tree.map(np.asarray, checkpointer.restore(path, shapes))


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run to compare with."""
    code, out, err = finish(start(place, "whole"))
    assert code == 0, err
    assert "step 24/24" in out and "images/s" in out and "waiting" in out and "left" in out
    return "whole"


def same(place, one, other):
    assert curve(place, one) == curve(place, other)
    a, b = arrays(place, one), arrays(place, other)
    assert len(jax.tree.leaves(a)) > 20
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_killed_at_step_17_and_restarted_equals_uninterrupted_bit_for_bit(place, whole):
    process = start(place, "killed")
    until(process, place / "killed" / "metrics.jsonl", 17)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, out, err = finish(start(place, "killed"))
    assert code == 0, err
    assert "steps 15 to 24" in out or "steps 10 to 24" in out or "steps 20 to 24" in out
    same(place, "killed", whole)


def test_sigterm_saves_and_exits_0(place, whole):
    process = start(place, "stopped")
    until(process, place / "stopped" / "metrics.jsonl", 7)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    assert "Stopped at step" in out
    assert finish(start(place, "stopped"))[0] == 0
    same(place, "stopped", whole)


def test_metrics_lines_have_the_promised_keys(place, whole):
    for line in (place / whole / "metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        assert {"step", "loss", "images_per_second", "learning_rate", "input_wait"} <= set(scalars)
    assert list((place / whole / "tensorboard").glob("events*"))
    kept = sorted(int(path.name) for path in (place / whole / "checkpoints").iterdir())
    assert kept[-3:] == [15, 20, 24] and len(kept) <= 4  # the newest three and the best


def refused(place, run, *overrides, dataset="dataset"):
    code, _, err = finish(start(place, run, *overrides, dataset=dataset))
    assert code == 2 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("hashvision: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_loss_that_is_not_finite_names_step_rate_and_checkpoint(place):
    sentence = refused(place, "diverged", "--config.optimizer.learning_rate=1e30")
    assert "at step" in sentence and "learning rate" in sentence and "last good" in sentence


def test_another_vocabulary_is_refused(place, whole):
    folder = datasets.write(place / "other")
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary["classes"][0]["name"] = "cat"
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    sentence = refused(place, whole, dataset="other")
    assert "vocabulary" in sentence and "new --workdir" in sentence


def test_other_settings_are_refused(place, whole):
    assert "seed=0, not 5" in refused(place, whole, "--config.seed=5")


def test_a_missing_shard_is_refused(place):
    folder = datasets.write(place / "short")
    next(folder.glob("*.tfrecord-00001*")).unlink()
    assert "is missing" in refused(place, "unborn", dataset="short")
    assert not (place / "unborn").exists()


def test_a_checkpoint_of_another_network_is_refused(place, whole):
    run = place / "other-network"
    run.mkdir()
    os.symlink(place / whole / "checkpoints", run / "checkpoints")
    sentence = refused(place, run.name, "--config.model.name=regnety_200mf")
    assert "does not fit this config" in sentence
