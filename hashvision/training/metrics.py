"""The metrics of a run on disk: metrics.jsonl for programs, and event files for TensorBoard."""

import json
import os
import time
from collections.abc import Mapping

import tensorboard.summary

from hashvision import storage

_EVERY = 60.0  # seconds between two uploads


class MetricsWriter:
    """Writes scalars to WORKDIR/metrics.jsonl and WORKDIR/tensorboard.

    A run that resumes after step s first deletes the lines of later steps, so that no step is in
    the file twice. A file in a bucket is uploaded every minute, before each checkpoint, and at the
    end.
    """

    def __init__(self, workdir: str, step: int) -> None:
        """Opens the files of `workdir` for a run that resumes after `step`."""
        self._path = os.path.join(workdir, "metrics.jsonl")
        kept = _until(self._path, step)
        storage.write(self._path, "".join(kept))
        self._lines, self._stored, self._time = kept, len(kept), time.monotonic()
        remote = storage.is_remote(workdir)
        self._file = None if remote else open(self._path, "a", encoding="utf-8")
        self._events = tensorboard.summary.Writer(os.path.join(workdir, "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line: {"step": step, **scalars}."""
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
        """Uploads all lines; called before each checkpoint that a run may resume from."""
        if not self._file and len(self._lines) > self._stored:
            storage.write(self._path, "".join(self._lines))
            self._stored, self._time = len(self._lines), time.monotonic()

    def close(self) -> None:
        """Writes the remaining lines and closes the files."""
        self.flush()
        if self._file:
            self._file.close()
        self._events.close()


def _until(path: str, step: int) -> list[str]:
    """The lines up to `step`, without a last line that a kill cut short."""
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
