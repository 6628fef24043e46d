"""JPEG bytes to uint8 crops, in tf.data: a photo is decoded once for all crops of it."""

import typing
from collections.abc import Sequence

if typing.TYPE_CHECKING:
    import tensorflow as tf


class Crops(typing.NamedTuple):
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


def crop_box(
    height: "tf.Tensor", width: "tf.Tensor", crops: Crops, seed: "tf.Tensor"
) -> "tf.Tensor":
    """Draws a box; the first of ten tries that fits, else the largest central one within the ratio.

    Area and log aspect ratio are uniform, the place too, as torchvision's RandomResizedCrop has it.

    Args:
      height: int32 scalar, of the photo.
      width: int32 scalar.
      crops: the ranges.
      seed: int32 (2,).

    Returns:
      int32 (4,): top, left, height, width.
    """
    import tensorflow as tf

    tries = 10
    draws = tf.random.stateless_uniform([tries, 4], seed)
    full = tf.cast(tf.stack([height, width]), tf.float32)
    share = crops.smallest + (crops.largest - crops.smallest) * draws[:, 0]
    area = share * full[0] * full[1]
    log_ratio = (2 * draws[:, 1] - 1) * tf.math.log(tf.constant(crops.ratio))
    sides = tf.sqrt(area)[:, None] * tf.exp(tf.stack([-log_ratio, log_ratio], 1) / 2)
    sides = tf.round(sides)
    fits = tf.reduce_all((sides <= full) & (sides >= 1), axis=1)
    first = tf.argmax(tf.cast(fits, tf.int32))
    place = draws[first, 2:] * (full - sides[first] + 1)
    # Nothing fitted: as large as the photo and the ratio allow, in the middle.
    central = tf.maximum(tf.round(tf.minimum(full, full[::-1] * crops.ratio)), 1)
    fitted = tf.concat([tf.floor(place), sides[first]], 0)
    middle = tf.concat([tf.floor((full - central) / 2), central], 0)
    return tf.cast(tf.where(fits[first], fitted, middle), tf.int32)


def random_resized_crops(
    image: "tf.Tensor", sizes: Sequence[Crops], seed: "tf.Tensor"
) -> "list[tf.Tensor]":
    """Crops of a JPEG, resized (bilinear, antialiased).

    The photo is decoded once for all of them; for a single crop, only where that lies. Where every
    crop is shrunk to a half or less, the decoder itself leaves out the detail that would be lost
    (JPEG's scaled inverse transform: a half, a quarter or an eighth of the side).

    Args:
      image: string scalar, JPEG bytes.
      sizes: the crops of each size.
      seed: int32 (2,), keyed by (seed, epoch, record).

    Returns:
      For each size uint8 (per_photo, size, size, 3).
    """
    import tensorflow as tf

    sides = [crops.size for crops in sizes for _ in range(crops.per_photo)]
    shape = tf.image.extract_jpeg_shape(image)
    boxes: list[tf.Tensor] = []
    for crops in sizes:
        for _ in range(crops.per_photo):
            # The first crop takes the seed itself: more crops of a photo leave it where it was.
            own = typing.cast("tf.Tensor", tf.random.fold_in(seed, len(boxes))) if boxes else seed
            boxes.append(crop_box(shape[0], shape[1], crops, own))

    def cut(pixels: "tf.Tensor", boxes: "Sequence[tf.Tensor]") -> "list[tf.Tensor]":
        parts = [tf.image.crop_to_bounding_box(pixels, *tf.unstack(box)) for box in boxes]
        return [_resize(part, side) for part, side in zip(parts, sides, strict=True)]

    def whole(ratio: int) -> "list[tf.Tensor]":
        pixels = tf.io.decode_jpeg(image, channels=3, ratio=ratio)
        limit = tf.shape(pixels)[:2]
        scaled = []
        for box in boxes:
            place = tf.minimum(box[:2] // ratio, limit - 1)
            scaled.append(
                tf.concat([place, tf.clip_by_value(box[2:] // ratio, 1, limit - place)], 0)
            )
        return cut(pixels, scaled)

    def full_size() -> "list[tf.Tensor]":
        if len(boxes) > 1:
            return whole(1)
        return [_resize(tf.io.decode_and_crop_jpeg(image, boxes[0], channels=3), sides[0])]

    # How far each crop will be shrunk along its shorter side; the least of all decides.
    shrunk = tf.reduce_min(
        tf.stack([tf.reduce_min(box[2:]) // side for box, side in zip(boxes, sides, strict=True)])
    )
    index = tf.searchsorted(tf.constant([2, 4, 8]), shrunk[None], side="right")[0]
    found = tf.switch_case(index, [full_size, lambda: whole(2), lambda: whole(4), lambda: whole(8)])
    rest = iter(found)
    return [tf.stack([next(rest) for _ in range(crops.per_photo)]) for crops in sizes]


def _resize(pixels: "tf.Tensor", side: int) -> "tf.Tensor":
    """Bilinear, antialiased; where neither side shrinks the same without that, in half the time."""
    import tensorflow as tf

    def resize(antialias: bool) -> "tf.Tensor":
        return tf.image.resize(pixels, [side, side], "bilinear", antialias=antialias)

    grows = tf.reduce_all(tf.shape(pixels)[:2] <= side)
    resized = tf.cond(grows, lambda: resize(False), lambda: resize(True))
    return tf.saturate_cast(tf.round(resized), tf.uint8)
