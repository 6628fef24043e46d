"""Tests of the metrics file and of how durations are printed."""

import json

from hashvision.training import metrics, progress


def test_a_restart_deletes_lines_of_later_steps_and_an_incomplete_line(tmp_path):
    writer = metrics.MetricsWriter(str(tmp_path), 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    writer = metrics.MetricsWriter(str(tmp_path), 2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]


def test_durations_are_printed_in_seconds_minutes_or_hours():
    assert [progress.duration(s) for s in (45.4, 185, 7800)] == ["45s", "3m05s", "2h10m"]
