"""The one training loop: from the last checkpoint to the last step, whatever is being learnt."""

import contextlib
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hashvision import storage
from hashvision.config import Config, derive
from hashvision.data import dataset, reader, removals, stream
from hashvision.errors import UserError
from hashvision.training import hosts
from hashvision.training import mesh as meshes
from hashvision.training import program as programs
from hashvision.training import workdir as workdirs
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.metrics import Writer, duration
from hashvision.training.state import State, averaged, evaluated

# Scalars of an objective that stand in the line to watch.
HEALTH = ("loss_per_ln_k", "prototype_entropy", "dead_prototypes", "cosine")

Predict = Callable[[np.ndarray], tuple[Any, Any]]
# What is measured now and then on the network as it is: (predict, resolution, step) -> scalars,
# where predict maps uint8 (B, R, R, 3) to features and scores.
Check = Callable[[Predict, int, int], dict[str, float]]


def train(
    config: Config,
    workdir: str,
    check: Check | None = None,
    removed: removals.RemovalList = removals.NO_LIST,
) -> bool:
    """Trains to the config's last step, going on from the newest whole checkpoint in `workdir`.

    A run may resume on another dataset of the same classes, or, without tags, on any other. It
    stays as long as it was to be, and what followed from the first dataset stays with it: epochs
    are counted in photos of the first. Which records come is arithmetic in (seed, step) on the
    present dataset, so the run enters its endless stream at the place where it would be by now.

    SIGTERM to any host, or notice of maintenance, makes all of them save at the same step and
    return (in a thread other than the main one, notice alone). All that the run says of itself is
    in WORKDIR/metrics.jsonl.

    Args:
      config: of hashvision/config/schema.py.
      workdir: made if absent.
      check: called every config.knn.every steps, before the first and after the last.
      removed: photos that are not shown.

    Returns:
      Whether the last step is done.

    Raises:
      UserError: something does not fit, another run has the workdir, the loss is no longer finite,
        nothing is learnt, too much of the dataset is broken, or a checkpoint cannot be written.
    """
    meshes.find_devices()
    with contextlib.nullcontext() if jax.process_index() else workdirs.held(workdir):
        return _train(config, workdir, check, removed)


def _train(
    config: Config, workdir: str, check: Check | None, removed: removals.RemovalList
) -> bool:
    if not config.dataset:
        raise UserError("No dataset is named; give --config.dataset a folder made by prepare.")
    source = dataset.load(config.dataset)
    names = source.names(removed)
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
        removed=names,
    )
    _tell_what_matches_nothing(removed, names, photos)
    config = config.copy_and_resolve_references()
    for line in derive.fill(config, photos.epoch_length, workdirs.began(workdir)):
        _say(line)
    program = programs.build(config, len(source.class_counts), photos.epoch_length)
    classes = workdirs.claim(workdir, config, source.vocabulary, source.manifest)
    workdirs.keep_compiled()
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    try:
        finished = _run(config, workdir, program, photos, classes, checkpoints, check, names)
    except BaseException:
        if jax.process_count() == 1:  # of several, the others are at their next step and wait there
            checkpoints.close()
        raise
    checkpoints.close()
    return finished


def _say(line: str) -> None:
    """Prints what one host says for all."""
    if jax.process_index() == 0:
        print(line, flush=True)


def _tell_what_matches_nothing(
    removed: removals.RemovalList, names: removals.Names, photos: stream.Stream
) -> None:
    """Tells which lines of the removal list match nothing, on any host.

    Raises:
      UserError: the hosts were given different lists, so that no note of what was shown could hold.
    """
    matched = names.matched(photos.hits)
    if jax.process_count() > 1:
        lists = multihost_utils.process_allgather(np.frombuffer(names.digest, np.uint8))
        if (lists != lists[0]).any():
            raise UserError(
                "The hosts of this run were given different removal lists; give all of them the"
                " same --removals and --keep_copies_of_removed."
            )
        matched = multihost_utils.process_allgather(matched).any(0)
    if removed.lines:
        unmatched = removed.unmatched(names, matched)
        told = removals.nothing_matched(unmatched, len(removed.lines), photos.dataset.path)
        _say(told)


