"""The protocol `knn`: weighted nearest neighbours on frozen features, without any training."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float32, Int, Integer

from hashvision.evaluation.encoded import EncodedSet, Findings, top1

NEIGHBOURS = 20
TEMPERATURE = 0.07
_CHUNK_SIMILARITIES = 2**24  # similarities in memory at a time: 64 MB


def evaluate(encoded: EncodedSet) -> Findings:
    """Runs the protocol `knn`: top-1 accuracy of weighted nearest neighbours."""
    split, train, test = encoded.parts()
    predicted = predict(
        train.features,
        split.train_labels[train.readable],
        test.features,
        classes=len(split.classes),
        k=NEIGHBOURS,
        temperature=TEMPERATURE,
    )
    return top1(encoded, predicted, {"k": NEIGHBOURS, "temperature": TEMPERATURE})


def predict(
    train: Float[np.ndarray, "N D"],
    labels: Integer[np.ndarray, " N"],
    test: Float[np.ndarray, "M D"],
    *,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Int[np.ndarray, " M"]:
    """Classifies each test photo by its k nearest training photos.

    Wu et al. 2018 (arXiv 1805.01978), section 3.4: with cosine similarity s_i to neighbour i,
    class c gets w_c votes, the sum of exp(s_i / temperature) over the neighbours of class c. The
    class with most votes wins, and the lower class number on a tie.

    Args:
      train: float (N, D), training features of any scale; they are scaled to unit length.
      labels: int (N,), class numbers in [0, classes).
      test: float (M, D), test features.
      classes: C, the number of classes.
      k: number of neighbours that vote; all N if there are fewer.
      temperature: of the votes, above 0.

    Returns:
      int64 (M,), predicted class numbers.
    """
    votes = _votes(
        normalize(train),
        np.asarray(labels),
        normalize(test),
        classes=classes,
        k=k,
        temperature=temperature,
    )
    return np.concatenate([np.argmax(chunk, axis=1) for chunk in votes])


def normalize(features: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, "N D"]:
    """Scales rows to unit length, float32 (N, D); a row of zeros stays zero."""
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def _votes(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    classes: int,
    k: int,
    temperature: float,
) -> Iterator[np.ndarray]:
    k = min(k, len(train))
    chunk = max(1, _CHUNK_SIMILARITIES // len(train))
    for start in range(0, len(test), chunk):
        similarities = test[start : start + chunk] @ train.T
        neighbours = nearest(similarities, k)
        weights = np.exp(
            np.take_along_axis(similarities, neighbours, axis=1).astype(np.float64) / temperature
        )
        rows = np.arange(len(neighbours))[:, None] * classes
        cells = (rows + labels[neighbours]).ravel()
        votes = np.bincount(cells, weights.ravel(), minlength=len(neighbours) * classes)
        yield votes.reshape(-1, classes)


def nearest(similarities: Float[np.ndarray, "M N"], k: int) -> Int[np.ndarray, "M {k}"]:
    """Column numbers of the k largest entries of each row, in ascending order.

    Ties at the k-th place go to the lower column, so that the neighbours are the same on every
    machine (with np.argpartition they would depend on its pivots).

    Args:
      similarities: float (M, N).
      k: number of columns, at most N.

    Returns:
      int64 (M, k).
    """
    columns = similarities.shape[1]
    threshold = np.partition(similarities, columns - k, axis=1)[:, columns - k, None]
    above = similarities > threshold
    tied = similarities == threshold
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (tied & (np.cumsum(tied, axis=1) <= room))
    return np.nonzero(chosen)[1].reshape(len(similarities), k)
