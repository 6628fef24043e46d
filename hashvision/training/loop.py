"""The one training loop: from the last checkpoint to the last step, whatever is being learnt."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hashvision.data import dataset, stream
from hashvision.errors import UserError
from hashvision.training import Config, presets
from hashvision.training import program as programs
from hashvision.training import workdir as workdirs
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.metrics import Writer, duration
from hashvision.training.state import State, evaluated

# Scalars of an objective that stand in the line to watch.
HEALTH = ("loss_per_ln_k", "prototype_entropy", "dead_prototypes", "cosine")

Predict = Callable[[np.ndarray], tuple[Any, Any]]
# What is measured now and then on the network as it is: (predict, resolution, step) -> scalars,
# where predict maps uint8 (B, R, R, 3) to features and scores.
Check = Callable[[Predict, int, int], dict[str, float]]


def train(config: Config, workdir: str, check: Check | None = None) -> None:
    """Trains to the config's last step, going on from the newest checkpoint in `workdir`.

    SIGTERM saves and returns. All that the run says of itself is in WORKDIR/metrics.jsonl.

    Args:
      config: the schema of configs/base.py.
      workdir: made if absent.
      check: called every config.knn.every steps, before the first and after the last.

    Raises:
      UserError: something does not fit, the loss is no longer finite, or nothing is learnt.
    """
    steps = config.profile
    if steps and (len(steps) != 2 or not all(isinstance(n, int) and n > 0 for n in steps)):
        raise UserError(
            f"profile={steps!r} is no step and number of steps; set --config.profile=100,5 to trace"
            " the five from step 100."
        )
    if not config.dataset:
        raise UserError("No dataset is named; give --config.dataset a folder made by prepare.")
    source = dataset.load(config.dataset)
    photos = stream.Stream(
        source,
        batch_size=config.batch_size,
        lanes=config.data.lanes,
        seed=config.seed,
        method=config.data.sampling,
        threshold=config.data.sampling_threshold,
        tagged_only=config.objective.name == "hashtag",
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    config = config.copy_and_resolve_references()
    for line in presets.fill(config, photos.epoch_length):
        print(line, flush=True)
    program = programs.build(config, len(source.class_counts), photos.epoch_length)
    workdirs.claim(workdir, config, source.vocabulary, source.manifest)
    workdirs.keep_compiled(workdir)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    try:
        _run(config, workdir, program, photos, checkpoints, check)
    finally:
        checkpoints.close()


def _run(
    config: Config,
    workdir: str,
    program: programs.Program,
    photos: stream.Stream,
    checkpoints: Checkpoints,
    check: Check | None,
) -> None:
    if checkpoints.latest_step() is None:
        state = programs.initial_state(program, config.seed)
        if config.init_from:
            state = _start_from(config.init_from, program, state)
    else:
        state = checkpoints.restore(program.abstract)
    start, total = int(state.step), program.total_steps
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    print(
        f"{config.model.name}, {parameters / 1e6:.1f}M parameters, on {program.mesh.devices.size}"
        f" {program.mesh.devices.flat[0].platform} devices; {photos.epoch_length:,.0f} photos an"
        f" epoch; steps {start:,} to {total:,}",
        flush=True,
    )
    host_batches = photos.batches(
        config.data.photo_size, config.data.max_labels, start, config.data.threads
    )
    batches = _on_devices(host_batches, program.abstract_batch)
    log = _Log(workdir, config, start, total, checkpoints, program.objective.diagnose)
    stopping, profile = _Stopping(), _Profile(workdir, config.profile, start, total)
    with jax.set_mesh(program.mesh), stopping, profile:
        if check and start == 0:
            with log.aside():
                log.note(0, _checked(check, program, config, state))
        for step in range(start, total):
            profile.before(step + 1)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                asked = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - asked
                state, metrics = program.step(state, batch)  # asynchronous; the state is donated
            log.add(step + 1, metrics, waited)
            profile.after(step + 1, metrics)
            last = step + 1 == total or stopping.asked
            if last or (step + 1) % config.checkpoint.every == 0:
                checkpoints.save(step + 1, state, log.settle())
            if check and (last or (step + 1) % config.knn.every == 0):
                with log.aside():
                    log.note(step + 1, _checked(check, program, config, state))
            if stopping.asked:
                print(f"Stopped at step {step + 1:,}, saved; the same command goes on.", flush=True)
                break
    log.close()


def _start_from(workdir: str, program: programs.Program, state: State) -> State:
    """The state with the trunk of another run's newest checkpoint."""
    workdirs.read(workdir)  # or says that it is none
    abstract = program.abstract
    checkpoints = Checkpoints(workdir, read_only=True)
    trunk = checkpoints.restore_trunk(
        {"params": abstract.params["trunk"], "batch_stats": abstract.extra["batch_stats"]}
    )
    checkpoints.close()
    params = {**state.params, "trunk": trunk["params"]}
    return state._replace(
        params=params,
        extra={**state.extra, "batch_stats": trunk["batch_stats"]},
        average=() if state.average == () else jax.tree.map(jnp.copy, params),
    )


def _checked(
    check: Check, program: programs.Program, config: Config, state: State
) -> dict[str, float]:
    params, extra = evaluated(state), state.extra
    resolution = programs.crops_of(config)[0].size
    return check(lambda images: program.predict(params, extra, images), resolution, int(state.step))


def _on_devices(
    batches: Iterator[dict[str, np.ndarray]], abstract: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[dict[str, jax.Array]]:
    """Makes host batches global arrays, one batch ahead of the step that takes them."""

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(
                abstract[name].sharding, value, abstract[name].shape
            )
            for name, value in batch.items()
        }

    ahead = put(next(batches))
    for batch in batches:
        ready, ahead = ahead, put(batch)
        yield ready


