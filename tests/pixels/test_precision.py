"""Products of pixels and of scores ask for their precision; a TPU's default is too coarse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import precision
from hashvision.objectives import hashtag, swav
from hashvision.pixels import augment, crops
from hashvision.pixels.crops import Crops

RNG = np.random.default_rng(0)
KEYS = RNG.integers(0, 2**32, (2, 2), np.uint32)
PIXELS = RNG.integers(0, 256, (2, 90, 90, 3), np.uint8)
BATCH = {"photos": PIXELS, "shape": np.full((2, 2), 90, np.int32), "key": KEYS}
SWAV = augment.Augmentation(distortion=1.0, grey=0.2, blur=0.5)


def cut(batch):
    return crops.cut(batch, (Crops(2, 32), Crops(1, 16)))


def augmented(images):
    return augment.augmented(images, jnp.array(KEYS), SWAV)


def logits(kernel, features):
    head = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}
    return jnp.sum(hashtag.head_logits(head, features))


def scores(prototypes, embeddings):
    return jnp.sum(swav._products(embeddings, prototypes))


@pytest.mark.parametrize(
    ("function", "arguments", "wanted"),
    [
        (cut, [BATCH], ["HIGH"] * 4),
        (augmented, [PIXELS], ["HIGH"] * 2),
        (jax.grad(logits, (0, 1)), np.ones((2, 8, 8), np.float32), ["HIGHEST"] * 3),
        (jax.grad(scores, (0, 1)), np.ones((2, 8, 8), np.float32), ["HIGHEST"] * 3),
    ],
)
def test_products_of_pixels_and_scores_ask_for_a_precision(function, arguments, wanted):
    assert precision.requested(function, *arguments) == wanted


@pytest.mark.slow
def test_crops_on_a_tpu_differ_by_at_most_one_level():
    boxes = jnp.array([[(0, 0, 90, 60), (10, 20, 60, 40), (40, 3, 31, 50)]], jnp.float32)
    photos = jnp.array(PIXELS[:1])
    found = precision.on_tpu(lambda photos: crops.resized(photos, boxes, 48), photos)
    levels = np.abs(np.asarray(found, int) - np.asarray(crops.resized(photos, boxes, 48), int))
    assert levels.max() <= 1 and levels.mean() < 0.005  # 0.15 with one product of bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_blur_on_a_tpu_is_within_a_hundredth_of_a_level(probability):
    images = jnp.array(RNG.random((2, 24, 24, 3), np.float32))

    def blurred(images):
        return augment.blur(images, jnp.array(KEYS), probability)

    found = precision.on_tpu(blurred, images)
    np.testing.assert_allclose(found, blurred(images), atol=0.01 / 255)
