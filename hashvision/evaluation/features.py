"""Runs a trained network over photos: decodes them on the host's threads, and batches the crops."""

import collections
import concurrent.futures
import itertools
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Integer, UInt8
from PIL import Image

from hashvision.errors import UserError
from hashvision.evaluation.labelled import Photos
from hashvision.sources import files, pictures
from hashvision.sources.reasons import Dropped

# Bytes of encoded images that may wait for decoding; one file may have sources.files.LARGEST_FILE.
MOST_BYTES_AHEAD = 2**28
# The centre crop's share of the short side: 224 of 256.
_CROP_SHARE = 7 / 8


class Encoder(typing.NamedTuple):
    """A trained network, for evaluation.

    `encode` maps uint8 (B, R, R, 3) to features float (B, D), the trunk's pooled output, and
    scores float (B, K), or None if the network has no tag head. It normalises the photos itself.

    Scores must be comparable between photos, since mAP ranks photos within a class. For a softmax
    head they are the log-probabilities, log_softmax(logits). Raw logits would not do: the loss
    determines a photo's logits only up to a constant per photo, which would enter the ranking. For
    independent sigmoids the logits would do, since each is the log-odds of its class.
    """

    encode: Callable[[UInt8[np.ndarray, "B R R 3"]], tuple[Any, Any]]
    resolution: int  # R
    step: int  # of training
    vocabulary: Mapping[str, Any]  # as in vocabulary.json; its classes name the K scores
    batch_size: int = 64
    leads: bool = True  # whether this process prints and writes; True on one host only


class Encoded(typing.NamedTuple):
    """A network's outputs for N photos, n of which are readable."""

    features: Float32[np.ndarray, "n D"]
    scores: Float32[np.ndarray, "n C"] | None  # of the C requested classes, if any
    readable: Bool[np.ndarray, " N"]

    def of(self, photos: Photos, part: Photos) -> "Encoded":
        """The outputs for some of these photos.

        Args:
          photos: the N photos.
          part: some of them, identified by their places.

        Raises:
          UserError: no photo of the part can be read.
        """
        chosen = np.isin(photos.places, part.places)
        rows = chosen[self.readable]
        found = Encoded(
            features=self.features[rows],
            scores=None if self.scores is None else self.scores[rows],
            readable=self.readable[chosen],
        )
        _check_readable(part, found.readable)
        return found


def encode(
    encoder: Encoder, photos: Photos, classes: Integer[np.ndarray, " C"] | None = None
) -> Encoded:
    """Runs the network over photos once: features, and the scores of the requested classes.

    Args:
      encoder: the network.
      photos: N photos.
      classes: int (C,), class numbers of the encoder's vocabulary; other scores are dropped.

    Raises:
      UserError: no photo can be read, the network has no tag head for the classes, or its outputs
        are not finite.
    """
    readable: list[bool] = []

    def crops() -> Iterator[np.ndarray]:
        for crop in decoded(photos.images(), encoder.resolution):
            readable.append(crop is not None)
            if crop is not None:
                yield crop

    features, scores = [], []
    shape = (encoder.batch_size, encoder.resolution, encoder.resolution, 3)
    remaining = crops()
    while batch := list(itertools.islice(remaining, encoder.batch_size)):
        # Padded to one shape, so that the network is compiled once.
        padded = np.zeros(shape, np.uint8)
        padded[: len(batch)] = batch
        batch_features, batch_scores = encoder.encode(padded)
        features.append(_float32(batch_features, len(batch)))
        if classes is None:
            continue
        if batch_scores is None:
            raise UserError(
                "This network has no tag head, so it cannot predict tags; use --protocol=knn or"
                " --protocol=linear."
            )
        scores.append(_float32(np.asarray(batch_scores)[:, classes], len(batch)))
    _check_readable(photos, np.array(readable, bool))
    found = Encoded(
        features=np.concatenate(features),
        scores=np.concatenate(scores) if scores else None,
        readable=np.array(readable),
    )
    if not all(np.isfinite(each).all() for each in found[:2] if each is not None):
        raise UserError(
            f"The network at step {encoder.step} returns values that are not finite, so its"
            " training has diverged; evaluate an earlier checkpoint."
        )
    return found


def decoded(
    images: Iterable[bytes], resolution: int, ahead: int = 256
) -> Iterator[UInt8[np.ndarray, "R R 3"] | None]:
    """Decodes images on threads (Pillow releases the GIL) ahead of their use; yields them in order.

    Its memory is bounded: up to `ahead` crops, MOST_BYTES_AHEAD of files and one more file, and the
    photos that `sources.pictures` decodes at a time.

    Yields:
      uint8 (R, R, 3), or None for bytes that are not a readable image.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: collections.deque[tuple[int, concurrent.futures.Future[np.ndarray | None]]]
        pending, size = collections.deque(), 0
        for encoded in images:
            pending.append((len(encoded), pool.submit(_decode_or_none, encoded, resolution)))
            size += len(encoded)
            while len(pending) > ahead or size > MOST_BYTES_AHEAD:
                length, crop = pending.popleft()
                size -= length
                yield crop.result()
        for _, crop in pending:
            yield crop.result()


def decode(encoded: bytes, resolution: int) -> UInt8[np.ndarray, "{resolution} {resolution} 3"]:
    """Decodes an image for evaluation: uint8 (R, R, 3).

    The image is turned upright, its short side is scaled to 8/7 of the resolution (bilinear,
    antialiased), and the centre is cropped. One step does this without computing pixels outside the
    crop.

    Raises:
      Dropped: the bytes are not a readable image (`sources.pictures`).
    """

    def crop(image: Image.Image) -> Image.Image:
        width, height = image.size
        side = _CROP_SHARE * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = left, top, left + side, top + side
        return image.resize((resolution, resolution), Image.Resampling.BILINEAR, box)

    return np.asarray(pictures.decode(encoded, crop))


def _decode_or_none(encoded: bytes, resolution: int) -> np.ndarray | None:
    try:
        return decode(encoded, resolution)
    except Dropped:  # unreadable files are skipped and counted
        return None


def _float32(values: Any, number: int) -> np.ndarray:
    """The first `number` rows, without the padding of the batch."""
    return np.asarray(values)[:number].astype(np.float32)


def _check_readable(photos: Photos, readable: np.ndarray) -> None:
    if not readable.any():
        raise UserError(
            f"None of the {len(readable):,} images ({files.printable(photos.names[0])}, ...) can be"
            " read; check that the files exist where the dataset says, and that they are images."
        )
