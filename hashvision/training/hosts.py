"""The hosts of a run: started together, watched, and the one that is lost is named.

Each host runs the same command, told by three variables of the environment, JAX's own names, who it
is: JAX_COORDINATOR_ADDRESS (HOST:PORT of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. The
command is two processes then: one that computes, which a lost host leaves waiting in a collective
or which JAX ends without a word on who was lost, and one that watches it and the other hosts.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from hashvision.errors import UserError
from hashvision.training import pulse as pulses
from hashvision.training.pulse import AGAIN, BEAT, GOES_ON, Place

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_WATCHED = "HASHVISION_WATCHED"  # set for the process that computes


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
        address, _, port = found.coordinator.rpartition(":")
        sensible = address and 0 < int(port) < 2**16 and 0 <= found.host < found.hosts
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
    """Whether this process is the one that computes, and another watches it."""
    return _WATCHED in os.environ


def join(place: Place, join_seconds: float, lost_seconds: float) -> None:
    """Makes JAX see the devices of all hosts; the first call to JAX.

    Args:
      place: which host this is.
      join_seconds: how long another host may take to appear.
      lost_seconds: how long one that was there may be silent.
    """
    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.hosts,
        place.host,
        # The process that watches is to find out first, since it can say who.
        initialization_timeout=round(join_seconds) + 60,
        heartbeat_timeout_seconds=round(lost_seconds) + 60,
    )


def watch(
    place: Place, workdir: str, command: Sequence[str], join_seconds: float, lost_seconds: float
) -> int:
    """Runs the command that computes, and ends it when another host is lost.

    Args:
      place: which host this is.
      workdir: of the run, or a folder in it, where all hosts see it.
      command: to run.
      join_seconds: how long another host may take to appear.
      lost_seconds: how long one that was there may be silent.

    Returns:
      The exit code: the command's own, AGAIN where a host was lost, or 2 where one cannot go on.

    Raises:
      OSError: the first host cannot write into the workdir, or can open no port.
    """
    pulse = pulses.start(place, workdir)
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
            child.kill()  # a host that waits for another in a collective hears nothing
            child.wait()
        pulse.end(code)
        for number, handler in before.items():
            signal.signal(number, handler)
    return code


def _watch(
    pulse: pulses.Pulse,
    child: subprocess.Popen[bytes],
    join_seconds: float,
    lost_seconds: float,
) -> int:
    ended: float | None = None
    while True:
        code = child.poll()
        pulse.beat(code)
        lost = pulse.lost(join_seconds, lost_seconds, code is not None and code > 0)
        if code in (0, 2, AGAIN):
            return code
        if lost:
            sentence, code = lost
            print(f"hashvision: {sentence}.", file=sys.stderr)
            return code
        if code is not None and code < 0 and code != -signal.SIGABRT:
            said = f"what ran here was ended by {signal.Signals(-code).name}; {GOES_ON}"
            print(f"hashvision: {said}.", file=sys.stderr)
            return AGAIN
        if code is not None:
            # It may have failed because another host did, which shows a little later.
            ended = ended or time.monotonic()
            if time.monotonic() - ended > lost_seconds + 2 * BEAT:
                return code if code > 0 else AGAIN
        time.sleep(BEAT)
