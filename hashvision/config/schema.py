"""The schema of a config: every key, with its default, the values it takes and its meaning.

`hashvision config` prints it. Recipes start from `get_config`, through `import base`.
"""

import reprlib
from collections.abc import Mapping
from inspect import get_annotations
from typing import Any, NamedTuple

from ml_collections import config_dict

from hashvision.config import Config
from hashvision.config.objectives import OBJECTIVES
from hashvision.config.ranges import (
    FLAG,
    NAME,
    SEED,
    SIDE,
    TEXT,
    Range,
    fixed_tuple,
    integer,
    number,
    one_of,
    optional,
)
from hashvision.errors import UserError


class ConfigKey(NamedTuple):
    """A key of a config."""

    default: Any
    takes: Range
    meaning: str  # completes "KEY: ..."; printed by `config` and in messages


_STEPS = integer(1, 2**31 - 1)  # int32 counts steps
_STEPS_OR_0 = integer(0, 2**31 - 1)
_COUNT = integer(1, 2**20)
_SHARE = number(0, 1)
_SHARE_ABOVE_0 = number(0, 1, above=True)
_DECAY = number(0, 1, below=True)
_EPOCHS = number(0, 1_000_000, above=True)
_RATE = number(0, 1e30)  # float32 holds its product with any batch size
_SECONDS = number(0, 1_000_000, above=True)
_CROP = fixed_tuple("a crop size", integer(1, 64), integer(1, 4096), _SHARE_ABOVE_0, _SHARE_ABOVE_0)
_CROPS = Range(
    tuple,
    "a tuple per size: (crops per photo, pixels per side, smallest share of the area, largest)",
    lambda sizes: 0 < len(sizes) <= 16 and all(_CROP.fits(x) and x[2] <= x[3] for x in sizes),
)
_WIDTHS = Range(tuple, "a tuple of widths", lambda x: 0 < len(x) <= 16 and all(map(_COUNT.fits, x)))
_BY_STAGE = fixed_tuple("a tuple of true or false for each of the four stages", *(FLAG,) * 4)
_SPAN = fixed_tuple("a span of steps", _STEPS, _STEPS)
_SPAN_OR_NONE = Range(
    tuple, "(first step, number of steps), or ()", lambda span: not span or _SPAN.holds(span)
)

GROUPS = {
    "data": "The photos. Evaluation uses the first crop size.",
    "augment": "Applied on the device to each crop separately; 0 switches an augmentation off."
    " Crops are always flipped at random.",
    "swav": "`train` derives keys that are None from the batch and the dataset, and prints how.",
}

