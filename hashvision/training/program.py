"""Builds a config's program: mesh, objective, shapes of the state, and the jitted functions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hashvision import objectives
from hashvision.config import Config, derive
from hashvision.errors import UserError
from hashvision.objectives import Objective
from hashvision.pixels import crops
from hashvision.training import optim, sharding, state


class Program(NamedTuple):
    """What a training run executes; holds no data and no memory on devices."""

    mesh: Mesh
    objective: Objective
    init: Callable[[jax.Array], state.State]
    abstract: state.State  # shapes, dtypes and shardings
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    cut: state.Cut
    step: Any  # jitted (state, batch) -> (state, metrics)
    predict: Any  # jitted objective.predict: photos sharded over all devices, answers replicated
    total_steps: int


class EvaluationProgram(NamedTuple):
    """The part of a program that evaluation needs, without optimiser and queue."""

    mesh: Mesh
    init: Callable[[jax.Array], dict[str, Any]]
    abstract: dict[str, Any]  # what state.averaged returns: shapes, dtypes and shardings
    predict: Any  # as of Program


def build(
    config: Config, classes: int, epoch_length: float, devices: Sequence[Any] | None = None
) -> Program:
    """Builds the program of a config; compiles nothing and allocates nothing.

    Args:
      config: complete: objectives.fill has set what the recipe leaves open.
      classes: number of classes in the vocabulary.
      epoch_length: photos of an epoch, if config.epoch_length does not say.
      devices: all devices if None.

    Raises:
      UserError: a setting does not fit the others or the devices.
    """
    mesh = sharding.make_mesh(config.mesh.fsdp, devices)
    _check_batch(config, mesh.devices.size)
    objective = objectives.from_config(config, classes, mesh.devices.flat[0].platform)
    settings, epoch_length = config.optimizer, config.epoch_length or epoch_length
    steps = derive.total_steps(config, epoch_length)
    rate = _schedule(config, steps, epoch_length)
    tx = optim.build(
        settings.name,
        rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        clip=settings.clip,
        plateau_steps=settings.plateau_steps if settings.schedule == "plateau" else 0,
    )
    batch, cut = _abstract_batch(config, config.batch_size, mesh), _cut(config)
    init = state.initializer(objective, tx, average=settings.average > 0, batch=batch, cut=cut)
    abstract = state.abstract_state(init, mesh)
    step = state.train_step(
        objective,
        cut,
        tx=tx,
        rate=rate,
        abstract=abstract,
        mesh=mesh,
        seed=config.seed,
        decay=settings.average,
        parts=config.accumulate,
    )
    return Program(
        mesh=mesh,
        objective=objective,
        init=init,
        abstract=abstract,
        abstract_batch=batch,
        cut=cut,
        step=step,
        predict=_predict(objective, mesh),
        total_steps=steps,
    )


def build_evaluation(
    config: Config, classes: int, devices: Sequence[Any] | None = None
) -> EvaluationProgram:
    """Builds the network of a config for evaluation, sharded over all devices; allocates nothing.

    Args:
      config: complete, as `build` takes it.
      classes: number of classes in the vocabulary.
      devices: all devices if None.

    Raises:
      UserError: there is no such network.
    """
    devices = jax.devices() if devices is None else devices
    mesh = sharding.make_mesh(len(devices), devices)
    objective = objectives.from_config(config, classes, mesh.devices.flat[0].platform)
    batch = _abstract_batch(config, len(devices), mesh)
    network = state.network_initializer(objective, batch, _cut(config))

    def init(rng: jax.Array) -> dict[str, Any]:
        return state.averaged(*network(rng))

    return EvaluationProgram(
        mesh=mesh,
        init=init,
        abstract=state.abstract_state(init, mesh),
        predict=_predict(objective, mesh),
    )


def initial_state(program: Program | EvaluationProgram, seed: int) -> Any:
    """What program.init returns for a seed, on the program's devices."""
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
    # It runs only once, so optimising it would cost XLA for CPU more time than it saves.
    on_cpu = program.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    init = jax.jit(program.init, out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(seed))


def predictor(
    program: Program | EvaluationProgram, params: Any, extra: Any
) -> Callable[[np.ndarray], tuple[Any, Any]]:
    """The network as a function of any number of photos on the host, uint8 (B, R, R, 3).

    With several hosts, each passes all photos, copies its devices' share to them, and gets all
    answers.

    Args:
      program: whose devices compute.
      params: as program.predict takes them, on the devices.
      extra: the same.
    """
    over_devices, devices = sharding.batch_sharding(program.mesh), program.mesh.devices.size

    def predict(images: np.ndarray) -> tuple[Any, Any]:
        number = len(images)
        padded = np.pad(images, ((0, -number % devices), (0, 0), (0, 0), (0, 0)))
        photos = jax.make_array_from_callback(padded.shape, over_devices, lambda part: padded[part])
        with jax.set_mesh(program.mesh):
            answers = program.predict(params, extra, photos)
        return jax.tree.map(lambda x: np.asarray(x)[:number], answers)

    return predict


def _check_batch(config: Config, devices: int) -> None:
    """Raises UserError if the batch does not divide over the devices and the parts."""
    if config.batch_size % devices:
        raise UserError(
            f"batch_size={config.batch_size} does not divide over {devices} devices;"
            " set --config.batch_size to a multiple."
        )
    if config.batch_size % (devices * config.accumulate):
        raise UserError(
            f"batch_size={config.batch_size} does not divide over {devices} devices with"
            f" accumulate={config.accumulate} parts each; change one of them."
        )


def _schedule(config: Config, steps: int, epoch_length: float) -> optim.Schedule:
    settings = config.optimizer
    if settings.learning_rate is None:
        raise UserError(
            "optimizer.learning_rate is not set, and only SwAV derives it from the batch; set"
            " --config.optimizer.learning_rate."
        )
    warmup = round(settings.warmup_epochs * epoch_length / config.batch_size)
    return optim.schedule(
        settings.schedule,
        peak=settings.learning_rate * config.batch_size / 256,
        total_steps=steps,
        warmup_steps=min(warmup, steps // 2),
        final=settings.final,
        halvings=settings.halvings,
        warmup_start=settings.warmup_start,
    )


def _abstract_batch(config: Config, photos: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    data = config.data
    return state.abstract_batch(photos, side=data.photo_size, max_labels=data.max_labels, mesh=mesh)


def _cut(config: Config) -> state.Cut:
    return functools.partial(crops.cut, sizes=crops.from_config(config))


def _predict(objective: Objective, mesh: Mesh) -> Any:
    return jax.jit(
        objective.predict,
        in_shardings=(None, None, sharding.batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
