"""How many copies are compared in a band of many rows, and the cost per row.

The band is synthetic; its model is fitted to real bands. In 13,101 photos (Flickr8k, flowers,
Caltech-101) the spectra of different photos that share a key correlate as follows:

    bands                  mean    median   above 0.9   above 0.95   above 0.97   above 0.99
    all                    0.75    0.81     25%         11%          5.6%         1.2%
    of 50 to 110 rows      0.71    0.77     19%         7.3%         3.2%         0.3%
    the model              0.77    0.83     29%         11%          4.6%         0.3%

In the model logarithms of magnitudes are normal, with four common factors and a log-normal scale
per row. Its correlations above 0.99 are a guess. Boxes are random.

Planted copies follow 4,000 edits (tests/support/edits.py) of 2,000 photos of Flickr8k. If a photo
and its edit share a key, 1 minus the correlation of their spectra is log-normal, with a median of
0.0003 and a deviation of 2. For the 3% of edits with three such keys or fewer ("hard") the median
is 0.009 and the deviation 0.7. The noise is equal in all coefficients, as in the real edits.

For comparison the output has the figures of an earlier rule, by which a row was compared with the
first 64 rows of its band.
"""

import argparse
import time
import typing

import numpy as np

from hashvision.duplicates import bands
from hashvision.duplicates.fingerprints import BITS, pack_spectra, unpack_spectra

_FACTORS = (0.3, 0.15, 0.08, 0.05)  # each factor's share of the variance
_VARIANCE, _SCALES = 0.5, 0.7
_SHORTFALL = {False: (3e-4, 2.0), True: (9e-3, 0.7)}  # median, and deviation of the logarithm
_MOST_SHORT = 0.045  # above 0.05 the rectangles of a pair do not agree
_NOISE = 0.15  # the value at which the bit of a coefficient changes
_FIRST = 64
LEAST_TIMED = 50_000  # rows


class Planted(typing.NamedTuple):
    """A band with planted copies."""

    rows: np.ndarray  # bands.ROW (n,); `file` is the number of a row
    earlier: np.ndarray  # int64 (p,), row numbers of originals
    later: np.ndarray  # int64 (p,), row numbers of their copies
    hard: np.ndarray  # bool (p,), whether a copy is hard to find


def _whole(spectra: np.ndarray) -> np.ndarray:
    return spectra / np.sqrt((spectra**2).mean(1, keepdims=True))


def _spectra(random: np.random.Generator, size: int) -> np.ndarray:
    """Spectra of different photos, float32 (size, BITS)."""
    signs = random.choice((-1, 1), BITS)
    mean = random.normal(0, 0.6, BITS).astype(np.float32)
    factors = random.standard_normal((len(_FACTORS), BITS), np.float32)
    lengths = np.sqrt(np.array(_FACTORS, np.float32) * BITS)
    factors *= (lengths / np.linalg.norm(factors, axis=1))[:, None]
    logs = random.standard_normal((size, BITS), np.float32)
    logs *= np.float32(np.sqrt(1 - sum(_FACTORS)))
    logs += random.standard_normal((size, len(_FACTORS)), np.float32) @ factors
    scales = np.exp(_SCALES * random.standard_normal((size, 1), np.float32) - _SCALES**2)
    logs *= scales * np.float32(np.sqrt(_VARIANCE))
    return _whole(np.exp(np.minimum(logs + mean, 6)) * signs + _NOISE).astype(np.float32)


def _levels(spectra: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(spectra * 9), -31, 31).astype(np.int8)


def band(size: int, planted: int, seed: int) -> Planted:
    """Makes a band of `size` rows with `planted` pairs of copies; half of them are hard to find."""
    random = np.random.default_rng(seed)
    spectra = _spectra(random, size)
    one, other = random.permutation(size)[: 2 * planted].reshape(2, planted)
    hard = np.arange(planted) % 2 == 1
    median, deviation = np.array([_SHORTFALL[each] for each in hard.tolist()]).T
    short = np.minimum(median * np.exp(deviation * random.standard_normal(planted)), _MOST_SHORT)
    noise = random.standard_normal((planted, BITS))
    noise *= np.sqrt(2 * short * BITS)[:, None] / np.linalg.norm(noise, axis=1, keepdims=True)
    copies = spectra[one] + noise
    copies = np.where((copies > _NOISE) == (spectra[one] > _NOISE), copies, 2 * _NOISE - copies)
    spectra[other] = _whole(copies)
    rows = np.zeros(size, bands.ROW)
    rows["band"], rows["rank"] = seed, bands.POST
    rows["order"], rows["file"] = random.permutation(size), np.arange(size)
    sides = random.integers(56, 255, (size, 2))
    corner = random.integers(0, 256 - sides)
    rows["box"] = np.concatenate((corner, corner + sides), axis=1)
    rows["box"][other] = rows["box"][one]
    rows["spectrum"] = pack_spectra(_levels(spectra))
    swap = rows["order"][one] > rows["order"][other]
    return Planted(rows, np.where(swap, other, one), np.where(swap, one, other), hard)


def found(planted: Planted, met: np.ndarray) -> np.ndarray:
    """Whether each planted pair was compared, bool (p,)."""
    size = len(planted.rows)
    pairs = met["post"]["file"] * np.uint64(size) + met["partner"]["file"]
    return np.isin(planted.later * size + planted.earlier, pairs.astype(np.int64))


def law(planted: Planted, pairs: int = 400_000) -> np.ndarray:
    """Correlations of pairs of different photos, float32 (pairs,)."""
    random = np.random.default_rng(0)
    one, other = random.integers(0, len(planted.rows), (2, pairs))
    one, other = one[one != other], other[one != other]
    spectra = unpack_spectra(planted.rows["spectrum"]).astype(np.float32)
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
    return np.einsum("ij,ij->i", spectra[one], spectra[other])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="16,256,1e4,1e5,1e6")
    parser.add_argument("--planted", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print("| rows | found | hard, found | met a row | CPU a row | the first 64: found |")
    print("|---|---|---|---|---|---|")
    for size in (int(float(each)) for each in arguments.sizes.split(",")):
        planted = band(size, min(arguments.planted, size // 4), arguments.seed)
        met = bands.meetings(planted.rows)
        many = np.tile(
            planted.rows, max(1, LEAST_TIMED // size)
        )  # several small bands, to time enough rows
        many["band"] = np.arange(len(many)) // size
        start = time.process_time()
        bands.meetings(many)
        seconds = (time.process_time() - start) / len(many)
        hits, first = found(planted, met), planted.rows["order"][planted.earlier] < _FIRST
        print(
            f"| {size:,} | {hits[~planted.hard].mean():.3f} | {hits[planted.hard].mean():.3f} "
            f"| {len(met) / size:.2f} | {seconds * 1e6:.1f} us | {first.mean():.4f} |",
            flush=True,
        )
    strangers = law(planted)
    shares = [f"{(strangers > level).mean():.4f}" for level in (0.9, 0.95, 0.97, 0.98, 0.99)]
    print(f"strangers: mean {strangers.mean():.3f}, median {np.median(strangers):.3f}, {shares}")


if __name__ == "__main__":
    main()
