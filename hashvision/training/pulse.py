"""How the hosts of a run hear of each other: each tells the first host, which tells the others.

Every second a host sends the first one line over TCP, to the port after the coordinator's. The
answer lists the hosts that are not simply alive. So 128 hosts send 128 messages a second, and none
to storage. WORKDIR/hosts.json holds the port and a token that changes with each start: the first
host listens only to those who can read the workdir. JAX's own port beside it asks for no token.

JAX's coordination service has heartbeats and a key-value store, but they do not do here (seen with
JAX 0.10). It aborts its clients, which are all processes, when one of them dies, and tells the
number of that one in a page of text; when the coordinator dies or one does not join, it aborts them
and names nobody. The key-value store is not a public API, opens once all have joined, and ends with
the coordinator.
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

AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on
BEAT = 1.0  # seconds
GOES_ON = "the same command on all hosts goes on"

_ABORTED = -6  # SIGABRT: JAX ends so when it finds that another host is gone
_LATE = 3 * BEAT  # seconds of silence from which on a host is told of, by the first
_LAST_WORD = 5.0  # seconds to hand it over, at most, and of silence before nobody is there to hear
_LOOK = 3 * BEAT  # seconds between two looks at WORKDIR/hosts.json, until the first host answers
_WAIT = 5.0  # seconds for a connection and each of its messages
_BACKLOG = 1024  # connections that may wait to be accepted
_LINE = 1024  # bytes of what a host says, at most
_ANSWER = 1 << 20  # bytes of what it is told, at most
# What a connection, a file or a message may raise that is broken or not of this run.
_BROKEN = (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError)


class Place(typing.NamedTuple):
    """Which host this is."""

    coordinator: str  # HOST:PORT
    hosts: int
    host: int


class Said(typing.NamedTuple):
    """What is known of a host."""

    machine: str
    silent: float = 0.0  # seconds since it was heard
    code: int | None = None  # how its training ended; None while it runs
    ended: float = 0.0  # seconds since that was heard first


class Roll:
    """The hosts that were heard, and when."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has been heard yet; `clock` gives seconds."""
        self._clock, self._lock = clock, threading.Lock()
        self._heard: dict[int, tuple[str, float, int | None, float]] = {}

    def hear(self, host: int, machine: str, code: int | None) -> None:
        """Notes that a host has spoken; of codes the first counts, until it trains again."""
        with self._lock:
            now = self._clock()
            _, _, before, since = self._heard.get(host, ("", now, None, now))
            if code is None or before is None:
                before, since = code, now
            self._heard[host] = machine, now, before, since

    def known(self) -> dict[int, Said]:
        """All that were heard."""
        with self._lock:
            now = self._clock()
            return {
                host: Said(machine, now - heard, code, now - since)
                for host, (machine, heard, code, since) in self._heard.items()
            }


def lost(
    place: Place,
    known: Mapping[int, Said],
    waited: float,
    join_seconds: float,
    lost_seconds: float,
    failed: bool = False,
    trouble: str = "",
) -> tuple[str, int] | None:
    """Says which other host is not there, if one is not, and with which code to end for it.

    Args:
      place: which host this is.
      known: of the hosts that were heard.
      waited: seconds since this host started.
      join_seconds: how long another may take to appear.
      lost_seconds: how long one that was there may be silent.
      failed: whether training failed here. Those that stop to go on, or that JAX aborts, follow it.
      trouble: why nobody was heard, if that is so.
    """
    why = f" ({trouble})" if trouble else ""
    for host in range(place.hosts):
        if host == place.host:
            continue
        name = f"host {host} of {place.hosts}"
        if host not in known:
            if waited > join_seconds:
                return f"{name} did not join within {join_seconds:g} s{why}; {GOES_ON}", AGAIN
            continue
        machine, silent, code, ended = known[host]
        name += f" ({machine})"
        if code is None and silent > lost_seconds:
            return f"{name} has been silent for {lost_seconds:g} s; {GOES_ON}", AGAIN
        if code == 2:
            return f"{name} cannot go on, and its own words say why", 2
        if failed and code in (AGAIN, _ABORTED):
            continue
        # One that stopped to go on has agreed on that with this one, which needs its time.
        patience = lost_seconds if code == AGAIN else 2 * BEAT
        if code not in (None, 0) and ended > patience:
            return f"{name} ended with code {code}; {GOES_ON}", AGAIN
    return None


class Pulse(abc.ABC):
    """What this host says of itself and hears of the others; `First` and `Other` know how."""

    trouble = ""  # why nobody has been heard, if that is so

    def __init__(self, place: Place) -> None:
        """Says nothing yet."""
        self.place, self._machine = place, socket.gethostname()
        self._start = time.monotonic()

    @abc.abstractmethod
    def beat(self, code: int | None) -> None:
        """Says that this host is alive, or how its training ended."""

    @abc.abstractmethod
    def known(self) -> Mapping[int, Said]:
        """What is known of the hosts that were heard."""

    @abc.abstractmethod
    def end(self, code: int) -> None:
        """Says the last word, and waits some seconds at most for it to be heard."""

    def lost(
        self, join_seconds: float, lost_seconds: float, failed: bool = False
    ) -> tuple[str, int] | None:
        """See the function of the same name."""
        waited = time.monotonic() - self._start
        known, trouble = self.known(), self.trouble
        return lost(self.place, known, waited, join_seconds, lost_seconds, failed, trouble)


