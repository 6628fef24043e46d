"""The benchmark's bookkeeping, with workers that say how long they took."""

import json
import sys

import pytest
from bench import train_step

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
    speed, ratio = train_step.compare(workers, batch=8, rounds=6)
    assert speed == {"ours": 8 / 1.0, "peer": 8 / 2.0}
    assert ratio == {"ours": 1.0, "peer": 2.0}


def test_a_worker_that_ends_is_named():
    with pytest.raises(SystemExit, match="exit"):
        train_step.Worker([sys.executable, "-c", "exit(3)"])


def test_both_files_keep_what_was_not_measured_again(tmp_path):
    rows = [
        {
            "name": f"train_step/{name}/128px/b16/cpu",
            "unit": "images/s",
            "ours": ours,
            "peer": 2.0,
            "peer_name": "PyTorch, timm",
            "ratio": ours / 2,
        }
        for name, ours in (("a", 1.0), ("b", 3.0), ("a", 4.0))
    ]
    for row in rows:
        train_step.write([row], "two cores", tmp_path)
    assert json.loads((tmp_path / "benchmarks.json").read_text()) == [rows[2], rows[1]]
    lines = (tmp_path / "benchmarks.md").read_text().splitlines()[-3:]
    assert lines[0].startswith("|---")
    assert [line.split("|")[1:6] for line in lines[1:]] == [
        [
            f" {row['name']} ",
            " images/s ",
            f" {row['ours']:.2f} ",
            " 2.00 ",
            f" {row['ratio']:.2f} ",
        ]
        for row in (rows[2], rows[1])
    ]
