"""A worker process of Beam on this machine, which ends when the process that started it has ended.

    python -m hashvision.prepare.worker DRIVER

DRIVER is the number of that process; all else Beam tells by the environment.
"""

import contextlib
import logging
import os
import sys
import threading
import time


def main() -> None:
    """Works until the driver lets it go or has ended; what goes wrong in a step is told it."""
    end_with(int(sys.argv.pop()))
    # Beam sends to the driver what it logs and raises, and prints both here, too.
    logging.getLogger().addHandler(logging.NullHandler())
    from apache_beam.runners.worker import sdk_worker_main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        sdk_worker_main.main(sys.argv)


def end_with(driver: int, every: float = 1.0) -> None:
    """Ends this process once its parent is no longer that one; `every` is in seconds."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, name="driver", daemon=True).start()


if __name__ == "__main__":
    main()