def start(place: Place, workdir: str) -> Pulse:
    """Begins to listen, on the first host, or to speak to it.

    Raises:
      OSError: the first host cannot write WORKDIR/hosts.json, or can open no port.
    """
    path = os.path.join(workdir, "hosts.json")
    return Other(place, path) if place.host else First(place, path)


class First(Pulse):
    """The first host, which the others speak to."""

    def __init__(self, place: Place, path: str) -> None:
        """Opens the port behind the coordinator's, or any where that is taken, and tells of it."""
        super().__init__(place)
        self.messages = 0  # that were answered
        self._roll, self._token = Roll(), secrets.token_hex(16)
        self._told: dict[int, float] = {}  # when each host was answered last
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
        told = {"port": listening.getsockname()[1], "token": self._token}
        storage.write(path, json.dumps(told))

    def beat(self, code: int | None) -> None:
        """Notes it for the others to hear."""
        self._roll.hear(self.place.host, self._machine, code)

    def known(self) -> Mapping[int, Said]:
        """What is known of the hosts that were heard."""
        return self._roll.known()

    def end(self, code: int) -> None:
        """Stays until those that are there have heard the last word."""
        self.beat(code)
        now = time.monotonic()
        while time.monotonic() - now < _LAST_WORD and any(
            said.code is None and said.silent < _LAST_WORD and self._told.get(host, 0) < now
            for host, said in self.known().items()
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
        await asyncio.sleep(0)  # in which their connections are closed

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one line; whoever does not know the token is not answered."""
        with contextlib.suppress(*_BROKEN), contextlib.closing(writer):
            line = await asyncio.wait_for(reader.readline(), _WAIT)
            token, _, said = line.partition(b" ")
            if hmac.compare_digest(token, self._token.encode()):
                host, machine, code = json.loads(said)
                now = time.monotonic()
                writer.write(self._answer(host, machine, code))
                await asyncio.wait_for(writer.drain(), _WAIT)
                self._told[host] = now

    def _answer(self, host: int, machine: str, code: int | None) -> bytes:
        """What is said of the hosts that are not simply alive; null of those not yet heard."""
        if not 0 < host < self.place.hosts:
            raise ValueError(host)
        self._roll.hear(host, machine, code)
        self.messages += 1
        known = self.known()
        told = {
            other: known.get(other)
            for other in range(self.place.hosts)
            if other not in known or known[other].code is not None or known[other].silent > _LATE
        }
        return json.dumps([self._machine, told]).encode()


def _listen(port: int) -> socket.socket:
    """A socket on all addresses of the machine, as JAX's coordinator has one."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be switched off
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
    return socket.create_server(("", port), backlog=_BACKLOG)


class Other(Pulse):
    """A host that speaks to the first."""

    def __init__(self, place: Place, path: str) -> None:
        """Says nothing yet.

        Args:
          place: which host this is.
          path: of WORKDIR/hosts.json.
        """
        super().__init__(place)
        self._path, self._host = path, place.coordinator.rpartition(":")[0].strip("[]")
        self._port, self._token = 0, ""
        self._looked = self._answered = -math.inf
        self._others: dict[int, Said] = {}

    def beat(self, code: int | None) -> None:
        """Tells the first host, and hears from it of the others."""
        if not self._others and time.monotonic() - self._looked > _LOOK:
            self._look()
        if not self._token:
            return
        said = json.dumps([self.place.host, self._machine, code])
        try:
            with socket.create_connection((self._host, self._port), _WAIT) as connection:
                connection.sendall(f"{self._token} {said}\n".encode())
                with connection.makefile("rb") as file:
                    machine, told = json.loads(file.read(_ANSWER))
            others = {host: Said("") for host in range(self.place.hosts)}
            for host, found in told.items():
                if found is None:
                    del others[int(host)]
                else:
                    others[int(host)] = Said(*found)
            self._others = {**others, 0: others[0]._replace(machine=machine)}
        except _BROKEN as error:
            self._blame(f"{self._host}:{self._port} does not answer: {error}")
            return
        self._answered, self.trouble = time.monotonic(), ""

    def known(self) -> Mapping[int, Said]:
        """What was told last; of the first host itself its silence since."""
        since = time.monotonic() - self._answered
        known = {
            host: said._replace(ended=said.ended + since) for host, said in self._others.items()
        }
        if known:
            known[0] = known[0]._replace(silent=known[0].silent + since)
        return known

    def end(self, code: int) -> None:
        """Says the last word until the first host has heard it."""
        now = time.monotonic()
        while self._answered < now and time.monotonic() - now < _LAST_WORD:
            self.beat(code)
            time.sleep(BEAT / 10)

    def _look(self) -> None:
        """Reads where the first host listens, which an earlier start may have written."""
        self._looked = time.monotonic()
        try:
            said = json.loads(storage.read(self._path))
            self._port, self._token = int(said["port"]), str(said["token"])
        except _BROKEN as error:
            self._blame(f"{self._path} cannot be read: {error}")

    def _blame(self, trouble: str) -> None:
        if not self._others:
            self.trouble = trouble
