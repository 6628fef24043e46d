"""A Beam worker process on this machine that ends when the process that started it has ended.

    python -m hashvision.prepare.worker DRIVER

DRIVER is the process id of the driver. Beam passes everything else in environment variables.
"""

import contextlib
import logging
import os
import sys
import threading
import time


def main() -> None:
    """Works until the driver releases it or has ended; errors in a step are sent to the driver."""
    end_with_driver(int(sys.argv.pop()))
    # Beam sends its log and its errors to the driver, and prints both here as well.
    logging.getLogger().addHandler(logging.NullHandler())
    from apache_beam.runners.worker import sdk_worker_main

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        sdk_worker_main.main(sys.argv)


def end_with_driver(driver: int, every: float = 1.0) -> None:
    """Ends this process, with exit code 1, once its parent is no longer the driver.

    Args:
      driver: process id.
      every: seconds between two checks.
    """

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, name="driver", daemon=True).start()


if __name__ == "__main__":
    main()
