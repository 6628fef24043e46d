"""The loop of every worker of figures.py, for any Python."""

import sys
import time
from collections.abc import Callable


def serve(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
    """Works once and prints `ready SECONDS`; then works once per line and prints the seconds.

    Args:
      work: the measured work; it returns when all of it is done.
      before: what to do each time before, unmeasured.
    """
    start = time.perf_counter()
    work()
    print("ready", time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        before()
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)
