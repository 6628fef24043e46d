"""Augmentations of crops on the device, inside the jitted step: flip, colour, grey and blur.

Every function takes a batch and a key per image, so a crop gets the same pixels on any number of
devices. Between the functions images are float32 RGB in [0, 1].
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped, UInt8, UInt32

from hashvision.config import Config

# Channel means and standard deviations of ImageNet, for pixels in [0, 1]. The authors of ResNeXt
# and RegNet normalise with them, as do all weights published since.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision

# Precision of products of pixels and weights. A TPU computes a float32 product as products of
# bfloat16. With one product, the default, 15% of a crop's pixels differ, by up to one level of 255.
# With three, as here, the error is below a hundredth of a level. Six (HIGHEST) would gain nothing,
# because crops are rounded to levels.
PRECISION = jax.lax.Precision.HIGH

# Purposes of random draws, which keep the draws from one key independent.
_DISTORT, _GREY, _BLUR, CROP = range(4)


class Augmentation(NamedTuple):
    """The strengths of the augmentations; 0 leaves one out. SwAV has (1, 0.2, 0.5).

    Attributes:
      distortion: strength of the colour distortion.
      grey: probability in [0, 1] that a crop turns grey.
      blur: probability in [0, 1] that a crop is blurred.
    """

    distortion: float = 0.0
    grey: float = 0.0
    blur: float = 0.0


FLIPS = Augmentation()


def from_config(config: Config) -> Augmentation:
    """The augmentation that config.augment asks for."""
    wanted = config.augment
    return Augmentation(distortion=wanted.distortion, grey=wanted.grey, blur=wanted.blur)


def augmented(
    crops: UInt8[Array, "B H W 3"], keys: UInt32[Array, "B 2"], augmentation: Augmentation
) -> Float[Array, "B H W 3"]:
    """Augments and normalises crops, in the order of SwAV's code: flip, colour, grey, blur.

    Args:
      crops: uint8 (B, H, W, 3).
      keys: uint32 (B, 2).
      augmentation: the augmentations besides the flip, which always applies.

    Returns:
      float32 (B, H, W, 3) with about zero mean and unit variance.
    """
    images = flip(crops.astype(jnp.float32) / 255, keys)
    if augmentation.distortion:
        images = distort(images, keys, augmentation.distortion)
    if augmentation.grey:
        images = grey(images, keys, augmentation.grey)
    if augmentation.blur:
        images = blur(images, keys, augmentation.blur)
    return standardize(images)


def normalize(images: UInt8[Array, "*B 3"]) -> Float[Array, "*B 3"]:
    """Maps uint8 (..., 3) to float32 with about zero mean and unit variance per channel."""
    return standardize(images.astype(jnp.float32) / 255)


def standardize(images: Float[Array, "*B 3"]) -> Float[Array, "*B 3"]:
    """Maps float32 (..., 3) in [0, 1] to about zero mean and unit variance per channel."""
    return (images - jnp.array(MEAN, jnp.float32)) / jnp.array(STD, jnp.float32)


def crop_keys(keys: UInt32[Array, "B 2"], first: int, count: int) -> UInt32[Array, "B {count} 2"]:
    """Keys for crops first to first + count - 1 of each photo.

    Args:
      keys: uint32 (B, 2), one key per photo.
      first: number of the first crop.
      count: number of crops.

    Returns:
      uint32 (B, count, 2).
    """
    crops = jnp.arange(first, first + count)

    def of_crop(key: jax.Array, crop: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), crop))

    return jax.vmap(lambda key: jax.vmap(lambda crop: of_crop(key, crop))(crops))(keys)


def draw_key(key: UInt32[Array, "2"], purpose: int) -> PRNGKeyArray:
    """Makes the JAX key for one purpose from the key, uint32 (2,), of a photo or crop."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), purpose)


def _per_image(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    images: jax.Array,
    keys: jax.Array,
    purpose: int,
) -> jax.Array:
    """Applies function(image, key) to each image, with the key for this purpose."""

    def apply(image: jax.Array, key: jax.Array) -> jax.Array:
        return function(image, draw_key(key, purpose))

    return jax.vmap(apply)(images, keys)