KEYS: dict[str, ConfigKey] = {
    "seed": ConfigKey(
        0, SEED, "seed of the initial parameters and the order, crops and colours of photos"
    ),
    "dataset": ConfigKey("", TEXT, "dataset folder that `hashvision prepare` made"),
    "batch_size": ConfigKey(256, _COUNT, "photos per step, over all devices"),
    "accumulate": ConfigKey(
        1, _COUNT, "parts that a batch is split into to save memory; their gradients are averaged"
    ),
    "epochs": ConfigKey(30.0, _EPOCHS, "epochs to train, each of epoch_length photos"),
    "epoch_length": ConfigKey(
        None,
        optional(number(0, 1e15, above=True)),
        "photos per epoch, repeats counted; if None, that of the dataset that the run starts with",
    ),
    "steps": ConfigKey(None, optional(_STEPS), "steps to train; if None, as many as epochs take"),
    "data.lanes": ConfigKey(
        8,
        _COUNT,
        "parts of the dataset that are shuffled separately: a divisor of batch_size and a multiple"
        " of the number of hosts; changing it changes the order of photos",
    ),
    "data.sampling": ConfigKey(
        "square_root",
        one_of("natural", "square_root", "uniform"),
        "how often photos of rare classes are repeated (WSL, section 2.2)",
    ),
    "data.sampling_threshold": ConfigKey(
        None,
        optional(_SHARE_ABOVE_0),
        "class frequency below which photos are repeated; if None, the mean class frequency",
    ),
    "data.max_labels": ConfigKey(
        16, integer(1, 1024), "tags used per photo; of more, a random sample"
    ),
    # At prepare's short side of 384, a photo of aspect 4:3 keeps its size and one of 3:2 is shrunk
    # by an eighth. Larger photos would cost the host's link and the devices' memory for all.
    "data.photo_size": ConfigKey(
        512, SIDE, "longer side in pixels to which larger photos are shrunk before cropping"
    ),
    "data.crops": ConfigKey(((1, 224, 0.08, 1.0),), _CROPS, "crops cut out of each photo"),
    "data.broken": ConfigKey(
        0.001, _SHARE, "share of a host's records that may be unreadable before the run stops"
    ),
    "data.threads": ConfigKey(
        None, optional(integer(1, 4096)), "threads of the input pipeline; if None, one per core"
    ),
    "augment.distortion": ConfigKey(
        0.0, number(0, 10), "strength of the colour distortion; SwAV uses 1"
    ),
    "augment.grey": ConfigKey(0.0, _SHARE, "probability of turning a crop grey"),
    "augment.blur": ConfigKey(0.0, _SHARE, "probability of blurring a crop"),
    "init_from": ConfigKey("", TEXT, "workdir of the run whose trunk this run starts from"),
    "model.name": ConfigKey(
        "resnext101_32x16d", NAME, "trunk: a ResNet, ResNeXt or RegNetY of hashvision/models"
    ),
    "model.dtype": ConfigKey(
        "bfloat16",
        one_of("float32", "bfloat16"),
        "dtype of the computation; parameters, statistics and logits stay float32",
    ),
    "model.norm_photos": ConfigKey(
        0, integer(0, 2**20), "photos that share BatchNorm statistics; 0: all photos of a step"
    ),
    "model.zero_scale": ConfigKey(
        True, FLAG, "whether the scale of each block's last BatchNorm starts at 0 (WSL), not at 1"
    ),
    "model.remat": ConfigKey(
        (False,) * 4, _BY_STAGE, "stages whose activations are computed again to save memory"
    ),
    "model.unroll": ConfigKey(
        1,
        integer(0, 1024),
        "blocks per iteration of a stage's loop; 0: all (slow to compile, fast on CPU)",
    ),
    "model.group_conv": ConfigKey(
        "auto",
        one_of("auto", "blocks", "packed", "native"),
        "implementation of grouped convolutions; auto chooses by the platform",
    ),
    "objective.name": ConfigKey("hashtag", one_of(*OBJECTIVES), "training objective"),
    "objective.loss": ConfigKey(
        "softmax", one_of("softmax", "sigmoid"), "loss of the hashtag objective"
    ),
    "objective.label_smoothing": ConfigKey(
        0.0, _DECAY, "share of the target that is spread evenly over all classes (hashtag)"
    ),
    "swav.prototypes": ConfigKey(
        None, optional(integer(2, 2**24)), "number of prototypes: clusters of photos"
    ),
    "swav.temperature": ConfigKey(
        0.1, number(0.001, 1000), "temperature of the softmax over prototypes"
    ),
    "swav.epsilon": ConfigKey(
        0.05, number(0.001, 1000), "weight of Sinkhorn's entropy term; smaller gives sharper codes"
    ),
    "swav.iterations": ConfigKey(3, integer(1, 1000), "Sinkhorn iterations"),
    "swav.assigned": ConfigKey(
        2,
        integer(1, 64),
        "number of crops per photo, of the first size, that codes are computed for",
    ),
    "swav.head": ConfigKey((2048, 128), _WIDTHS, "widths of the projection head's layers"),
    "swav.head_norm": ConfigKey(True, FLAG, "whether the projection head has BatchNorm"),
    "swav.frozen_steps": ConfigKey(
        None, optional(_STEPS_OR_0), "steps at the start in which prototypes stay unchanged"
    ),
    "swav.queue": ConfigKey(
        None,
        optional(_STEPS_OR_0),
        "earlier photos that codes are also computed over, a multiple of batch_size; 0: none",
    ),
    "swav.queue_start": ConfigKey(None, optional(_STEPS_OR_0), "step from which the queue is used"),
    "swav.patience": ConfigKey(
        None, optional(_STEPS), "steps without learning after which the run stops"
    ),
    "optimizer.name": ConfigKey("sgd", one_of("sgd", "larc", "adamw"), "optimizer"),
    "optimizer.learning_rate": ConfigKey(
        0.1,
        optional(_RATE),
        "peak learning rate per 256 photos of the batch; if None, SwAV derives it from the batch",
    ),
    "optimizer.schedule": ConfigKey(
        "cosine",
        one_of("cosine", "halving", "constant", "plateau"),
        "schedule of the learning rate after the warm-up",
    ),
    "optimizer.plateau_steps": ConfigKey(
        1000, _STEPS, "steps per mean loss; three means without a fall halve the rate (plateau)"
    ),
    "optimizer.warmup_epochs": ConfigKey(
        1.0, number(0, 1_000_000), "epochs in which the learning rate rises to its peak"
    ),
    "optimizer.warmup_start": ConfigKey(
        0.0, _RATE, "learning rate that the warm-up starts from, not scaled by the batch"
    ),
    "optimizer.final": ConfigKey(0.0, _SHARE, "last learning rate as a share of the peak (cosine)"),
    "optimizer.halvings": ConfigKey(
        10, integer(1, 1000), "number of halvings of the learning rate, evenly spaced (halving)"
    ),
    "optimizer.momentum": ConfigKey(
        0.9, _DECAY, "momentum of sgd (Nesterov) and larc; beta 1 of adamw"
    ),
    "optimizer.weight_decay": ConfigKey(
        1e-4, number(0, 1000), "weight decay of kernels; with larc, of all parameters"
    ),
    "optimizer.clip": ConfigKey(0.0, _RATE, "largest global norm of the gradients; 0: no clipping"),
    "optimizer.average": ConfigKey(
        0.0, _DECAY, "decay of the moving average of the parameters; 0: no average"
    ),
    "mesh.fsdp": ConfigKey(
        1, _COUNT, "devices that the state is sharded over; the batch is sharded over all devices"
    ),
    "hosts.join": ConfigKey(300.0, _SECONDS, "seconds to wait for all hosts to appear"),
    "hosts.lost": ConfigKey(
        30.0, _SECONDS, "seconds of silence after which a host counts as lost and the others stop"
    ),
    "evaluate_on": ConfigKey(
        "",
        TEXT,
        "labelled photos to evaluate on during training, as `evaluate --dataset` takes them",
    ),
    "evaluate_protocols": ConfigKey(
        "knn", TEXT, "protocols of these evaluations, as for `evaluate --protocol`"
    ),
    "evaluate_every": ConfigKey(1000, _STEPS, "steps between two evaluations during training"),
    "log_every": ConfigKey(50, _STEPS, "steps between two lines of metrics"),
    "profile": ConfigKey((), _SPAN_OR_NONE, "steps to trace into WORKDIR/tensorboard"),
    "checkpoint.every": ConfigKey(1000, _STEPS, "steps between two checkpoints"),
    "checkpoint.keep": ConfigKey(
        3, _COUNT, "newest checkpoints to keep; the one with the lowest loss is kept as well"
    ),
}


