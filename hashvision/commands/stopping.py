"""Lets SIGTERM stop a command as Ctrl-C does, so that it removes what it has half written."""

import contextlib
import signal
import sys
from collections.abc import Iterator

_STOPPED = 130  # the exit code that shells give for Ctrl-C


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Ends the process with exit code 130 and one sentence when it is stopped inside."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("hashvision: stopped; unfinished output is removed.", file=sys.stderr)
        raise SystemExit(_STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
