"""95% bootstrap intervals over test photos, for all metrics that evaluation reports.

A statistic is a function of photo counts, int (B, N): how often each of the N test photos is in
each of B resamples. Counts of one give its value. Resamples drawn with replacement give Efron's
percentile interval (Efron & Tibshirani 1993, chapter 13).

This interval is correct only if the metric has no bias. A statistic that is biased upward returns
two numbers per resample: the metric, and the metric without its bias. The lower end of the interval
then comes from the second, and the upper end from the first. So the interval covers both the mean
of the metric over test sets of this size and its value on an infinite test set.
"""

import typing
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Num, Real, UInt16

RESAMPLES = 1000
SEED = 20180502
_CHUNK_COUNTS = 2**24  # counts in memory at a time: 32 MB

Counts = Num[np.ndarray, "b N"]
Statistic = Callable[[Counts], Real[np.ndarray, "*numbers b"]]


class Estimate(typing.NamedTuple):
    """A metric's value on the test photos, and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def estimate(
    statistic: Statistic, photos: int, *, number: int = RESAMPLES, seed: int = SEED
) -> Estimate:
    """A statistic's value and its 95% percentile interval.

    Args:
      statistic: maps counts int (b, N) to float (b,), or, if it is biased upward, to float (2, b):
        the metric, and the metric without its bias. NaN if a resample defines no value.
      photos: N, the number of test photos.
      number: number of resamples to draw.
      seed: key of the random draws.
    """
    value = float(np.atleast_2d(statistic(np.ones((1, photos), np.uint16)))[0, 0])
    drawn = (statistic(counts) for counts in resamples(photos, number=number, seed=seed))
    values = np.concatenate([np.atleast_2d(each) for each in drawn], axis=1)
    values = values[:, ~np.isnan(values[0])]
    if not values.size:
        return Estimate(value, np.nan, np.nan)
    low, high = np.percentile(values[-1], 2.5), np.percentile(values[0], 97.5)
    return Estimate(value, float(low), float(high))


def resamples(
    photos: int, *, number: int = RESAMPLES, seed: int = SEED, chunk: int | None = None
) -> Iterator[UInt16[np.ndarray, "b N"]]:
    """Draws resamples of `photos` photos with replacement, in chunks.

    A resample is keyed by (seed, its number), so two networks evaluated on the same photos get the
    same resamples, whatever the chunk size.

    Args:
      photos: N, the number of test photos.
      number: total number of resamples.
      seed: key of the random draws.
      chunk: number of resamples per chunk; by default as many as fit into 32 MB.

    Yields:
      uint16 (b, N), whose rows sum to N; the b of all chunks add up to `number`.
    """
    chunk = chunk or max(1, _CHUNK_COUNTS // photos)
    for start in range(0, number, chunk):
        rows = range(start, min(start + chunk, number))
        counts = np.empty((len(rows), photos), np.uint16)
        for row, resample in enumerate(rows):
            rng = np.random.Generator(np.random.Philox(key=[seed, resample]))
            counts[row] = np.bincount(rng.integers(0, photos, photos), minlength=photos)
        yield counts


def mean_of(
    values: Real[np.ndarray, " N"] | Bool[np.ndarray, " N"],
    eligible: Bool[np.ndarray, " N"] | None = None,
) -> Statistic:
    """The statistic that averages one number per photo over the eligible photos.

    Args:
      values: float or bool (N,), one number per photo, such as whether it is classified correctly.
      eligible: bool (N,), the photos to average over; by default all.
    """
    values = np.asarray(values, np.float64)
    member = np.ones(len(values)) if eligible is None else np.asarray(eligible, np.float64)
    weighted = np.where(member > 0, values, 0.0)

    def statistic(counts: Counts) -> Real[np.ndarray, " b"]:
        denominator = counts @ member
        with np.errstate(invalid="ignore"):
            return (counts @ weighted) / denominator

    return statistic
