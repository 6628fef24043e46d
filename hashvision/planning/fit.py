"""Finds mesh.fsdp, accumulate and model.remat for the fastest step that fits a topology."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hashvision import objectives
from hashvision.config import Config
from hashvision.errors import UserError
from hashvision.planning.plan import (
    DoesNotFit,
    Plan,
    Target,
    bytes_per_device,
    devices_of,
    memory_of,
    plan,
)
from hashvision.training import program

# Per stage, from the fastest to the one that takes least memory. The first stages come first: their
# activations are largest.
REMAT = [tuple(stage < count for stage in range(4)) for count in range(5)]
# The share of a device's memory that the sharded state may take; the rest is for activations.
STATE_SHARE = 0.4


class Choice(NamedTuple):
    """One combination of the settings that are searched.

    Attributes:
      fsdp: mesh.fsdp, the number of devices that the state is sharded over.
      accumulate: the number of parts in which a batch is computed.
      remat: model.remat, whether each of the four stages is computed again in the backward pass.
    """

    fsdp: int
    accumulate: int
    remat: tuple[bool, ...]

    def overrides(self) -> str:
        """The settings as command-line overrides."""
        remat = str(self.remat).replace(" ", "")
        return (
            f"--config.mesh.fsdp={self.fsdp} --config.accumulate={self.accumulate}"
            f" --config.model.remat='{remat}'"
        )

    def applied(self, config: Config) -> Config:
        """Returns a copy of the config with these settings."""
        copy = config.copy_and_resolve_references()
        copy.mesh.fsdp, copy.accumulate, copy.model.remat = self
        return copy


class Best(NamedTuple):
    """The fastest choice that fits, and its plan."""

    choice: Choice
    plan: Plan


def fit(config: Config, target: Target) -> Best:
    """Searches for the settings with the shortest estimated step that fits; prints each attempt.

    Args:
      config: keys as in hashvision/config/schema.py. The batch size and the groups of BatchNorm
        stay as they are.
      target: the topology, the dataset and the price.

    Raises:
      UserError: no choice fits, or `plan.plan` raises it.
    """
    config = config.copy_and_resolve_references()
    for line in objectives.fill(config, target.photos):
        print(line, flush=True)
    devices = devices_of(target.topology)
    memory = memory_of(target.topology, devices)
    count = len(devices)
    parts = accumulate_values(config.batch_size, count, config.model.norm_photos)
    if len(parts) < len(accumulate_values(config.batch_size, count, 1)):
        together = f"{config.model.norm_photos:,}" if config.model.norm_photos else "all"
        print(
            f"BatchNorm normalises {together} photos together (model.norm_photos), so"
            f" --config.accumulate can be {' or '.join(map(str, parts))}.",
            flush=True,
        )

    def state_fits(fsdp: int) -> bool:
        wide = Choice(fsdp=fsdp, accumulate=1, remat=REMAT[0]).applied(config)
        state = program.build(
            config=wide, classes=target.classes, epoch_length=target.photos, devices=devices
        ).abstract
        return not memory or bytes_per_device(state) <= STATE_SHARE * memory

    def attempt(choice: Choice) -> Plan:
        return plan(choice.applied(config), target)

    widths = [width for width in range(1, count + 1) if count % width == 0]
    return search(widths=widths, parts=parts, state_fits=state_fits, attempt=attempt)


def accumulate_values(batch: int, devices: int, photos: int) -> list[int]:
    """The numbers of parts into which a batch can be cut, ascending.

    A part is spread evenly over the devices and holds whole groups of BatchNorm.

    Args:
      batch: photos per step.
      devices: number of devices.
      photos: photos per group of BatchNorm; 0 means all photos of a step.
    """
    photos = photos or batch
    several = range(2, batch + 1)
    fitting = [n for n in several if batch % (devices * n) == 0 and batch // n % photos == 0]
    return [1, *fitting]


def search(
    widths: Sequence[int],
    parts: Sequence[int],
    state_fits: Callable[[int], bool],
    attempt: Callable[[Choice], Plan],
) -> Best:
    """Returns the choice with the shortest step, among those that are worth compiling.

    The search takes the smallest fsdp with which the state fits, since it gathers least. For each
    number of parts it finds the least rematerialisation that fits. It stops when no
    rematerialisation is needed or the step becomes longer. A choice that does not fit costs little:
    the compiler finds that out before it generates code.

    Args:
      widths: values of fsdp, ascending.
      parts: numbers of parts of a batch, ascending.
      state_fits: whether the state leaves enough memory for activations with a value of fsdp.
      attempt: compiles a choice; raises DoesNotFit.

    Raises:
      UserError: nothing fits.
    """
    best: Best | None = None
    for fsdp in (width for width in widths if width == widths[-1] or state_fits(width)):
        for count in parts:
            found = _least_remat(fsdp, count, attempt)
            if best and not (found and found.plan.step_seconds < best.plan.step_seconds):
                break
            best = found
            if found and not any(found.choice.remat):
                break
        if best:
            return best
    raise UserError(
        "No --config.mesh.fsdp, --config.accumulate and --config.model.remat fit --topology;"
        " give a topology with more chips."
    )


def _least_remat(fsdp: int, parts: int, attempt: Callable[[Choice], Plan]) -> Best | None:
    """The choice with the least rematerialisation that fits; None if none fits."""
    for remat in REMAT:
        choice = Choice(fsdp=fsdp, accumulate=parts, remat=remat)
        try:
            plan = attempt(choice)
        except DoesNotFit:
            plan = None
        if plan is None or (plan.memory and plan.needed > plan.memory):
            print(f"{choice.overrides()}: does not fit", flush=True)
            continue
        print(f"{choice.overrides()}: {plan.step_seconds:.4f} s per step", flush=True)
        return Best(choice, plan)
    return None
