"""Heartbeats between the hosts of a run: each reports to the first host, which tells the others.

Every second each host sends one line over TCP to the first host, at the port after the
coordinator's. The answer lists the hosts that have ended, are silent or have not joined. So 128
hosts send 128 messages per second, and none to storage. WORKDIR/hosts.json holds the port and a
token that changes with each start, so the first host answers only those who can read the workdir.
JAX's own port beside it requires no token.

JAX's coordination service has heartbeats and a key-value store, but they do not suffice (as of JAX
0.10). When a process dies, the service aborts all others, and names the dead one only within a page
of text. When the coordinator dies or a process does not join, it aborts them without naming any.
The key-value store is not a public API, opens only once all have joined, and ends with the
coordinator.
"""

import abc
import asyncio
import contextlib
import hmac
import json
import math
import os
import secrets
import socket
import threading
import time
import typing
from collections.abc import Callable, Mapping

from hashvision import storage

AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command resumes the run
FINAL = (0, 2, AGAIN)  # codes after which a host no longer looks for what ended its training
BEAT = 1.0  # seconds between two heartbeats
RESUME = "run the same command on all hosts to resume"

_ABORTED = -6  # SIGABRT: JAX aborts with it when it finds that another host is gone
_LATE = 3 * BEAT  # seconds of silence after which the first host tells the others
_LAST_REPORT = 5.0  # seconds to deliver the last report; a host silent for longer is not waited for
_LOOKUP = 3 * BEAT  # seconds between two reads of hosts.json, until the first host answers
_WAIT = 5.0  # seconds to wait for a connection, and for each of its messages
_BACKLOG = 1024  # connections that may wait to be accepted
_LINE = 1024  # largest report in bytes
_ANSWER = 1 << 20  # largest answer in bytes
# Raised for a connection, file or message that is broken or does not belong to this run.
_BROKEN = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


class Place(typing.NamedTuple):
    """Which host this is."""

    coordinator: str  # HOST:PORT
    hosts: int
    host: int


class Status(typing.NamedTuple):
    """What is known about a host."""

    machine: str
    silent: float = 0.0  # seconds since its last report
    code: int | None = None  # exit code of its training; None while it runs
    ended: float = 0.0  # seconds since it first reported that code


class Reports:
    """The last report of each host, and when it arrived."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts without any report; `clock` returns seconds."""
        self._clock, self._lock = clock, threading.Lock()
        self._last: dict[int, tuple[str, float, int | None, float]] = {}

    def add(self, host: int, machine: str, code: int | None) -> None:
        """Records a report; the first exit code counts until the host trains again."""
        with self._lock:
            now = self._clock()
            _, _, before, since = self._last.get(host, ("", now, None, now))
            if code is None or before is None:
                before, since = code, now
            self._last[host] = machine, now, before, since

    def known(self) -> dict[int, Status]:
        """The status of each host that has reported."""
        with self._lock:
            now = self._clock()
            return {
                host: Status(machine, now - heard, code, now - since)
                for host, (machine, heard, code, since) in self._last.items()
            }


def find_lost(
    place: Place,
    known: Mapping[int, Status],
    *,
    waited: float,
    join_seconds: float,
    lost_seconds: float,
    failed: bool = False,
    trouble: str = "",
) -> tuple[str, int] | None:
    """Finds another host that is lost, so that this host must end too.

    Args:
      place: which host this is.
      known: the hosts that have reported.
      waited: seconds since this host started.
      join_seconds: how long another host may take to appear.
      lost_seconds: how long a host may be silent after it appeared.
      failed: whether training failed on this host. Then hosts that exit with AGAIN or are aborted
        by JAX are its consequence.
      trouble: why no host has been heard, if that is so.

    Returns:
      A sentence that names the host and the exit code for this host, or None if all are alive.
    """
    why = f" ({trouble})" if trouble else ""
    for host in range(place.hosts):
        if host == place.host:
            continue
        name = f"host {host} of {place.hosts}"
        if host not in known:
            if waited > join_seconds:
                return f"{name} did not join within {join_seconds:g} s{why}; {RESUME}", AGAIN
            continue
        machine, silent, code, ended = known[host]
        name += f" ({machine})"
        if code is None and silent > lost_seconds:
            return f"{name} has been silent for {lost_seconds:g} s; {RESUME}", AGAIN
        if code == 2:
            return f"{name} stopped with an error; see that host's log", 2
        if failed and code in (AGAIN, _ABORTED):
            continue
        # A host that exits with AGAIN has agreed on it with this one, which may need more time.
        patience = lost_seconds if code == AGAIN else 2 * BEAT
        if code not in (None, 0) and ended > patience:
            return f"{name} ended with code {code}; {RESUME}", AGAIN
    return None


