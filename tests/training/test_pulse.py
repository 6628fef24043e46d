"""Tests of heartbeats: which host is lost, on a simulated clock, and the protocol over a port."""

import concurrent.futures
import contextlib
import json
import os
import socket
import threading
import time

import pytest

from hashvision.training import pulse
from hashvision.training.pulse import AGAIN, Place, Status

JOIN, LOST = 40, 6


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Hosts:
    """Three hosts as host 1 sees them."""

    def __init__(self):
        self.clock = Clock()
        self.start, self.reports = self.clock.now, pulse.Reports(self.clock)

    def hear(self, *codes, seconds=1):
        """Lets time pass, then each host reports its code; hosts with "silent" do not report."""
        self.clock.now += seconds
        for host, code in enumerate(codes):
            if code != "silent":
                self.reports.add(host, f"tpu-{host}", code)

    def lost(self, failed=False):
        return pulse.find_lost(
            Place("a:1", 3, 1),
            self.reports.known(),
            waited=self.clock.now - self.start,
            join_seconds=JOIN,
            lost_seconds=LOST,
            failed=failed,
        )


@pytest.fixture
def hosts():
    return Hosts()


def test_no_host_is_lost_while_all_report(hosts):
    for _ in range(100):
        hosts.hear(None, None, None)
        assert hosts.lost() is None


def test_a_host_that_does_not_join_in_time_is_lost(hosts):
    hosts.hear(None, None, "silent", seconds=JOIN)
    assert hosts.lost() is None
    hosts.hear(None, None, "silent")
    sentence, code = hosts.lost()
    assert sentence.startswith("host 2 of 3 did not join within 40 s; run the") and code == AGAIN


def test_a_silent_host_is_lost_and_named_with_its_machine(hosts):
    hosts.hear(None, None, None)
    hosts.hear("silent", None, None, seconds=LOST)
    assert hosts.lost() is None
    hosts.hear("silent", None, None)
    sentence, code = hosts.lost()
    assert "host 0 of 3 (tpu-0) has been silent for 6 s" in sentence and code == AGAIN


def test_a_host_that_reports_again_in_time_is_not_lost(hosts):
    hosts.hear(None, None, None)
    hosts.hear("silent", None, None, seconds=LOST)
    for _ in range(3):
        hosts.hear(None, None, None, seconds=LOST)
        assert hosts.lost() is None


def test_a_user_error_on_one_host_ends_all_with_2(hosts):
    hosts.hear(None, None, 2)
    assert hosts.lost() == ("host 2 of 3 (tpu-2) stopped with an error; see that host's log", 2)


def test_a_finished_host_is_never_lost(hosts):
    hosts.hear(0, None, 0)
    hosts.hear("silent", None, "silent", seconds=1000)
    assert hosts.lost() is None


@pytest.mark.parametrize(("code", "patience"), [(1, 2), (-9, 2), (-6, 2), (AGAIN, LOST)])
def test_a_host_that_failed_is_lost_after_a_grace_period(hosts, code, patience):
    hosts.hear(None, None, code)
    hosts.hear(None, None, "silent", seconds=patience)
    assert hosts.lost() is None
    hosts.hear(None, None, code)  # the first report of the code counts
    sentence, found = hosts.lost()
    assert f"host 2 of 3 (tpu-2) ended with code {code}; " in sentence and found == AGAIN


@pytest.mark.parametrize("code", [AGAIN, -6])
def test_hosts_that_stop_after_a_failure_here_are_not_blamed_for_it(hosts, code):
    hosts.hear(None, 1, code)
    hosts.hear(None, 1, code, seconds=LOST + 1)
    assert hosts.lost(failed=True) is None and hosts.lost() is not None


def test_a_host_that_is_started_again_is_alive(hosts):
    hosts.hear(None, None, -9)
    hosts.hear(None, None, None)
    hosts.hear(None, None, None, seconds=3)
    assert hosts.lost() is None


