"""Crops against torchvision's boxes and Pillow's and TensorFlow's resizing."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import datasets
from hashvision.pixels import augment, crops
from hashvision.pixels.crops import Crops

SIDE = 140


def plain_box(height, width, draws, wanted):
    """RandomResizedCrop.get_params of torchvision with given draws: top, left, height, width."""
    for area, ratio, top, left in draws.astype(float):
        area = (wanted.smallest + (wanted.largest - wanted.smallest) * area) * height * width
        ratio = math.exp((2 * ratio - 1) * math.log(wanted.ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 1 / wanted.ratio:
        h = round(width * wanted.ratio)
    elif width / height > wanted.ratio:
        w = round(height * wanted.ratio)
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(90, 140), (140, 90), (1, 1), (3, 400), (400, 3)])
@pytest.mark.parametrize("wanted", [Crops(1, 24, 0.3), Crops(1, 24, 0.05, 0.14)])
def test_boxes_equal_torchvisions(shape, wanted):
    keys = jax.random.split(jax.random.key(1), 200)
    draw = jax.jit(jax.vmap(lambda key: crops.box(jnp.array(shape), key, wanted)))
    found = np.asarray(draw(keys))
    draws = np.stack([jax.random.uniform(key, (10, 4)) for key in keys])
    expected = np.array([plain_box(*shape, each, wanted) for each in draws])
    # Values near a half may round either way.
    assert (np.abs(found - expected) <= 1).all() and (found == expected).all(1).mean() > 0.98
    assert (found[:, :2] >= 0).all() and (found[:, 2:] >= 1).all()
    assert (found[:, :2] + found[:, 2:] <= np.array(shape)).all()


@pytest.mark.slow
def test_boxes_cover_the_ranges_of_area_and_ratio():
    keys = jax.random.split(jax.random.key(0), 1000)
    wanted = Crops(1, 24, 0.3)
    boxes = np.asarray(jax.vmap(lambda key: crops.box(jnp.array([90, 140]), key, wanted))(keys))
    shares, ratios = boxes[:, 2] * boxes[:, 3] / (90 * 140), boxes[:, 3] / boxes[:, 2]
    assert 0.28 < shares.min() < 0.32 and shares.max() > 0.8  # the ratio allows 0.857
    assert 0.7 < ratios.min() < 0.8 and 1.27 < ratios.max() < 1.4


def padded(pixels, side=SIDE):
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, side - height), (0, side - width), (0, 0)), constant_values=255)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 48, 130])
def test_boxes_are_resized_as_by_pillow_and_tensorflow(size):
    """Boxes shrink and grow; the padding is white, so that a leak from it would show."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 120, 3), np.uint8)
    boxes = [(0, 0, 90, 120), (10, 20, 60, 80), (40, 3, 50, 31), (89, 119, 1, 1), (0, 50, 48, 48)]
    photos = jnp.array(padded(pixels)[None])
    found = np.asarray(crops.resized(photos, jnp.array([boxes], jnp.float32), size))
    assert found.shape == (1, len(boxes), size, size, 3) and found.dtype == np.uint8
    for crop, (top, left, height, width) in zip(found[0].astype(int), boxes, strict=True):
        part = pixels[top : top + height, left : left + width]
        ours = tf.image.resize(part, [size, size], "bilinear", antialias=True).numpy()
        assert np.abs(crop - ours).max() < 0.51  # ours is rounded
        pillow = Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR)
        assert np.abs(crop - np.asarray(pillow)).max() <= 1


SIZES = (Crops(2, 32, 0.3), Crops(3, 16, 0.05, 0.2))


def batch(count):
    rng = np.random.default_rng(0)
    photos, shapes = [], rng.integers(60, SIDE + 1, (count, 2))
    for number, (height, width) in enumerate(shapes):
        with Image.open(io.BytesIO(datasets.jpeg(number, height, width))) as opened:
            photos.append(padded(np.asarray(opened)))
    return {
        "photos": np.stack(photos),
        "shape": shapes.astype(np.int32),
        "labels": np.arange(count),
        "key": rng.integers(0, 2**32, (count, 2), np.uint32),
    }


@pytest.mark.slow
def test_a_batch_of_photos_becomes_one_of_crops():
    given = batch(4)
    found = jax.jit(lambda batch: crops.cut(batch, SIZES))(given)
    assert set(found) == {"crops0", "crops1", "labels", "key"}
    np.testing.assert_array_equal(found["key"], given["key"])
    first = 0
    for number, wanted in enumerate(SIZES):
        cut = np.asarray(found[f"crops{number}"])
        assert cut.shape == (4, wanted.per_photo, wanted.size, wanted.size, 3)
        keys = augment.crop_keys(jnp.array(given["key"]), first, wanted.per_photo)
        for photo in range(4):
            for crop in range(wanted.per_photo):
                key = augment.draw_key(keys[photo, crop], augment.CROP)
                box = crops.box(jnp.array(given["shape"][photo]), key, wanted)
                top, left, height, width = (int(x) for x in box)
                part = given["photos"][photo, top : top + height, left : left + width]
                size = (wanted.size, wanted.size)
                expected = Image.fromarray(part).resize(size, Image.Resampling.BILINEAR)
                assert np.abs(cut[photo, crop].astype(int) - np.asarray(expected)).max() <= 1
        first += wanted.per_photo
    crops_of_one = [crop.tobytes() for group in ("crops0", "crops1") for crop in found[group][0]]
    assert len({*crops_of_one}) == 5


@pytest.mark.slow
def test_further_sizes_do_not_change_the_first_crops():
    given = jax.tree.map(jnp.array, batch(3))
    alone = crops.cut(given, SIZES[:1])["crops0"]
    np.testing.assert_array_equal(crops.cut(given, SIZES)["crops0"], alone)


@pytest.mark.slow
def test_crops_are_the_same_on_8_devices():
    given = jax.tree.map(jnp.array, batch(8))
    whole = crops.cut(given, SIZES)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    cut = jax.jit(lambda batch: crops.cut(batch, SIZES))
    sharded = cut(jax.device_put(given, sharding))
    np.testing.assert_array_equal(sharded["key"], given["key"])
    for name in ("crops0", "crops1"):
        difference = np.asarray(whole[name]).astype(int) - np.asarray(sharded[name])
        assert np.abs(difference).max() <= 1
    text = cut.lower(jax.device_put(given, sharding)).compile().as_text()
    assert "all-" not in text  # no communication: each device cuts its own photos