class Pulse(abc.ABC):
    """Sends this host's reports and receives those of the others."""

    trouble = ""  # why no other host has been heard, if that is so

    def __init__(self, place: Place) -> None:
        """Sends nothing yet."""
        self.place, self._machine = place, socket.gethostname()
        self._start = time.monotonic()

    @abc.abstractmethod
    def beat(self, code: int | None) -> None:
        """Reports that this host is alive, or the exit code of its training."""

    @abc.abstractmethod
    def known(self) -> Mapping[int, Status]:
        """The status of each host that has reported."""

    @abc.abstractmethod
    def end(self, code: int) -> None:
        """Sends the last report, and waits up to 5 s until it is delivered."""

    def lost(
        self, join_seconds: float, lost_seconds: float, failed: bool = False
    ) -> tuple[str, int] | None:
        """Finds a lost host; see `find_lost`."""
        return find_lost(
            self.place,
            self.known(),
            waited=time.monotonic() - self._start,
            join_seconds=join_seconds,
            lost_seconds=lost_seconds,
            failed=failed,
            trouble=self.trouble,
        )


def start(place: Place, workdir: str) -> Pulse:
    """Starts to listen on the first host, or to report to it on another.

    Raises:
      OSError: the first host cannot write WORKDIR/hosts.json or open a port.
    """
    path = os.path.join(workdir, "hosts.json")
    return OtherHost(place, path) if place.host else FirstHost(place, path)


class FirstHost(Pulse):
    """The pulse of the first host, which receives the reports of the others."""

    def __init__(self, place: Place, path: str) -> None:
        """Opens the port after the coordinator's, or a free one if that is in use.

        Args:
          place: which host this is.
          path: of WORKDIR/hosts.json, which tells the others the port.
        """
        super().__init__(place)
        self.messages = 0  # number of reports answered
        self._reports, self._token = Reports(), secrets.token_hex(16)
        self._answered: dict[int, float] = {}  # when each host was last answered
        self.beat(None)
        try:
            listening = _listen(int(place.coordinator.rpartition(":")[2]) + 1)
        except (OSError, OverflowError):
            listening = _listen(0)
        self._loop = asyncio.new_event_loop()
        serving = asyncio.start_server(self._serve, sock=listening, limit=_LINE)
        self._server = self._loop.run_until_complete(serving)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        address = {"port": listening.getsockname()[1], "token": self._token}
        storage.write(path, json.dumps(address))

    def beat(self, code: int | None) -> None:
        """Records the report, for the answers to the others."""
        self._reports.add(self.place.host, self._machine, code)

    def known(self) -> Mapping[int, Status]:
        """The status of each host that has reported."""
        return self._reports.known()

    def end(self, code: int) -> None:
        """Records the last report and stays until the other live hosts have received it.

        A host whose training failed is live: this report may be what it waits for, as the cause.
        """
        self.beat(code)
        now = time.monotonic()
        while time.monotonic() - now < _LAST_REPORT and any(
            each.code not in FINAL
            and each.silent < _LAST_REPORT
            and self._answered.get(host, 0) < now
            for host, each in self.known().items()
        ):
            time.sleep(BEAT / 10)
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        answering = asyncio.all_tasks() - {asyncio.current_task()}
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
        await asyncio.sleep(0)  # lets their connections close

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers a report of one line, if it starts with the token."""
        with contextlib.suppress(*_BROKEN), contextlib.closing(writer):
            line = await asyncio.wait_for(reader.readline(), _WAIT)
            token, _, report = line.partition(b" ")
            if hmac.compare_digest(token, self._token.encode()):
                host, machine, code = json.loads(report)
                now = time.monotonic()
                writer.write(self._answer(host, machine, code))
                await asyncio.wait_for(writer.drain(), _WAIT)
                self._answered[host] = now

    def _answer(self, host: int, machine: str, code: int | None) -> bytes:
        """The status of hosts that ended or are silent, and null for those not yet heard."""
        if not 0 < host < self.place.hosts:
            raise ValueError(host)
        self._reports.add(host, machine, code)
        self.messages += 1
        known = self.known()
        unusual = {
            other: known.get(other)
            for other in range(self.place.hosts)
            if other not in known or known[other].code is not None or known[other].silent > _LATE
        }
        return json.dumps([self._machine, unusual]).encode()


def _listen(port: int) -> socket.socket:
    """Opens a socket on all addresses of the machine, as JAX's coordinator does."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be switched off
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
    return socket.create_server(("", port), backlog=_BACKLOG)


