"""The bookkeeping of the benchmarks, with workers that report made-up times."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import figures
import input as input_benchmark

WORKER = """
import sys
print("ready", 0.0, flush=True)
for step, _ in enumerate(sys.stdin):
    print({seconds} * (1 + step % 3), flush=True)
"""


def worker(seconds):
    return [sys.executable, "-c", WORKER.format(seconds=seconds)]


def test_figures_are_medians():
    workers = {"ours": worker(0.5), "peer": worker(1.0)}
    (found,) = figures.compare("step", "images/s", workers, amount=8, rounds=6)
    assert found == figures.Figure("step", "images/s", 8 / 1.0, 8 / 2.0, "peer")


def test_a_worker_that_exits_is_named():
    with pytest.raises(SystemExit, match="exit"):
        figures.Worker([sys.executable, "-c", "exit(3)"])


def test_the_ratio_is_above_1_if_ours_is_better():
    assert figures.Figure("step", "images/s", 3.0, 2.0, "PyTorch").ratio == 1.5
    assert figures.Figure("restart", "s", 2.0, 3.0, "what is allowed").ratio == 1.5
    assert figures.Figure("cycles", "Mcycles", 2.0, 3.0, "XLA").ratio == 1.5


def test_write_replaces_figures_of_the_same_run_and_refuses_others(tmp_path, capsys):
    rows = [
        figures.Figure(name, "images/s", ours, 2.0, "PyTorch")
        for name, ours in (("step/b", 3.0), ("step/a", 1.0), ("step/a", 4.0))
    ]
    for row in rows:
        figures.write([row], "this run", tmp_path)
    written = [(tmp_path / name).read_text() for name in ("benchmarks.json", "benchmarks.md")]
    kept = [rows[2]._asdict(), rows[0]._asdict()]
    assert json.loads(written[0]) == {"run": "this run", "figures": kept}
    assert "in one run: this run." in written[1]
    lines = written[1].splitlines()[-3:]
    assert lines[0].startswith("|---")
    assert lines[1:] == [
        "| step/a | images/s | 4.00 | 2.00 | 2.00 | PyTorch |",
        "| step/b | images/s | 3.00 | 2.00 | 1.50 | PyTorch |",
    ]
    capsys.readouterr()
    figures.write(rows[:1], "another run", tmp_path)
    assert "is from another run (this run); it stays unchanged." in capsys.readouterr().out
    names = ("benchmarks.json", "benchmarks.md")
    assert written == [(tmp_path / name).read_text() for name in names]


def test_the_environment_sets_the_day_of_a_run(monkeypatch):
    monkeypatch.setenv(figures.RUN, "2026-01-01")
    assert figures.run().endswith(", 2026-01-01")


def test_each_row_of_benchmarks_md_follows_from_the_figures():
    """Each ratio follows from the rounded figures beside it, within rounding."""
    kept = json.loads((figures.ROOT / "benchmarks.json").read_text())
    page = (figures.ROOT / "benchmarks.md").read_text()
    assert page == figures.page(kept)
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines[1:]]
    assert len(rows) == len(kept["figures"]) > 20
    for name, unit, ours, peer, ratio, _ in rows:
        low, high = sorted(
            (float(a) + x) / (float(b) + y)
            for a, b in ([(ours, peer)] if unit.endswith("/s") else [(peer, ours)])
            for x, y in ((-0.005, 0.005), (0.005, -0.005))
        )
        assert low - 0.006 <= float(ratio) <= high + 0.006, name


@pytest.mark.parametrize(("cores", "verdict"), [(10, "enough"), (1, "too few")])
def test_need_says_whether_a_host_is_fast_enough_for_its_pod(tmp_path, monkeypatch, cores, verdict):
    plan = {"model": "net", "topology": "v5e:4x4", "photos_per_second": 8000.0, "hosts": 4}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan, "chip": {"lanes": 128}, "host_cores": cores}))
    monkeypatch.setattr(input_benchmark.os, "cpu_count", lambda: 2)
    line = input_benchmark.need(str(path), 1000.0)  # photos per second on two cores
    assert "2,000 photos a second from each of 4 hosts" in line
    assert f"takes 4.0 of its {cores} cores: {verdict}." in line
    path.write_text(json.dumps({**plan, "chip": None}))
    assert "is of no TPU" in input_benchmark.need(str(path), 1000.0)


def test_a_mosaic_has_each_photo_in_its_place(tmp_path):
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
