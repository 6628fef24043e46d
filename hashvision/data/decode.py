"""JPEG bytes to pixels, in tf.data: a photo is decoded once, whole, and no larger than is asked."""

import typing

if typing.TYPE_CHECKING:
    import tensorflow as tf


def decode(image: "tf.Tensor", side: int) -> "tf.Tensor":
    """A photo whose longer side is `side` at most.

    A larger one is shrunk to that (bilinear, antialiased), after the decoder itself has left out
    detail that would be lost (JPEG's scaled inverse transform: a half, a quarter or an eighth of
    each side, which never makes it smaller than is asked).

    Args:
      image: string scalar, JPEG bytes.
      side: in pixels.

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

    # The first is for photos that are small enough.
    limits = tf.constant([side + 1, 2 * side, 4 * side, 8 * side])
    index = tf.searchsorted(limits, longer[None], side="right")[0]
    whole = lambda: tf.io.decode_jpeg(image, channels=3)  # noqa: E731
    ways = [whole, *(lambda ratio=ratio: shrunk(ratio) for ratio in (1, 2, 4, 8))]
    return tf.switch_case(index, ways)
