"""What every worker does, in whichever Python: see figures.py."""

import sys
import time
from collections.abc import Callable


def serve(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
    """Works once and says `ready SECONDS`; then for every line, and says the seconds alone.

    Args:
      work: what is measured; it returns when all of it is done.
      before: done each time before that, and not measured.
    """
    start = time.perf_counter()
    work()
    print("ready", time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        before()
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)