def started(path, count=3):
    """The pulses of the first host of a run and of the others, on a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    places = [Place(f"localhost:{port}", count, host) for host in range(count)]
    first, *others = (pulse.start(place, str(path)) for place in places)
    return first, others


@contextlib.contextmanager
def speaking(path, count=3):
    """As `started`; at the end the first host reports that it is done, and does not wait."""
    first, others = started(path, count)
    yield first, others
    end_at_once(first)


def end_at_once(first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulse, "_LAST_REPORT", 0.0)
        first.end(0)


def address(path):
    return json.loads((path / "hosts.json").read_text())


def send(path, line):
    """Sends raw bytes to the first host; returns the answer."""
    with socket.create_connection(("localhost", address(path)["port"]), 10) as connection:
        connection.sendall(line)
        with contextlib.suppress(ConnectionError):
            return connection.makefile("rb").read()
    return b""


def test_hosts_hear_of_each_other(tmp_path):
    with speaking(tmp_path) as (first, (one, two)):
        one.beat(None)
        assert one.known().keys() == {0, 1}  # 2 has not joined yet
        two.beat(-9)
        one.beat(None)
        machine = socket.gethostname()
        assert one.known()[0]._replace(silent=0, ended=0) == Status(machine)
        assert one.known()[2]._replace(silent=0, ended=0) == Status(machine, code=-9)
        assert first.known()[2].code == -9 and first.known()[1].code is None
        assert os.listdir(tmp_path) == ["hosts.json"]


def test_the_first_host_is_lost_when_it_stops_answering(tmp_path):
    with speaking(tmp_path) as (first, (one, two)):
        for other in (one, two):
            other.beat(None)
    end = time.monotonic() + 60
    while (found := one.lost(JOIN, 0.5)) is None and time.monotonic() < end:
        one.beat(None)
        time.sleep(0.05)
    assert "host 0 of 3" in found[0] and "silent for 0.5 s" in found[0]


@pytest.mark.parametrize("code", [None, -6])
def test_the_first_host_stays_until_the_others_have_its_last_report(tmp_path, code):
    """Also those whose training was aborted by the first host's failure, and who look for it."""
    first, (one, two) = started(tmp_path)
    one.beat(None)
    two.beat(code)
    ending = threading.Thread(target=first.end, args=(2,))
    ending.start()
    time.sleep(0.2)
    assert ending.is_alive()
    one.beat(None)
    time.sleep(0.2)
    assert ending.is_alive()
    two.beat(code)
    ending.join(60)
    assert one.lost(JOIN, LOST)[1] == two.lost(JOIN, LOST)[1] == 2


def test_the_first_host_receives_a_last_report(tmp_path):
    with speaking(tmp_path) as (first, (one, _)):
        one.end(2)
        assert first.lost(JOIN, LOST)[1] == 2


def test_the_reason_why_no_host_is_heard_is_in_the_message(tmp_path):
    other = pulse.start(Place("localhost:1", 2, 1), str(tmp_path))
    other.beat(None)
    assert "hosts.json cannot be read" in other.lost(0, LOST)[0]
    (tmp_path / "hosts.json").write_text('{"port": 1, "token": "old"}')
    other = pulse.start(Place("localhost:1", 2, 1), str(tmp_path))
    other.beat(None)
    sentence = other.lost(0, LOST)[0]
    assert "host 0 of 2 did not join within 0 s (localhost:1 does not answer: " in sentence


def test_an_address_of_an_earlier_start_is_looked_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pulse, "_LOOKUP", 0.0)
    (tmp_path / "hosts.json").write_text('{"port": 1, "token": "old"}')
    early = pulse.start(Place("localhost:1", 3, 1), str(tmp_path))
    early.beat(None)
    assert not early.known()
    with speaking(tmp_path):
        early.beat(None)
        assert early.known() and not early.trouble


def test_another_port_is_opened_if_the_preferred_one_is_in_use(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        first = pulse.start(Place(f"localhost:{port - 1}", 2, 0), str(tmp_path))
        other = pulse.start(Place(f"localhost:{port - 1}", 2, 1), str(tmp_path))
        other.beat(None)
        assert other.known() and address(tmp_path)["port"] != port
        end_at_once(first)


@pytest.mark.parametrize(
    "line",
    [
        b'wrong [1, "x", 2]\n',
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 400,
        b"TOKEN\n",
        b"TOKEN {\n",
        b"TOKEN []\n",
        b'TOKEN [7, "x", 2]\n',
        b'TOKEN ["1", "x", 2]\n',
        b"TOKEN " + b"[" * 1000 + b"\n",
        b'TOKEN [1, "' + b"x" * 5000 + b'", 2]\n',
    ],
)
def test_messages_of_strangers_change_nothing(tmp_path, line, capfd):
    with speaking(tmp_path) as (first, (one, two)):
        one.beat(None)
        two.beat(None)
        token = address(tmp_path)["token"].encode()
        assert send(tmp_path, line.replace(b"TOKEN", token)) == b""
        one.beat(None)
        assert one.known().keys() == {0, 1, 2}
        assert first.lost(JOIN, LOST) is one.lost(JOIN, LOST) is None
    assert capfd.readouterr() == ("", "")


def test_an_invalid_answer_counts_as_no_answer(tmp_path):
    with socket.create_server(("localhost", 0)) as fake:
        port = fake.getsockname()[1]
        (tmp_path / "hosts.json").write_text(json.dumps({"port": port, "token": "t"}))
        other = pulse.start(Place(f"localhost:{port}", 2, 1), str(tmp_path))
        for answer in (b"", b"[]", b'["x", {"0": null}]', b'["x", {"0": 5}]', b"[" * 9999):
            beating = threading.Thread(target=other.beat, args=(None,))
            beating.start()
            connection, _ = fake.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)
            beating.join(60)
            assert not other.known() and "does not answer" in other.trouble


def test_each_heartbeat_is_one_message_and_does_not_use_storage(tmp_path, monkeypatch):
    with speaking(tmp_path, 129) as (first, others):
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda other: other.beat(None), others))
            monkeypatch.setattr(pulse.storage, "read", None)
            monkeypatch.setattr(pulse.storage, "write", None)
            list(pool.map(lambda other: other.beat(None), others))
        assert first.messages == 2 * 128
        assert all(len(other.known()) == 129 for other in others)
        assert all(other.lost(JOIN, 60) is None for other in others)
