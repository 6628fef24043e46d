"""Tests of training with SwAV in real processes: killed, collapsed, evaluated, and fine-tuned."""

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


def evaluation_flags(place):
    return f"--config.evaluate_on={place / 'labelled'}", "--config.evaluate_every=10"


def knn_top1(place, run):
    """The top-1 accuracy of kNN by step."""
    lines = map(json.loads, (place / run / "metrics.jsonl").read_text().splitlines())
    return {
        line["step"]: line["knn_top1_labelled"] for line in lines if "knn_top1_labelled" in line
    }


@pytest.fixture(scope="module")
def whole_swav(place):
    """An uninterrupted run, evaluated by kNN on two classes."""
    for split, first in (("train", 0), ("test", 50)):
        for number, name in enumerate(("dog", "boat")):
            folder = place / "labelled" / split / name
            folder.mkdir(parents=True)
            for photo in range(6):
                picture = datasets.jpeg(first + 2 * photo + number)
                (folder / f"{photo}.jpg").write_bytes(picture)
    code, out, err = finish(
        start(place, "whole-swav", *evaluation_flags(place), config="tiny_swav")
    )
    assert code == 0, err
    assert "loss_per_ln_k" in out and "this run has 12" in out
    assert "step 10/24  knn_top1_labelled" in out
    return "whole-swav"


def test_a_run_killed_at_step_17_and_restarted_equals_an_uninterrupted_one(place, whole_swav):
    killed_and_restarted(place, "killed", "tiny_swav")
    same(place, "killed", whole_swav)
    assert np.abs(arrays(place, "killed")["extra"]["queue"]).max() > 0.1


def test_a_run_that_learns_nothing_stops_with_cause_and_remedies(place):
    """A huge weight decay makes the run collapse."""
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


def test_knn_is_evaluated_during_training(place, whole_swav):
    found = knn_top1(place, whole_swav)
    assert list(found) == [0, 10, 20, 24]
    assert all(0 <= share <= 1 for share in found.values())


def test_two_hosts_have_the_losses_and_the_knn_accuracy_of_one(place, whole_swav):
    ended = all_finish(start_hosts(place, "two", 2, *evaluation_flags(place), config="tiny_swav"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    found, wanted = curve(place, "two"), curve(place, whole_swav)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=1e-4)
    assert knn_top1(place, "two") == knn_top1(place, whole_swav)


def test_evaluate_on_two_hosts_gives_the_report_of_one(place, whole_swav):
    """Each host gives the network the photos of its own devices; the first prints and writes."""
    report = place / whole_swav / "evaluations" / "knn-labelled.json"
    flags = "--protocol=knn", f"--dataset={place / 'labelled'}"
    code, alone, err = finish(start(place, whole_swav, *flags, command="evaluate"))
    assert code == 0, err
    wanted = json.loads(report.read_text())
    report.unlink()
    ended = all_finish(start_hosts(place, whole_swav, 2, *flags, command="evaluate"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    found = json.loads(report.read_text())
    printed = [
        "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))
        for _, out, _ in ended
    ]
    assert printed == [alone, ""] and "labelled" in alone
    assert found["metrics"] == wanted["metrics"] and found["photos"] == {"train": 12, "test": 12}


def test_hashtags_start_from_a_swav_trunk(place, whole_swav):
    overrides = [f"--config.init_from={place / whole_swav}", "--config.optimizer.learning_rate=0.0"]
    code, _, err = finish(start(place, "on-top", *overrides, "--config.steps=2"))
    assert code == 0, err
    swav, hashtags = arrays(place, whole_swav), arrays(place, "on-top", step=2)
    # At a learning rate of 0 the trunk stays the moving average of SwAV's run.
    jax.tree.map(
        np.testing.assert_array_equal,
        swav["average"]["params"]["trunk"],
        hashtags["params"]["trunk"],
    )
    assert "head" in hashtags["params"] and "prototypes" not in hashtags["params"]
    sentence = refused(place, "too-wide", *overrides, "--config.model.name=regnety_200mf")
    assert "does not fit this config" in sentence
