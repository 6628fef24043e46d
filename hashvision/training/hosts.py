"""The hosts of a run: started together, watched, and the one that is lost is named.

Each host runs the same command, told by three variables of the environment, JAX's own names, who it
is: JAX_COORDINATOR_ADDRESS (HOST:PORT of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. The
command is two processes then: one that trains, which a lost host leaves waiting in a collective or
which JAX ends without a word on who was lost, and one that watches it and the other hosts, which
say in WORKDIR/hosts that they are alive.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import typing
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence

from hashvision import storage
from hashvision.errors import UserError

AGAIN = 75  # exit code, EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_WATCHED = "HASHVISION_WATCHED"  # set for the process that trains
_BEAT = 1.0  # seconds
_GOES_ON = "the same command on all hosts goes on"
_METADATA = "/computeMetadata/v1/instance/"
# What Google's metadata server says while nothing is ahead.
_QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}
_PRODUCT = "/sys/class/dmi/id/product_name"


class Place(typing.NamedTuple):
    """Which host this is."""

    coordinator: str  # HOST:PORT
    hosts: int
    host: int


def place() -> Place | None:
    """Which of several hosts this is; None where it is alone.

    Raises:
      UserError: the variables make no sense.
    """
    values = [os.environ.get(name) for name in _VARIABLES]
    if not any(values):
        return None
    coordinator, hosts, host = values
    try:
        found = Place(coordinator or "", int(hosts or ""), int(host or ""))
        sensible = ":" in found.coordinator and 0 <= found.host < found.hosts
    except ValueError:
        sensible, found = False, None
    if not sensible or found is None:
        told = ", ".join(f"{name}={value}" for name, value in zip(_VARIABLES, values, strict=True))
        raise UserError(
            f"{told} name no host of a run; set all three, HOST:PORT of the first, the number of"
            " hosts and which one this is, from 0, or none of them."
        )
    return found if found.hosts > 1 else None


def watched() -> bool:
    """Whether this process is the one that trains, and another watches it."""
    return _WATCHED in os.environ


def join(place: Place, seconds: float) -> None:
    """Makes JAX see the devices of all hosts; the first call to JAX.

    Args:
      place: which host this is.
      seconds: how long to wait for the others.
    """
    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.hosts,
        place.host,
        # The process that watches is to find out first, since it can say who.
        initialization_timeout=round(seconds) + 60,
    )


def watch(
    place: Place, workdir: str, command: Sequence[str], join_seconds: float, lost_seconds: float
) -> int:
    """Runs the command that trains, and ends it when another host is lost.

    Args:
      place: which host this is.
      workdir: of the run, where all hosts see it.
      command: to run.
      join_seconds: how long another host may take to appear.
      lost_seconds: how long one that was there may be silent.

    Returns:
      The exit code: the command's own, AGAIN where a host was lost, or 2 where one cannot go on.
    """
    pulse = _Pulse(os.path.join(workdir, "hosts"), place)
    child = subprocess.Popen(command, env={**os.environ, _WATCHED: "1"})
    before = {
        number: signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return _watch(pulse, child, join_seconds, lost_seconds)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    pulse: "_Pulse", child: subprocess.Popen[bytes], join_seconds: float, lost_seconds: float
) -> int:
    ended: float | None = None
    while True:
        code = child.poll()
        pulse.beat(code)
        lost = pulse.lost(join_seconds, lost_seconds, code is not None and code > 0)
        if code in (0, 2, AGAIN):
            pulse.beat(code)
            return code
        if lost:
            if code is None:
                child.kill()  # a host that waits for another in a collective hears nothing
                child.wait()
            sentence, code = lost
            pulse.beat(code)
            print(f"hashvision: {sentence}.", file=sys.stderr)
            return code
        if code is not None and code < 0 and code != -signal.SIGABRT:
            pulse.beat(code)
            said = f"training was ended by {signal.Signals(-code).name}; {_GOES_ON}"
            print(f"hashvision: {said}.", file=sys.stderr)
            return AGAIN
        if code is not None:
            # It may have failed because another host did, which shows a little later.
            ended = ended or time.monotonic()
            if time.monotonic() - ended > lost_seconds + 2 * _BEAT:
                return code if code > 0 else AGAIN
        time.sleep(_BEAT)


class _Pulse:
    """What the hosts say of themselves, a file each."""

    def __init__(self, folder: str, place: Place) -> None:
        self._folder, self._place = folder, place
        self._session, self._beats, self._start = uuid.uuid4().hex, 0, time.monotonic()
        self._heard: dict[int, tuple[Mapping[str, typing.Any], float]] = {}
        self._alive: set[int] = set()
        storage.make_folder(folder)
        self._left_over = self._read()

    def _path(self, host: int) -> str:
        return os.path.join(self._folder, f"{host:05d}.json")

    def _read(self) -> list[Mapping[str, typing.Any] | None]:
        """What each host says."""

        def read(host: int) -> Mapping[str, typing.Any] | None:
            try:
                return json.loads(storage.read(self._path(host)))
            except (OSError, ValueError):
                return None

        return storage.each(read, range(self._place.hosts), storage.is_remote(self._folder))

    def beat(self, code: int | None) -> None:
        """Says that this host is alive, or how its training ended."""
        self._beats += 1
        said = {
            "host": socket.gethostname(),
            "session": self._session,
            "beat": self._beats,
            "code": code,
        }
        try:
            storage.write(self._path(self._place.host), json.dumps(said))
        except OSError:  # a full disk, say: training itself will meet it, and tell
            pass

    def lost(
        self, join_seconds: float, lost_seconds: float, failed: bool = False
    ) -> tuple[str, int] | None:
        """Says which host is not there, if one is not, and with which code to end for it.

        Where training `failed` here, those that stop to go on, or that JAX aborts, follow it.
        """
        every, now = self._read(), time.monotonic()
        for host, said in enumerate(every):
            if host == self._place.host:
                continue
            name = f"host {host} of {self._place.hosts}"
            if said is not None and said != self._left_over[host]:
                before = self._heard[host][0] if host in self._heard else None
                # Of a host whose training has ended it counts when that was heard first.
                if said != before and (
                    said["code"] is None or before is None or before["code"] is None
                ):
                    self._heard[host] = said, now
            if host not in self._heard:
                if now - self._start > join_seconds:
                    return f"{name} did not join within {join_seconds:g} s; {_GOES_ON}", AGAIN
                continue
            last, heard = self._heard[host]
            name += f" ({last['host']})"
            if last["code"] is None and now - heard > lost_seconds:
                return f"{name} has been silent for {lost_seconds:g} s; {_GOES_ON}", AGAIN
            if last["code"] == 2:
                return f"{name} cannot go on, and its own words say why", 2
            if failed and last["code"] in (AGAIN, -signal.SIGABRT):
                continue
            # One that stopped to go on has agreed on that with this one, which needs its time.
            patience = lost_seconds if last["code"] == AGAIN else 2 * _BEAT
            if last["code"] not in (None, 0) and now - heard > patience:
                return f"{name} ended with code {last['code']}; {_GOES_ON}", AGAIN
        return None


class Maintenance(threading.Thread):
    """Asks Google's metadata server, where there is one, whether this machine will be taken away.

    Preemption of a VM comes as SIGTERM too, but late; maintenance of a TPU comes as this alone.
    """

    def __init__(self, tell: Callable[[str], None], every: float = 5.0) -> None:
        """Makes the thread; `tell` is called once, with what the server says.

        Args:
          tell: takes a sentence's part.
          every: seconds.
        """
        super().__init__(daemon=True)
        self._tell, self._every, self._over = tell, every, threading.Event()
        self._server = os.environ.get("GCE_METADATA_HOST") or (
            "metadata.google.internal" if _is_google() else None
        )

    def run(self) -> None:
        """Asks until there is something to tell, or until `end`.

        What is said from the start on has been told to the run before: it stopped for that, and was
        started again on the same machine, which is still there.
        """
        first: dict[str, str] = {}
        while self._server:
            for key, quiet in _QUIET.items():
                if self._over.is_set():
                    return
                request = urllib.request.Request(
                    f"http://{self._server}{_METADATA}{key}", headers={"Metadata-Flavor": "Google"}
                )
                try:
                    with urllib.request.urlopen(request, timeout=5) as answer:
                        said = answer.read().decode().strip().upper()
                except (OSError, http.client.HTTPException, ValueError):
                    continue
                if said not in (quiet, first.setdefault(key, said)):
                    self._tell(f"{key}: {said}")
                    return
            self._over.wait(self._every)

    def end(self) -> None:
        """Stops asking and waits for an open request, 5 s at most; nothing is told afterwards."""
        self._over.set()
        self.join()


def _is_google() -> bool:
    try:
        with open(_PRODUCT, encoding="utf-8") as file:
            return "Google" in file.read()
    except OSError:
        return False
