"""What a run tells of itself: metrics.jsonl for programs, TensorBoard for eyes, a line to watch."""

import json
import os
from collections.abc import Mapping
from typing import TextIO

import tensorboard.summary


class Writer:
    """Writes scalars to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    A run that restarts at step s takes back what its predecessor wrote of later steps, so that each
    step stands there once.
    """

    def __init__(self, workdir: str, step: int) -> None:
        """Opens the files of `workdir` for a run that starts at `step`."""
        path = os.path.join(workdir, "metrics.jsonl")
        _keep_until(path, step)
        self._file: TextIO = open(path, "a", encoding="utf-8")
        self._events = tensorboard.summary.Writer(os.path.join(workdir, "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line: {"step": step, **scalars}."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for tag, value in scalars.items():
            self._events.add_scalar(tag, value, step)

    def close(self) -> None:
        """Writes out what is left."""
        self._file.close()
        self._events.close()


def _keep_until(path: str, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line cut short by a kill."""
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.append(line)
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(partial, path)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m05s, 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
