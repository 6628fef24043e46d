"""Tests of what stops the training loop, and that nothing of one loop affects a later one."""

import functools
import os
import signal
import threading
import time

import pytest

import metadata
from hashvision.training import preemption

QUIET, EVENT = "NONE", "TERMINATE_ON_HOST_MAINTENANCE"


@pytest.fixture
def signals():
    """The SIGTERMs that reach this process outside the loop's own handler."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def events(monkeypatch):
    """The list of events of a metadata server that is polled a hundred times a second."""
    announced = [QUIET]
    often = functools.partial(preemption.Maintenance, every=0.01)
    monkeypatch.setattr(preemption, "Maintenance", often)
    with metadata.serving(announced) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        yield announced


def stops(stopping):
    """Whether the loop is asked to stop within 30 seconds."""
    end = time.monotonic() + 30
    while not stopping.at(1) and time.monotonic() < end:
        time.sleep(0.01)
    return stopping.at(1)


def announce(events):
    """Lets the server be polled, then announces maintenance."""
    time.sleep(0.2)
    events[:] = [EVENT]
    time.sleep(0.2)


def test_sigterm_stops_the_loop(signals):
    stopping = preemption.Preemption()
    with stopping:
        assert not stopping.at(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.at(1)
    assert not signals


def test_announced_maintenance_stops_the_loop(events):
    stopping = preemption.Preemption()
    with stopping:
        announce(events)
        assert stops(stopping)


@pytest.mark.parametrize("count", [1, 2])
def test_an_announcement_after_the_loop_has_no_effect(events, signals, count, monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: count)
    with preemption.Preemption():
        pass
    announce(events)
    assert not signals


def test_with_several_hosts_an_announcement_becomes_a_sigterm_for_jax(events, signals, monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    with preemption.Preemption():
        announce(events)
        end = time.monotonic() + 30
        while not signals and time.monotonic() < end:
            time.sleep(0.01)
    assert signals == [signal.SIGTERM]


def test_polling_ends_with_the_loop(events):
    before = threading.active_count()
    with preemption.Preemption():
        assert threading.active_count() > before
    assert not any(type(thread).__name__ == "Maintenance" for thread in threading.enumerate())


def test_a_second_loop_ignores_the_announcement_that_stopped_the_first(events):
    first, second = preemption.Preemption(), preemption.Preemption()
    with first:
        announce(events)
        assert stops(first)
    with second:  # an announcement from before the start is ignored
        time.sleep(0.2)
        assert not second.at(1)


def test_a_signal_in_a_nested_loop_stops_only_that_loop(signals):
    outer, inner = preemption.Preemption(), preemption.Preemption()
    with outer:
        with inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.at(1) and not outer.at(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.at(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [signal.SIGTERM]


def test_a_handler_that_python_did_not_set_is_replaced_by_the_default(monkeypatch, signals):
    """For a handler such as JAX's, signal.signal returns None and cannot restore it."""
    handlers = []

    def replace(number, handler):
        handlers.append(handler)

    monkeypatch.setattr(preemption.signal, "signal", replace)
    with preemption.Preemption():
        pass
    assert handlers[1:] == [signal.SIG_DFL]


def test_announced_maintenance_stops_a_loop_outside_the_main_thread(events, signals):
    stopped = []

    def train():
        stopping = preemption.Preemption()
        with stopping:
            announce(events)
            stopped.append(stops(stopping))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert stopped == [True] and not signals
