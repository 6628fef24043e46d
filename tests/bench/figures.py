"""What all benchmarks share: workers that run in turn, and the two files of figures.

A worker is a process that does its work once for every line it reads and answers with the seconds
it took. Ours and the peer's do so in turn, so that a machine that changes its speed changes both;
while one works the others are stopped, for they would fill their buffers meanwhile.
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
from collections.abc import Mapping
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUN = "HASHVISION_BENCHMARK"  # environment variable: the day of the run that a figure belongs to
HEAD = """# Benchmarks

Made from benchmarks.json by `bash launch/bench.sh`, in one run: {run}.

A figure is the median over rounds in which ours and the peer work in turn. The ratio is that of
the two figures: ours to the peer's of a speed (something a second), the peer's to ours of what
something takes (s, Mcycles). Above 1 it is in our favour.

| name | unit | ours | peer | ratio | peer is |
|---|---|---|---|---|---|
"""


class Figure(NamedTuple):
    """A row of benchmarks.json."""

    name: str
    unit: str
    ours: float
    peer: float
    peer_name: str

    @property
    def ratio(self) -> float:
        """Of the two figures; above 1 is in our favour."""
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours


class Worker:
    """A process that works once for every line it is sent; else it is stopped, children and all."""

    def __init__(self, command: list[str]) -> None:
        paths = [str(ROOT), str(HERE.parent / "support"), os.environ.get("PYTHONPATH", "")]
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
    return [Figure(name, unit, speed[ours], speed[peer], peer) for peer in peers]


def run() -> str:
    """What the figures depend on: machine, without its name, versions, and the run's day."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    day = os.environ.get(RUN) or datetime.date.today().isoformat()
    return ", ".join([cores, *versions, day])


def write(figures: list[Figure], run: str, folder: pathlib.Path = ROOT) -> None:
    """Prints the figures and adds them to both files, if those are of the same run or absent.

    Args:
      figures: to write; one takes the place of another of the same name and peer.
      run: that they belong to.
      folder: of benchmarks.json and benchmarks.md.
    """
    for figure in figures:
        print(json.dumps({**figure._asdict(), "ratio": figure.ratio}), flush=True)
    path = folder / "benchmarks.json"
    kept = json.loads(path.read_text()) if path.exists() else {"run": run, "figures": []}
    if kept["run"] != run:
        print(f"{path} is of another run ({kept['run']}); nothing is added to it.", flush=True)
        return
    every = [*(Figure(**row) for row in kept["figures"]), *figures]
    rows = {(each.name, each.peer_name): each for each in every}
    kept["figures"] = [rows[key]._asdict() for key in sorted(rows)]
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(page(kept))


def page(kept: Mapping[str, Any]) -> str:
    """benchmarks.md, of what benchmarks.json holds."""
    table = [
        f"| {each.name} | {each.unit} | {each.ours:.2f} | {each.peer:.2f} | {each.ratio:.2f}"
        f" | {each.peer_name} |\n"
        for each in (Figure(**row) for row in kept["figures"])
    ]
    return HEAD.format(run=kept["run"]) + "".join(table)
