"""Random arrays, and their placement on the 8 simulated devices, for tests of the layers."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import weights_rule
from hashvision.models import layers


def drawn(name: str, *shape: int) -> np.ndarray:
    """Random numbers in [-1, 1), float32, keyed by `name`."""
    return weights_rule.uniform(name, int(np.prod(shape))).reshape(shape).astype(np.float32)


def mesh_of_8(shape: tuple[int, int] = (8, 1)) -> jax.sharding.Mesh:
    assert len(jax.devices()) == 8  # simulated: conftest.py
    return jax.make_mesh(shape, layers.BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def sharded(mesh: jax.sharding.Mesh, x: np.ndarray) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(layers.BATCH_AXES)))


def replicated(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def flops(compiled: Any) -> float:
    """FLOPs of a compiled program on one device."""
    return compiled.cost_analysis()["flops"]


def collectives(compiled: Any, kind: str) -> list[str]:
    """The instructions of that kind in the compiled program, as text."""
    return re.findall(rf".* {kind}(?:-start)?\(.*", compiled.as_text())
