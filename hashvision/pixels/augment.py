"""What happens to uint8 crops on the device, inside the jitted step: colour, grey, blur, flip.

Every function takes a batch and a key per image, so the same photo at the same place of a run gets
the same pixels on any number of devices. Images are float32 RGB in [0, 1] between the functions.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# ImageNet's channel means and deviations, in units of the 0..1 range, as both families' authors
# normalise (and every weight file published since).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision turn RGB to grey

# Of products of pixels and weights. A TPU computes one of float32 as products of bfloat16. One, the
# default, is off by up to a grey level (15% of a crop's pixels came out different); three, as here,
# by less than a hundredth of one. Six (HIGHEST) would add nothing: crops are rounded to levels.
PRECISION = jax.lax.Precision.HIGH

# What a draw is for; keeps the draws of one key independent of each other.
_DISTORT, _GREY, _BLUR, CROP = range(4)


class Augmentation(NamedTuple):
    """What is done to crops besides the flip; 0 leaves a part out. SwAV's is (1, 0.2, 0.5)."""

    distortion: float = 0.0  # strength of the colour distortion
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability


FLIPS = Augmentation()


def augmented(crops: jax.Array, keys: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Crops as the network takes them, in the order of SwAV's code: flip, colour, grey, blur.

    Args:
      crops: uint8 (B, H, W, 3).
      keys: uint32 (B, 2).
      augmentation: what is done besides the flip.

    Returns:
      float32 (B, H, W, 3) of about zero mean and unit variance.
    """
    images = flip(crops.astype(jnp.float32) / 255, keys)
    if augmentation.distortion:
        images = distort(images, keys, augmentation.distortion)
    if augmentation.grey:
        images = grey(images, keys, augmentation.grey)
    if augmentation.blur:
        images = blur(images, keys, augmentation.blur)
    return standardize(images)


def normalize(images: jax.Array) -> jax.Array:
    """Maps uint8 (..., 3) in 0..255 to float32 of about zero mean and unit variance."""
    return standardize(images.astype(jnp.float32) / 255)


def standardize(images: jax.Array) -> jax.Array:
    """Maps float32 (..., 3) in [0, 1] to about zero mean and unit variance."""
    return (images - jnp.array(MEAN, jnp.float32)) / jnp.array(STD, jnp.float32)


def crop_keys(keys: jax.Array, first: int, count: int) -> jax.Array:
    """The keys of crops first to first + count of each photo: uint32 (B, 2) to (B, count, 2)."""
    crops = jnp.arange(first, first + count)

    def of_crop(key: jax.Array, crop: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), crop))

    return jax.vmap(lambda key: jax.vmap(lambda crop: of_crop(key, crop))(crops))(keys)


def draw_key(key: jax.Array, purpose: int) -> jax.Array:
    """The key (uint32 (2,)) of a photo or crop as JAX takes it, for draws of one purpose."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), purpose)


def _per_image(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    images: jax.Array,
    keys: jax.Array,
    purpose: int,
) -> jax.Array:
    def apply(image: jax.Array, key: jax.Array) -> jax.Array:
        return function(image, draw_key(key, purpose))

    return jax.vmap(apply)(images, keys)


def flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each photo left to right with probability one half.

    Args:
      images: (B, H, W, 3).
      keys: uint32 (B, 2), keyed by (seed, epoch, record).

    Returns:
      (B, H, W, 3).
    """
    draw = jax.vmap(lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key)))(keys)
    return jnp.where(draw[:, None, None, None], images[:, :, ::-1], images)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends an image (H, W, 3) with black: `factor` 0 is black, 1 the image."""
    return jnp.clip(image * factor, 0, 1)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends an image with the mean of its grey values: `factor` 0 is flat, 1 the image."""
    mean = jnp.mean(luma(image))
    return jnp.clip(mean + (image - mean) * factor, 0, 1)


def saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends an image with its grey version: `factor` 0 is grey, 1 the image."""
    grey = luma(image)
    return jnp.clip(grey + (image - grey) * factor, 0, 1)


def hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns an image's hue by `turn` of the colour circle, at equal HSV saturation and value.

    The closed form of HSV to RGB (channel c at hue h: v - v s max(0, min(k, 4 - k, 1)) with
    k = (n_c + 6 h) mod 6) spares the six cases.
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


def luma(image: jax.Array) -> jax.Array:
    """The grey values (..., 1) of an RGB image (..., 3)."""
    return jnp.sum(image * jnp.array(_LUMA, jnp.float32), -1, keepdims=True)


def distort(
    images: jax.Array, keys: jax.Array, strength: float, probability: float = 0.8
) -> jax.Array:
    """Colour distortion of SimCLR and SwAV: brightness, contrast, saturation and hue by chance.

    Factors are uniform in 1 +- 0.8 strength, the hue's turn in +-0.2 strength. torchvision draws
    the order of the four for each image; here it is always this one, since a drawn order would cost
    every image all orders.

    Args:
      images: float32 (B, H, W, 3) in [0, 1].
      keys: uint32 (B, 2).
      strength: s; SwAV and SEER take 1.
      probability: that an image is distorted at all.

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


def grey(images: jax.Array, keys: jax.Array, probability: float = 0.2) -> jax.Array:
    """Turns each image grey with the given probability; arguments as in `distort`."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, probability), luma(image), image)

    return _per_image(one, images, keys, _GREY)


def blur(
    images: jax.Array,
    keys: jax.Array,
    probability: float = 0.5,
    deviations: tuple[float, float] = (0.1, 2.0),
) -> jax.Array:
    """Gaussian blur of each image with the given probability; arguments as in `distort`.

    A blur along one axis is a product with a matrix of weights, which suits matrix units. At the
    border the weights inside the image are scaled to sum to one.

    Args:
      images: float32 (B, H, W, 3) in [0, 1].
      keys: uint32 (B, 2).
      probability: that an image is blurred.
      deviations: of the Gaussian in pixels, drawn uniformly between the two.
    """

    def weights(size: int, deviation: jax.Array) -> jax.Array:
        place = jnp.arange(size, dtype=jnp.float32)
        exponents = -0.5 * jnp.square((place[:, None] - place) / deviation)
        return jax.nn.softmax(exponents, axis=-1)

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        chance, draw = jax.random.uniform(key, (2,))
        deviation = deviations[0] + draw * (deviations[1] - deviations[0])
        height, width, _ = image.shape
        # An image left as it is takes the unit matrix, which a vanishing deviation gives.
        deviation = jnp.where(chance < probability, deviation, 1e-3)
        multiply = functools.partial(jnp.einsum, precision=PRECISION)
        rows = multiply("ij,jwc->iwc", weights(height, deviation), image)
        return multiply("ij,hjc->hic", weights(width, deviation), rows)

    return _per_image(one, images, keys, _BLUR)
