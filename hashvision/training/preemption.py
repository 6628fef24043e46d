"""When to save and stop: SIGTERM has arrived, or the machine is about to be taken away."""

import http.client
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

_METADATA = "/computeMetadata/v1/instance/"
# Keys of Google's metadata server, each with its value while nothing is planned.
_QUIET = {"maintenance-event": "NONE", "preempted": "FALSE"}
_PRODUCT = "/sys/class/dmi/id/product_name"


class Preemption:
    """Tells the training loop, which runs inside this context, whether to save and stop.

    With several hosts, any of them may be told; JAX catches the signal then and makes all hosts
    agree on a step. Python lets only the main thread catch signals: a loop in another thread stops
    for maintenance alone, and leaves SIGTERM to the program around it.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._asked, self._several = False, jax.process_count() > 1
        in_main = threading.current_thread() is threading.main_thread()
        self._catches = in_main and not self._several
        self._maintenance = Maintenance(self.ask)

    def ask(self, why: str) -> None:
        """Asks the loop to save and stop; `why` is printed."""
        print(f"This machine is about to be taken away ({why}).", flush=True)
        self._asked = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other hosts

    def at(self, step: int) -> bool:
        """Whether this step is the last one; the same on all hosts. Call it once per step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._asked

    def __enter__(self) -> "Preemption":
        """Starts to listen."""

        def hear(*_: Any) -> None:
            self._asked = True

        if self._catches:
            # None stands for a handler that Python did not set, and cannot set again.
            self._before = signal.signal(signal.SIGTERM, hear) or signal.SIG_DFL
        self._maintenance.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops listening and restores the signal handler."""
        self._maintenance.end()
        if self._catches:
            signal.signal(signal.SIGTERM, self._before)


class Maintenance(threading.Thread):
    """Polls Google's metadata server, where there is one, for planned maintenance and preemption.

    A preempted VM gets SIGTERM too, but late. Maintenance of a TPU is announced here alone.
    """

    def __init__(self, tell: Callable[[str], None], every: float = 5.0) -> None:
        """Makes the thread.

        Args:
          tell: called at most once, with what the server announced.
          every: seconds between two requests.
        """
        super().__init__(daemon=True)
        self._tell, self._every, self._over = tell, every, threading.Event()
        self._server = os.environ.get("GCE_METADATA_HOST") or (
            "metadata.google.internal" if _is_google() else None
        )

    def run(self) -> None:
        """Polls until there is something to tell, or until `end`.

        What the server announces from the start was known to the run before: it stopped for that
        reason and was started again on the same machine, which is still there.
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
                        value = answer.read().decode().strip().upper()
                except (OSError, http.client.HTTPException, ValueError):
                    continue
                if value not in (quiet, first.setdefault(key, value)):
                    self._tell(f"{key}: {value}")
                    return
            self._over.wait(self._every)

    def end(self) -> None:
        """Stops polling; waits up to 5 s for an open request, and tells nothing afterwards."""
        self._over.set()
        self.join()


def _is_google() -> bool:
    try:
        with open(_PRODUCT, encoding="utf-8") as file:
            return "Google" in file.read()
    except OSError:
        return False
