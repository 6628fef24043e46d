"""The settings of a run: every key, the recipes that set them, and what is derived from others.

The classes below tell type checkers the types of schema.KEYS; a test checks that both agree. A key
that is None until objectives.fill sets it has the type that it has afterwards.
"""

import ml_collections


class DataConfig(ml_collections.ConfigDict):
    """The keys config.data.NAME."""

    lanes: int
    sampling: str
    sampling_threshold: float | None
    max_labels: int
    photo_size: int
    crops: tuple[tuple[int, int, float, float], ...]
    broken: float
    threads: int | None


class AugmentConfig(ml_collections.ConfigDict):
    """The keys config.augment.NAME."""

    distortion: float
    grey: float
    blur: float


class ModelConfig(ml_collections.ConfigDict):
    """The keys config.model.NAME."""

    name: str
    dtype: str
    norm_photos: int
    zero_scale: bool
    remat: tuple[bool, ...]
    unroll: int
    group_conv: str


class ObjectiveConfig(ml_collections.ConfigDict):
    """The keys config.objective.NAME."""

    name: str
    loss: str
    label_smoothing: float


class SwavConfig(ml_collections.ConfigDict):
    """The keys config.swav.NAME."""

    prototypes: int
    temperature: float
    epsilon: float
    iterations: int
    assigned: int
    head: tuple[int, ...]
    head_norm: bool
    frozen_steps: int
    queue: int
    queue_start: int
    patience: int


class OptimizerConfig(ml_collections.ConfigDict):
    """The keys config.optimizer.NAME."""

    name: str
    learning_rate: float | None
    schedule: str
    plateau_steps: int
    warmup_epochs: float
    warmup_start: float
    final: float
    halvings: int
    momentum: float
    weight_decay: float
    clip: float
    average: float


class MeshConfig(ml_collections.ConfigDict):
    """The keys config.mesh.NAME."""

    fsdp: int


class HostsConfig(ml_collections.ConfigDict):
    """The keys config.hosts.NAME."""

    join: float
    lost: float


class CheckpointConfig(ml_collections.ConfigDict):
    """The keys config.checkpoint.NAME."""

    every: int
    keep: int


class Config(ml_collections.ConfigDict):
    """All settings of a run, as schema.KEYS lists them; recipes.load returns it locked."""

    seed: int
    dataset: str
    batch_size: int
    accumulate: int
    epochs: float
    epoch_length: float
    steps: int | None
    init_from: str
    evaluate_on: str
    evaluate_protocols: str
    evaluate_every: int
    log_every: int
    profile: tuple[int, ...]
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    objective: ObjectiveConfig
    swav: SwavConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    hosts: HostsConfig
    checkpoint: CheckpointConfig
