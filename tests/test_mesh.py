import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from hashvision import models
from hashvision.errors import UserError
from hashvision.training import mesh


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 8, 512), P(None, None, None, "fsdp")),
        ((17, 1, 1, 2904, 1002), P(None, None, None, "fsdp")),  # 1002 / 8 leaves a rest
        ((2048, 27_000), P(None, "fsdp")),
        ((8, 5), P()),  # small
        ((1001, 1003), P()),  # nothing divides
        ((), P()),
    ],
)
def test_the_last_divisible_dimension_of_a_large_array_is_sharded(shape, spec):
    assert mesh.state_spec(shape, 8) == spec
    assert mesh.state_spec(shape, 1) == P()


@pytest.mark.parametrize("name", ["regnety_32gf", "regnety_128gf", "regnety_256gf", "regnety_10b"])
def test_the_widest_networks_are_cut_evenly(name):
    """Widths such as 4,103 and 11,110, which hardly a power of two divides, included."""
    model = models.build(name, group_conv="native")  # fastest to trace
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(lambda key: model.init(key, images, False), jax.random.key(0))["params"]
    leaves = jax.tree.leaves(params)
    for fsdp in (8, 128):
        whole = sum(x.size for x in leaves if "fsdp" not in mesh.state_spec(x.shape, fsdp))
        assert 4 * whole < 100e6  # bytes


def test_mesh_axes_and_order():
    devices = jax.devices()
    made = mesh.make_mesh(2)
    assert made.axis_names == ("data", "fsdp") and made.devices.shape == (4, 2)
    assert made.devices.ravel().tolist() == devices


def test_an_fsdp_width_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="mesh.fsdp=3"):
        mesh.make_mesh(3)
