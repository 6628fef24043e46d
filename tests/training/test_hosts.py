"""Tests of runs of several hosts, here processes: resized, stopped, or with a host that is lost."""

import os
import queue
import signal
import time

import numpy as np
import pytest

import metadata
from hashvision.errors import UserError
from hashvision.training import hosts, preemption
from runs import all_finish, curve, finish, kill_host, make, start, start_hosts, until

pytestmark = pytest.mark.slow

QUICK = ("--config.hosts.join=40", "--config.hosts.lost=6")
# So that a run is stopped long before its last step, and saves when it is stopped.
LONGER = ("--config.steps=60", "--config.checkpoint.every=40")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def alone(place):
    code, _, err = finish(start(place, "alone", *LONGER))
    assert code == 0, err
    return curve(place, "alone")


def same_losses(found, wanted):
    assert found.keys() == wanted.keys()
    for step in wanted:
        np.testing.assert_allclose(found[step][0], wanted[step][0], rtol=1e-5)


def test_a_run_on_four_hosts_then_two_then_one_learns_the_same_as_on_one(place, alone):
    metrics = place / "elastic" / "metrics.jsonl"
    for count in (4, 2):
        running = start_hosts(place, "elastic", count, *LONGER)
        reached = max(curve(place, "elastic")) if metrics.exists() else 0
        until(running[0], metrics, reached + 3)
        running[-1].send_signal(signal.SIGTERM)  # to one host only
        ended = all_finish(running)
        assert [code for code, _, _ in ended] == [hosts.AGAIN] * count, ended
        assert "Stopped at step" in ended[0][1]
        assert (
            f"of {count} hosts" in ended[0][1] and "hosts" not in ended[1][1]
        )  # only host 0 prints
    code, _, err = finish(start(place, "elastic", *LONGER))
    assert code == 0, err
    same_losses(curve(place, "elastic"), alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_host_dies_the_other_names_it_and_ends(place, victim):
    running = start_hosts(place, f"lost-{victim}", 2, *QUICK)
    until(running[0], place / f"lost-{victim}" / "metrics.jsonl", 6)
    kill_host(running[victim])
    killed = time.monotonic()
    code, _, err = finish(running[1 - victim])
    assert time.monotonic() - killed < 6 + 8
    assert code == hosts.AGAIN, err
    (sentence,) = [line for line in err.splitlines() if line.startswith("hashvision: ")]
    assert f"host {victim} of 2 (" in sentence and "silent" in sentence
    finish(running[victim])


def test_when_training_is_killed_on_a_host_the_other_ends_at_once(place):
    running = start_hosts(place, "crashed", 2, *QUICK)
    until(running[0], place / "crashed" / "metrics.jsonl", 6)
    (child,) = children(running[1].pid)
    signal_at = time.monotonic()
    os.kill(child, signal.SIGKILL)
    ended = all_finish(running)
    assert time.monotonic() - signal_at < 10
    assert [code for code, _, _ in ended] == [hosts.AGAIN] * 2
    assert "SIGKILL" in ended[1][2] and "host 1 of 2" in ended[0][2]


def test_a_host_that_never_joins_is_named(place):
    started = time.monotonic()
    (running,) = start_hosts(place, "unborn", 2, "--config.hosts.join=5", only=[0])
    code, _, err = finish(running)
    assert time.monotonic() - started < 20
    assert code == hosts.AGAIN and "host 1 of 2 did not join within 5 s" in err


def test_a_user_error_on_one_host_ends_all(place):
    """All exit with 2, and at least one prints the reason."""
    running = start_hosts(place, "refused", 2, *QUICK, dataset="nowhere")
    ended = all_finish(running)
    assert [code for code, _, _ in ended] == [2, 2]
    assert any("nowhere" in err for _, _, err in ended)


def test_an_os_error_on_one_host_ends_all(place):
    (place / "occupied" / "metrics.jsonl").mkdir(parents=True)
    ended = all_finish(start_hosts(place, "occupied", 2, *QUICK))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "metrics.jsonl cannot be used (Is a directory)" in ended[0][2]


UNEXPECTED = """
import os, sys
from hashvision.commands.main import main
from hashvision.training import metrics
if os.environ["JAX_PROCESS_ID"] == "0":
    metrics._until = None
sys.exit(main())
"""


def test_an_unexpected_error_on_one_host_ends_all(place):
    """JAX's normal exit would wait minutes for the others, which wait for this host."""
    started = time.monotonic()
    ended = all_finish(start_hosts(place, "unforeseen", 2, *QUICK, program=("-c", UNEXPECTED)))
    assert time.monotonic() - started < 150
    assert [code for code, _, _ in ended] == [70, hosts.AGAIN]
    assert "TypeError" in ended[0][2] and "host 0 of 2" in ended[1][2]


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
    ],
)
def test_invalid_environment_variables_are_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_PROCESS_ID"):
        hosts.place()


def test_announced_maintenance_saves_and_stops_a_run(place):
    with metadata.serving(["NONE", "TERMINATE_ON_HOST_MAINTENANCE"]) as address:
        environment = {"GCE_METADATA_HOST": address}
        running = start(place, "notice", "--config.steps=100000", environment=environment)
        code, out, err = finish(running)
    assert code == hosts.AGAIN, err
    assert "TERMINATE_ON_HOST_MAINTENANCE" in out and "Stopped at step" in out


def test_maintenance_announced_before_the_start_is_ignored(monkeypatch):
    """Otherwise a restarted run would stop again at once, until the machine is gone."""
    events = queue.Queue()
    with metadata.serving(["TERMINATE"] * 5 + ["NONE"] * 5 + ["MIGRATE"]) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        polling = preemption.Maintenance(events.put, every=0.01)
        polling.start()
        assert events.get(timeout=10) == "maintenance-event: MIGRATE"
        polling.end()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
