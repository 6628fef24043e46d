"""The cost to the first host of hearing from the others: messages, bytes and processor time.

python tests/bench/watching.py [--hosts=128] [--seconds=30]

The first host is one process. The others are threads of another process, and send a message once a
second, as real hosts do.
"""

import argparse
import multiprocessing
import socket
import tempfile
import threading
import time

from hashvision.training import pulse


def listen(place: pulse.Place, folder: str, ready, over, results) -> None:
    """Runs the first host; `results` gets what it used from `ready` to `over`."""
    first = pulse.FirstHost(place, f"{folder}/hosts.json")
    ready.set()
    start, used = time.monotonic(), time.process_time()
    while not over.wait(pulse.BEAT):
        first.beat(None)
    results.put((first.messages, time.monotonic() - start, time.process_time() - used))
    first.end(0)


def speak(other: pulse.Pulse, delay: float, over: threading.Event, late: list[float]) -> None:
    """Runs another host; records how long each of its messages took."""
    time.sleep(delay)
    while not over.is_set():
        start = time.monotonic()
        other.beat(None)
        late.append(time.monotonic() - start)
        over.wait(pulse.BEAT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    count = arguments.hosts
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1] - 1}"
    context = multiprocessing.get_context("spawn")
    ready, over, results = context.Event(), context.Event(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        place = pulse.Place(address, count, 0)
        first = context.Process(target=listen, args=(place, folder, ready, over, results))
        first.start()
        ready.wait()
        late: list[float] = []
        others = [pulse.start(place._replace(host=host), folder) for host in range(1, count)]
        quiet = threading.Event()
        threads = [
            threading.Thread(target=speak, args=(other, host / count, quiet, late))
            for host, other in enumerate(others)
        ]
        for thread in threads:
            thread.start()
        time.sleep(arguments.seconds)
        missed = sum(len(other.known()) < count for other in others)
        over.set()
        messages, seconds, used = results.get()
        quiet.set()
        for thread in threads:
            thread.join()
        first.join()
    late.sort()
    print(
        f"{count} hosts: {messages / seconds:.0f} messages a second at the first, which take"
        f" {used / seconds:.1%} of a core; half are answered within {late[len(late) // 2]:.3f} s,"
        f" 99% within {late[len(late) * 99 // 100]:.3f} s; {missed} hosts have not heard of all."
        " Storage: 0 requests a second."
    )


if __name__ == "__main__":
    main()
