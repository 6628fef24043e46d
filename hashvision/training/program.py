"""A config made into what runs: mesh, objective, shapes of the state, the jitted step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hashvision import models
from hashvision.config import Config, derive
from hashvision.errors import UserError
from hashvision.models.layers import GROUP_CONV_FORMS
from hashvision.objectives import Objective, hashtag, swav
from hashvision.pixels.augment import Augmentation
from hashvision.pixels.crops import Crops, cut
from hashvision.training import mesh as meshes
from hashvision.training import optim, state

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Program(NamedTuple):
    """All of a run that needs no data and no memory yet."""

    mesh: Mesh
    objective: Objective
    init: Callable[[jax.Array], state.State]
    abstract: state.State  # shapes, dtypes and shardings
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    cut: state.Cut
    step: Any  # jitted (state, batch) -> (state, metrics)
    predict: Any  # jitted objective.predict, photos over all devices, answers on every one
    total_steps: int


def build_model(config: Config, platform: str) -> Any:
    """The network of config.model, its grouped convolutions in the form that suits the platform."""
    options: dict[str, Any] = dict(config.model)
    name, dtype, form = options.pop("name"), options.pop("dtype"), options.pop("group_conv")
    groups = norm_groups(options.pop("norm_photos"), config.batch_size // config.accumulate)
    if form == "auto":
        form = GROUP_CONV_FORMS.get(platform, "native")
    return models.build(name, dtype=DTYPES[dtype], group_conv=form, norm_groups=groups, **options)


def norm_groups(photos: int, shown: int) -> models.Groups | None:
    """BatchNorm's groups of `photos` among the photos that the network is shown at a time."""
    return None if photos in (0, shown) else models.Groups(photos, shown // photos)


def build_objective(config: Config, model: Any, classes: int) -> Objective:
    """The objective that config.objective names, over `model`.

    Args:
      config: with nothing left open (presets.fill).
      model: the trunk.
      classes: of the vocabulary, for hashtags.

    Raises:
      UserError: the crops do not suit the objective.
    """
    name, sizes = config.objective.name, crops_of(config)
    augmentation = Augmentation(config.augment.distortion, config.augment.grey, config.augment.blur)
    if name == "hashtag":
        if [crops.per_photo for crops in sizes] != [1]:
            raise UserError(
                f"data.crops={config.data.crops!r} cuts more than the one crop a photo that"
                " hashtags are learnt from; set --config.data.crops='((1, 224, 0.08, 1.0),)'."
            )
        settings = config.objective
        smoothing = settings.label_smoothing
        return hashtag.objective(model, classes, settings.loss, smoothing, augmentation)
    if config.swav.assigned > sizes[0].per_photo or sum(c.per_photo for c in sizes) < 2:
        raise UserError(
            f"swav.assigned={config.swav.assigned} crops of the first size do not go with"
            f" data.crops={config.data.crops!r}; set --config.data.crops to two or more crops of a"
            " photo."
        )
    head = models.ProjectionHead(
        tuple(config.swav.head),
        config.swav.head_norm,
        model.norm_groups,
        model.dtype,
    )
    settings = swav.Settings(
        config.batch_size,
        config.swav.prototypes,
        config.swav.temperature,
        config.swav.epsilon,
        config.swav.iterations,
        config.swav.assigned,
        config.swav.frozen_steps,
        config.swav.queue // config.batch_size,
        config.swav.queue_start,
        augmentation,
    )
    return swav.objective(model, head, settings)


def crops_of(config: Config) -> list[Crops]:
    """The crops of each size that config.data.crops asks for."""
    return [Crops(*each) for each in config.data.crops]


def build(config: Config, classes: int, epoch_length: float, devices: Any = None) -> Program:
    """Makes the program of a config; compiles nothing and takes no memory.

    Args:
      config: of hashvision/config/schema.py.
      classes: of the vocabulary.
      epoch_length: photos of an epoch, where config.epoch_length does not say.
      devices: a sequence of devices; all if None.

    Raises:
      UserError: there is no such network, or numbers do not divide.
    """
    mesh = meshes.make_mesh(config.mesh.fsdp, devices)
    count = mesh.devices.size
    if config.batch_size % count:
        raise UserError(
            f"batch_size={config.batch_size} does not divide over {count} devices;"
            " set --config.batch_size to a multiple."
        )
    if config.batch_size % (count * config.accumulate):
        raise UserError(
            f"batch_size={config.batch_size} does not divide over {count} devices into accumulate="
            f"{config.accumulate} parts each; set either to fit."
        )
    _check_groups(config)
    learning_rate = config.optimizer.learning_rate
    if learning_rate is None:
        raise UserError(
            "optimizer.learning_rate is not set, and only SwAV's follows from the batch; set"
            " --config.optimizer.learning_rate."
        )
    model = build_model(config, mesh.devices.flat[0].platform)
    objective = build_objective(config, model, classes)
    epoch_length = config.epoch_length or epoch_length
    steps = derive.total_steps(config, epoch_length)
    settings = config.optimizer
    rate = optim.schedule(
        settings.schedule,
        learning_rate * config.batch_size / 256,
        steps,
        min(round(settings.warmup_epochs * epoch_length / config.batch_size), steps // 2),
        settings.final,
        settings.halvings,
        settings.warmup_start,
    )
    tx = optim.build(
        settings.name,
        rate,
        settings.weight_decay,
        settings.momentum,
        clip=settings.clip,
        plateau_steps=settings.plateau_steps if settings.schedule == "plateau" else 0,
    )
    batch = state.abstract_batch(
        config.batch_size, config.data.photo_size, config.data.max_labels, mesh
    )
    into_crops = functools.partial(cut, sizes=crops_of(config))
    init = state.initializer(objective, tx, settings.average > 0, batch, into_crops)
    abstract = state.abstract_state(init, mesh)
    step = state.train_step(
        objective,
        into_crops,
        tx,
        rate,
        abstract,
        mesh,
        config.seed,
        settings.average,
        config.accumulate,
    )
    predict = _predict(objective, mesh)
    return Program(mesh, objective, init, abstract, batch, into_crops, step, predict, steps)


class Network(NamedTuple):
    """What evaluation needs of a run: neither optimiser nor queue, and no numbers that divide."""

    mesh: Mesh
    init: Callable[[jax.Array], dict[str, Any]]
    abstract: dict[str, Any]  # `state.averaged`: shapes, dtypes and shardings
    predict: Any  # as of Program


def network(config: Config, classes: int, devices: Any = None) -> Network:
    """Makes the network of a config, sharded over all devices; takes no memory.

    Args:
      config: of hashvision/config/schema.py.
      classes: of the vocabulary.
      devices: a sequence of devices; all if None.

    Raises:
      UserError: there is no such network.
    """
    devices = jax.devices() if devices is None else devices
    mesh = meshes.make_mesh(len(devices), devices)
    model = build_model(config, mesh.devices.flat[0].platform)
    objective = build_objective(config, model, classes)
    batch = state.abstract_batch(len(devices), config.data.photo_size, config.data.max_labels, mesh)
    into_crops = functools.partial(cut, sizes=crops_of(config))
    whole = state.network_initializer(objective, batch, into_crops)

    def init(rng: jax.Array) -> dict[str, Any]:
        return state.averaged(*whole(rng))

    return Network(mesh, init, state.abstract_state(init, mesh), _predict(objective, mesh))


def _predict(objective: Objective, mesh: Mesh) -> Any:
    return jax.jit(
        objective.predict,
        in_shardings=(None, None, meshes.batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def predictor(
    program: Program | Network, params: Any, extra: Any
) -> Callable[[np.ndarray], tuple[Any, Any]]:
    """The network as a function of photos uint8 (B, R, R, 3), B any number, on the host.

    Of several hosts each gives all the photos, puts those of its devices on them, and gets all the
    answers.

    Args:
      program: whose devices compute.
      params: as `predict` takes them, on the devices.
      extra: the same.
    """
    sharding, devices = meshes.batch_sharding(program.mesh), program.mesh.devices.size

    def predict(images: np.ndarray) -> tuple[Any, Any]:
        number = len(images)
        padded = np.pad(images, ((0, -number % devices), (0, 0), (0, 0), (0, 0)))
        photos = jax.make_array_from_callback(padded.shape, sharding, lambda part: padded[part])
        with jax.set_mesh(program.mesh):
            answers = program.predict(params, extra, photos)
        return jax.tree.map(lambda x: np.asarray(x)[:number], answers)

    return predict


def _check_groups(config: Config) -> None:
    """Says in one sentence why BatchNorm cannot have the groups that it is set to."""
    photos, parts = config.model.norm_photos, config.accumulate
    shown = config.batch_size // parts
    if photos == 0 and parts > 1:
        raise UserError(
            f"model.norm_photos=0 has BatchNorm take the statistics of all {config.batch_size:,}"
            f" photos of a step, and accumulate={parts} shows it {shown:,} at a time; set"
            f" --config.model.norm_photos={shown}, or a divisor of that, or --config.accumulate=1."
        )
    if photos and shown % photos:
        fits = max(n for n in range(1, min(photos, shown) + 1) if shown % n == 0)
        raise UserError(
            f"model.norm_photos={photos} does not divide the {shown:,} photos that the network is"
            f" shown at a time (batch_size={config.batch_size}, accumulate={parts}); set"
            f" --config.model.norm_photos={fits}, or 0 for all photos of a step."
        )


def initial_state(program: Program | Network, seed: int) -> Any:
    """The state of step 0, or what evaluation needs of it, on its devices."""
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
    # Runs once, so what XLA for CPU would spend on making it fast is lost.
    on_cpu = program.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    init = jax.jit(program.init, out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(seed))
