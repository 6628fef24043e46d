"""Training steps beside PyTorch's: benchmarks.json and benchmarks.md.

Ours and the peer's run in turn, step by step, in processes of their own, so that a machine that
changes its speed changes both. A figure is the median over the rounds, a ratio the median of the
rounds' ratios. A step is forward, backward and SGD with momentum on a batch that stays the same.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = {"resnext50_32x4d": "resnext50_32x4d", "regnety_800mf": "regnety_008"}
HEAD = """# Benchmarks

Made by `bash launch/bench.sh`, which says how; the same figures lie in benchmarks.json.

| name | unit | ours | peer | ratio | peer is | machine, versions, date |
|---|---|---|---|---|---|---|
"""


class Worker:
    """A process that runs one step for every line it is sent."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        )
        self._read()

    def _read(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.split()
            if words and words[0] in ("ready", words[-1]):
                return float(words[-1])
        self.stop()
        raise SystemExit(f"{self.process.args} ended; its error stands above.")

    def step(self) -> float:
        """Seconds of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        with self.process:  # closes its pipes and waits
            self.process.kill()


def machine() -> str:
    """What the figures depend on, without the machine's name."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    return ", ".join([cores, *versions, datetime.date.today().isoformat()])


def compare(
    workers: dict[str, list[str]], batch: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Images a second of each worker, and each one's ratio to the first's."""
    running = {name: Worker(command) for name, command in workers.items()}
    try:
        for worker in running.values():
            worker.step()
        seconds = {name: [] for name in running}
        for _ in range(rounds):
            for name, worker in running.items():
                seconds[name].append(worker.step())
    finally:
        for worker in running.values():
            worker.stop()
    first = next(iter(seconds.values()))
    speed = {name: batch / statistics.median(times) for name, times in seconds.items()}
    ratio = {
        name: statistics.median(b / a for a, b in zip(first, times, strict=True))
        for name, times in seconds.items()
    }
    return speed, ratio


def write(rows: list[dict], note: str, folder: pathlib.Path = ROOT) -> None:
    """Puts the rows into both files, in place of those of the same name and peer."""
    path = folder / "benchmarks.json"
    old = json.loads(path.read_text()) if path.exists() else []
    new = {(row["name"], row["peer_name"]) for row in rows}
    kept = [row for row in old if (row["name"], row["peer_name"]) not in new]
    path.write_text(json.dumps(sorted(kept + rows, key=lambda row: row["name"]), indent=1) + "\n")
    page = folder / "benchmarks.md"
    lines = page.read_text().splitlines() if page.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {(c[0], c[5]): line for c, line in zip(cells, lines, strict=True) if len(c) == 7}
    table = {key: line for key, line in table.items() if "/" in key[0]}
    for row in rows:
        figures = f"{row['ours']:.2f} | {row['peer']:.2f} | {row['ratio']:.2f}"
        line = f"| {row['name']} | {row['unit']} | {figures} | {row['peer_name']} | {note} |"
        table[row["name"], row["peer_name"]] = line
    page.write_text(HEAD + "\n".join(table[key] for key in sorted(table)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer_python", help="one that has torch and timm")
    parser.add_argument("--models", default=",".join(PEERS))
    parser.add_argument("--batches", default="16,64")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--native", action="store_true", help="beside XLA's own grouped form too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = arguments.device
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for model in arguments.models.split(","):
        for batch in arguments.batches.split(","):
            ours = [sys.executable, str(HERE / "ours.py"), model, batch, str(arguments.size)]
            workers = {"ours": [*ours, "auto"]}
            if arguments.peer_python:
                peer = [arguments.peer_python, str(HERE / "peer.py"), PEERS[model]]
                workers["PyTorch, timm"] = [*peer, batch, str(arguments.size)]
            if arguments.native:
                workers["XLA's grouped form"] = [*ours, "native"]
            speed, ratio = compare(workers, int(batch), arguments.rounds)
            rows = [
                {
                    "name": f"train_step/{model}/{arguments.size}px/b{batch}/{arguments.device}",
                    "unit": "images/s",
                    "ours": speed["ours"],
                    "peer": speed[peer],
                    "peer_name": peer,
                    "ratio": ratio[peer],
                }
                for peer in list(workers)[1:]
            ]
            for row in rows:
                print(json.dumps(row), flush=True)
            write(rows, machine())


if __name__ == "__main__":
    main()
