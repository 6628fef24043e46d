"""Tests of decoding photos in tf.data."""

import numpy as np
import pytest
from PIL import Image

import datasets
from hashvision.data import dataset, decode, reader, stream


def resized(pixels, height, width):
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (64, 48), (3, 64)])
def test_small_photos_are_decoded_at_their_size(height, width):
    import tensorflow as tf

    image = tf.constant(datasets.jpeg(0, height, width))
    np.testing.assert_array_equal(decode.decode_photo(image, 64), tf.io.decode_jpeg(image))


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(65, 40, 1), (127, 127, 1), (100, 128, 2), (300, 200, 4), (320, 600, 8)],
)
def test_larger_photos_are_shrunk_and_decoded_no_larger_than_needed(
    height, width, ratio, monkeypatch
):
    import tensorflow as tf

    image, asked = tf.constant(datasets.jpeg(1, height, width)), []
    decode_jpeg = tf.io.decode_jpeg

    def spy(contents, channels, ratio=1):
        asked.append(ratio)
        return decode_jpeg(contents, channels=channels, ratio=ratio)

    monkeypatch.setattr(tf.io, "decode_jpeg", spy)
    found = decode.decode_photo(image, 64).numpy()
    assert asked == [ratio] and found.dtype == np.uint8
    share = 64 / max(height, width)
    wanted = max(1, round(height * share)), max(1, round(width * share))
    assert found.shape == (*wanted, 3)
    expected = resized(decode_jpeg(image, channels=3).numpy(), *wanted)
    # The decoder's own reduction is coarser. An unrelated photo differs by about 70.
    assert np.abs(found.astype(int) - expected).mean() < (1 if ratio == 1 else 5)


def test_photos_are_in_the_corner_with_zeros_around(tmp_path):
    source = dataset.load(str(datasets.write(tmp_path / "set", size=16)))  # 40 by 56
    stream_of = stream.Stream(source, batch_size=8, lanes=4, seed=0, method="natural")
    _, batch = next(reader.BatchReader(stream_of, 64, 2, threads=1).batches())
    np.testing.assert_array_equal(batch["shape"], [[40, 56]] * 8)
    assert batch["photos"].shape == (8, 64, 64, 3) and batch["photos"].dtype == np.uint8
    assert not batch["photos"][:, 40:].any() and not batch["photos"][:, :, 56:].any()
    assert batch["photos"][:, :40, :56].std(axis=(1, 2)).min() > 5
