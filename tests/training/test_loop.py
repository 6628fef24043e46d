"""Tests of training on hashtags in real processes: killed, stopped, damaged and restarted."""

import json
import os
import signal
import types

import jax
import pytest

import datasets
from hashvision.data import records
from hashvision.training import hosts
from runs import (
    REPO,
    finish,
    killed,
    make,
    newest_checkpoint,
    refused,
    same,
    start,
    train_here,
    until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run to compare with, traced for a while."""
    code, out, err = finish(start(place, "whole", "--config.profile=3,4"))
    assert code == 0, err
    assert "step 24/24" in out and "images/s" in out and "waiting" in out and "left" in out
    return "whole"


def notes(folder):
    return [(folder / name).read_bytes() for name in ("removed.jsonl", "dataset.json")]


def test_a_second_run_is_refused_and_the_first_saves_at_sigterm_and_resumes(place, whole):
    process, workdir = start(place, "stopped"), place / "stopped"
    until(process, workdir / "metrics.jsonl", 3)
    process.send_signal(signal.SIGSTOP)  # it would reach its end during the second run
    noted = notes(workdir)
    (place / "list.csv").write_text("kind,value,reason,received_at\nowner,u2,left,2018-06-01\n")
    sentence = refused(place, "stopped", f"--removals={place / 'list.csv'}")
    assert f"by process {process.pid} on " in sentence and notes(workdir) == noted
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    code, out, err = finish(process)
    assert code == hosts.AGAIN, err
    assert "Stopped at step" in out
    assert not (workdir / "lock").exists()
    assert finish(start(place, "stopped"))[0] == 0
    same(place, "stopped", whole)


def test_metrics_lines_have_the_documented_keys(place, whole):
    for line in (place / whole / "metrics.jsonl").read_text().splitlines():
        scalars = json.loads(line)
        assert {"step", "loss", "images_per_second", "learning_rate", "input_wait"} <= set(scalars)
    assert list((place / whole / "tensorboard").glob("events*"))
    kept = sorted(int(path.name) for path in (place / whole / "checkpoints").iterdir())
    assert kept[-3:] == [15, 20, 24] and len(kept) <= 4  # the newest three and the best


def test_a_trace_holds_the_requested_steps(place, whole):
    (trace,) = (place / whole / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [3, 4, 5, 6]
    assert any(event.name == "ThunkExecutor::Execute" for event in events)  # what XLA did too


def test_an_invalid_profile_is_refused(place):
    assert "(first step, number of steps)" in refused(place, "unborn", "--config.profile=5,")


def test_the_message_on_a_non_finite_loss_names_step_rate_and_checkpoint(place):
    sentence = refused(place, "diverged", "--config.optimizer.learning_rate=1e30")
    assert "at step" in sentence and "learning rate" in sentence and "last good" in sentence


def test_another_vocabulary_is_refused(place, whole):
    folder = datasets.write(place / "other")
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    vocabulary["classes"][0]["name"] = "cat"
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    datasets.seal(folder)
    sentence = refused(place, whole, dataset="other")
    assert "vocabulary" in sentence and "new --workdir" in sentence


def test_other_settings_are_refused(place, whole):
    assert "seed=0, not 5" in refused(place, whole, "--config.seed=5")


def test_a_missing_shard_is_refused(place):
    folder = datasets.write(place / "short")
    next(folder.glob("*.tfrecord-00001*")).unlink()
    sentence = refused(place, "unborn", dataset="short")
    assert "No such file" in sentence and "copy that file again" in sentence


def test_a_checkpoint_of_another_network_is_refused(place, whole):
    run = place / "other-network"
    run.mkdir()
    os.symlink(place / whole / "checkpoints", run / "checkpoints")
    sentence = refused(place, run.name, "--config.model.name=regnety_200mf")
    assert "does not fit this config" in sentence


def plain_objective():
    """An objective without watched metrics, whose functions must not be called."""
    from hashvision.objectives import Objective

    def nothing(*_):
        raise AssertionError

    return Objective(nothing, nothing, nothing)


def test_evaluations_between_checkpoints_do_not_change_the_mean_loss(tmp_path):
    from hashvision.config import recipes
    from hashvision.training import progress

    config = recipes.load(str(REPO / "configs" / "demo.py"), [])
    log = progress.Progress(str(tmp_path), config, plain_objective(), start=0, total=10)
    for step, loss in enumerate((1.0, 3.0), 1):
        log.add(step, {"loss": loss, "gradient_norm": 1.0, "learning_rate": 0.1}, 0.0)
        with log.paused():
            log.note(step, {"knn": 0.5})
    assert log.mean_loss() == {"loss": 2.0}
    log.__exit__(None)


def test_the_time_of_evaluations_is_left_out_of_the_speed(tmp_path, monkeypatch):
    from hashvision.config import recipes
    from hashvision.training import progress

    now = 0.0
    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(progress, "time", clock)
    config = recipes.load(str(REPO / "configs" / "demo.py"), ["--config.log_every=4"])
    log = progress.Progress(str(tmp_path), config, plain_objective(), start=0, total=9)
    for step in range(1, 6):  # a second each
        now += 1.0
        log.add(step, {"loss": 1.0, "gradient_norm": 1.0, "learning_rate": 0.1}, 0.0)
        if step == 2:
            with log.paused():
                now += 100.0
    log.__exit__(None)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert {line["step"]: line["images_per_second"] for line in lines}[4] == config.batch_size


def test_a_full_disk_is_reported_and_the_same_command_resumes(place, whole):
    code, _, err = finish(start(place, "full", largest_file=20))
    assert code == 2, err
    (sentence,) = [line for line in err.splitlines() if line.startswith("hashvision: ")]
    assert "cannot be written" in sentence and "space" in sentence
    assert finish(start(place, "full"))[0] == 0
    same(place, "full", whole)


def test_a_killed_run_with_a_damaged_checkpoint_resumes_from_the_one_before(place, whole):
    killed(place, "damaged", "tiny")
    newest = newest_checkpoint(place, "damaged")
    for path in newest.glob("default/d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    code, out, err = finish(start(place, "damaged"))
    assert code == 0, err
    assert f"The checkpoint of step {newest.name} is damaged" in out
    same(place, "damaged", whole)


def test_a_broken_shard_stops_the_run_and_once_repaired_the_run_resumes(place, whole):
    folder = datasets.write(place / "fragile")
    shard = folder / records.shard_name(1, 2)
    sound = shard.read_bytes()
    process = start(place, "fragile_run", "--config.data.broken=0", dataset="fragile")
    until(process, place / "fragile_run" / "metrics.jsonl", 2)
    shard.write_bytes(sound[:5000] + bytes(30_000) + sound[35_000:])
    code, out, err = finish(process)
    assert code == 2 and shard.name in err and "--config.data.broken" in err
    assert "Excluded " in out and "cannot be read: " in out
    assert list((place / "fragile_run" / "checkpoints").iterdir())
    assert shard.name in refused(place, "fragile_run", "--config.data.broken=0", dataset="fragile")
    shard.write_bytes(sound)
    code, out, err = finish(start(place, "fragile_run", dataset="fragile"))
    assert code == 0 and "can be read again" in out, err
    same(place, "fragile_run", whole)


def test_each_start_notes_its_removal_list(place, whole):
    (place / "removals.csv").write_text("kind,value,reason,received_at\nowner,u3,left,2018-06-01\n")
    removals = f"--removals={place / 'removals.csv'}"
    code, _, err = train_here(place, "removed", "--config.steps=6")
    assert code == 0, err
    code, _, err = train_here(place, "removed", removals)
    assert code == 0, err
    lines = (place / "removed" / "removed.jsonl").read_text().splitlines()
    starts = [json.loads(line) for line in lines]
    assert [(start["step"], len(start["removed"]["owner"])) for start in starts] == [
        (0, 0),
        (6, 1),
    ]
