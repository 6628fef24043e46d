"""Shared parts of the benchmarks: workers that run in turn, and the two files of figures.

A worker is a process. For every line that it reads, it works once and answers with the seconds that
it took. Our worker and the peer's take turns, so that a change of the machine's speed affects both.
The others are stopped meanwhile, since they would fill their buffers.
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
RUN = "HASHVISION_BENCHMARK"  # environment variable with the day of the run
HEAD = """# Benchmarks

Made from benchmarks.json by `bash launch/bench.sh`, in one run: {run}.

Each figure is the median over rounds in which ours and the peer take turns. The ratio is above 1 if
ours is better: for a speed (something per second) it is ours / peer, for a cost (s, Mcycles) it is
peer / ours.

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
        """The ratio of the two figures; above 1 if ours is better."""
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours


class Worker:
    """A process that works once per line; in between it is stopped, with its children."""

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
        self.ready = self._read()  # seconds of preparation, such as compilation

    def _read(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.split()
            if words and words[0] in ("ready", words[-1]):
                self._signal(signal.SIGSTOP)
                return float(words[-1])
        self.stop()
        raise SystemExit(f"{self.process.args} exited; see its error above.")

    def work(self) -> float:
        """Lets the worker work once; returns the seconds that it took."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        with self.process:  # closes the pipes and waits for the process
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # the process has ended
            os.killpg(self.process.pid, number)


def compare(
    name: str, unit: str, workers: dict[str, list[str]], amount: float, rounds: int
) -> list[Figure]:
    """Runs workers in turn, after one warm-up round.

    Args:
      name: name of the benchmark.
      unit: unit of its figures, something per second.
      workers: command of each worker, ours first.
      amount: how much of the unit a worker does per line.
      rounds: number of rounds after the warm-up.

    Returns:
      One figure per peer.
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
    """Describes a run: number and kind of cores, versions of JAX and Flax, and the day."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    day = os.environ.get(RUN) or datetime.date.today().isoformat()
    return ", ".join([cores, *versions, day])


def write(figures: list[Figure], run: str, folder: pathlib.Path = ROOT) -> None:
    """Prints figures and adds them to both files, unless the files are from another run.

    Args:
      figures: the figures; each replaces the one of the same name and peer.
      run: the description of their run.
      folder: folder of benchmarks.json and benchmarks.md.
    """
    for figure in figures:
        print(json.dumps({**figure._asdict(), "ratio": figure.ratio}), flush=True)
    path = folder / "benchmarks.json"
    kept = json.loads(path.read_text()) if path.exists() else {"run": run, "figures": []}
    if kept["run"] != run:
        print(f"{path} is from another run ({kept['run']}); it stays unchanged.", flush=True)
        return
    every = [*(Figure(**row) for row in kept["figures"]), *figures]
    rows = {(each.name, each.peer_name): each for each in every}
    kept["figures"] = [rows[key]._asdict() for key in sorted(rows)]
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (folder / "benchmarks.md").write_text(page(kept))


def page(kept: Mapping[str, Any]) -> str:
    """The text of benchmarks.md for the content of benchmarks.json."""
    table = [
        f"| {each.name} | {each.unit} | {each.ours:.2f} | {each.peer:.2f} | {each.ratio:.2f}"
        f" | {each.peer_name} |\n"
        for each in (Figure(**row) for row in kept["figures"])
    ]
    return HEAD.format(run=kept["run"]) + "".join(table)
