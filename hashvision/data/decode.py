"""Decodes JPEG photos in tf.data, once and no larger than needed, for the reader."""

import typing

if typing.TYPE_CHECKING:
    import tensorflow as tf


def decode_photo(image: "tf.Tensor", side: int) -> "tf.Tensor":
    """Decodes a photo and shrinks it until its longer side is at most `side`.

    The decoder first shrinks a larger photo to a half, a quarter or an eighth (JPEG's scaled
    inverse transform), as long as its longer side stays at least `side`. Then the photo is resized
    (bilinear, antialiased). A smaller photo keeps its size.

    Args:
      image: string scalar, JPEG bytes.
      side: largest longer side of the result, in pixels.

    Returns:
      uint8 (height, width, 3).
    """
    import tensorflow as tf

    shape = tf.image.extract_jpeg_shape(image)[:2]
    longer = tf.reduce_max(shape)

    def shrunk(ratio: int) -> "tf.Tensor":
        pixels = tf.io.decode_jpeg(image, channels=3, ratio=ratio)
        target = tf.maximum(1, (2 * shape * side + longer) // (2 * longer))  # rounded
        resized = tf.image.resize(pixels, target, "bilinear", antialias=True)
        return tf.saturate_cast(tf.round(resized), tf.uint8)

    # The first branch is for photos that are small enough.
    limits = tf.constant([side + 1, 2 * side, 4 * side, 8 * side])
    index = tf.searchsorted(limits, longer[None], side="right")[0]
    whole = lambda: tf.io.decode_jpeg(image, channels=3)  # noqa: E731
    ways = [whole, *(lambda ratio=ratio: shrunk(ratio) for ratio in (1, 2, 4, 8))]
    return tf.switch_case(index, ways)
