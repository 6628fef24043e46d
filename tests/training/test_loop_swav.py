"""The real loop of SwAV, in processes of their own: killed, collapsed, watched, started from."""

import json

import jax
import numpy as np
import pytest

import datasets
from runs import (
    all_finish,
    arrays,
    curve,
    finish,
    killed_and_restarted,
    make,
    refused,
    same,
    start,
    start_hosts,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"))


def watched(place):
    return f"--config.evaluate_on={place / 'labelled'}", "--config.evaluate_every=10"


def neighbours(place, run):
    """The share that kNN names right, by step."""
    lines = map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: line["knn_top1_labelled"] for line in lines if "knn_top1_labelled" in line
    }


@pytest.fixture(scope="module")
def whole_swav(place):
    """An uninterrupted run, watched by kNN on two classes."""
    for split, first in (("train", 0), ("test", 50)):
        for number, name in enumerate(("dog", "boat")):
            folder = place / "labelled" / split / name
            folder.mkdir(parents=True)
            for photo in range(6):
                picture = datasets.jpeg(first + 2 * photo + number)
                (folder / f"{photo}.jpg").write_bytes(picture)
    code, out, err = finish(start(place, "whole-swav", *watched(place), config="tiny_swav"))
    assert code == 0, err
    assert (
        "loss_per_ln_k" in out and "there are 12" in out and "step 10/24  knn_top1_labelled" in out
    )
    return "whole-swav"


def test_killed_at_step_17_and_restarted_equals_uninterrupted_bit_for_bit(place, whole_swav):
    killed_and_restarted(place, "killed", "tiny_swav")
    same(place, "killed", whole_swav)
    assert np.abs(arrays(place, "killed")["extra"]["queue"]).max() > 0.1


def test_a_run_that_learns_nothing_stops_with_cause_and_remedies(place):
    """Collapsed on purpose: a weight decay that leaves nothing of the weights."""
    sentence = refused(
        place,
        "collapsed",
        "--config.optimizer.learning_rate=0.2",
        "--config.optimizer.weight_decay=5.0",
        "--config.swav.patience=6",
        "--config.steps=300",
        config="tiny_swav",
    )
    assert "Nothing was learnt in the last" in sentence and sentence.count("--config.") == 3


def test_knn_is_watched_while_training(place, whole_swav):
    found = neighbours(place, whole_swav)
    assert list(found) == [0, 10, 20, 24]
    assert all(0 <= share <= 1 for share in found.values())


def test_two_hosts_have_the_codes_and_the_neighbours_of_one(place, whole_swav):
    ended = all_finish(start_hosts(place, "two", 2, *watched(place), config="tiny_swav"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    found, wanted = curve(place, "two"), curve(place, whole_swav)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-4)
    assert neighbours(place, "two") == neighbours(place, whole_swav)


def test_two_hosts_evaluate_as_one(place, whole_swav):
    """Each gives the network the photos of its own devices; the first prints and writes."""
    report = place / whole_swav / "evaluations" / "knn-labelled.json"
    flags = "--protocol=knn", f"--dataset={place / 'labelled'}"
    code, alone, err = finish(start(place, whole_swav, *flags, verb="evaluate"))
    assert code == 0, err
    wanted = json.loads(report.read_text())
    report.unlink()
    ended = all_finish(start_hosts(place, whole_swav, 2, *flags, verb="evaluate"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    found = json.loads(report.read_text())
    told = [
        "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))
        for _, out, _ in ended
    ]
    assert told == [alone, ""] and "labelled" in alone
    assert found["metrics"] == wanted["metrics"] and found["photos"] == {"train": 12, "test": 12}


def test_hashtags_start_from_a_swav_trunk(place, whole_swav):
    overrides = [f"--config.init_from={place / whole_swav}", "--config.optimizer.learning_rate=0.0"]
    code, out, err = finish(start(place, "on-top", *overrides))
    assert code == 0, err
    swav, hashtags = arrays(place, whole_swav), arrays(place, "on-top")
    # At a learning rate of 0 the trunk stays what it was; the average of SwAV's run came over.
    jax.tree.map(
        np.testing.assert_array_equal,
        swav["average"]["params"]["trunk"],
        hashtags["params"]["trunk"],
    )
    assert "head" in hashtags["params"] and "prototypes" not in hashtags["params"]
    sentence = refused(place, "too-wide", *overrides, "--config.model.name=regnety_200mf")
    assert "does not fit this config" in sentence
