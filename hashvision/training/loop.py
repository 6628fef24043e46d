"""The training loop, for all objectives: from the newest checkpoint to the last step."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hashvision import objectives
from hashvision.config import Config
from hashvision.data import reader, removals, stream
from hashvision.errors import UserError
from hashvision.pixels import crops
from hashvision.training import compilation, program, run, sharding, start
from hashvision.training.checkpoint import Checkpoints
from hashvision.training.preemption import Preemption
from hashvision.training.profiling import Profile
from hashvision.training.progress import Progress, say
from hashvision.training.state import State, evaluated

Predict = Callable[[np.ndarray], tuple[Any, Any]]
# Evaluates the network during training: (predict, resolution R, step) -> scalars in [0, 1].
# `predict` maps photos uint8 (B, R, R, 3) to features and scores.
Evaluate = Callable[[Predict, int, int], dict[str, float]]


def train(
    config: Config,
    workdir: str,
    evaluate: Evaluate | None = None,
    removed: removals.RemovalList = removals.NO_LIST,
) -> bool:
    """Trains to the config's last step, from the newest whole checkpoint in `workdir`.

    A run may resume on another dataset with the same classes, or, if its objective needs no tags,
    on any dataset. Its length and the settings derived from the first dataset stay the same, and an
    epoch keeps the number of photos of the first. The records of a step depend on (seed, step) and
    the present dataset, so the run continues in the new dataset's stream at its present step.

    SIGTERM to any host, or announced maintenance, makes all hosts save at the same step and return.
    If `train` runs outside the main thread, it reacts to maintenance only. WORKDIR/metrics.jsonl
    has all metrics of the run.

    Args:
      config: of hashvision/config/schema.py.
      workdir: made if it does not exist.
      evaluate: called every config.evaluate_every steps, before the first step, and after the last.
      removed: photos to leave out.

    Returns:
      Whether the last step is done.

    Raises:
      UserError: a setting does not fit, another run uses the workdir, the loss is not finite, the
        run learns nothing, too much of the dataset is broken, or a checkpoint cannot be written.
    """
    sharding.find_devices()
    with contextlib.nullcontext() if jax.process_index() else run.lock(workdir):
        photos, names = start.open_stream(config, removed)
        source = photos.dataset
        config = config.copy_and_resolve_references()
        for line in objectives.fill(config, photos.epoch_length, run.frozen_config(workdir)):
            say(line)
        compilation.use_cache()
        built = program.build(config, len(source.class_counts), photos.epoch_length)
        classes = run.claim(workdir, config, source.vocabulary, source.manifest)
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
        try:
            state = start.first_state(config, built, checkpoints)
            run.note_start(workdir, int(state.step), names)
            batches = reader.BatchReader(
                photos,
                side=config.data.photo_size,
                max_labels=config.data.max_labels,
                faults=reader.Faults(workdir, jax.process_index(), config.data.broken),
                threads=config.data.threads,
                classes=classes,
            ).batches(int(state.step))
            say(start.headline(config, built, photos, int(state.step)))
            finished = _steps(config, workdir, built, state, batches, checkpoints, evaluate)
        except BaseException:
            if jax.process_count() == 1:  # other hosts would wait in their next step
                checkpoints.close()
            raise
        checkpoints.close()
        return finished


def _steps(
    config: Config,
    workdir: str,
    built: program.Program,
    state: State,
    host_batches: Iterator[tuple[stream.Items, reader.Batch]],
    checkpoints: Checkpoints,
    evaluate: Evaluate | None,
) -> bool:
    """The loop itself; returns whether the last step is done."""
    first, total, stop = int(state.step), built.total_steps, False
    step, resolution = first, crops.from_config(config)[0].size
    batches = sharding.on_devices((batch for _, batch in host_batches), built.abstract_batch)
    progress = Progress(
        workdir, config, built.objective, start=first, total=total, checkpoints=checkpoints
    )
    profile = Profile(workdir, config.profile, start=first, total=total)
    with jax.set_mesh(built.mesh), Preemption() as preemption, profile, progress:
        if first == 0:
            _evaluate(evaluate, built, state, resolution, progress)
        for step in range(first + 1, total + 1):
            profile.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                asked = time.perf_counter()
                try:
                    batch = next(batches)
                except UserError:  # too many broken records; keep what was learnt so far
                    _save_before(
                        step,
                        state,
                        first=first,
                        config=config,
                        checkpoints=checkpoints,
                        progress=progress,
                    )
                    raise
                waited = time.perf_counter() - asked
                state, metrics = built.step(state, batch)  # asynchronous; donates the state
            progress.add(step, metrics, waited)
            profile.after(step, metrics)
            stop = preemption.at(step)
            if stop or step == total or step % config.checkpoint.every == 0:
                checkpoints.save(step, state, progress.mean_loss())
            if step == total or step % config.evaluate_every == 0:
                _evaluate(evaluate, built, state, resolution, progress)
            if stop:
                break
    checkpoints.wait()
    if stop:
        say(f"Stopped at step {step:,}, saved; the same command resumes the run.")
    return step >= total


def _save_before(
    step: int,
    state: State,
    *,
    first: int,
    config: Config,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """Saves the state that step `step` would have started from, unless it is saved already."""
    saved = (step - 1) % config.checkpoint.every == 0
    # Several hosts return to the last checkpoint, since the others do not know of the error.
    if jax.process_count() == 1 and step - 1 > first and not saved:
        checkpoints.save(step - 1, state, progress.mean_loss())


def _evaluate(
    evaluate: Evaluate | None,
    built: program.Program,
    state: State,
    resolution: int,
    progress: Progress,
) -> None:
    if evaluate:
        step = int(state.step)
        with progress.paused():
            predict = program.predictor(built, *evaluated(state))
            progress.note(step, evaluate(predict, resolution, step))