class OtherHost(Pulse):
    """The pulse of a host that reports to the first one."""

    def __init__(self, place: Place, path: str) -> None:
        """Sends nothing yet.

        Args:
          place: which host this is.
          path: of WORKDIR/hosts.json.
        """
        super().__init__(place)
        self._path, self._host = path, place.coordinator.rpartition(":")[0].strip("[]")
        self._port, self._token = 0, ""
        self._looked = self._answered = -math.inf
        self._others: dict[int, Status] = {}

    def beat(self, code: int | None) -> None:
        """Reports to the first host, and receives the status of the others."""
        if not self._others and time.monotonic() - self._looked > _LOOKUP:
            self._look_up_address()
        if not self._token:
            return
        report = json.dumps([self.place.host, self._machine, code])
        try:
            with socket.create_connection((self._host, self._port), _WAIT) as connection:
                connection.sendall(f"{self._token} {report}\n".encode())
                with connection.makefile("rb") as file:
                    machine, unusual = json.loads(file.read(_ANSWER))
            others = {host: Status("") for host in range(self.place.hosts)}
            for host, found in unusual.items():
                if found is None:
                    del others[int(host)]
                else:
                    others[int(host)] = Status(*found)
            self._others = {**others, 0: others[0]._replace(machine=machine)}
        except _BROKEN as error:
            self._set_trouble(f"{self._host}:{self._port} does not answer: {error}")
            return
        self._answered, self.trouble = time.monotonic(), ""

    def known(self) -> Mapping[int, Status]:
        """The hosts as of the last answer; the first host counts as silent since then."""
        since = time.monotonic() - self._answered
        known = {
            host: each._replace(ended=each.ended + since) for host, each in self._others.items()
        }
        if known:
            known[0] = known[0]._replace(silent=known[0].silent + since)
        return known

    def end(self, code: int) -> None:
        """Repeats the last report until the first host has answered, for up to 5 s."""
        now = time.monotonic()
        while self._answered < now and time.monotonic() - now < _LAST_REPORT:
            self.beat(code)
            time.sleep(BEAT / 10)

    def _look_up_address(self) -> None:
        """Reads where the first host listens; the file may be from an earlier start."""
        self._looked = time.monotonic()
        try:
            address = json.loads(storage.read(self._path))
            self._port, self._token = int(address["port"]), str(address["token"])
        except _BROKEN as error:
            self._set_trouble(f"{self._path} cannot be read: {error}")

    def _set_trouble(self, trouble: str) -> None:
        if not self._others:
            self.trouble = trouble
