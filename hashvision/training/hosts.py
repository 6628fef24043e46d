"""Runs a command on several hosts: joins them, watches them, and names a host that is lost.

Each host runs the same command. Three environment variables, with JAX's own names, tell it which
host it is: JAX_COORDINATOR_ADDRESS (HOST:PORT of the first host), JAX_NUM_PROCESSES and
JAX_PROCESS_ID. The command then is two processes. One computes; when another host is lost, it waits
forever in a collective, or JAX aborts it without naming the host. The other one watches this
process and the other hosts.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from hashvision.errors import UserError
from hashvision.training.pulse import AGAIN, BEAT, FINAL, RESUME, Place, Pulse, start

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_WATCHED = "HASHVISION_WATCHED"  # set for the process that computes


def place() -> Place | None:
    """Which of several hosts this is; None if there is only one.

    Raises:
      UserError: the environment variables do not name a host.
    """
    values = [os.environ.get(name) for name in _VARIABLES]
    if not any(values):
        return None
    coordinator, hosts, host = values
    try:
        found = Place(coordinator or "", int(hosts or ""), int(host or ""))
        address, _, port = found.coordinator.rpartition(":")
        valid = address and 0 < int(port) < 2**16 and 0 <= found.host < found.hosts
    except ValueError:
        valid, found = False, None
    if not valid or found is None:
        given = ", ".join(f"{name}={value}" for name, value in zip(_VARIABLES, values, strict=True))
        raise UserError(
            f"{given} do not name a host of a run; set all three (HOST:PORT of the first host, the"
            " number of hosts, and this host's number from 0), or none of them."
        )
    return found if found.hosts > 1 else None


def watched() -> bool:
    """Whether this process computes and another one watches it."""
    return _WATCHED in os.environ


def join(place: Place, *, join_seconds: float, lost_seconds: float) -> None:
    """Makes JAX see the devices of all hosts; must be the first call to JAX.

    Args:
      place: which host this is.
      join_seconds: how long another host may take to appear.
      lost_seconds: how long a host may be silent after it appeared.
    """
    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.hosts,
        place.host,
        # Longer than the watching process waits, since only that one can name the lost host.
        initialization_timeout=round(join_seconds) + 60,
        heartbeat_timeout_seconds=round(lost_seconds) + 60,
    )


def watch(
    place: Place,
    workdir: str,
    command: Sequence[str],
    *,
    join_seconds: float,
    lost_seconds: float,
) -> int:
    """Runs the command that computes, and kills it when another host is lost.

    Args:
      place: which host this is.
      workdir: of the run, or a folder in it, which all hosts can read.
      command: the command that computes, with its arguments.
      join_seconds: how long another host may take to appear.
      lost_seconds: how long a host may be silent after it appeared.

    Returns:
      The exit code: that of the command, AGAIN if a host was lost, or 2 if another host stopped
      with an error that the user must fix.

    Raises:
      OSError: the first host cannot write into the workdir or open a port.
    """
    pulse = start(place, workdir)
    child = subprocess.Popen(command, env={**os.environ, _WATCHED: "1"})
    before = {
        number: signal.signal(number, lambda *_: child.send_signal(signal.SIGTERM))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    code = AGAIN
    try:
        code = _watch(pulse, child, join_seconds, lost_seconds)
    finally:
        if child.poll() is None:
            child.kill()  # a process that waits in a collective ignores SIGTERM
            child.wait()
        pulse.end(code)
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _watch(
    pulse: Pulse, child: subprocess.Popen[bytes], join_seconds: float, lost_seconds: float
) -> int:
    """Watches the child and the other hosts until one of them ends; returns the exit code."""
    ended: float | None = None
    while True:
        code = child.poll()
        pulse.beat(code)
        lost = pulse.lost(join_seconds, lost_seconds, code is not None and code > 0)
        if code in FINAL:
            return code
        if lost:
            sentence, code = lost
            print(f"hashvision: {sentence}.", file=sys.stderr)
            return code
        if code is not None and code < 0 and code != -signal.SIGABRT:
            killed = f"training on this host was killed by {signal.Signals(-code).name}"
            print(f"hashvision: {killed}; {RESUME}.", file=sys.stderr)
            return AGAIN
        if code is not None:
            # It may have failed because another host did, whose report arrives a little later.
            ended = ended or time.monotonic()
            if time.monotonic() - ended > lost_seconds + 2 * BEAT:
                return code if code > 0 else AGAIN
        time.sleep(BEAT)
