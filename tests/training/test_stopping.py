"""When the loop is told to stop, and that nothing of one loop reaches what comes after it."""

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
def heard():
    """The signals that reach this process while nothing of the loop catches them."""
    signals = []
    before = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    yield signals
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def events(monkeypatch):
    """What a metadata server says, which is asked a hundred times a second."""
    said = [QUIET]
    often = functools.partial(preemption.Maintenance, every=0.01)
    monkeypatch.setattr(preemption, "Maintenance", often)
    with metadata.serving(said) as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        yield said


def asked(stopping):
    """Whether the loop is told to stop within some seconds."""
    end = time.monotonic() + 30
    while not stopping.at(1) and time.monotonic() < end:
        time.sleep(0.01)
    return stopping.at(1)


def tell(events):
    """Lets the server be asked, then says that the machine is about to go."""
    time.sleep(0.2)
    events[:] = [EVENT]
    time.sleep(0.2)


def test_sigterm_asks_for_the_end(heard):
    stopping = preemption.Preemption()
    with stopping:
        assert not stopping.at(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.at(1)
    assert not heard


def test_notice_of_maintenance_asks_for_the_end(events):
    stopping = preemption.Preemption()
    with stopping:
        tell(events)
        assert asked(stopping)


@pytest.mark.parametrize("count", [1, 2])
def test_a_notice_after_the_loop_reaches_nobody(events, heard, count, monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: count)
    with preemption.Preemption():
        pass
    tell(events)
    assert not heard


def test_of_several_hosts_jax_hears_the_notice(events, heard, monkeypatch):
    monkeypatch.setattr(preemption.jax, "process_count", lambda: 2)
    with preemption.Preemption():
        tell(events)
        end = time.monotonic() + 30
        while not heard and time.monotonic() < end:
            time.sleep(0.01)
    assert heard == [signal.SIGTERM]


def test_nothing_that_asks_outlives_the_loop(events):
    before = threading.active_count()
    with preemption.Preemption():
        assert threading.active_count() > before
    asking = [thread for thread in threading.enumerate() if type(thread).__name__ == "Maintenance"]
    assert not asking


def test_a_second_loop_is_not_stopped_by_the_notice_to_the_first(events):
    first, second = preemption.Preemption(), preemption.Preemption()
    with first:
        tell(events)
        assert asked(first)
    with second:  # the notice stands already: this start was made knowing it
        time.sleep(0.2)
        assert not second.at(1)


def test_a_loop_inside_another_hears_for_itself(heard):
    outer, inner = preemption.Preemption(), preemption.Preemption()
    with outer:
        with inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.at(1) and not outer.at(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.at(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_a_handler_that_python_does_not_know_gives_way_to_the_default(monkeypatch, heard):
    """As that of JAX is; Python names it None and cannot put it back."""
    put = []

    def replace(number, handler):
        put.append(handler)

    monkeypatch.setattr(preemption.signal, "signal", replace)
    with preemption.Preemption():
        pass
    assert put[1:] == [signal.SIG_DFL]


def test_in_another_thread_than_the_main_one_notice_still_stops_the_loop(events, heard):
    stopped = []

    def train():
        stopping = preemption.Preemption()
        with stopping:
            tell(events)
            stopped.append(asked(stopping))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert stopped == [True] and not heard