def flip(images: Shaped[Array, "B H W 3"], keys: UInt32[Array, "B 2"]) -> Shaped[Array, "B H W 3"]:
    """Mirrors each image left to right with probability 1/2.

    Args:
      images: (B, H, W, 3) of any type.
      keys: uint32 (B, 2), derived from (seed, epoch, record).

    Returns:
      (B, H, W, 3) of the same type.
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key)))(keys)
    return jnp.where(draw[:, None, None, None], images[:, :, ::-1], images)


def brightness(image: Float[Array, "H W 3"], factor: Float[Array, ""]) -> Float[Array, "H W 3"]:
    """Blends an image (H, W, 3) with black; `factor` 0 gives black, 1 the image."""
    return jnp.clip(image * factor, 0, 1)


def contrast(image: Float[Array, "H W 3"], factor: Float[Array, ""]) -> Float[Array, "H W 3"]:
    """Blends an image (H, W, 3) with its mean grey; `factor` 0 gives that grey, 1 the image."""
    mean = jnp.mean(luma(image))
    return jnp.clip(mean + (image - mean) * factor, 0, 1)


def saturation(image: Float[Array, "H W 3"], factor: Float[Array, ""]) -> Float[Array, "H W 3"]:
    """Blends an image (H, W, 3) with its grey version; `factor` 0 gives grey, 1 the image."""
    grey = luma(image)
    return jnp.clip(grey + (image - grey) * factor, 0, 1)


def hue(image: Float[Array, "H W 3"], turn: Float[Array, ""]) -> Float[Array, "H W 3"]:
    """Rotates the hue of an image (H, W, 3) by `turn` turns; HSV saturation and value stay.

    Uses the closed form of HSV to RGB, which has no case distinction: channel c at hue h is
    v - v s max(0, min(k, 4 - k, 1)), with k = (n_c + 6 h) mod 6 and n = (5, 3, 1).
    """
    value = jnp.max(image, -1)
    chroma = value - jnp.min(image, -1)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    sector = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = (jnp.array([5.0, 3.0, 1.0]) + (sector + 6 * turn)[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def luma(image: Float[Array, "*B 3"]) -> Float[Array, "*B 1"]:
    """The grey values (..., 1) of an RGB image (..., 3)."""
    return jnp.sum(image * jnp.array(_LUMA, jnp.float32), -1, keepdims=True)


def distort(
    images: Float[Array, "B H W 3"],
    keys: UInt32[Array, "B 2"],
    strength: float,
    probability: float = 0.8,
) -> Float[Array, "B H W 3"]:
    """Colour distortion of SimCLR and SwAV: brightness, contrast, saturation and hue.

    The three factors are uniform in 1 +- 0.8 strength, but not negative. The turn of the hue is
    uniform in +-0.2 strength. torchvision draws the order of the four per image. Here the order is
    fixed, because a drawn order would compute every order for every image.

    Args:
      images: float32 (B, H, W, 3) in [0, 1].
      keys: uint32 (B, 2).
      strength: 1 in SwAV and SEER.
      probability: probability in [0, 1] that an image is distorted.

    Returns:
      float32 (B, H, W, 3) in [0, 1].
    """

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        draws = jax.random.uniform(key, (5,))
        signed = 2 * draws - 1
        low = max(0.0, 1 - 0.8 * strength)
        factors = low + draws * (1 + 0.8 * strength - low)
        changed = brightness(image, factors[0])
        changed = contrast(changed, factors[1])
        changed = saturation(changed, factors[2])
        changed = hue(changed, 0.2 * strength * signed[3])
        return jnp.where(draws[4] < probability, changed, image)

    return _per_image(one, images, keys, _DISTORT)


def grey(
    images: Float[Array, "B H W 3"], keys: UInt32[Array, "B 2"], probability: float = 0.2
) -> Float[Array, "B H W 3"]:
    """Turns each image grey with the given probability; arguments as in `distort`."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, probability), luma(image), image)

    return _per_image(one, images, keys, _GREY)


def blur(
    images: Float[Array, "B H W 3"],
    keys: UInt32[Array, "B 2"],
    probability: float = 0.5,
    deviations: tuple[float, float] = (0.1, 2.0),
) -> Float[Array, "B H W 3"]:
    """Blurs each image by a Gaussian, with the given probability.

    The blur along an axis is a product with a matrix of weights, which suits matrix units. At the
    border the weights inside the image are scaled to sum to 1.

    Args:
      images: float32 (B, H, W, 3) in [0, 1].
      keys: uint32 (B, 2).
      probability: probability in [0, 1] that an image is blurred.
      deviations: range of the standard deviation in pixels, drawn uniformly.

    Returns:
      float32 (B, H, W, 3) in [0, 1].
    """

    def weights(size: int, deviation: jax.Array) -> jax.Array:
        place = jnp.arange(size, dtype=jnp.float32)
        exponents = -0.5 * jnp.square((place[:, None] - place) / deviation)
        return jax.nn.softmax(exponents, axis=-1)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        chance, draw = jax.random.uniform(key, (2,))
        deviation = deviations[0] + draw * (deviations[1] - deviations[0])
        height, width, _ = image.shape
        # An image that is not blurred takes the unit matrix, which a tiny deviation gives.
        deviation = jnp.where(chance < probability, deviation, 1e-3)
        multiply = functools.partial(jnp.einsum, precision=PRECISION)
        rows = multiply("ij,jwc->iwc", weights(height, deviation), image)
        return multiply("ij,hjc->hic", weights(width, deviation), rows)

    return _per_image(one, images, keys, _BLUR)