def _run(
    config: Config,
    workdir: str,
    program: programs.Program,
    photos: stream.Stream,
    classes: np.ndarray | None,
    checkpoints: Checkpoints,
    check: Check | None,
    removed: removals.Names,
) -> bool:
    if checkpoints.latest_step() is None:
        state = programs.initial_state(program, config.seed)
        if config.init_from:
            state = _start_from(config.init_from, program, state)
    else:
        state = checkpoints.restore(program.abstract)
    start, total = int(state.step), program.total_steps
    faults = reader.Faults(workdir, jax.process_index(), config.data.broken)
    photos_read = reader.Reader(
        photos, config.data.photo_size, config.data.max_labels, faults, config.data.threads, classes
    )
    workdirs.note_start(workdir, start, removed)
    parameters = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    several = f" of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    _say(
        f"{config.model.name}, {parameters / 1e6:.1f}M parameters, on {program.mesh.devices.size}"
        f" {program.mesh.devices.flat[0].platform} devices{several}; {photos.epoch_length:,.0f}"
        f" photos an epoch; steps {start:,} to {total:,}"
    )
    batches = _on_devices(photos_read.batches(start), program.abstract_batch)
    log = _Log(workdir, config, start, total, checkpoints, program.objective.diagnose)
    stopping, profile = _Stopping(), _Profile(workdir, config.profile, start, total)
    step = start
    with jax.set_mesh(program.mesh), stopping, profile, log:
        if check and start == 0:
            with log.aside():
                log.note(0, _checked(check, program, config, state))
        while step < total:
            step += 1
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except UserError:
                    # Nothing is learnt in place of so much that is broken; the steps before it are
                    # kept. Several hosts go back to the last save instead.
                    saved = (step - 1) % config.checkpoint.every == 0
                    if jax.process_count() == 1 and step - 1 > start and not saved:
                        checkpoints.save(step - 1, state, log.settle())
                    raise
                waited = time.perf_counter() - asked
                state, metrics = program.step(state, batch)  # asynchronous; the state is donated
            log.add(step, metrics, waited)
            profile.after(step, metrics)
            stopped = stopping.at(step)
            last = step == total or stopped
            if last or step % config.checkpoint.every == 0:
                checkpoints.save(step, state, log.settle())
            if check and (step == total or step % config.knn.every == 0):
                with log.aside():
                    log.note(step, _checked(check, program, config, state))
            if stopped:
                checkpoints.wait()
                _say(f"Stopped at step {step:,}, saved; the same command goes on.")
                break
    checkpoints.wait()
    return step >= total


def _start_from(workdir: str, program: programs.Program, state: State) -> State:
    """The state with the trunk of another run's newest checkpoint."""
    workdirs.read(workdir)  # or says that it is none
    abstract = program.abstract
    checkpoints = Checkpoints(workdir, read_only=True)
    wanted = averaged(abstract.params["trunk"], abstract.extra)
    _, trunk = checkpoints.restore_network(wanted, "trunk")
    checkpoints.close()
    params = {**state.params, "trunk": trunk["params"]}
    extra = {**state.extra, "batch_stats": trunk["batch_stats"]}
    average = averaged(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, extra))
    return state._replace(
        params=params, extra=extra, average=() if state.average == () else average
    )


def _checked(
    check: Check, program: programs.Program, config: Config, state: State
) -> dict[str, float]:
    predict = programs.predictor(program, *evaluated(state))
    return check(predict, programs.crops_of(config)[0].size, int(state.step))


def _on_devices(
    batches: Iterator[tuple[stream.Items, reader.Batch]], abstract: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[dict[str, jax.Array]]:
    """Makes host batches global arrays, one batch ahead of the step that takes them."""

    def put(batch: reader.Batch) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(
                abstract[name].sharding, value, abstract[name].shape
            )
            for name, value in batch.items()
        }

    ahead = put(next(batches)[1])
    for _, batch in batches:
        ready, ahead = ahead, put(batch)
        yield ready


class _Stopping:
    """Whether to save and stop, while the loop is inside: SIGTERM has come, or is about to.

    Of several hosts any may be told; JAX catches the signal then, and has them agree on a step.
    Python lets the main thread alone catch signals: a loop in another thread is stopped by notice
    of maintenance, and leaves SIGTERM to the program around it.
    """

    def __init__(self) -> None:
        self._asked, self._several = False, jax.process_count() > 1
        in_main = threading.current_thread() is threading.main_thread()
        self._catches = in_main and not self._several
        self._maintenance = hosts.Maintenance(self.ask)

    def ask(self, why: str) -> None:
        """Asks for it from inside."""
        print(f"The machine is about to go ({why}).", flush=True)
        self._asked = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the other hosts

    def at(self, step: int) -> bool:
        """Whether this step, the same on all hosts, is the last; asked after each."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._asked

    def __enter__(self) -> None:
        def hear(*_: Any) -> None:
            self._asked = True

        if self._catches:
            # None stands for a handler that Python did not set, and so cannot set again.
            self._before = signal.signal(signal.SIGTERM, hear) or signal.SIG_DFL
        self._maintenance.start()

    def __exit__(self, *_: object) -> None:
        self._maintenance.end()
        if self._catches:
            signal.signal(signal.SIGTERM, self._before)


class _Profile:
    """A trace of some steps, which TensorBoard's profiler opens; an open one ends with the loop."""

    def __init__(self, workdir: str, steps: tuple[int, ...], start: int, total: int) -> None:
        self._folder, self._open = os.path.join(workdir, "tensorboard"), False
        self._first, self._last = (steps[0], sum(steps) - 1) if steps else (0, 0)
        if steps and not start < self._first <= total:
            _say(f"No trace: step {self._first:,} is none of this run's.")

    def before(self, step: int) -> None:
        """Begins the trace if this step is its first."""
        if step == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would hide the rest
            self._traced = self._folder
            if storage.is_remote(self._folder):  # of which JAX's profiler knows nothing
                self._traced = tempfile.mkdtemp()
            jax.profiler.start_trace(self._traced, profiler_options=options)
            self._open = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Ends the trace if this step is its last, once the devices have done it."""
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
        if self._writer:
            self._writer.flush()
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

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._writer:
            self._writer.close()
