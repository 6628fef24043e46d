"""The benchmark's bookkeeping, with workers that say how long they took."""

import json
import sys

import figures
import input as input_benchmark
import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize(("cores", "verdict"), [(10, "enough"), (1, "too few")])
def test_a_host_is_fast_enough_for_its_pod_or_not(tmp_path, monkeypatch, cores, verdict):
    plan = {"model": "net", "topology": "v5e:4x4", "photos_per_second": 8000.0, "hosts": 4}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan, "chip": {"lanes": 128}, "host_cores": cores}))
    monkeypatch.setattr(input_benchmark.os, "cpu_count", lambda: 2)
    line = input_benchmark.need(str(path), 1000.0)  # of two cores
    assert "2,000 photos a second from each of 4 hosts" in line
    assert f"takes 4.0 of its {cores} cores: {verdict}." in line
    path.write_text(json.dumps({**plan, "chip": None}))
    assert "is of no TPU" in input_benchmark.need(str(path), 1000.0)


def test_mosaics_hold_every_photo_at_its_place(tmp_path):
    colours = [(20 * number, 255 - 20 * number, 128) for number in range(12)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "made").mkdir()
    input_benchmark.mosaics(sorted(tmp_path.glob("*.png")), tmp_path / "made")
    (made,) = (tmp_path / "made").iterdir()
    pixels = np.asarray(Image.open(made)).astype(int)
    assert pixels.shape == (375, 500, 3)
    middles = pixels[62::125, 62::125].reshape(12, 3)
    assert np.abs(middles - colours).max() < 6  # JPEG
