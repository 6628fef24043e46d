"""What a run tells of itself: metrics.jsonl for programs, TensorBoard for eyes, a line to watch."""

import json
import os
import time
from collections.abc import Mapping

import tensorboard.summary

from hashvision import storage

_EVERY = 60.0  # seconds between two uploads


class Writer:
    """Writes scalars to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    A run that restarts at step s takes back what its predecessor wrote of later steps, so that each
    step stands there once. Remote storage gets the file as a whole, once a minute, where the run
    asks for it before it saves, and at the end.
    """

    def __init__(self, workdir: str, step: int) -> None:
        """Opens the files of `workdir` for a run that starts at `step`."""
        self._path = os.path.join(workdir, "metrics.jsonl")
        kept = _until(self._path, step)
        storage.write(self._path, "".join(kept))
        self._lines, self._stored, self._time = kept, len(kept), time.monotonic()
        remote = storage.is_remote(workdir)
        self._file = None if remote else open(self._path, "a", encoding="utf-8")
        self._events = tensorboard.summary.Writer(os.path.join(workdir, "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line: {"step": step, **scalars}."""
        line = json.dumps({"step": step, **scalars}) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._time > _EVERY:
                self.flush()
        for tag, value in scalars.items():
            self._events.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Sees that all lines are stored, before a checkpoint is from which a run goes on."""
        if not self._file and len(self._lines) > self._stored:
            storage.write(self._path, "".join(self._lines))
            self._stored, self._time = len(self._lines), time.monotonic()

    def close(self) -> None:
        """Writes out what is left."""
        self.flush()
        if self._file:
            self._file.close()
        self._events.close()


def _until(path: str, step: int) -> list[str]:
    """The lines up to `step`, without a last one cut short by a kill."""
    kept = []
    if storage.exists(path):
        for line in storage.read(path).decode().splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept.append(line)
    return kept


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 3m05s, 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
