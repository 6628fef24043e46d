"""The mesh and the one sharding rule that covers parameters, optimiser state and averages."""

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hashvision.errors import UserError
from hashvision.models.layers import BATCH_AXES

# Arrays below this many elements are replicated: gathering them costs more than they take.
SMALLEST_SHARDED = 2**14


def find_devices() -> list[Any]:
    """All devices of all hosts; called before anything else asks JAX for them.

    Raises:
      UserError: JAX_PLATFORMS names what JAX cannot use here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where CUDA's part is missing
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error).partition("\n")[0] or "it is not installed, or there is no such device"
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={asked} ({why}); unset it, or install what it"
            " names."
        ) from error


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A mesh ('data', 'fsdp') over all devices, or those given, placed as `placed` says.

    So the devices of a host need not be neighbours in it, and the batch's photos may stand in
    another order than the hosts: each device still has photos of its own host, a step shows the
    same photos, and all that is drawn for one goes by its key. BatchNorm's groups (models.Groups)
    stay the same photos too, where their number divides the photos of a device.

    Args:
      fsdp: over how many devices the state is sharded; the batch is sharded over all.
      devices: a sequence of devices; all of `jax.devices()` if absent.

    Raises:
      UserError: the number of devices is no multiple of fsdp.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices of this run;"
            " set --config.mesh.fsdp to a divisor."
        )
    # Auto: under the Explicit axes that jax.make_mesh defaults to, grouped convolutions fail.
    return Mesh(placed(devices, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def placed(devices: Sequence[Any], fsdp: int) -> np.ndarray:
    """The devices as (data, fsdp), by the torus that links them: fsdp over neighbours.

    jax.make_mesh does the same for fewer shapes: it cuts no side of a torus but v5e's (8 of 4x4x4),
    and takes one slice of a pod only. Of several slices each is placed by itself, and data goes
    over all. Devices in no torus that JAX knows stay in their order: CPUs and GPUs, and the cores
    that the compiler counts of a v4 chip.
    """
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    try:
        parts = [
            mesh_utils.create_device_mesh(
                (len(each) // fsdp, fsdp), each, allow_split_physical_axes=True
            )
            for each in slices.values()
        ]
    except (AssertionError, ValueError):
        return np.array(devices).reshape(-1, fsdp)
    return np.concatenate(parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Photos over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Shards the last dimension that `fsdp` divides, if the array is large; replicates otherwise.

    The last dimension is that of a kernel's outputs, and the classes of a head: the largest in most
    layers, and never the layer axis that a scan runs over unless nothing else divides.
    """
    if fsdp > 1 and np.prod(shape, dtype=np.int64) >= SMALLEST_SHARDED:
        for axis in reversed(range(len(shape))):
            if shape[axis] % fsdp == 0:
                return PartitionSpec(*(None,) * axis, "fsdp")
    return PartitionSpec()


def state_shardings(shapes: Any, mesh: Mesh) -> Any:
    """The tree of shardings for a tree of arrays or shapes: a queue's as the batch's."""
    fsdp = mesh.shape["fsdp"]

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        if getattr(path[-1], "key", None) == "queue":  # photos along its first axis
            return batch_sharding(mesh)
        return NamedSharding(mesh, state_spec(x.shape, fsdp))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def on_devices(
    batches: Iterator[Mapping[str, np.ndarray]], abstract: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[dict[str, jax.Array]]:
    """Turns host batches into global arrays, one batch ahead of the step that takes them."""

    def put(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(
                abstract[name].sharding, value, abstract[name].shape
            )
            for name, value in batch.items()
        }

    ahead = put(next(batches))
    for batch in batches:
        ready, ahead = ahead, put(batch)
        yield ready
