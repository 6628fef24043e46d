"""The whole schema: every key of a config, with its default, what it takes and what it means.

`python -m hashvision config` prints it. Recipes start from `get_config`, by `import base`.
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
    number,
    one_of,
    optional,
    row,
    whole,
)
from hashvision.errors import UserError


class Key(NamedTuple):
    """A key of a config."""

    default: Any
    takes: Range
    meaning: str


_STEPS = whole(1, 2**31 - 1)  # as many as int32 counts
_STEPS_OR_0 = whole(0, 2**31 - 1)
_COUNT = whole(1, 2**20)
_SHARE = number(0, 1)
_SHARE_ABOVE_0 = number(0, 1, above=True)
_DECAY = number(0, 1, below=True)
_EPOCHS = number(0, 1_000_000, above=True)
_RATE = number(0, 1e30)  # float32 holds that times any batch
_SECONDS = number(0, 1_000_000, above=True)
_CROP = row("a size of crops", whole(1, 64), whole(1, 4096), _SHARE_ABOVE_0, _SHARE_ABOVE_0)
_CROPS = Range(
    tuple,
    "a row for each size: (how many of a photo, pixels a side, least share of its area, largest)",
    lambda sizes: 0 < len(sizes) <= 16 and all(_CROP.fits(x) and x[2] <= x[3] for x in sizes),
)
_WIDTHS = Range(tuple, "a tuple of widths", lambda x: 0 < len(x) <= 16 and all(map(_COUNT.fits, x)))
_BY_STAGE = row("true or false for each of four stages", FLAG, FLAG, FLAG, FLAG)
_SPAN = row("a span of steps", _STEPS, _STEPS)
_SPAN_OR_NONE = Range(
    tuple, "(first step, how many), or ()", lambda span: not span or _SPAN.holds(span)
)

GROUPS = {
    "data": "The photos; evaluation sees them at the first size of crops.",
    "augment": "Done on the device to each crop by itself; 0 leaves it out. Flips are always on.",
    "swav": "What is unset follows from the batch and the dataset; `train` prints how.",
}

KEYS: dict[str, Key] = {
    "seed": Key(0, SEED, "of the first parameters, the order of photos, their crops and colours"),
    "dataset": Key("", TEXT, "a folder made by `python -m hashvision prepare`"),
    "batch_size": Key(256, _COUNT, "photos a step, over all devices"),
    "accumulate": Key(1, _COUNT, "parts of a batch that gradients are summed over in turn"),
    "epochs": Key(30.0, _EPOCHS, "of epoch_length photos each"),
    "epoch_length": Key(
        None,
        optional(number(0, 1e15, above=True)),
        "photos, repeats counted; those of the dataset that the run begins with if unset",
    ),
    "steps": Key(None, optional(_STEPS), "of the run; as many as epochs take if unset"),
    "data.lanes": Key(
        8, _COUNT, "divides the batch, and hosts divide it. Changing it changes the order"
    ),
    "data.sampling": Key(
        "square_root",
        one_of("natural", "square_root", "uniform"),
        "how often photos of rare classes are repeated (WSL, section 2.2)",
    ),
    "data.sampling_threshold": Key(
        None, optional(_SHARE_ABOVE_0), "t; the mean class frequency if unset"
    ),
    "data.max_labels": Key(16, whole(1, 1024), "tags kept of a photo"),
    # At a short side of 384, as prepare keeps photos, one of 4:3 stays whole; one of 3:2 is shrunk
    # by an eighth. More would cost the host's link and the devices' memory for all.
    "data.photo_size": Key(512, SIDE, "pixels to which a photo's longer side is shrunk first"),
    "data.crops": Key(((1, 224, 0.08, 1.0),), _CROPS, "what is cut out of each photo"),
    "data.broken": Key(
        0.001, _SHARE, "share of a host's records that may be unreadable before the run stops"
    ),
    "data.threads": Key(
        None, optional(whole(1, 4096)), "of the input pipeline; one a core if unset"
    ),
    "augment.distortion": Key(0.0, number(0, 10), "strength of the colour distortion; SwAV's is 1"),
    "augment.grey": Key(0.0, _SHARE, "probability"),
    "augment.blur": Key(0.0, _SHARE, "probability"),
    "init_from": Key("", TEXT, "a workdir whose trunk this run starts from"),
    "model.name": Key(
        "resnext101_32x16d", NAME, "the trunk: a ResNet, ResNeXt or RegNetY of hashvision/models"
    ),
    "model.dtype": Key(
        "bfloat16",
        one_of("float32", "bfloat16"),
        "of compute; parameters, statistics and logits are float32",
    ),
    "model.norm_photos": Key(
        0, whole(0, 2**20), "photos that share BatchNorm's statistics; 0: all of a step"
    ),
    "model.zero_scale": Key(
        True, FLAG, "each block's last BatchNorm starts at 0 (WSL), or at 1 (RegNet)"
    ),
    "model.remat": Key((False,) * 4, _BY_STAGE, "whether to compute activations again, by stage"),
    "model.unroll": Key(
        1, whole(0, 1024), "equal blocks a loop iteration; 0: all (slow to compile, fast on CPU)"
    ),
    "model.group_conv": Key(
        "auto",
        one_of("auto", "blocks", "packed", "native"),
        "form of grouped convolutions; auto goes by the backend",
    ),
    "objective.name": Key("hashtag", one_of(*OBJECTIVES), "what is learnt"),
    "objective.loss": Key("softmax", one_of("softmax", "sigmoid"), "of hashtag"),
    "objective.label_smoothing": Key(
        0.0, _DECAY, "how much of a target is spread evenly (hashtag)"
    ),
    "swav.prototypes": Key(None, optional(whole(2, 2**24)), "clusters that photos are assigned to"),
    "swav.temperature": Key(0.1, number(0.001, 1000), "of the softmax over prototypes"),
    "swav.epsilon": Key(
        0.05, number(0.001, 1000), "of Sinkhorn's entropy: the smaller, the sharper the codes"
    ),
    "swav.iterations": Key(3, whole(1, 1000), "of Sinkhorn"),
    "swav.assigned": Key(2, whole(1, 64), "the first so many crops of the first size give codes"),
    "swav.head": Key((2048, 128), _WIDTHS, "of the projection"),
    "swav.head_norm": Key(True, FLAG, "whether the projection has BatchNorm"),
    "swav.frozen_steps": Key(None, optional(_STEPS_OR_0), "in which prototypes stay as they began"),
    "swav.queue": Key(
        None, optional(_STEPS_OR_0), "photos remembered, a multiple of the batch; 0: none"
    ),
    "swav.queue_start": Key(None, optional(_STEPS_OR_0), "step from which the queue is used"),
    "swav.patience": Key(None, optional(_STEPS), "steps without learning that stop the run"),
    "optimizer.name": Key("sgd", one_of("sgd", "larc", "adamw"), "how parameters are updated"),
    "optimizer.learning_rate": Key(
        0.1, optional(_RATE), "per 256 photos; SwAV's follows from the batch if unset"
    ),
    "optimizer.schedule": Key(
        "cosine",
        one_of("cosine", "halving", "constant", "plateau"),
        "of the learning rate after the warm-up",
    ),
    "optimizer.plateau_steps": Key(
        1000, _STEPS, "the loss's mean over these; three without a fall halve the LR"
    ),
    "optimizer.warmup_epochs": Key(
        1.0, number(0, 1_000_000), "in which the learning rate rises to its peak"
    ),
    "optimizer.warmup_start": Key(
        0.0, _RATE, "the learning rate that it rises from, not scaled by the batch"
    ),
    "optimizer.final": Key(0.0, _SHARE, "last learning rate as a share of the peak (cosine)"),
    "optimizer.halvings": Key(
        10, whole(1, 1000), "of the learning rate, at even distances (halving)"
    ),
    "optimizer.momentum": Key(0.9, _DECAY, "of sgd (Nesterov's) and larc; adamw's beta 1"),
    "optimizer.weight_decay": Key(1e-4, number(0, 1000), "of kernels; of all parameters (larc)"),
    "optimizer.clip": Key(0.0, _RATE, "largest global norm of the gradients; 0: none"),
    "optimizer.average": Key(0.0, _DECAY, "decay of the moving average of parameters; 0: none"),
    "mesh.fsdp": Key(1, _COUNT, "devices the state is sharded over; the batch is sharded over all"),
    "hosts.join": Key(300.0, _SECONDS, "seconds for all hosts to appear"),
    "hosts.lost": Key(
        30.0, _SECONDS, "seconds of silence after which a host is lost, and the others end"
    ),
    "evaluate_on": Key("", TEXT, "labelled photos to evaluate on in training, as for `evaluate`"),
    "evaluate_protocols": Key("knn", TEXT, "protocols, as for `evaluate`: knn,linear,multilabel"),
    "evaluate_every": Key(1000, _STEPS, "steps between two evaluations in training"),
    "log_every": Key(50, _STEPS, "steps from one line of metrics to the next"),
    "profile": Key((), _SPAN_OR_NONE, "steps to trace into WORKDIR/tensorboard"),
    "checkpoint.every": Key(1000, _STEPS, "steps from one to the next"),
    "checkpoint.keep": Key(
        3, _COUNT, "of the newest; the one with the lowest loss is kept besides"
    ),
}


def get_config(values: Mapping[str, Any] | None = None) -> Config:
    """A Config of all keys, which takes no others once it is locked.

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
        if takes.optional:  # None may become a value of that type, and a value None
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
    """Refuses a value that its key does not take.

    Args:
      values: by dotted key, all of them in KEYS.
      where: what sets them.

    Raises:
      UserError: names the first such key, its value and what the key takes.
    """
    for key, value in values.items():
        if not KEYS[key].takes.fits(value):
            raise UserError(f"{where} sets {key}={_shown(value)}, but {wanted(key)}.")


def wanted(key: str) -> str:
    """What a key takes and means, as a part of a sentence."""
    return f"{key} takes {KEYS[key].takes.words} ({KEYS[key].meaning})"


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
