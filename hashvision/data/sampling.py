"""Which photo is seen how often: repeat factors from class frequencies, in NumPy.

Mahajan et al. 2018 (arXiv 1805.00932), section 2.2: hashtag h with frequency f(h), the share of
photos that carry it, gets the repeat factor r(h) = max(1, phi(t / f(h))), and a photo the largest
factor of its tags. phi is the square root or, for uniform sampling, the identity; natural sampling
repeats nothing. The threshold t sets how far the tail is lifted, and so the length of an epoch.
"""

import numpy as np

METHODS = ("natural", "square_root", "uniform")


def default_threshold(counts: np.ndarray, posts: int) -> float:
    """The mean class frequency: classes rarer than the average one are lifted.

    Args:
      counts: int (K,), the number of posts that carry each class.
      posts: the number of posts in the dataset.
    """
    return float(np.mean(counts) / posts) if len(counts) else 1.0


def repeat_factors(rarest: np.ndarray, posts: int, threshold: float, method: str) -> np.ndarray:
    """Repeat factor of each photo.

    Since r(h) falls as f(h) grows, the largest factor among a photo's tags is that of its rarest.

    Args:
      rarest: int (N,), the number of posts that carry the photo's rarest class; 0 for photos
        without a tag, which nothing lifts.
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
    """How often each photo comes in one epoch: a factor of 2.3 is 2 or, with probability 0.3, 3.

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
    """Photos of an epoch, repeats counted.

    Args:
      rarest: int (D,), as for `repeat_factors`, each value once.
      photos: int (D,), how many photos have it.
      posts: the number of posts in the dataset.
      threshold: t, a frequency in (0, 1].
      method: one of METHODS.
    """
    return float(repeat_factors(rarest, posts, threshold, method) @ photos)


def epoch_summary(
    rarest: np.ndarray, photos: np.ndarray, posts: int, threshold: float
) -> dict[str, dict[str, float]]:
    """Epoch length (photos) and largest repeat factor under each method; see `epoch_length`."""
    summary = {}
    for method in METHODS:
        factors = repeat_factors(rarest, posts, threshold, method)
        summary[method] = {
            "length": round(epoch_length(rarest, photos, posts, threshold, method), 3),
            "largest_repeat": round(float(factors.max(initial=1.0)), 3),
        }
    return summary
