"""95% bootstrap intervals over test photos, for every number the evaluation room reports.

A statistic takes photo counts, int (B, N): how often each of the N test photos lies in each of B
resamples. Counts of one give its value; Efron's percentile interval (Efron & Tibshirani 1993,
chapter 13) comes from resamples drawn with replacement.

Such an interval covers where the metric is not biased. One that is gives two numbers a resample:
itself, and itself with the bias taken out. Then the lower end comes from the second, the upper end
from the first, so that the interval covers both what test sets of this size give on average and
what an endless one would give.
"""

import typing
from collections.abc import Callable, Iterator

import numpy as np

RESAMPLES = 1000
SEED = 20180502
_CHUNK_COUNTS = 2**24  # counts held at once: 32 MB

Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(typing.NamedTuple):
    """A metric's value on the test photos, with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def resamples(
    photos: int, number: int = RESAMPLES, seed: int = SEED, chunk: int | None = None
) -> Iterator[np.ndarray]:
    """Draws resamples of `photos` photos with replacement, some at a time.

    A resample is keyed by (seed, its number), so that two networks evaluated on the same photos see
    the same resamples, whatever the chunk.

    Args:
      photos: N, the number of test photos.
      number: how many resamples to draw in all.
      seed: key of the draws.
      chunk: how many to draw at a time; by default as many as fit 32 MB.

    Yields:
      uint16 (b, N), the rows summing to N; the chunks' b add up to `number`.
    """
    chunk = chunk or max(1, _CHUNK_COUNTS // photos)
    for start in range(0, number, chunk):
        rows = range(start, min(start + chunk, number))
        counts = np.empty((len(rows), photos), np.uint16)
        for row, resample in enumerate(rows):
            rng = np.random.Generator(np.random.Philox(key=[seed, resample]))
            counts[row] = np.bincount(rng.integers(0, photos, photos), minlength=photos)
        yield counts


def estimate(
    statistic: Statistic, photos: int, number: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """A statistic's value and its 95% percentile interval.

    Args:
      statistic: maps counts int (b, N) to float (b,), or to float (2, b) where it is biased upward:
        the metric, and the metric without its bias. NaN where a resample defines no value.
      photos: N, the number of test photos.
      number: how many resamples to draw.
      seed: key of the draws.
    """
    value = float(np.atleast_2d(statistic(np.ones((1, photos), np.uint16)))[0, 0])
    drawn = (statistic(counts) for counts in resamples(photos, number, seed))
    values = np.concatenate([np.atleast_2d(each) for each in drawn], axis=1)
    values = values[:, ~np.isnan(values[0])]
    if not values.size:
        return Estimate(value, np.nan, np.nan)
    low, high = np.percentile(values[-1], 2.5), np.percentile(values[0], 97.5)
    return Estimate(value, float(low), float(high))


def mean_of(values: np.ndarray, eligible: np.ndarray | None = None) -> Statistic:
    """The statistic that averages one number a photo, over the eligible photos.

    Args:
      values: float or bool (N,), one number a photo (right or wrong, say).
      eligible: bool (N,), the photos that count in the denominator; by default all.
    """
    values = np.asarray(values, np.float64)
    member = np.ones(len(values)) if eligible is None else np.asarray(eligible, np.float64)
    weighted = np.where(member > 0, values, 0.0)

    def statistic(counts: np.ndarray) -> np.ndarray:
        denominator = counts @ member
        with np.errstate(invalid="ignore"):
            return (counts @ weighted) / denominator

    return statistic
