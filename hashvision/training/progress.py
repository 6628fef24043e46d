"""The progress of a run: metrics to disk, a line to watch, and the end of a run that fails."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from hashvision.config import Config
from hashvision.errors import UserError
from hashvision.objectives import Objective
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.metrics import MetricsWriter


def say(line: str) -> None:
    """Prints a line once, whatever the number of hosts."""
    if jax.process_index() == 0:
        print(line, flush=True)


class Progress:
    """Reads the metrics of each step one step late, so that the host never waits for the devices.

    The loop runs inside this context.
    """

    def __init__(
        self,
        workdir: str,
        config: Config,
        objective: Objective,
        *,
        start: int,
        total: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """Opens the metrics files.

        Args:
          workdir: of the run.
          config: of the run.
          objective: says which metrics to print, and when nothing is learnt.
          start: steps done before.
          total: the run's last step.
          checkpoints: named in the message if the loss is no longer finite.
        """
        self._writer = MetricsWriter(workdir, start) if jax.process_index() == 0 else None
        self._config, self._objective = config, objective
        self._start, self._total, self._checkpoints = start, total, checkpoints
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._since_line: list[dict[str, float]] = []
        self._losses: list[float] = []  # since the last checkpoint
        self._waited, self._steps_without_learning = 0.0, 0
        self._time = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes the metrics of a step just dispatched, and reads those of the step before.

        Args:
          step: its number, from 1.
          metrics: scalars that the devices are still computing.
          waited: seconds that the host waited for the batch.

        Raises:
          UserError: the step before has a loss that is not finite, or nothing is learnt any more.
        """
        self._read()
        self._waited += waited
        self._pending = step, metrics

    def mean_loss(self) -> dict[str, float]:
        """The mean loss since the last call, for a checkpoint; reads the last step's metrics too.

        Raises:
          UserError: as `add`.
        """
        self._read()
        if self._writer:
            self._writer.flush()
        loss = float(np.mean(self._losses))
        self._losses = []
        return {"loss": loss}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the run's speed."""
        self._read()
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes and prints what evaluators measured, as fractions."""
        if self._writer:
            self._writer.write(step, scalars)
            shown = "  ".join(f"{name} {value:.1%}" for name, value in scalars.items())
            print(f"step {step:,}/{self._total:,}  {shown}", flush=True)

    def _read(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        scalars = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(scalars[name]) for name in ("loss", "gradient_norm")):
            raise UserError(self._diverged(step, scalars))
        self._since_line.append(scalars)
        self._losses.append(scalars["loss"])
        first = step == self._start + 1  # printed at once, since it ends the wait for the compiler
        if first or step % self._config.log_every == 0 or step == self._total:
            self._write(step)

    def _diverged(self, step: int, scalars: Mapping[str, float]) -> str:
        good = self._checkpoints.latest_step() if self._checkpoints else None
        last = f"{self._checkpoints.path}/{good}" if self._checkpoints and good else "none yet"
        return (
            f"The loss is {scalars['loss']} and the gradient norm {scalars['gradient_norm']} at"
            f" step {step:,} with learning rate {scalars['learning_rate']:.3g}; the last good"
            f" checkpoint is {last}; lower --config.optimizer.learning_rate or set"
            " --config.optimizer.clip=1.0 and train into a new --workdir."
        )

    def _write(self, step: int) -> None:
        """Writes and prints the means since the last line."""
        now = time.perf_counter()
        elapsed, steps = now - self._time, len(self._since_line)
        means = {
            name: float(np.mean([scalars[name] for scalars in self._since_line]))
            for name in self._since_line[0]
        }
        means["learning_rate"] = self._since_line[-1]["learning_rate"]
        speed = steps * self._config.batch_size / elapsed
        waiting = self._waited / elapsed
        if self._writer:
            self._writer.write(step, {**means, "images_per_second": speed, "input_wait": waiting})
            watched = "".join(f"  {name} {means[name]:.3f}" for name in self._objective.watch)
            left = duration((self._total - step) * elapsed / steps)
            print(
                f"step {step:,}/{self._total:,}  loss {means['loss']:.4f}"
                f"{watched}  lr {means['learning_rate']:.3g}  {speed:.1f} images/s"
                f"  waiting {waiting:.0%}  left {left}",
                flush=True,
            )
        self._since_line, self._waited, self._time = [], 0.0, now
        self._stop_if_nothing_is_learnt(step, steps, means)

    def _stop_if_nothing_is_learnt(self, step: int, steps: int, means: Mapping[str, float]) -> None:
        cause = self._objective.diagnose(means)
        self._steps_without_learning = self._steps_without_learning + steps if cause else 0
        if cause and self._steps_without_learning >= self._objective.patience:
            raise UserError(
                f"Nothing was learnt in the last {self._steps_without_learning:,} steps, up to step"
                f" {step:,}: {cause}; then train into a new --workdir."
            )

    def __enter__(self) -> "Progress":
        """Does nothing: the files are open already."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Reads the last step's metrics, unless an error ended the loop, and closes the files."""
        try:
            if kind is None:
                self._read()
        finally:
            if self._writer:
                self._writer.close()


def duration(seconds: float) -> str:
    """Formats seconds: 45s, 3m05s, 2h10m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
