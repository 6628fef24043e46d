import jax
import pytest
from jax.sharding import PartitionSpec as P

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


def test_mesh_axes_and_order():
    devices = jax.devices()
    made = mesh.make_mesh(2)
    assert made.axis_names == ("data", "fsdp") and made.devices.shape == (4, 2)
    assert made.devices.ravel().tolist() == devices


def test_an_fsdp_width_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="mesh.fsdp=3"):
        mesh.make_mesh(3)
