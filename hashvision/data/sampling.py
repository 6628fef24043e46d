"""Computes how often each photo occurs in an epoch: repeat factors from class frequencies.

Mahajan et al. 2018 (arXiv 1805.00932), section 2.2: f(h) is the share of photos with hashtag h.
Its repeat factor is r(h) = max(1, phi(t / f(h))), and a photo has the largest factor of its tags.
phi is the square root or, for uniform sampling, the identity; natural sampling repeats nothing. The
threshold t decides how much rare classes are oversampled, and so the length of an epoch.
"""

import numpy as np

METHODS = ("natural", "square_root", "uniform")


def default_threshold(counts: np.ndarray, posts: int) -> float:
    """The mean class frequency, so that classes rarer than the average are oversampled.

    Args:
      counts: int (K,), the number of posts that have each class.
      posts: the number of posts in the dataset.
    """
    return float(np.mean(counts) / posts) if len(counts) else 1.0


def repeat_factors(rarest: np.ndarray, posts: int, threshold: float, method: str) -> np.ndarray:
    """Computes the repeat factor of each photo.

    Since r(h) falls as f(h) grows, a photo's largest factor belongs to its rarest tag.

    Args:
      rarest: int (N,), the number of posts that have the photo's rarest class; 0 for photos without
        a tag, whose factor is 1.
      posts: the number of posts in the dataset.
      threshold: t, a frequency in (0, 1].
      method: one of METHODS.

    Returns:
      float64 (N,), at least 1.
    """
    if method == "natural":
        return np.ones(len(rarest))
    rarest = np.asarray(rarest, np.float64)
    ratio = np.where(rarest > 0, threshold * posts / np.maximum(rarest, 1), 0.0)
    if method == "square_root":
        ratio = np.sqrt(ratio)
    elif method != "uniform":
        raise ValueError(method)
    return np.maximum(1.0, ratio)


def repeats(factors: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Draws how often each photo occurs in one epoch: 2.3 gives 2 or, with probability 0.3, 3.

    Args:
      factors: float (N,), repeat factors.
      uniform: float (N,), a draw from [0, 1) keyed by (seed, epoch, record).

    Returns:
      int64 (N,).
    """
    whole = np.floor(factors)
    return (whole + (uniform < factors - whole)).astype(np.int64)


def epoch_length(
    rarest: np.ndarray, photos: np.ndarray, posts: int, threshold: float, method: str
) -> float:
    """Expected number of photos in an epoch, including repeats.

    Args:
      rarest: int (D,), as for `repeat_factors`, each value once.
      photos: int (D,), the number of photos with each value.
      posts: the number of posts in the dataset.
      threshold: t, a frequency in (0, 1].
      method: one of METHODS.
    """
    return float(repeat_factors(rarest, posts, threshold, method) @ photos)


def epoch_summary(
    rarest: np.ndarray, photos: np.ndarray, posts: int, threshold: float
) -> dict[str, dict[str, float]]:
    """Epoch length (photos) and largest repeat factor of each method; see `epoch_length`."""
    summary = {}
    for method in METHODS:
        factors = repeat_factors(rarest, posts, threshold, method)
        summary[method] = {
            "length": round(epoch_length(rarest, photos, posts, threshold, method), 3),
            "largest_repeat": round(float(factors.max(initial=1.0)), 3),
        }
    return summary
