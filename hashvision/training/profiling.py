"""Traces of single training steps, for TensorBoard's profiler."""

import os
import tempfile

import jax

from hashvision import storage
from hashvision.training.progress import say


class Profile:
    """A trace of a few steps, written to WORKDIR/tensorboard.

    The loop runs inside this context; a trace that is still open ends with it.
    """

    def __init__(self, workdir: str, steps: tuple[int, ...], *, start: int, total: int) -> None:
        """Prepares the trace, or says that its first step is outside this run.

        Args:
          workdir: of the run.
          steps: (first step, number of steps), or () for no trace.
          start: steps that are done already.
          total: the last step of the run.
        """
        self._folder, self._open = os.path.join(workdir, "tensorboard"), False
        self._first, self._last = (steps[0], sum(steps) - 1) if steps else (0, 0)
        if steps and not start < self._first <= total:
            say(f"No trace: step {self._first:,} is not among steps {start + 1:,} to {total:,}.")

    def before(self, step: int) -> None:
        """Starts the trace if this is its first step."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would hide the rest
            self._traced = self._folder
            if storage.is_remote(self._folder):  # JAX's profiler writes to local folders only
                self._traced = tempfile.mkdtemp()
            jax.profiler.start_trace(self._traced, profiler_options=options)
            self._open = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Ends the trace if this is its last step, once the devices have finished it."""
        if step == self._last and self._open:
            jax.block_until_ready(metrics)
            self._close()

    def _close(self) -> None:
        self._open = False
        jax.profiler.stop_trace()
        if self._traced != self._folder:
            for folder, _, names in storage.walk(self._traced):
                for name in names:
                    path = os.path.join(folder, name)
                    target = os.path.join(self._folder, os.path.relpath(path, self._traced))
                    storage.write(target, storage.read(path))
            storage.remove_folder(self._traced)
        print(f"The trace is in {self._folder}; TensorBoard's profiler opens it.", flush=True)

    def __enter__(self) -> "Profile":
        """Does nothing: `before` starts the trace."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a trace that is still open."""
        if self._open:
            self._close()
