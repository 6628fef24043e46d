"""Derives the settings that a config leaves at None from others, and gives a reason for each."""

import math
from collections.abc import Mapping
from typing import Any

from hashvision.config import Config
from hashvision.errors import UserError

_IMAGENET = 1_281_167  # photos

# Published ratios of prototypes to the photos that codes are computed over. The highest is SEER's
# 16,000 at batch 4096, the lowest SwAV's 300 at batch 4096; most papers use 3000 at 4096.
_MOST, _LEAST, _USUAL = 16_000 / 4096, 300 / 4096, 3000 / 4096
_QUEUED = 16_000 / 7936  # above this ratio a queue is added by default

# A run stops after this many steps without learning: at least 500, so that shorter runs never stop,
# and at most a quarter of the run.
_LEAST_PATIENCE, _MOST_PATIENCE = 500, 1 / 4

# Keys that objectives.fill sets if a config leaves them at None.
OPEN = (
    "epoch_length",
    "optimizer.learning_rate",
    "swav.prototypes",
    "swav.queue",
    "swav.frozen_steps",
    "swav.queue_start",
    "swav.patience",
)


def total_steps(config: Config, epoch_length: float) -> int:
    """Returns config.steps, or the number of steps in config.epochs if that is None."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * epoch_length / config.batch_size))


def keep(config: Config, epoch_length: float, frozen: Mapping[str, Any]) -> list[str]:
    """Sets the keys of OPEN as the run began with them, and config.epoch_length, in place.

    Args:
      config: of the run.
      epoch_length: photos per epoch of the dataset, used if nothing else sets it.
      frozen: the config that the run began with, by dotted key; empty for a new run.

    Returns:
      The lines to print: what was kept, and whether this dataset has another epoch length.
    """
    kept = []
    for key in OPEN:
        group, _, name = key.rpartition(".")
        holder: Any = config[group] if group else config
        if holder[name] is None and frozen.get(key) is not None:
            holder[name] = frozen[key]
            if holder is not config:
                kept.append(f"{key}={frozen[key]:.6g}")
    lines = [f"Kept from the start of the run: {', '.join(kept)}."] if kept else []
    if config.epoch_length is None:
        config.epoch_length = epoch_length
    if config.epoch_length != epoch_length:
        lines.append(
            f"epoch_length={config.epoch_length:,.0f}: the run counts this many photos as an epoch;"
            f" an epoch of this dataset has {epoch_length:,.0f}"
        )
    return lines


def swav(config: Config, epoch_length: float) -> list[str]:
    """Sets SwAV's keys that are None, in place.

    Args:
      config: of the run.
      epoch_length: photos per epoch.

    Returns:
      A line for each derived setting with its value and the reason, and one on the prototypes.

    Raises:
      UserError: there are too many prototypes for the batch and the queue, or the queue is not a
        multiple of the batch.
    """
    settings, batch = config.swav, config.batch_size
    why = []
    steps_an_epoch = max(1, round(epoch_length / batch))

    def say(name: str, value: object, reason: str) -> None:
        why.append(f"{name}={value}: {reason}")

    if config.optimizer.learning_rate is None:
        peak = 0.6 * (batch / 256) ** 0.75
        config.optimizer.learning_rate = peak * 256 / batch
        say(
            "optimizer.learning_rate",
            f"{config.optimizer.learning_rate:.3g}",
            f"a peak of {peak:.3g} at batch {batch:,}, interpolated between the authors' 0.6 at"
            " batch 256 and 4.8 at batch 4096",
        )
    if settings.prototypes is None:
        settings.prototypes = max(60, min(3000, round(epoch_length * 3000 / _IMAGENET)))
        say(
            "swav.prototypes",
            settings.prototypes,
            f"the ratio of 3000 to ImageNet's 1.28M photos, for {epoch_length:,.0f} photos per"
            " epoch; at least 60 and at most 3000",
        )
    if settings.queue is None:
        missing = settings.prototypes / _USUAL - batch
        small = settings.prototypes > _QUEUED * batch
        settings.queue = math.ceil(missing / batch) * batch if small else 0
        say(
            "swav.queue",
            settings.queue,
            f"with it, a batch of {batch:,} has as many photos per prototype as 4096 for 3000"
            if small
            else f"a batch of {batch:,} is enough for {settings.prototypes:,} prototypes",
        )
    if settings.frozen_steps is None:
        settings.frozen_steps = round(min(epoch_length, _IMAGENET) / batch)
        say(
            "swav.frozen_steps",
            settings.frozen_steps,
            "one epoch, but at most as long as ImageNet's (313 steps at batch 4096)",
        )
    if settings.queue_start is None:
        settings.queue_start = 15 * steps_an_epoch
        if settings.queue:
            say(
                "swav.queue_start",
                settings.queue_start,
                "after 15 epochs, as at the authors' batch 256",
            )
    if settings.patience is None:
        total = total_steps(config, epoch_length)
        share = round(total * _MOST_PATIENCE)
        settings.patience = max(_LEAST_PATIENCE, min(4 * steps_an_epoch, share))
        say(
            "swav.patience",
            settings.patience,
            "the run stops after this many steps without learning: 4 epochs, or a quarter of its"
            f" {total:,} steps if that is less, but at least {_LEAST_PATIENCE}",
        )

    if settings.queue % batch:
        raise UserError(
            f"swav.queue={settings.queue} must be a multiple of batch_size={batch}; set"
            f" --config.swav.queue={round(settings.queue / batch) * batch or batch}."
        )
    photos = batch + settings.queue
    if settings.prototypes > _MOST * photos:
        queue = math.ceil((settings.prototypes / _USUAL - batch) / batch) * batch
        raise UserError(
            f"swav.prototypes={settings.prototypes:,} is too many for codes over {photos:,} photos"
            f" (batch_size={batch:,}, swav.queue={settings.queue:,}); set"
            f" --config.swav.queue={queue} or --config.swav.prototypes={int(_MOST * photos)}."
        )
    least, most = math.ceil(_LEAST * photos), int(_MOST * photos)
    why.append(
        f"Published ratios range from {least:,} to {most:,} prototypes for codes over {photos:,}"
        f" photos; this run has {settings.prototypes:,}."
    )
    return why
