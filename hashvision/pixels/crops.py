"""Random-resized crops of decoded photos, cut on the device: two products with matrices of weights.

A host that cuts and resizes spends three times what it takes to decode; matrix units do it in half
a percent of a step.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hashvision.pixels import augment


class Crops(NamedTuple):
    """Random-resized crops of one size (Szegedy et al. 2015, section 6).

    Attributes:
      per_photo: how many of a photo.
      size: side in pixels.
      smallest: share of the photo's area, in (0, 1], that a crop covers at least.
      largest: and at most.
      ratio: the largest aspect ratio r; drawn between 1/r and r, log-uniformly.
    """

    per_photo: int
    size: int
    smallest: float = 0.08
    largest: float = 1.0
    ratio: float = 4 / 3


def box(shape: jax.Array, key: jax.Array, crops: Crops) -> jax.Array:
    """Draws a box; the first of ten tries that fits, else the largest central one within the ratio.

    Area and log aspect ratio are uniform, the place too, as torchvision's RandomResizedCrop has it.

    Args:
      shape: int32 (2,), height and width of the photo.
      key: of JAX.
      crops: the ranges.

    Returns:
      float32 (4,), whole numbers: top, left, height, width.
    """
    draws = jax.random.uniform(key, (10, 4))
    full = shape.astype(jnp.float32)
    share = crops.smallest + (crops.largest - crops.smallest) * draws[:, 0]
    log_ratio = (2 * draws[:, 1] - 1) * jnp.log(crops.ratio)
    half = jnp.stack([-log_ratio, log_ratio], 1) / 2
    sides = jnp.round(jnp.sqrt(share * full[0] * full[1])[:, None] * jnp.exp(half))
    fits = jnp.all((sides <= full) & (sides >= 1), axis=1)
    first = jnp.argmax(fits)
    place = jnp.floor(draws[first, 2:] * (full - sides[first] + 1))
    # Nothing fitted: as large as the photo and the ratio allow, in the middle.
    central = jnp.maximum(jnp.round(jnp.minimum(full, full[::-1] * crops.ratio)), 1)
    drawn = jnp.concatenate([place, sides[first]])
    middle = jnp.concatenate([jnp.floor((full - central) / 2), central])
    return jnp.where(fits[first], drawn, middle)


def weights(start: jax.Array, length: jax.Array, size: int, side: int) -> jax.Array:
    """How much each pixel of a line counts for each pixel of a part of it, resized.

    Bilinear; where the part shrinks, antialiased: the triangle is as much wider (the triangle
    filter of Pillow and of tf.image.resize). Pixels outside the part count nothing.

    Args:
      start: float32 scalar, first pixel of the part.
      length: float32 scalar, pixels of the part.
      size: pixels that it is resized to.
      side: pixels of the line.

    Returns:
      float32 (size, side); rows sum to 1.
    """
    place = jnp.arange(side, dtype=jnp.float32)
    centre = start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * length / size - 0.5
    width = jnp.maximum(length / size, 1.0)
    triangle = jnp.maximum(1 - jnp.abs(place - centre[:, None]) / width, 0.0)
    inside = jnp.where((place >= start) & (place < start + length), triangle, 0.0)
    return inside / jnp.sum(inside, axis=1, keepdims=True)


def resized(photos: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Parts of photos, resized (bilinear, antialiased).

    Args:
      photos: uint8 (B, S, S, 3).
      boxes: float32 (B, n, 4), of `box`.
      size: side of the result.

    Returns:
      uint8 (B, n, size, size, 3).
    """
    side = photos.shape[1]

    def of_photo(photo: jax.Array, boxes: jax.Array) -> jax.Array:
        along = jax.vmap(lambda start, length: weights(start, length, size, side))
        rows, columns = along(boxes[:, 0], boxes[:, 2]), along(boxes[:, 1], boxes[:, 3])
        multiply = functools.partial(jnp.einsum, precision=augment.PRECISION)
        lines = multiply("niy,yxc->nixc", rows, photo.astype(jnp.float32))
        return multiply("nixc,njx->nijc", lines, columns)

    # Weights are positive and sum to 1, but for rounding.
    return jnp.clip(jnp.round(jax.vmap(of_photo)(photos, boxes)), 0, 255).astype(jnp.uint8)


def cut(batch: dict[str, jax.Array], sizes: Sequence[Crops]) -> dict[str, jax.Array]:
    """A batch of photos made into one of crops, which objectives take.

    Args:
      batch: photos uint8 (B, S, S, 3), each in the upper left corner; shape int32 (B, 2), its
        height and width; key uint32 (B, 2), keyed by (seed, epoch, record); others are kept.
      sizes: the crops of each size.

    Returns:
      crops0, crops1, ... uint8 (B, per_photo, size, size, 3), a member for each size; no photos and
      no shapes; the others as they came.
    """
    found = {name: x for name, x in batch.items() if name not in ("photos", "shape")}
    first = 0
    for number, crops in enumerate(sizes):
        keys = augment.crop_keys(batch["key"], first, crops.per_photo)

        def draw(shape: jax.Array, key: jax.Array, crops: Crops = crops) -> jax.Array:
            return box(shape, augment.draw_key(key, augment.CROP), crops)

        boxes = jax.vmap(jax.vmap(draw, (None, 0)))(batch["shape"], keys)
        found[f"crops{number}"] = resized(batch["photos"], boxes, crops.size)
        first += crops.per_photo
    return found