def get_config(values: Mapping[str, Any] | None = None) -> Config:
    """A Config with all keys of the schema, not locked.

    Args:
      values: by dotted key; the other keys get their defaults.
    """
    config, classes = Config(), get_annotations(Config)
    for key, (default, takes, _) in KEYS.items():
        *groups, name = key.split(".")
        holder: Any = config
        for group in groups:
            if group not in holder:
                holder[group] = classes[group]()
            holder = holder[group]
        value = (values or {}).get(key, default)
        if takes.optional:  # a placeholder lets a recipe replace None by a value, and vice versa
            holder[name] = config_dict.placeholder(takes.kind)
        holder[name] = takes.cast(value)
    return config


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a ConfigDict, or of nested dicts, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if hasattr(value, "items") else {name: value})
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        holder = found
        for group in groups:
            holder = holder.setdefault(group, {})
        holder[name] = value
    return found


def check(values: Mapping[str, Any], where: str) -> None:
    """Raises UserError if a key does not take its value.

    Args:
      values: by dotted key, all of them in KEYS.
      where: the file that sets them, for the message.

    Raises:
      UserError: names the first such key, its value and the values that the key takes.
    """
    for key, value in values.items():
        if not KEYS[key].takes.fits(value):
            raise UserError(f"{where} sets {key}={_shown(value)}, but {wanted(key)}.")


def wanted(key: str) -> str:
    """The values that a key takes and its meaning, as part of a sentence."""
    return f"{key} takes {KEYS[key].takes.words} ({KEYS[key].meaning})"


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "an integer of more than 4,300 digits"
