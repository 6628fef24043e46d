"""The train step compiled for a TPU topology nobody has started yet: what a chip would hold."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from hashvision.errors import UserError
from hashvision.training import Config, presets
from hashvision.training import program as programs

# Memory of a chip in GiB (cloud.google.com/tpu/docs/system-architecture-tpu-vm). Where the compiler
# counts each of a chip's two cores as a device, as for v3 and v4, each has half.
MEMORY = {"v3": 32, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}


class Plan(NamedTuple):
    """What one device of the topology holds while it trains, in bytes."""

    topology: str
    devices: int
    held: dict[str, int]  # by kind; temporary is the compiler's own figure
    memory: int  # that the device has
    compile_seconds: float
    text: str  # the compiled program's HLO

    @property
    def needed(self) -> int:
        """Bytes that a device needs in all."""
        return sum(self.held.values())


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology, to compile for.

    Args:
      topology: KIND:SHAPE, v5e:16x16 say.

    Raises:
      UserError: there is no such topology or no compiler for it.
    """
    kind, _, shape = topology.partition(":")
    if kind not in MEMORY or not shape:
        raise UserError(
            f"--topology={topology} is none that is known; give KIND:SHAPE, such as v4:4x4x8 or"
            f" v5e:16x16, of {', '.join(MEMORY)}."
        )
    # What libtpu asks for where there is no TPU that would tell it.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # It takes no TPU, so it may plan beside a run that has one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu answers with several kinds
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"The TPU compiler cannot plan for --topology={topology} ({reason}); install it with"
            " `pip install libtpu`, or give a shape that exists."
        ) from None


def _bytes_a_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def plan(config: Config, topology: str, classes: int, photos: float) -> Plan:
    """Compiles the step that `train` would run, with its shardings, for a TPU topology.

    Args:
      config: the schema of configs/base.py.
      topology: KIND:SHAPE, v5e:16x16 say.
      classes: of the vocabulary.
      photos: of an epoch.

    Raises:
      UserError: there is no such topology or no compiler for it, or the config does not fit it.
    """
    config = config.copy_and_resolve_references()
    for line in presets.fill(config, photos):
        print(line, flush=True)
    devices = devices_of(topology)
    program = programs.build(config, classes, photos, devices)
    start = time.monotonic()
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.abstract, program.abstract_batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            line = next((x for x in str(error).splitlines() if "Ran out of memory" in x), None)
            if line is None:
                raise
            raise UserError(
                f"{config.model.name} does not fit {topology}: {line.strip()}"
            ) from None
    state = program.abstract
    held = {
        "parameters": _bytes_a_device(state.params),
        "optimiser": _bytes_a_device(state.opt_state),
        "average": _bytes_a_device(state.average),
        "statistics and queue": _bytes_a_device(state.extra),
        "batch": _bytes_a_device(program.abstract_batch),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    chips = len({str(getattr(device, "coords", device.id)) for device in devices})
    memory = MEMORY[topology.partition(":")[0]] * 2**30 * chips // len(devices)
    seconds = time.monotonic() - start
    return Plan(topology, len(devices), held, memory, seconds, compiled.as_text())


def table(found: Plan) -> str:
    """A plan as the lines that are printed."""
    rows: Mapping[str, int] = {**found.held, "in all": found.needed, "there is": found.memory}
    lines = [f"{found.topology}: {found.devices} devices, GiB on each", ""]
    lines += [f"{name:<22}{size / 2**30:>8.2f}" for name, size in rows.items()]
    share = found.needed / found.memory
    lines.append("")
    lines.append(
        f"fits, with {1 - share:.0%} to spare"
        if share <= 1
        else f"does not fit, by {(share - 1) * found.memory / 2**30:.2f} GiB a device"
    )
    lines.append(f"compiled in {found.compile_seconds:.0f} s")
    return "\n".join(lines)
