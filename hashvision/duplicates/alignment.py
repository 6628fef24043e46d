"""Aligns two photos by their fingerprints and measures their similarity, for the duplicate search.

Each key that two photos share gives a map from one to the other: a shift, a scale in each direction
and maybe a mirroring. Maps whose rectangles look different, or with which the photos hardly
overlap, are left out. The best maps are refined by Gauss-Newton steps (Lucas and Kanade 1981; Baker
and Matthews 2004, section 2), and the photos are compared where they overlap.
"""

import numpy as np

from hashvision.duplicates.fingerprints import THUMBNAIL, Fingerprint

# Two rectangles agree if their spectra correlate by more than ALIKE and if their map makes the
# photos overlap by at least _LIKELY_OVERLAP. That is less than _LEAST_OVERLAP, because a rectangle
# is known only to a pixel of SIDE. Of 4,763 pairs of edits of Flickr8k that share a key, none lost
# its last agreeing key, nor did any of 317 copies; of 2,463 pairs that are not copies, 78 kept one.
ALIKE = 0.95
_LIKELY_OVERLAP = 0.4
# Measured on Flickr8k. Of 7,161 photos, 4,542 pairs share a key: 353 have a similarity above 0.97,
# all of them copies by eye, and 4,189 have one below 0.7. Of 20 kinds of edit (200 photos each), 19
# kept at least 98% of the copies above 0.95 and one kept 96%. False positives at 0.95: 16% of the
# pairs of memes with different words on one photo (51% at 0.9), and 1% of the photos into which an
# object of a fifth of the width was pasted (5% at 0.9).
DUPLICATE = 0.95
_STARTS = 8  # shared keys that are tried, those with the largest rectangles
_FINALISTS = 2  # the best of these are refined
_STEPS = 4
# Correlation before refining. Copies had at least 0.7; 6 in 7 of the other candidates had less.
_LEAST_CORRELATION = 0.6
_LEAST_OVERLAP = 0.5  # of either photo; copies cropped by a tenth on all sides have 0.6
_LONGEST_STEP = 0.1
_BLOCK = 4  # pixels; the smallest difference that makes two photos different has this side
_BLOCK_SHARE = 8.0
_LEAST_CONTRAST = 0.1
_LEAST_VARIANCE = 9.0  # grey levels squared; flatter pictures would all be similar
_BLUR_VARIANCE = 1.0  # of a thumbnail, in pixels squared
_RING = 1.0 / THUMBNAIL  # the outermost pixels mix with the frame
_GRID = ((np.arange(THUMBNAIL) + 0.5) / THUMBNAIL).astype(np.float32)


def similarity(one: Fingerprint, other: Fingerprint) -> float:
    """Returns how similar two photos are, from 0 to 1; at DUPLICATE or more they are copies.

    The similarity is the share of one photo's variance that a cubic curve of the other's grey
    levels explains. So brightness, contrast and gamma do not matter. It is lower where a block of
    _BLOCK pixels differs: the error there counts as a share of the block's own contrast, divided by
    _BLOCK_SHARE. So photos taken a moment apart, in which someone has moved, are not copies, and
    nor are pictures with different words on them.
    """
    if one.digest == other.digest:
        return 1.0
    if one.digest > other.digest:  # the result does not depend on the order of the arguments
        one, other = other, one
    maps = _candidate_maps(one, other)
    if not len(maps):
        return 0.0
    mine, others = one.pixels, other.pixels
    correlations = _correlations(mine, others, maps)
    best = np.argsort(-correlations, kind="stable")[:_FINALISTS]
    if correlations[best[0]] < _LEAST_CORRELATION:
        return 0.0
    maps = _refine(mine, others, maps[best])
    return max(_aligned_similarity(mine, others, each) for each in maps)


def agree(
    boxes: np.ndarray, spectra: np.ndarray, other_boxes: np.ndarray, other_spectra: np.ndarray
) -> np.ndarray:
    """Returns whether rectangles with equal keys may show the same: bool (n,).

    Args:
      boxes: uint8 (n, 4), one rectangle of a photo in each row, as in Fingerprint.rectangles.
      spectra: int8 (n, BITS), of these rectangles.
      other_boxes: uint8 (n, 4), one rectangle of another photo in each row.
      other_spectra: int8 (n, BITS), of these rectangles.
    """
    mine, others = spectra.astype(np.float32)[:, None], other_spectra.astype(np.float32)[:, None]
    alike = correlation(mine, others)[:, 0, 0] > ALIKE
    return alike & overlapping(boxes, other_boxes)


