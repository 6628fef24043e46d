"""The mesh and the one sharding rule that covers parameters, optimiser state and averages."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hashvision.errors import UserError
from hashvision.models.layers import BATCH_AXES

# Arrays below this many elements are replicated: gathering them costs more than they take.
SMALLEST_SHARDED = 2**14


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A mesh ('data', 'fsdp') over all devices, or those given, in their order.

    Args:
      fsdp: over how many devices the state is sharded; the batch is sharded over all.
      devices: a sequence of devices; all of `jax.devices()` if absent.

    Raises:
      UserError: the number of devices is no multiple of fsdp.
    """
    devices = np.array(jax.devices() if devices is None else devices)
    if devices.size % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {devices.size} devices of this run;"
            " set --config.mesh.fsdp to a divisor."
        )
    # Auto: under the Explicit axes that jax.make_mesh defaults to, grouped convolutions fail.
    return Mesh(devices.reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


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
