"""Runs a trained network over photos: bytes to crops on the host's threads, batches to features."""

import collections
import concurrent.futures
import io
import itertools
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hashvision.errors import UserError
from hashvision.evaluation.datasets import Photos

# The centre crop's share of the short side: 224 of 256.
_CROP_SHARE = 7 / 8


class Encoder(typing.NamedTuple):
    """A trained network as evaluation sees it.

    `encode` maps uint8 (B, R, R, 3) to features float (B, D), the trunk's pooled output, and
    scores float (B, K), or None where the network has no tag head. Its normalisation is inside.

    Scores must be comparable between photos, since mAP ranks photos within a class: for a softmax
    head the log-probabilities, log_softmax(logits). Its raw logits are not: the loss leaves a
    photo's logits free up to a constant of that photo, and ranking by them would rank these
    constants too. For independent sigmoids the logits themselves are right: each is the class's
    log-odds.
    """

    encode: Callable[[np.ndarray], tuple[Any, Any]]
    resolution: int  # R
    step: int  # of training
    vocabulary: Mapping[str, Any]  # as in vocabulary.json; its classes name the K scores
    batch_size: int = 64


class Encoded(typing.NamedTuple):
    """What a network says of the readable photos of a set."""

    values: np.ndarray  # float32 (n, D), features or scores
    readable: np.ndarray  # bool (N,), which of the N photos they are


def decode(encoded: bytes, resolution: int) -> np.ndarray:
    """An encoded image as the network sees it in evaluation, uint8 (R, R, 3).

    Turned upright, its short side brought to 8/7 of the resolution (bilinear, antialiased) and the
    centre cropped; in one step, which never makes the pixels outside the crop.

    Raises:
      Exception: whatever Pillow raises for bytes that are no image; the kinds are open-ended.
    """
    with Image.open(io.BytesIO(encoded)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # 16-bit greyscale, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB")
    width, height = image.size
    side = _CROP_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = left, top, left + side, top + side
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR, box))


def _decode_or_none(encoded: bytes, resolution: int) -> np.ndarray | None:
    try:
        return decode(encoded, resolution)
    except Exception:  # a broken file may raise anything; it is skipped and counted
        return None


def decoded(
    images: Iterable[bytes], resolution: int, ahead: int = 256
) -> Iterator[np.ndarray | None]:
    """Decodes images in order on threads (Pillow releases the GIL), up to `ahead` in advance.

    Yields:
      uint8 (R, R, 3), or None for bytes that cannot be read as an image.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: collections.deque[concurrent.futures.Future[np.ndarray | None]]
        pending = collections.deque()
        for encoded in images:
            pending.append(pool.submit(_decode_or_none, encoded, resolution))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _run(
    encoder: Encoder, photos: Photos, select: Callable[[tuple[Any, Any]], np.ndarray]
) -> Encoded:
    readable: list[bool] = []

    def crops() -> Iterator[np.ndarray]:
        for crop in decoded(photos.images(), encoder.resolution):
            readable.append(crop is not None)
            if crop is not None:
                yield crop

    values = []
    shape = (encoder.batch_size, encoder.resolution, encoder.resolution, 3)
    remaining = crops()
    while batch := list(itertools.islice(remaining, encoder.batch_size)):
        # Always the same shape, so that the network is compiled once.
        padded = np.zeros(shape, np.uint8)
        padded[: len(batch)] = batch
        selected = np.asarray(select(encoder.encode(padded)))[: len(batch)]
        values.append(selected.astype(np.float32))
    if not values:
        raise UserError(
            f"None of the {len(readable):,} images ({photos.names[0]}, ...) can be read; "
            "check that the files are where the dataset says and are images."
        )
    joined = np.concatenate(values)
    if not np.isfinite(joined).all():
        raise UserError(
            f"The network at step {encoder.step} answers with values that are not finite: its "
            "training diverged; evaluate an earlier checkpoint."
        )
    return Encoded(joined, np.array(readable))


def features(encoder: Encoder, photos: Photos) -> Encoded:
    """The network's features of the photos, float32 (n, D).

    Raises:
      UserError: no photo can be read, or the features are not finite.
    """
    return _run(encoder, photos, lambda outputs: np.asarray(outputs[0]))


def scores(encoder: Encoder, photos: Photos, classes: np.ndarray) -> Encoded:
    """The network's scores of the given classes for the photos, float32 (n, C).

    Args:
      encoder: with a tag head.
      photos: N of them.
      classes: int (C,), class numbers of the encoder's vocabulary; the other scores are not kept.

    Raises:
      UserError: the network has no tag head, no photo can be read, or scores are not finite.
    """

    def select(outputs: tuple[Any, Any]) -> np.ndarray:
        if outputs[1] is None:
            raise UserError(
                "This network has no tag head, so it cannot name what it sees; "
                "use --protocol=knn or --protocol=linear."
            )
        return np.asarray(outputs[1])[:, classes]

    return _run(encoder, photos, select)
