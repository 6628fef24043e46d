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
    config.data.crops = ((1, 24, 0.3, 1.0),)
    config.model.name = "tiny"
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 0.2
    config.optimizer.average = 0.9
    config.log_every = 1
    config.checkpoint.every = 5
    return config
"""

TINY_SWAV = """
import tiny


def get_config():
    config = tiny.get_config()
    config.data.sampling = "natural"
    config.data.crops = ((2, 24, 0.3, 1.0), (2, 12, 0.1, 0.3))
    config.objective.name = "swav"
    config.swav.prototypes = 12
    config.swav.head = (16, 8)
    config.swav.queue = 32
    config.swav.queue_start = 4
    config.swav.frozen_steps = 2
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset, a tiny config beside a copy of the schema, and room for runs."""
    folder = tmp_path_factory.mktemp("runs")
    datasets.write(folder / "dataset")
    (folder / "base.py").write_text((REPO / "configs" / "base.py").read_text())
    (folder / "tiny.py").write_text(TINY)
    (folder / "tiny_swav.py").write_text(TINY_SWAV)
    return folder


def start(place, run, *overrides, dataset="dataset", config="tiny"):
    command = [sys.executable, "-m", "hashvision", "train", f"--config={place / config}.py"]
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
    return {line["step"]: (line["loss"], line["learning_rate"]) for line in lines if "loss" in line}


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


@pytest.fixture(scope="module")
def whole_swav(place):
    """The same of photos without tags, watched by kNN on two classes."""
    for split, first in (("train", 0), ("test", 50)):
        for number, name in enumerate(("dog", "boat")):
            folder = place / "labelled" / split / name
            folder.mkdir(parents=True)
            for photo in range(6):
                picture = datasets.jpeg(first + 2 * photo + number)
                (folder / f"{photo}.jpg").write_bytes(picture)
    overrides = [f"--config.knn.dataset={place / 'labelled'}", "--config.knn.every=10"]
    code, out, err = finish(start(place, "whole-swav", *overrides, config="tiny_swav"))
    assert code == 0, err
    assert "loss_per_ln_k" in out and "there are 12" in out and "step 10/24  knn_labelled" in out
    return "whole-swav"


@pytest.mark.parametrize("config", ["tiny", "tiny_swav"])
def test_killed_at_step_17_and_restarted_equals_uninterrupted_bit_for_bit(
    place, config, whole, whole_swav
):
    run = f"killed-{config}"
    process = start(place, run, config=config)
    until(process, place / run / "metrics.jsonl", 17)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    code, out, err = finish(start(place, run, config=config))
    assert code == 0, err
    assert "steps 15 to 24" in out or "steps 10 to 24" in out or "steps 20 to 24" in out
    same(place, run, whole if config == "tiny" else whole_swav)
    if config == "tiny_swav":
        assert np.abs(arrays(place, run)["extra"]["queue"]).max() > 0.1


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


def refused(place, run, *overrides, **options):
    code, _, err = finish(start(place, run, *overrides, **options))
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


def test_a_run_that_learns_nothing_stops_with_cause_and_remedies(place):
    """Collapsed on purpose: a weight decay that leaves nothing of the weights."""
    sentence = refused(
        place,
        "collapsed",
        "--config.optimizer.weight_decay=5.0",
        "--config.swav.patience=6",
        "--config.steps=300",
        config="tiny_swav",
    )
    assert "Nothing was learnt in the last" in sentence and sentence.count("--config.") == 3


def test_knn_is_watched_while_training(place, whole_swav):
    lines = (place / whole_swav / "metrics.jsonl").read_text().splitlines()
    found = {line["step"]: line for line in map(json.loads, lines) if "knn_labelled" in line}
    assert list(found) == [0, 10, 20, 24]
    assert all(0 <= line["knn_labelled"] <= 1 for line in found.values())


def test_hashtags_start_from_a_swav_trunk(place, whole_swav):
    overrides = [f"--config.init_from={place / whole_swav}", "--config.optimizer.learning_rate=0.0"]
    code, out, err = finish(start(place, "on-top", *overrides))
    assert code == 0, err
    swav, hashtags = arrays(place, whole_swav), arrays(place, "on-top")
    # At a learning rate of 0 the trunk stays what it was; the average of SwAV's run came over.
    jax.tree.map(
        np.testing.assert_array_equal, swav["average"]["trunk"], hashtags["params"]["trunk"]
    )
    assert "head" in hashtags["params"] and "prototypes" not in hashtags["params"]
    sentence = refused(place, "too-wide", *overrides, "--config.model.name=regnety_200mf")
    assert "does not fit this config" in sentence


def test_a_check_between_checkpoints_leaves_the_mean_loss_whole(tmp_path):
    from hashvision.__main__ import _config
    from hashvision.training import loop

    config = _config(str(REPO / "configs" / "demo.py"), [])
    log = loop._Log(str(tmp_path), config, 0, 10, None, lambda scalars: None)
    for step, loss in enumerate((1.0, 3.0), 1):
        log.add(step, {"loss": loss, "gradient_norm": 1.0, "learning_rate": 0.1}, 0.0)
        log.catch_up()
        log.note(step, {"knn": 0.5})
    assert log.settle() == {"loss": 2.0}
    log.close()
