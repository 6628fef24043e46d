"""What all benchmarks share: workers that run in turn, and the two files of figures.

A worker is a process that does its work once for every line it reads and answers with the seconds
it took. Ours and the peer's do so in turn, so that a machine that changes its speed changes both;
while one works the others are stopped, for they would fill their buffers meanwhile.
A figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEAD = """# Benchmarks

Made by `bash launch/bench.sh`, which says how; the same figures lie in benchmarks.json.

| name | unit | ours | peer | ratio | peer is | machine, versions, date |
|---|---|---|---|---|---|---|
"""


class Figure(NamedTuple):
    """A row of benchmarks.json; a ratio above 1 is in our favour."""

    name: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float


class Worker:
    """A process that works once for every line it is sent; else it is stopped, children and all."""

    def __init__(self, command: list[str]) -> None:
        paths = [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        self.ready = self._read()  # seconds, of compilation say

    def _read(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.split()
            if words and words[0] in ("ready", words[-1]):
                self._signal(signal.SIGSTOP)
                return float(words[-1])
        self.stop()
        raise SystemExit(f"{self.process.args} ended; its error stands above.")

    def work(self) -> float:
        """Seconds that the worker took."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        with self.process:  # closes its pipes and waits
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, number)


def compare(
    name: str, unit: str, workers: dict[str, list[str]], amount: float, rounds: int
) -> list[Figure]:
    """Runs workers in turn, after a round that does not count.

    Args:
      name: of the benchmark.
      unit: of its figures, something a second.
      workers: the command of each, ours first.
      amount: of what the unit counts, that a worker does for a line.
      rounds: that count.

    Returns:
      A figure beside each peer.
    """
    running: dict[str, Worker] = {}
    try:
        for peer, command in workers.items():
            running[peer] = Worker(command)
        for worker in running.values():
            worker.work()
        seconds = {peer: [] for peer in running}
        for _ in range(rounds):
            for peer, worker in running.items():
                seconds[peer].append(worker.work())
    finally:
        for worker in running.values():
            worker.stop()
    ours, *peers = seconds
    speed = {peer: amount / statistics.median(times) for peer, times in seconds.items()}
    return [
        Figure(
            name,
            unit,
            speed[ours],
            speed[peer],
            peer,
            statistics.median(b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)),
        )
        for peer in peers
    ]


def machine() -> str:
    """What the figures depend on, without the machine's name."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    return ", ".join([cores, *versions, datetime.date.today().isoformat()])


def write(figures: list[Figure], note: str, folder: pathlib.Path = ROOT) -> None:
    """Prints the figures and puts them into both files, for those of the same name and peer.

    Args:
      figures: to write.
      note: on what machine, with which versions and when they were taken.
      folder: of benchmarks.json and benchmarks.md.
    """
    for figure in figures:
        print(json.dumps(figure._asdict()), flush=True)
    path, page = folder / "benchmarks.json", folder / "benchmarks.md"
    old = [Figure(**row) for row in json.loads(path.read_text())] if path.exists() else []
    rows = {(each.name, each.peer_name): each for each in [*old, *figures]}
    ordered = [rows[key] for key in sorted(rows)]
    path.write_text(json.dumps([each._asdict() for each in ordered], indent=1) + "\n")

    lines = page.read_text().splitlines() if page.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    notes = {(each[0], each[5]): each[6] for each in cells if len(each) == 7}
    notes |= {(each.name, each.peer_name): note for each in figures}
    table = [
        f"| {each.name} | {each.unit} | {each.ours:.2f} | {each.peer:.2f} | {each.ratio:.2f}"
        f" | {each.peer_name} | {notes[each.name, each.peer_name]} |"
        for each in ordered
    ]
    page.write_text(HEAD + "\n".join(table) + "\n")
