"""Tests of the mesh and of the sharding of states and batches."""

import dataclasses
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hashvision import models
from hashvision.errors import UserError
from hashvision.planning import plan
from hashvision.training import sharding
from places import REPO


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 8, 512), P(None, None, None, "fsdp")),
        ((17, 1, 1, 2904, 1002), P(None, None, None, "fsdp")),  # 8 does not divide 1002
        ((2048, 27_000), P(None, "fsdp")),
        ((8, 5), P()),  # small
        ((1001, 1003), P()),  # nothing divides
        ((), P()),
    ],
)
def test_the_last_divisible_dimension_of_a_large_array_is_sharded(shape, spec):
    assert sharding.state_spec(shape, 8) == spec
    assert sharding.state_spec(shape, 1) == P()


@pytest.mark.parametrize("name", ["regnety_32gf", "regnety_128gf", "regnety_256gf", "regnety_10b"])
def test_nearly_all_parameters_of_the_widest_networks_are_sharded(name):
    """Even with widths such as 4,103 and 11,110, which few powers of two divide."""
    model = models.build(name, group_conv="native")  # fastest to trace
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(lambda key: model.init(key, images, False), jax.random.key(0))["params"]
    leaves = jax.tree.leaves(params)
    for fsdp in (8, 128):
        whole = sum(x.size for x in leaves if "fsdp" not in sharding.state_spec(x.shape, fsdp))
        assert 4 * whole < 100e6  # bytes


def test_mesh_axes_and_order():
    devices = jax.devices()
    made = sharding.make_mesh(2)
    assert made.axis_names == ("data", "fsdp") and made.devices.shape == (4, 2)
    assert made.devices.ravel().tolist() == devices
    assert sharding.make_mesh(1, devices[::-1]).devices.ravel().tolist() == devices[::-1]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip as JAX describes it; the 2 x 2 chips of a host have consecutive ids."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"


def torus(kind, x, y, z=1, piece=0):
    places = [(a, b, c) for c in range(z) for b in range(y) for a in range(x)]
    places.sort(key=lambda at: (at[2], at[1] // 2, at[0] // 2, at[1], at[0]))
    return [Chip(i, at, i // 4, piece, kind) for i, at in enumerate(places)]


def sides(chips):
    at = np.array([chip.coords for chip in chips])
    return sorted((at.max(0) - at.min(0) + 1).tolist())


def hops(chips):
    return [sum(np.abs(np.subtract(a.coords, b.coords))) for a, b in itertools.pairwise(chips)]


@pytest.mark.parametrize(
    ("kind", "shape", "fsdp", "box"),
    [
        ("TPU v5 lite", (16, 16), 4, [1, 1, 4]),  # rather than the 2 x 2 of a host
        ("TPU v5 lite", (8, 8), 8, [1, 1, 8]),
        ("TPU v5", (4, 4, 4), 8, [1, 2, 4]),  # jax.make_mesh cannot do this
        ("TPU v5", (8, 8, 16), 8, [1, 1, 8]),  # a ring
    ],
)
def test_fsdp_groups_are_neighbours_in_a_torus(kind, shape, fsdp, box):
    chips = torus(kind, *shape)
    found = sharding.arrange(chips, fsdp)
    assert found.shape == (len(chips) // fsdp, fsdp)
    assert {*found.flat} == {*chips} and found.size == len(chips)
    assert all(sides(group) == box for group in found)
    if box[:2] == [1, 1]:
        assert all(set(hops(group)) == {1} for group in found)


def test_fsdp_groups_stay_within_a_slice():
    chips = [*torus("TPU v5 lite", 4, 4, piece=0), *torus("TPU v5 lite", 4, 4, piece=1)]
    found = sharding.arrange(chips, 4)
    assert found.shape == (8, 4)
    assert [{chip.slice_index for chip in group} for group in found] == [{0}] * 4 + [{1}] * 4


def test_cores_of_a_chip_keep_their_order():
    chips = torus("TPU v4", 2, 2, 2)
    cores = [dataclasses.replace(chip, core_on_chip=core) for chip in chips for core in (0, 1)]
    assert sharding.arrange(cores, 4).ravel().tolist() == cores


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no TPU compiler: pip install libtpu"
)
@pytest.mark.parametrize(("topology", "fsdp"), [("v5e:16x16", 4), ("v5p:4x4x4", 8)])
def test_fsdp_groups_are_neighbours_in_real_topologies(topology, fsdp):
    devices = plan.devices_of(topology)
    assert all(np.prod(sides(group)) == fsdp for group in sharding.arrange(devices, fsdp))


@pytest.mark.slow
def test_each_host_keeps_its_photos_in_a_mesh_that_interleaves_hosts():
    """The photos also stay in the same BatchNorm groups and parts of a batch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for host in range(2):
        environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
        environment |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(host)}
        environment |= {"PYTHONPATH": str(REPO), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, REPO / "tests" / "support" / "interleaved_host.py"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
    answers = [each.communicate()[0] for each in processes]
    assert [each.returncode for each in processes] == [0, 0]
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]  # after Gloo's lines
    for host in found:
        assert sorted(host["here"]) == host["own"]
    whole = np.array(found[0]["whole"])
    np.testing.assert_array_equal(np.sort(whole), np.arange(32))
    assert (whole != np.arange(32)).any()
    for number in (2, 4):  # divisors of the four photos per device
        np.testing.assert_array_equal(whole % number, np.arange(32) % number)


def test_fsdp_must_divide_the_devices():
    with pytest.raises(UserError, match="mesh.fsdp=3"):
        sharding.make_mesh(3)
