"""Augmentations against plain NumPy forms, their probabilities, and their keys."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hashvision.pixels import augment


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


def test_flip_depends_only_on_the_key_on_8_devices():
    rng = np.random.default_rng(0)
    images = jnp.array(rng.integers(0, 256, (16, 4, 4, 3), np.uint8))
    keys = jnp.array(rng.integers(0, 2**32, (16, 2), np.uint32))
    whole = augment.flip(images, keys)
    alone = [augment.flip(images[i : i + 1], keys[i : i + 1])[0] for i in range(16)]
    np.testing.assert_array_equal(whole, np.stack(alone))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(augment.flip)(
        jax.device_put(images, sharding), jax.device_put(keys, sharding)
    )
    np.testing.assert_array_equal(whole, sharded)


def keys_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), np.uint32)


def draws(keys, purpose, shape):
    """The uniform draws of a purpose for each key."""
    fold = lambda key: jax.random.fold_in(jax.random.wrap_key_data(jnp.array(key)), purpose)  # noqa: E731
    return np.stack([np.asarray(jax.random.uniform(fold(key), shape)) for key in keys])


@pytest.fixture
def images():
    """Random colours, including black, white, grey and ties between channels."""
    images = np.random.default_rng(0).random((12, 6, 5, 3)).astype(np.float32)
    images[0, 0] = 0
    images[0, 1] = 1
    images[0, 2] = images[0, 2, :, :1]
    images[0, 3, :, 1] = images[0, 3, :, 0]
    return images


def plain_grey(image):
    return (0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2])[..., None]


def plain_hue(image, turn):
    turned = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[place].astype(float))
        turned[place] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    return turned


def plain_distort(image, draw, strength):
    """Brightness, contrast, saturation and hue as torchvision's ColorJitter defines them."""
    if draw[4] >= 0.8:
        return image
    low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
    brightness, contrast, saturation = low + (high - low) * draw[:3]
    image = np.clip(image * brightness, 0, 1)
    image = np.clip(contrast * image + (1 - contrast) * plain_grey(image).mean(), 0, 1)
    image = np.clip(saturation * image + (1 - saturation) * plain_grey(image), 0, 1)
    return plain_hue(image, 0.2 * strength * (2 * draw[3] - 1))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_distort_equals_the_plain_form(images, strength):
    keys = keys_of(len(images))
    found = augment.distort(jnp.array(images), jnp.array(keys), strength)
    chances = draws(keys, augment._DISTORT, (5,))
    wanted = [plain_distort(*each, strength) for each in zip(images, chances, strict=True)]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)
    changed = np.abs(np.asarray(found) - images).max((1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(changed, chances[:, 4] < 0.8)
    assert 0 < changed.sum() < len(images)


def test_grey_equals_the_plain_form(images):
    keys = keys_of(len(images), 1)
    found = np.asarray(augment.grey(jnp.array(images), jnp.array(keys), 0.5))
    turned = np.abs(found - plain_grey(images)).max((1, 2, 3)) < 1e-6
    kept = (found == images).all((1, 2, 3))
    assert (turned ^ kept).all() and 2 < turned.sum() < 10


def plain_blur(image, deviation):
    """Replaces pixels by Gaussian-weighted means, first along columns, then along rows."""
    for axis in (0, 1):
        place = np.arange(image.shape[axis])
        weights = np.exp(-((place[:, None] - place) ** 2) / (2 * deviation**2))
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


def test_blur_equals_the_plain_form(images):
    keys = keys_of(len(images), 2)
    found = np.asarray(augment.blur(jnp.array(images), jnp.array(keys)))
    chances = draws(keys, augment._BLUR, (2,))
    blurred = chances[:, 0] < 0.5
    for before, after, (chance, draw) in zip(images, found, chances, strict=True):
        wanted = plain_blur(before, 0.1 + 1.9 * draw) if chance < 0.5 else before
        np.testing.assert_allclose(after, wanted, atol=1e-5)
    assert 0 < blurred.sum() < len(images)


@pytest.mark.slow
def test_the_shares_of_changed_images_are_the_probabilities():
    images = np.random.default_rng(0).random((600, 2, 2, 3)).astype(np.float32)
    keys = jnp.array(keys_of(600))
    for function, share in (
        (lambda x, k: augment.distort(x, k, 1.0), 0.8),
        (augment.grey, 0.2),
        (augment.blur, 0.5),
    ):
        changed = np.abs(np.asarray(function(jnp.array(images), keys)) - images).max((1, 2, 3))
        assert abs((changed > 1e-4).mean() - share) < 0.07


def test_each_crop_has_its_own_key():
    keys = jnp.array(keys_of(3))
    all_four = np.asarray(augment.crop_keys(keys, 0, 4))
    assert len({tuple(key) for key in all_four.reshape(-1, 2)}) == 12
    np.testing.assert_array_equal(augment.crop_keys(keys, 2, 2), all_four[:, 2:])


@pytest.mark.slow
def test_augmented_pixels_are_the_same_alone_and_on_8_devices():
    images = jnp.array(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8))
    keys = jnp.array(keys_of(16))

    def augmented(images, keys):
        return augment.augmented(
            images, keys, augment.Augmentation(distortion=1.0, grey=0.2, blur=0.5)
        )

    whole = jax.jit(augmented)(images, keys)
    alone = np.stack([augmented(images[i : i + 1], keys[i : i + 1])[0] for i in range(16)])
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(images, sharding), jax.device_put(keys, sharding)
    np.testing.assert_allclose(whole, jax.jit(augmented)(*placed), atol=1e-5)


def test_an_augmentation_set_to_0_is_left_out():
    crops = jnp.array(np.random.default_rng(0).integers(0, 256, (16, 4, 4, 3), np.uint8))
    keys = jnp.array(keys_of(16))
    flipped = augment.normalize(augment.flip(crops, keys))
    np.testing.assert_array_equal(augment.augmented(crops, keys, augment.FLIPS), flipped)
    grey = np.asarray(augment.augmented(crops, keys, augment.Augmentation(grey=0.5)))
    same = (grey == flipped).all((1, 2, 3))
    colours = grey * np.array(augment.STD) + augment.MEAN
    assert 0 < same.sum() < 16 and np.ptp(colours[~same], axis=-1).max() < 1e-5
