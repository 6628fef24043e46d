"""The training objectives: each is a few pure functions over plain arrays.

A new objective is a module here with `from_config` and `fill`, and a line in config/objectives.py.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray, UInt8

from hashvision.config import Config, derive
from hashvision.config.objectives import OBJECTIVES

Tree = Any  # a nested dict of arrays
Batch = dict[str, jax.Array]
Metrics = dict[str, Float[Array, ""]]
Loss = tuple[Float[Array, ""], tuple[Tree, Metrics]]  # (loss, (changed members of extra, metrics))


class Objective(NamedTuple):
    """Everything that the training loop and the evaluators need from an objective.

    Attributes:
      init: (rng, batch) -> (params, extra). `extra` holds what a step updates without gradients:
        statistics and queues. params["trunk"] and extra["trunk"] are the trunk's Variables.
      loss: (params, extra, batch, rng, step) -> (loss, (changed, metrics)). Loss and metrics are
        float32 scalars; `changed` holds the members of extra that the step changes. When gradients
        accumulate, each part of the batch gets the extra from before the step, and the loop
        averages the results of the parts.
      predict: (params, extra, images) -> (features, scores): uint8 photos (B, H, W, 3) to float32
        (B, D) and (B, K). Scores rank photos within a class and classes within a photo. They are
        None for an objective without classes.
      after_update: params -> params, called after each optimiser step; SwAV normalises prototypes.
      before_parts: (params, extra, parts, rng, step) -> (parts, changed), called before gradients
        accumulate over the parts of a batch; adds what depends on the whole batch. An array of
        `parts` is (N, B / N, ...), with photo i of the batch in part i % N.
      watch: the metrics to print in each line of progress, besides the loss.
      diagnose: metrics of a log line -> the likely cause and its remedies if the run learns
        nothing, else None.
      patience: the run stops after `diagnose` has found a cause for this many steps.
    """

    init: Callable[[PRNGKeyArray, Batch], tuple[Tree, Tree]]
    loss: Callable[[Tree, Tree, Batch, PRNGKeyArray, Int[Array, ""]], Loss]
    predict: Callable[
        [Tree, Tree, UInt8[Array, "B H W 3"]],
        tuple[Float32[Array, "B D"], Float32[Array, "B K"] | None],
    ]
    after_update: Callable[[Tree], Tree] = lambda params: params
    before_parts: Callable[
        [Tree, Tree, Batch, PRNGKeyArray, Int[Array, ""]], tuple[Batch, Tree]
    ] = lambda params, extra, parts, rng, step: (parts, {})
    watch: tuple[str, ...] = ()
    diagnose: Callable[[Mapping[str, float]], str | None] = lambda metrics: None
    patience: int = 0


def from_config(config: Config, classes: int, platform: str) -> Objective:
    """The objective called config.objective.name, over the trunk called config.model.name.

    Args:
      config: complete: `fill` has set the keys that the recipe leaves at None.
      classes: number of classes in the vocabulary.
      platform: of the devices: "cpu", "tpu" or "gpu".

    Raises:
      UserError: a setting does not suit the objective or the network.
    """
    return _module(config).from_config(config, classes, platform)


def fill(config: Config, epoch_length: float, frozen: Mapping[str, Any] | None = None) -> list[str]:
    """Sets the keys that a config leaves at None, in place: the epoch length and the objective's.

    A run that resumes keeps the settings that it began with. Otherwise they depend on the batch and
    the dataset only, and are the same on any machine.

    Args:
      config: of the run.
      epoch_length: photos per epoch of the dataset.
      frozen: the config that the run began with, by dotted key, if it resumes.

    Returns:
      The lines to print: each setting with its value and the reason.

    Raises:
      UserError: settings do not fit together.
    """
    lines = derive.keep(config, epoch_length, frozen or {})
    return lines + _module(config).fill(config, config.epoch_length)


def _module(config: Config) -> Any:
    return importlib.import_module(OBJECTIVES[config.objective.name].module)
