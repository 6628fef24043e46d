"""The benchmark's bookkeeping, with workers that say how long they took."""

import json
import sys

import pytest
from bench import figures

WORKER = """
import sys
print("ready", 0.0, flush=True)
for step, _ in enumerate(sys.stdin):
    print({seconds} * (1 + step % 3), flush=True)
"""


def worker(seconds):
    return [sys.executable, "-c", WORKER.format(seconds=seconds)]


def test_figures_are_medians_and_ratios_are_of_the_same_round():
    workers = {"ours": worker(0.5), "peer": worker(1.0)}
    (found,) = figures.compare("step", "images/s", workers, amount=8, rounds=6)
    assert found == figures.Figure("step", "images/s", 8 / 1.0, 8 / 2.0, "peer", 2.0)


def test_a_worker_that_ends_is_named():
    with pytest.raises(SystemExit, match="exit"):
        figures.Worker([sys.executable, "-c", "exit(3)"])


def test_both_files_keep_what_was_not_measured_again(tmp_path):
    rows = [
        figures.Figure(name, "images/s", ours, 2.0, "PyTorch", ours / 2)
        for name, ours in (("step/b", 3.0), ("step/a", 1.0), ("step/a", 4.0))
    ]
    for number, row in enumerate(rows):
        figures.write([row], f"machine {number}", tmp_path)
    kept = [rows[2], rows[0]]
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == [x._asdict() for x in kept]
    lines = (tmp_path / "benchmarks.md").read_text().splitlines()[-3:]
    assert lines[0].startswith("|---")
    assert lines[1:] == [
        "| step/a | images/s | 4.00 | 2.00 | 2.00 | PyTorch | machine 2 |",
        "| step/b | images/s | 3.00 | 2.00 | 1.50 | PyTorch | machine 0 |",
    ]