class _Stopping:
    """Whether SIGTERM has come, while the loop is inside."""

    asked = False

    def __enter__(self) -> None:
        def ask(*_: Any) -> None:
            self.asked = True

        self._before = signal.signal(signal.SIGTERM, ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)


class _Profile:
    """A trace of some steps, which TensorBoard's profiler opens; an open one ends with the loop."""

    def __init__(self, workdir: str, steps: tuple[int, ...], start: int, total: int) -> None:
        self._folder, self._open = os.path.join(workdir, "tensorboard"), False
        self._first, self._last = (steps[0], sum(steps) - 1) if steps else (0, 0)
        if steps and not start < self._first <= total:
            print(f"No trace: step {self._first:,} is none of this run's.", flush=True)

    def before(self, step: int) -> None:
        """Begins the trace if this step is its first."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would hide the rest
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._open = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Ends the trace if this step is its last, once the devices have done it."""
        if step == self._last and self._open:
            jax.block_until_ready(metrics)
            self._close()

    def _close(self) -> None:
        self._open = False
        jax.profiler.stop_trace()
        print(f"A trace lies in {self._folder}; TensorBoard's profiler opens it.", flush=True)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._close()


class _Log:
    """Reads each step's metrics one step late, so that the host never waits for the devices."""

    def __init__(
        self,
        workdir: str,
        config: Config,
        start: int,
        total: int,
        checkpoints: Checkpoints,
        diagnose: Callable[[Mapping[str, float]], str | None],
    ) -> None:
        self._diagnose, self._learns_nothing = diagnose, 0
        self._writer = Writer(workdir, start) if jax.process_index() == 0 else None
        self._config, self._start, self._total = config, start, total
        self._checkpoints = checkpoints
        self._previous: tuple[int, dict[str, jax.Array]] | None = None
        self._since_log: list[dict[str, float]] = []
        self._since_save: list[float] = []
        self._waited = 0.0
        self._time = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Takes a step just dispatched, and deals with the metrics of the one before.

        Args:
          step: its number, from 1.
          metrics: scalars still to be computed.
          waited: seconds that the host waited for its batch.
        """
        self._deal()
        self._waited += waited
        self._previous = step, metrics

    def note(self, step: int, scalars: dict[str, float]) -> None:
        """Writes and shows what was measured besides."""
        if self._writer:
            self._writer.write(step, scalars)
            shown = "  ".join(f"{name} {value:.1%}" for name, value in scalars.items())
            print(f"step {step:,}/{self._total:,}  {shown}", flush=True)

    def settle(self) -> dict[str, float]:
        """Deals with the last step too; the mean loss since the last save, for its checkpoint."""
        self._deal()
        loss = float(np.mean(self._since_save))
        self._since_save = []
        return {"loss": loss}

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Deals with the last step too, and leaves what is done inside out of the speed."""
        self._deal()
        start = time.perf_counter()
        yield
        self._time += time.perf_counter() - start

    def _deal(self) -> None:
        if self._previous is None:
            return
        step, metrics = self._previous
        self._previous = None
        scalars = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(scalars[name]) for name in ("loss", "gradient_norm")):
            good = self._checkpoints.latest_step()
            where = f"{self._checkpoints.path}/{good}" if good is not None else "none yet"
            raise UserError(
                f"The loss is {scalars['loss']} and the gradient norm {scalars['gradient_norm']} at"
                f" step {step:,} with learning rate {scalars['learning_rate']:.3g}; the last good"
                f" checkpoint is {where}; lower --config.optimizer.learning_rate or set"
                " --config.optimizer.clip=1.0 and train into a new --workdir."
            )
        self._since_log.append(scalars)
        self._since_save.append(scalars["loss"])
        first = step == self._start + 1  # shown at once, since it ends the wait for the compiler
        if first or step % self._config.log_every == 0 or step == self._total:
            self._write(step)

    def _write(self, step: int) -> None:
        now = time.perf_counter()
        elapsed, steps = now - self._time, len(self._since_log)
        means = {
            name: float(np.mean([scalars[name] for scalars in self._since_log]))
            for name in self._since_log[0]
        }
        means["learning_rate"] = self._since_log[-1]["learning_rate"]
        speed = steps * self._config.batch_size / elapsed
        waiting = self._waited / elapsed
        if self._writer:
            scalars = {**means, "images_per_second": speed, "input_wait": waiting}
            self._writer.write(step, scalars)
            health = "".join(f"  {name} {means[name]:.3f}" for name in HEALTH if name in means)
            left = duration((self._total - step) * elapsed / steps)
            print(
                f"step {step:,}/{self._total:,}  loss {means['loss']:.4f}"
                f"{health}  lr {means['learning_rate']:.3g}  {speed:.1f} images/s"
                f"  waiting {waiting:.0%}  left {left}",
                flush=True,
            )
        self._since_log, self._waited, self._time = [], 0.0, now
        self._learns_nothing, cause = self._learns_nothing + steps, self._diagnose(means)
        if cause is None:
            self._learns_nothing = 0
        elif self._learns_nothing >= self._config.swav.patience:
            raise UserError(
                f"Nothing was learnt in the last {self._learns_nothing:,} steps, to step {step:,}:"
                f" {cause}; then train into a new --workdir."
            )

    def close(self) -> None:
        """Deals with the last step and closes the files."""
        self._deal()
        if self._writer:
            self._writer.close()
