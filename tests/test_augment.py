import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hashvision import augment


def test_normalize_equals_the_plain_form():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    wanted = (images / 255 - np.array(augment.MEAN)) / np.array(augment.STD)
    np.testing.assert_allclose(augment.normalize(jnp.array(images)), wanted, atol=1e-5)


def test_flip_mirrors_half_and_only_left_to_right():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 2, 5, 3), np.uint8)
    keys = rng.integers(0, 2**32, (400, 2), np.uint32)
    flipped = np.asarray(augment.flip(jnp.array(images), jnp.array(keys)))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 0.4 < mirrored.mean() < 0.6


def test_flip_depends_on_the_key_alone_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 4, 4, 3), np.uint8)
    keys = rng.integers(0, 2**32, (16, 2), np.uint32)
    whole = augment.flip(jnp.array(images), jnp.array(keys))
    alone = [augment.flip(images[i : i + 1], keys[i : i + 1])[0] for i in range(16)]
    np.testing.assert_array_equal(whole, np.stack(alone))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(augment.flip)(
        jax.device_put(images, sharding), jax.device_put(keys, sharding)
    )
    np.testing.assert_array_equal(whole, sharded)
