"""JPEG bytes to uint8 crops, in tf.data: a photo is decoded once, and only where it is cropped."""

import typing

if typing.TYPE_CHECKING:
    import tensorflow as tf


class Crop(typing.NamedTuple):
    """The random-resized crop of Szegedy et al. 2015, section 6.

    Attributes:
      size: side of the crop in pixels.
      smallest: share of the photo's area, in (0, 1], that a crop covers at least; at most all.
      ratio: the largest aspect ratio r; drawn between 1/r and r, log-uniformly.
    """

    size: int
    smallest: float = 0.08
    ratio: float = 4 / 3


def crop_box(height: "tf.Tensor", width: "tf.Tensor", crop: Crop, seed: "tf.Tensor") -> "tf.Tensor":
    """Draws a box; the first of ten tries that fits, else the largest central one within the ratio.

    Area and log aspect ratio are uniform, the place too, as torchvision's RandomResizedCrop has it.

    Args:
      height: int32 scalar, of the photo.
      width: int32 scalar.
      crop: the ranges.
      seed: int32 (2,).

    Returns:
      int32 (4,): top, left, height, width.
    """
    import tensorflow as tf

    tries = 10
    draws = tf.random.stateless_uniform([tries, 4], seed)
    full = tf.cast(tf.stack([height, width]), tf.float32)
    area = (crop.smallest + (1 - crop.smallest) * draws[:, 0]) * full[0] * full[1]
    log_ratio = (2 * draws[:, 1] - 1) * tf.math.log(tf.constant(crop.ratio))
    sides = tf.sqrt(area)[:, None] * tf.exp(tf.stack([-log_ratio, log_ratio], 1) / 2)
    sides = tf.round(sides)
    fits = tf.reduce_all((sides <= full) & (sides >= 1), axis=1)
    first = tf.argmax(tf.cast(fits, tf.int32))
    place = draws[first, 2:] * (full - sides[first] + 1)
    # Nothing fitted: as large as the photo and the ratio allow, in the middle.
    central = tf.maximum(tf.round(tf.minimum(full, full[::-1] * crop.ratio)), 1)
    fitted = tf.concat([tf.floor(place), sides[first]], 0)
    middle = tf.concat([tf.floor((full - central) / 2), central], 0)
    return tf.cast(tf.where(fits[first], fitted, middle), tf.int32)


def random_resized_crop(image: "tf.Tensor", crop: Crop, seed: "tf.Tensor") -> "tf.Tensor":
    """Decodes the drawn box of a JPEG and resizes it (bilinear, antialiased).

    Args:
      image: string scalar, JPEG bytes.
      crop: size and ranges.
      seed: int32 (2,), keyed by (seed, epoch, record).

    Returns:
      uint8 (size, size, 3).
    """
    import tensorflow as tf

    shape = tf.image.extract_jpeg_shape(image)
    box = crop_box(shape[0], shape[1], crop, seed)
    pixels = tf.io.decode_and_crop_jpeg(image, box, channels=3)
    resized = tf.image.resize(pixels, [crop.size, crop.size], "bilinear", antialias=True)
    return tf.saturate_cast(tf.round(resized), tf.uint8)
