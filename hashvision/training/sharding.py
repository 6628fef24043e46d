"""The mesh of devices, and the rules that shard the state and the batches over it."""

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

# Smaller arrays, in elements, are replicated: gathering them would cost more than it saves.
SMALLEST_SHARDED = 2**14


def find_devices() -> list[Any]:
    """Returns all devices of all hosts; must be called before any other use of JAX's devices.

    Raises:
      UserError: JAX_PLATFORMS names a platform that JAX cannot use on this machine.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError without JAX's CUDA plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error).partition("\n")[0] or "it is not installed, or there is no such device"
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={asked} ({why}); unset it, or install what it"
            " names."
        ) from error


def make_mesh(fsdp: int = 1, devices: Any = None) -> Mesh:
    """A mesh ('data', 'fsdp') over the devices, in the order that `arrange` gives.

    The devices of a host need not be neighbours in the mesh, so the photos of the global batch may
    be in another order than the hosts. Nothing else changes: each device gets photos of its own
    host, a step sees the same photos, and every draw for a photo is keyed by its record.
    BatchNorm's groups (models.Groups) also contain the same photos, if their number divides the
    number of photos per device.

    Args:
      fsdp: number of devices that the state is sharded over; the batch is sharded over all.
      devices: a sequence of devices; if None, all of `jax.devices()`.

    Raises:
      UserError: the number of devices is not a multiple of fsdp.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices of this run;"
            " set --config.mesh.fsdp to a divisor."
        )
    # Grouped convolutions fail under Explicit axes, the default of jax.make_mesh.
    return Mesh(arrange(devices, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def arrange(devices: Sequence[Any], fsdp: int) -> np.ndarray:
    """Arranges devices as an array (data, fsdp) whose rows are neighbours in the torus.

    jax.make_mesh does the same for fewer shapes: it splits a side of a torus only on v5e (it cannot
    place fsdp=8 on 4x4x4), and takes only one slice of a pod. Here each slice is placed separately,
    and the data axis spans all of them. Devices without a torus that JAX knows keep their order:
    CPUs, GPUs, and the two cores per v4 chip that the compiler describes.
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
    """Shards the first axis, the photos, over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Shards the last dimension that `fsdp` divides if the array is large, and replicates others.

    The last dimension of a kernel is its outputs, and that of a head its classes. It is the largest
    in most layers. The layer axis of a scanned stage is sharded only if `fsdp` divides no other.
    """
    if fsdp > 1 and np.prod(shape, dtype=np.int64) >= SMALLEST_SHARDED:
        for axis in reversed(range(len(shape))):
            if shape[axis] % fsdp == 0:
                return PartitionSpec(*(None,) * axis, "fsdp")
    return PartitionSpec()


def state_shardings(shapes: Any, mesh: Mesh) -> Any:
    """The tree of shardings for a tree of arrays or shapes; a queue is sharded like the batch."""
    fsdp = mesh.shape["fsdp"]

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        if getattr(path[-1], "key", None) == "queue":  # its first axis is the photos
            return batch_sharding(mesh)
        return NamedSharding(mesh, state_spec(x.shape, fsdp))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def on_devices(
    batches: Iterator[Mapping[str, np.ndarray]], abstract: dict[str, jax.ShapeDtypeStruct]
) -> Iterator[dict[str, jax.Array]]:
    """Turns host batches into global arrays, one batch ahead of the training step."""

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
