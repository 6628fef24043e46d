"""The width of fsdp, the remat and the parts of a batch that make the fastest step that fits."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hashvision.config import Config, derive
from hashvision.errors import UserError
from hashvision.planning import plan as plans
from hashvision.planning.plan import DoesNotFit, Plan, Target
from hashvision.training import program as programs

# By stage, from what is fastest to what takes least memory: the first stages' photos are largest.
REMAT = [tuple(stage < count for stage in range(4)) for count in range(5)]
# Of a device's memory, that the sharded state may take: the rest is for activations.
STATE_SHARE = 0.4


class Choice(NamedTuple):
    """Settings of a config."""

    fsdp: int
    accumulate: int
    remat: tuple[bool, ...]

    def overrides(self) -> str:
        """As they are pasted behind a command."""
        remat = str(self.remat).replace(" ", "")
        return (
            f"--config.mesh.fsdp={self.fsdp} --config.accumulate={self.accumulate}"
            f" --config.model.remat='{remat}'"
        )

    def applied(self, config: Config) -> Config:
        """A copy of the config with these settings."""
        copy = config.copy_and_resolve_references()
        copy.mesh.fsdp, copy.accumulate, copy.model.remat = self
        return copy


class Found(NamedTuple):
    """The best choice and its plan."""

    choice: Choice
    plan: Plan


def fit(config: Config, target: Target) -> Found:
    """Searches for the settings of the shortest estimated step that fits, and prints what it tries.

    Args:
      config: of hashvision/config/schema.py; its batch and BatchNorm's groups are kept.
      target: what it is planned for.

    Raises:
      UserError: no choice fits, or what `plan.plan` raises.
    """
    config = config.copy_and_resolve_references()
    for line in derive.fill(config, target.photos):
        print(line, flush=True)
    devices = plans.devices_of(target.topology)
    memory = plans.memory_of(target.topology, devices)
    count = len(devices)
    parts = parts_of(config.batch_size, count, config.model.norm_photos)
    if len(parts) < len(parts_of(config.batch_size, count, 1)):
        together = f"{config.model.norm_photos:,}" if config.model.norm_photos else "all"
        print(
            f"BatchNorm takes {together} photos together (model.norm_photos), which lets"
            f" --config.accumulate be {' or '.join(map(str, parts))}.",
            flush=True,
        )

    def state_fits(fsdp: int) -> bool:
        wide = Choice(fsdp, 1, REMAT[0]).applied(config)
        state = programs.build(wide, target.classes, target.photos, devices).abstract
        return not memory or plans.bytes_a_device(state) <= STATE_SHARE * memory

    def attempt(choice: Choice) -> Plan:
        return plans.plan(choice.applied(config), target)

    widths = [width for width in range(1, count + 1) if count % width == 0]
    return search(widths, parts, state_fits, attempt)


def parts_of(batch: int, devices: int, photos: int) -> list[int]:
    """Into how many parts a batch may be cut, ascending, each with whole groups of BatchNorm's.

    Args:
      batch: photos a step.
      devices: that each part is spread over evenly.
      photos: of a group; 0: all of a step.
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
) -> Found:
    """The best of the choices.

    fsdp is as narrow as the state allows, which gathers least. For each number of parts of a batch
    the least rematerialisation that fits is tried, until none is needed or steps become longer.
    What does not fit the compiler finds before it makes code; what does takes its full time.

    Args:
      widths: of fsdp, ascending.
      parts: a batch may be cut into, ascending.
      state_fits: whether the state leaves enough for the rest, at a width of fsdp.
      attempt: compiles a choice; raises DoesNotFit.

    Raises:
      UserError: nothing fits.
    """
    best: Found | None = None
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
    raise UserError("No width of fsdp, parts and remat fit --topology; take more chips.")


def _least_remat(fsdp: int, parts: int, attempt: Callable[[Choice], Plan]) -> Found | None:
    for remat in REMAT:
        choice = Choice(fsdp, parts, remat)
        try:
            plan = attempt(choice)
        except DoesNotFit:
            plan = None
        if plan is None or (plan.memory and plan.needed > plan.memory):
            print(f"{choice.overrides()}: does not fit", flush=True)
            continue
        print(f"{choice.overrides()}: {plan.step_seconds:.4f} s a step", flush=True)
        return Found(choice, plan)
    return None
