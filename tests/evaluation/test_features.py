"""Tests of decoding for evaluation and of running an encoder over photos."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from hashvision.errors import UserError
from hashvision.evaluation import features, labelled


def encoded(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def photos_of(images):
    names = tuple(f"{number}.png" for number in range(len(images)))

    def read(places):
        return (images[place] for place in places)

    return labelled.Photos(names, ((),) * len(images), np.arange(len(images)), read)


def encoder(calls=None, **options):
    """An encoder whose features are the mean colour, and whose scores are twice that."""

    def encode(batch):
        if calls is not None:
            calls.append((batch.shape, batch.dtype))
        mean = batch.mean(axis=(1, 2))
        return mean, 2 * mean

    fields = {"encode": encode, "resolution": 8, "step": 3, "vocabulary": {}, "batch_size": 4}
    return features.Encoder(**(fields | options))


def test_decode_resizes_the_short_side_and_crops_the_centre():
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize(
            (384, 256), Image.Resampling.BICUBIC
        )
    )
    crop = features.decode(encoded(smooth), 56)
    assert crop.shape == (56, 56, 3) and crop.dtype == np.uint8
    # The same in two steps: resize the short side to 64 = 56 * 8/7, then crop the centre.
    resized = Image.fromarray(smooth).resize((96, 64), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[4:60, 20:76]
    assert np.abs(crop.astype(int) - expected).max() <= 2


def test_decode_antialiases():
    checks = np.indices((512, 512)).sum(axis=0) % 2 * np.uint8(255)
    crop = features.decode(encoded(checks.astype(np.uint8)), 32)
    assert crop.min() > 115 and crop.max() < 140


def test_decode_handles_extreme_shapes():
    assert features.decode(encoded(np.zeros((1, 3000), np.uint8)), 16).shape == (16, 16, 3)
    assert features.decode(encoded(np.zeros((1, 1), np.uint8)), 16).shape == (16, 16, 3)


def test_decode_of_modes():
    grey16 = np.full((9, 9), 128 << 8, np.uint16)
    assert features.decode(encoded(grey16), 4).max() == 128
    palette = Image.fromarray(np.full((9, 9), 200, np.uint8)).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop = features.decode(buffer.getvalue(), 4)
    np.testing.assert_array_equal(crop, 200)
    translucent = np.full((9, 9, 4), 77, np.uint8)  # over white, as `prepare` does
    crop = features.decode(encoded(translucent), 4)
    np.testing.assert_allclose(crop, 255 - 77 / 255 * (255 - 77), atol=1)


def test_postscript_is_refused_without_running_ghostscript(tmp_path, monkeypatch):
    """Pillow would run Ghostscript to draw it, whatever the file's name."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    (found,) = features.decoded([eps], 4)
    assert found is None and not (tmp_path / "ran").exists()


def test_the_bytes_of_files_that_wait_for_decoding_are_bounded(monkeypatch):
    monkeypatch.setattr(features, "MOST_BYTES_AHEAD", 1000)
    read = []

    def images():
        for number in range(20):
            read.append(number)
            yield bytes(300)

    for number, _ in enumerate(features.decoded(images(), 4)):
        assert len(read) <= number + 4


def test_decode_turns_photos_upright():
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    crop = features.decode(encoded(half, exif=exif), 8)
    assert crop[0].max() == 0 and crop[-1].min() == 255


def test_decoded_keeps_order_and_marks_the_unreadable():
    images = [encoded(np.full((9, 9, 3), value, np.uint8)) for value in range(40)]
    images[7], images[20], images[31] = b"", b"no image", images[31][:50]
    crops = list(features.decoded(images, 4, ahead=6))
    assert [index for index, crop in enumerate(crops) if crop is None] == [7, 20, 31]
    assert all(crop[0, 0, 0] == index for index, crop in enumerate(crops) if crop is not None)


def test_encode_pads_the_last_batch_and_skips_unreadable_photos():
    images = [encoded(np.full((9, 9, 3), value, np.uint8)) for value in range(11)]
    images[2] = b"broken"
    calls = []
    found = features.encode(encoder(calls), photos_of(images))
    assert calls == [((4, 8, 8, 3), np.uint8)] * 3
    np.testing.assert_array_equal(found.readable, np.arange(11) != 2)
    kept = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(found.features, np.repeat(kept, 3).reshape(-1, 3))
    assert found.features.dtype == np.float32 and found.scores is None


def test_scores_are_those_of_the_requested_classes():
    images = [encoded(np.full((9, 9, 3), [value, 50, 90], np.uint8)) for value in range(5)]
    found = features.encode(encoder(), photos_of(images), np.array([2, 0]))
    np.testing.assert_allclose(found.scores, [[180, 2 * value] for value in range(5)])


def test_the_outputs_of_a_part_equal_encoding_that_part():
    images = [encoded(np.full((9, 9, 3), value, np.uint8)) for value in range(9)]
    images[2] = images[8] = b"broken"
    photos = photos_of(images)
    whole = features.encode(encoder(), photos, np.array([0]))
    for places in ([0, 2, 3], [4, 8], range(9)):
        part = labelled.take(photos, np.array(places))
        wanted = features.encode(encoder(), part, np.array([0]))
        for one, other in zip(whole.of(photos, part), wanted, strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError, match=r"None of the 2 images \(2\.png"):
        whole.of(photos, labelled.take(photos, np.array([2, 8])))


def test_errors():
    image = encoded(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UserError, match="None of the 2 images"):
        features.encode(encoder(), photos_of([b"", b"x"]))
    headless = encoder(encode=lambda batch: (batch.mean(axis=(1, 2)), None))
    with pytest.raises(UserError, match="no tag head"):
        features.encode(headless, photos_of([image]), np.array([0]))
    diverged = encoder(encode=lambda batch: (np.full((4, 3), np.nan), None))
    with pytest.raises(UserError, match="step 3 .* not finite"):
        features.encode(diverged, photos_of([image]))
