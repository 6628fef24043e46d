"""Runs a trained network over photos: bytes to crops on the host's threads, batches to features."""

import collections
import concurrent.futures
import itertools
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from hashvision.errors import UserError
from hashvision.evaluation.labelled import Photos
from hashvision.sources import files, pictures
from hashvision.sources.reasons import Dropped

# Of encoded images that wait to be decoded. A file may have `sources.files.LARGEST_FILE`.
MOST_BYTES_AHEAD = 2**28
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
    leads: bool = True  # whether this process prints and writes; of several hosts one does


class Encoded(typing.NamedTuple):
    """What a network says of the n readable ones of N photos."""

    features: np.ndarray  # float32 (n, D)
    scores: np.ndarray | None  # float32 (n, C), of the C classes asked for, if any
    readable: np.ndarray  # bool (N,)

    def of(self, photos: Photos, part: Photos) -> "Encoded":
        """What it says of some of these photos.

        Args:
          photos: the N photos.
          part: some of them, by their places.

        Raises:
          UserError: none of the part can be read.
        """
        chosen = np.isin(photos.places, part.places)
        rows = chosen[self.readable]
        scores = None if self.scores is None else self.scores[rows]
        found = Encoded(self.features[rows], scores, self.readable[chosen])
        _check_readable(part, found.readable)
        return found


def decode(encoded: bytes, resolution: int) -> np.ndarray:
    """An encoded image as the network sees it in evaluation, uint8 (R, R, 3).

    Turned upright, its short side brought to 8/7 of the resolution (bilinear, antialiased) and the
    centre cropped; in one step, which never makes the pixels outside the crop.

    Raises:
      Dropped: the bytes are no image that can be read (`sources.pictures`).
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
    except Dropped:  # a file that cannot be read is skipped and counted
        return None


def decoded(
    images: Iterable[bytes], resolution: int, ahead: int = 256
) -> Iterator[np.ndarray | None]:
    """Decodes images in order on threads (Pillow releases the GIL), some in advance.

    What that takes is bounded: up to `ahead` crops, files of MOST_BYTES_AHEAD together and one
    more, and the photos that `sources.pictures` decodes at once.

    Yields:
      uint8 (R, R, 3), or None for bytes that cannot be read as an image.
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


def encode(encoder: Encoder, photos: Photos, classes: np.ndarray | None = None) -> Encoded:
    """Runs the network over photos, once: features, and the scores of the classes asked for.

    Args:
      encoder: the network.
      photos: N of them.
      classes: int (C,), class numbers of the encoder's vocabulary; the other scores are not kept.

    Raises:
      UserError: no photo can be read, the network has no tag head for the classes, or what it
        answers is not finite.
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
        # Always the same shape, so that the network is compiled once.
        padded = np.zeros(shape, np.uint8)
        padded[: len(batch)] = batch
        batch_features, batch_scores = encoder.encode(padded)
        features.append(_float32(batch_features, len(batch)))
        if classes is None:
            continue
        if batch_scores is None:
            raise UserError(
                "This network has no tag head, so it cannot name what it sees; "
                "use --protocol=knn or --protocol=linear."
            )
        scores.append(_float32(np.asarray(batch_scores)[:, classes], len(batch)))
    _check_readable(photos, np.array(readable, bool))
    found = Encoded(
        np.concatenate(features), np.concatenate(scores) if scores else None, np.array(readable)
    )
    if not all(np.isfinite(each).all() for each in found[:2] if each is not None):
        raise UserError(
            f"The network at step {encoder.step} answers with values that are not finite: its "
            "training diverged; evaluate an earlier checkpoint."
        )
    return found


def _float32(values: Any, number: int) -> np.ndarray:
    """The first `number` rows, without what the batch was padded with."""
    return np.asarray(values)[:number].astype(np.float32)


def _check_readable(photos: Photos, readable: np.ndarray) -> None:
    if not readable.any():
        raise UserError(
            f"None of the {len(readable):,} images ({files.printable(photos.names[0])}, ...) can be "
            "read; check that the files are where the dataset says and are images."
        )