def correlation(spectra: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the correlation of all pairs of spectra in each cell: float32 (c, n, m).

    Args:
      spectra: float32 (c, n, BITS) of small integers, so that the products are exact.
      others: float32 (c, m, BITS).
    """
    norms, other_norms = ((each * each).sum(axis=2) for each in (spectra, others))
    products = spectra @ others.swapaxes(1, 2)
    return products / np.sqrt(norms[:, :, None] * other_norms[:, None, :])


def overlapping(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns whether photos, aligned by boxes uint8 (n, 4), overlap enough: bool (n,)."""
    maps = _maps_of_boxes(boxes, others)
    # Where the sides of the other photo are on this one.
    ends = np.sort((np.arange(2, dtype=np.float32) - maps[:, :, 1:]) / maps[:, :, :1], axis=2)
    inside = np.clip(ends, 0, 1)
    overlap = (inside[:, :, 1] - inside[:, :, 0]).prod(1)
    overlap *= np.minimum(1, np.abs(maps[:, :, 0]).prod(1))
    return overlap >= _LIKELY_OVERLAP


def _maps_of_boxes(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns maps from one photo to the other, float32 (n, 2, 2): scale and shift, of x and y."""
    boxes, others = boxes.astype(np.float32) / 255, others.astype(np.float32) / 255
    scales = (others[:, 2:] - others[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
    return np.stack((scales, others[:, :2] - scales * boxes[:, :2]), axis=2)


def _candidate_maps(one: Fingerprint, other: Fingerprint) -> np.ndarray:
    """Returns the maps, as `_maps_of_boxes`, of the largest shared rectangles that agree."""
    keys, boxes, spectra = one.rectangles
    other_keys, other_boxes, other_spectra = other.rectangles
    _, mine, others = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    agreed = agree(boxes[mine], spectra[mine], other_boxes[others], other_spectra[others])
    boxes, other_boxes = boxes[mine[agreed]], other_boxes[others[agreed]]
    sides = boxes[:, 2:].astype(np.float32) - boxes[:, :2]
    largest = np.argsort(-np.abs(sides.prod(1)), kind="stable")[:_STARTS]
    return _maps_of_boxes(boxes[largest], other_boxes[largest])


def _places(maps: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps a grid to the other photo.

    Returns:
      x and y (n, grid) on the other photo, and whether they are inside it, float32 (n, y, x).
    """
    x = maps[:, 0, :1] * grid + maps[:, 0, 1:]
    y = maps[:, 1, :1] * grid + maps[:, 1, 1:]
    inside = ((x > 0) & (x < 1))[:, None, :] & ((y > 0) & (y < 1))[:, :, None]
    return x, y, inside.astype(np.float32)


def _sample(planes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolates planes (p, THUMBNAIL, THUMBNAIL) at x (n, w) and y (n, h): (p, n, h, w)."""
    x, y = x * THUMBNAIL - 0.5, y * THUMBNAIL - 0.5
    column = np.clip(x.astype(np.intp), 0, THUMBNAIL - 2)
    row = np.clip(y.astype(np.intp), 0, THUMBNAIL - 2)
    part_x = np.clip(x - column, 0, 1)[:, None, :].astype(np.float32)
    part_y = np.clip(y - row, 0, 1)[:, :, None].astype(np.float32)
    corner = row[:, :, None] * THUMBNAIL + column[:, None, :]
    flat = planes.reshape(len(planes), -1)
    upper = flat[:, corner] * (1 - part_x) + flat[:, corner + 1] * part_x
    corner += THUMBNAIL
    lower = flat[:, corner] * (1 - part_x) + flat[:, corner + 1] * part_x
    return upper * (1 - part_y) + lower * part_y


def _centre(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Subtracts from values their mean over the inside; returns 0 outside."""
    count = inside.sum((1, 2), keepdims=True) + 1e-6
    return (values - (values * inside).sum((1, 2), keepdims=True) / count) * inside


def _correlations(one: np.ndarray, other: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Returns the correlation (n,) of every second pixel with the other photo under each map."""
    x, y, inside = _places(maps, _GRID[::2])
    mine, others = _centre(one[::2, ::2], inside), _centre(_sample(other[None], x, y)[0], inside)
    spread = np.sqrt((mine**2).sum((1, 2)) * (others**2).sum((1, 2)))
    return (mine * others).sum((1, 2)) / (spread + 1)


def _refine(one: np.ndarray, other: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Refines maps (n, 2, 2) by Gauss-Newton steps that reduce the squared error.

    Gain and offset of the grey levels are free.
    """
    down, across = np.gradient(other)
    planes = np.stack((other, across * THUMBNAIL, down * THUMBNAIL))
    ridge = np.eye(6, dtype=np.float32)
    for _ in range(_STEPS):
        x, y, inside = _places(maps, _GRID)
        levels, across, down = _sample(planes, x, y)
        mine, others = _centre(one, inside), _centre(levels, inside)
        gain = (mine * others).sum((1, 2)) / ((others**2).sum((1, 2)) + 1e-6)
        gain = gain[:, None, None]
        slopes = [gain * across * _GRID, gain * across, gain * down * _GRID[:, None], gain * down]
        slopes += [levels, np.ones_like(levels)]
        jacobian = (np.stack(slopes, axis=3) * inside[..., None]).reshape(len(maps), -1, 6)
        error = (mine - gain * others).reshape(len(maps), -1, 1)
        turned = jacobian.transpose(0, 2, 1)
        normal = turned @ jacobian
        damping = 1e-4 * np.trace(normal, axis1=1, axis2=2) / 6 + 1e-6
        step = np.linalg.solve(normal + damping[:, None, None] * ridge, turned @ error)
        step = np.clip(step[:, :4, 0], -_LONGEST_STEP, _LONGEST_STEP)
        maps = maps + step.reshape(-1, 2, 2)
    return maps


def _aligned_similarity(one: np.ndarray, other: np.ndarray, place: np.ndarray) -> float:
    """Returns the similarity of two thumbnails, with `other` aligned to `one` by a map (2, 2)."""
    x, y = (scale * _GRID + shift for scale, shift in place)
    columns, rows = ((each > _RING) & (each < 1 - _RING) for each in (x, y))
    columns[[0, -1]] = rows[[0, -1]] = False
    sizes = np.abs(place[:, 0])
    overlap = float(columns.mean() * rows.mean() * min(1.0, sizes.prod()))
    if overlap < _LEAST_OVERLAP or min(columns.sum(), rows.sum()) < 2 * _BLOCK:
        return 0.0
    for axis, size in ((1, sizes[0]), (0, sizes[1])):
        # A crop that was stretched to the thumbnail's size is the sharper of the two: soften it.
        if size < 1:
            one = _soften(one, axis, _BLUR_VARIANCE * (1 / size**2 - 1))
        else:
            other = _soften(other, axis, _BLUR_VARIANCE * (size**2 - 1))
    aligned = _sample(other[None], x[None, columns], y[None, rows])[0, 0]
    mine = one[np.ix_(rows, columns)]
    if min(mine.var(), aligned.var()) < _LEAST_VARIANCE:
        return 0.0
    # If one is clipped at white, its levels follow from the other's, but not the reverse.
    return max(_explained_share(mine, aligned), _explained_share(aligned, mine))


def _explained_share(seen: np.ndarray, source: np.ndarray) -> float:
    """Returns the share of `seen` that `source` explains, overall and in every block."""
    levels = (source - source.mean()) / source.std()
    powers = np.stack((np.ones_like(levels), levels, levels**2, levels**3), axis=2).reshape(-1, 4)
    curve = np.linalg.lstsq(powers.astype(np.float64), seen.ravel(), rcond=None)[0]
    error = (seen - (powers @ curve).reshape(seen.shape)) ** 2
    variance = float(seen.var())
    contrast = np.maximum(_variances(seen), _variances(levels) * variance)
    worst = (_means(error) / (contrast + _LEAST_CONTRAST * variance)).max()
    return max(0.0, 1 - max(float(error.mean()) / variance, float(worst) / _BLOCK_SHARE))


def _soften(levels: np.ndarray, axis: int, variance: float) -> np.ndarray:
    """Blurs levels along an axis by `variance` pixels squared, at most 2/3 with its three taps."""
    side = min(variance / 2, 1 / 3)
    levels = levels.swapaxes(0, axis)
    padded = np.concatenate((levels[:1], levels, levels[-1:]))
    return ((1 - 2 * side) * levels + side * (padded[:-2] + padded[2:])).swapaxes(0, axis)


def _means(levels: np.ndarray) -> np.ndarray:
    """Returns the mean of each block of _BLOCK x _BLOCK pixels, at every start."""
    sums = np.zeros((levels.shape[0] + 1, levels.shape[1] + 1))
    sums[1:, 1:] = levels.cumsum(0, dtype=np.float64).cumsum(1)
    rows = sums[_BLOCK:] - sums[:-_BLOCK]
    return (rows[:, _BLOCK:] - rows[:, :-_BLOCK]) / _BLOCK**2


def _variances(levels: np.ndarray) -> np.ndarray:
    """Returns the variance of each block of _BLOCK x _BLOCK pixels, at every start."""
    levels = levels - levels.mean()
    return np.maximum(_means(levels**2) - _means(levels) ** 2, 0)
