"""Settings that follow from others: filled in where a config leaves them open, and explained."""

import math
from collections.abc import Mapping
from typing import Any

from hashvision.config import Config
from hashvision.errors import UserError

_IMAGENET = 1_281_167  # photos

# Prototypes for each photo that codes are computed over: SEER's 16,000 at batch 4096 is the most,
# SwAV's 300 at batch 4096 the least that was published; 3000 at 4096 is the rule.
_MOST, _LEAST, _USUAL = 16_000 / 4096, 300 / 4096, 3000 / 4096
_QUEUED = 16_000 / 7936  # from which a queue is added unless the config says otherwise

# Steps without learning that stop a run: at least so many, which runs of fewer steps never reach,
# and of a long run no more than a share.
_LEAST_PATIENCE, _MOST_PATIENCE = 500, 1 / 4

# Keys that `fill` sets where a config leaves them open.
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
    """Steps of the whole run: config.steps, or as many as config.epochs take."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * epoch_length / config.batch_size))


def fill(config: Config, epoch_length: float, began: Mapping[str, Any] | None = None) -> list[str]:
    """Fills in what a config leaves open, in place: how long an epoch is, and SwAV's settings.

    A run that resumes keeps what it began with. Else a setting depends on the batch and the dataset
    alone (the patience on the run's length too), and so is the same on other machines.

    Args:
      config: of hashvision/config/schema.py.
      epoch_length: photos of an epoch of the dataset.
      began: the frozen config of the run that resumes, by dotted key.

    Returns:
      A line for each setting: its value and why.

    Raises:
      UserError: the batch and the queue are too small for the prototypes.
    """
    kept = _keep(config, began or {})
    if config.epoch_length is None:
        config.epoch_length = epoch_length
    if config.epoch_length != epoch_length:
        kept.append(
            f"epoch_length={config.epoch_length:,.0f}: the run's epochs are counted in it; an epoch"
            f" of this dataset has {epoch_length:,.0f} photos"
        )
    return kept + _fill_swav(config, config.epoch_length)


def _keep(config: Config, began: Mapping[str, Any]) -> list[str]:
    """Takes what is left open from the run that resumes; says so of all but the epoch's length."""
    kept = []
    for key in OPEN:
        group, _, name = key.rpartition(".")
        holder: Any = config[group] if group else config
        if holder[name] is None and began.get(key) is not None:
            holder[name] = began[key]
            if holder is not config:
                kept.append(f"{key}={began[key]:.6g}")
    return [f"As the run began: {', '.join(kept)}."] if kept else []


def _fill_swav(config: Config, epoch_length: float) -> list[str]:
    if config.objective.name != "swav":
        return []
    swav, batch = config.swav, config.batch_size
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
            f"a peak of {peak:.3g} at batch {batch:,}, on the curve through the authors' 0.6 at 256"
            " and 4.8 at 4096",
        )
    if swav.prototypes is None:
        swav.prototypes = max(60, min(3000, round(epoch_length * 3000 / _IMAGENET)))
        say(
            "swav.prototypes",
            swav.prototypes,
            f"3000 for ImageNet's 1.28M photos, as many a photo for {epoch_length:,.0f}, at least"
            " 60",
        )
    if swav.queue is None:
        missing = swav.prototypes / _USUAL - batch
        small = swav.prototypes > _QUEUED * batch
        swav.queue = math.ceil(missing / batch) * batch if small else 0
        say(
            "swav.queue",
            swav.queue,
            f"with the batch's {batch:,} photos, as many for each prototype as 4096 for 3000"
            if small
            else f"a batch of {batch:,} does for {swav.prototypes:,} prototypes",
        )
    if swav.frozen_steps is None:
        swav.frozen_steps = round(min(epoch_length, _IMAGENET) / batch)
        say(
            "swav.frozen_steps",
            swav.frozen_steps,
            "one epoch, of ImageNet's length at most (313 steps at batch 4096)",
        )
    if swav.queue_start is None:
        swav.queue_start = 15 * steps_an_epoch
        if swav.queue:
            say(
                "swav.queue_start",
                swav.queue_start,
                "after 15 epochs, as at the authors' batch 256",
            )
    if swav.patience is None:
        total = total_steps(config, epoch_length)
        share = round(total * _MOST_PATIENCE)
        swav.patience = max(_LEAST_PATIENCE, min(4 * steps_an_epoch, share))
        say(
            "swav.patience",
            swav.patience,
            f"4 epochs, or a quarter of the run's {total:,} steps if that is less, but at least"
            f" {_LEAST_PATIENCE}, without learning stop a run",
        )

    if swav.queue % batch:
        raise UserError(
            f"swav.queue={swav.queue} is no multiple of batch_size={batch}; set"
            f" --config.swav.queue={round(swav.queue / batch) * batch or batch}."
        )
    photos = batch + swav.queue
    if swav.prototypes > _MOST * photos:
        queue = math.ceil((swav.prototypes / _USUAL - batch) / batch) * batch
        raise UserError(
            f"Codes over {photos:,} photos (batch_size={batch:,}, swav.queue={swav.queue:,}) cannot"
            f" be spread over swav.prototypes={swav.prototypes:,}; set --config.swav.queue={queue}"
            f" or --config.swav.prototypes={int(_MOST * photos)} at most."
        )
    least, most = math.ceil(_LEAST * photos), int(_MOST * photos)
    why.append(
        f"Sane for codes over {photos:,} photos: {least:,} to {most:,} prototypes; there are"
        f" {swav.prototypes:,}."
    )
    return why
