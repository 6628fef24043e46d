"""How alike two photos are once one is laid upon the other, by their fingerprints alone.

Each key in common says how the other photo may lie on the one: shifted, scaled in each direction
and maybe mirrored; two rectangles that look different, or photos that would hardly overlap, say
nothing. The best of these are refined by Gauss-Newton steps (Lucas and Kanade 1981;
Baker and Matthews 2004, section 2), and the two photos are compared where they overlap.
"""

import numpy as np

from hashvision.duplicates.fingerprints import THUMBNAIL, Fingerprint

# Two rectangles agree whose spectra correlate so well and whose photos, laid upon each other by
# them, overlap as much (less than in the end, for a rectangle is known to a pixel of SIDE). Of
# 4,763 pairs of edits of Flickr8k with a key in common none lost its last, and 317 copies none; of
# 2,463 pairs that are no copies 78 still had one.
ALIKE = 0.95
_LIKELY_OVERLAP = 0.4
# Measured on Flickr8k. Of 7,161 photos, 4,542 pairs had a key in common: 353 with a similarity
# above 0.97, every one a copy when looked at, and 4,189 below 0.7. Of 20 kinds of edit (200 photos
# each) all but one, 96, kept 98 in 100 or more above 0.95; but so are 16 in 100 pairs of memes
# with different words on one photo, 51 at 0.9, and 1 in 100 photos into which something as large
# as a fifth of the width was pasted, 5 at 0.9.
DUPLICATE = 0.95
_STARTS = 8  # keys in common that are tried, those of the largest rectangles
_FINALISTS = 2  # of these are refined
_STEPS = 4
_UNLIKE = 0.6  # correlation before refining; copies had 0.7, of other candidates 6 in 7 had less
_LEAST_OVERLAP = 0.5  # of either photo; copies cropped by a tenth on all four sides have 0.6
_LONGEST_STEP = 0.1
_BLOCK = 4  # pixels: the smallest thing that, when it differs, makes two photos different
_BLOCK_SHARE = 8.0
_LEAST_CONTRAST = 0.1
_LEAST_VARIANCE = 9.0  # grey levels squared; below, a picture is flat and all flat ones are alike
_BLUR_VARIANCE = 1.0  # of a thumbnail, in pixels squared
_RING = 1.0 / THUMBNAIL  # the outermost pixels mix with the frame
_GRID = ((np.arange(THUMBNAIL) + 0.5) / THUMBNAIL).astype(np.float32)


def similarity(one: Fingerprint, other: Fingerprint) -> float:
    """How alike two photos are, from 0 to 1; from DUPLICATE on they are copies of one photo.

    The share of the variance that a cubic curve of the other's grey levels explains, which forgives
    brightness, contrast and gamma; or less where a block of _BLOCK pixels differs: there the error
    counts as a share of the block's own contrast, over _BLOCK_SHARE. So photos taken a moment
    apart, in which someone has moved, and pictures with different words on them, are not alike.
    """
    if one.digest == other.digest:
        return 1.0
    if one.digest > other.digest:  # whether two are copies does not depend on who is asked
        one, other = other, one
    maps = _maps(one, other)
    if not len(maps):
        return 0.0
    mine, others = one.pixels, other.pixels
    likeness = _correlations(mine, others, maps)
    best = np.argsort(-likeness, kind="stable")[:_FINALISTS]
    if likeness[best[0]] < _UNLIKE:
        return 0.0
    maps = _refine(mine, others, maps[best])
    return max(_explained(mine, others, each) for each in maps)


def agree(
    boxes: np.ndarray, spectra: np.ndarray, other_boxes: np.ndarray, other_spectra: np.ndarray
) -> np.ndarray:
    """Whether rectangles of equal keys may show the same: boolean (n,).

    Args:
      boxes: of one photo each, as Fingerprint.rectangles has them: uint8 (n, 4).
      spectra: int8 (n, BITS).
      other_boxes: of another photo each, uint8 (n, 4).
      other_spectra: int8 (n, BITS).
    """
    mine, others = spectra.astype(np.float32)[:, None], other_spectra.astype(np.float32)[:, None]
    alike = correlation(mine, others)[:, 0, 0] > ALIKE
    return alike & overlapping(boxes, other_boxes)


def correlation(spectra: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How alike all spectra of a cell are to all others of it: float32 (c, n, m).

    Args:
      spectra: float32 (c, n, BITS) of small integers, so that the products are exact.
      others: float32 (c, m, BITS).
    """
    norms, other_norms = ((each * each).sum(axis=2) for each in (spectra, others))
    products = spectra @ others.swapaxes(1, 2)
    return products / np.sqrt(norms[:, :, None] * other_norms[:, None, :])


def overlapping(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether photos overlap by _LIKELY_OVERLAP, laid upon each other by boxes uint8 (n, 4)."""
    maps = _laid(boxes, others)
    # Where the other photo's sides come to lie on the one.
    ends = np.sort((np.arange(2, dtype=np.float32) - maps[:, :, 1:]) / maps[:, :, :1], axis=2)
    inside = np.clip(ends, 0, 1)
    overlap = (inside[:, :, 1] - inside[:, :, 0]).prod(1)
    overlap *= np.minimum(1, np.abs(maps[:, :, 0]).prod(1))
    return overlap >= _LIKELY_OVERLAP


def _laid(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Float32 (n, 2, 2): scale and shift, of x and of y, from places on one to the other's."""
    boxes, others = boxes.astype(np.float32) / 255, others.astype(np.float32) / 255
    scales = (others[:, 2:] - others[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
    return np.stack((scales, others[:, :2] - scales * boxes[:, :2]), axis=2)


def _maps(one: Fingerprint, other: Fingerprint) -> np.ndarray:
    """Float32 (n, 2, 2), as `_laid`, by the largest of the keys in common that agree."""
    keys, boxes, spectra = one.rectangles
    other_keys, other_boxes, other_spectra = other.rectangles
    _, mine, others = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    agreed = agree(boxes[mine], spectra[mine], other_boxes[others], other_spectra[others])
    boxes, other_boxes = boxes[mine[agreed]], other_boxes[others[agreed]]
    sides = boxes[:, 2:].astype(np.float32) - boxes[:, :2]
    largest = np.argsort(-np.abs(sides.prod(1)), kind="stable")[:_STARTS]
    return _laid(boxes[largest], other_boxes[largest])


def _places(maps: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X and y (n, grid) on the other photo, and whether there is photo there, float32 (n, y, x)."""
    x = maps[:, 0, :1] * grid + maps[:, 0, 1:]
    y = maps[:, 1, :1] * grid + maps[:, 1, 1:]
    inside = ((x > 0) & (x < 1))[:, None, :] & ((y > 0) & (y < 1))[:, :, None]
    return x, y, inside.astype(np.float32)


def _sample(planes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Planes (p, THUMBNAIL, THUMBNAIL) at grids of x (n, w) and y (n, h): (p, n, h, w)."""
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
    """Values less their mean over what is inside, 0 elsewhere."""
    count = inside.sum((1, 2), keepdims=True) + 1e-6
    return (values - (values * inside).sum((1, 2), keepdims=True) / count) * inside


def _correlations(one: np.ndarray, other: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Correlation (n,) of every second pixel with what the maps lay upon it."""
    x, y, inside = _places(maps, _GRID[::2])
    mine, others = _centre(one[::2, ::2], inside), _centre(_sample(other[None], x, y)[0], inside)
    spread = np.sqrt((mine**2).sum((1, 2)) * (others**2).sum((1, 2)))
    return (mine * others).sum((1, 2)) / (spread + 1)


def _refine(one: np.ndarray, other: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Gauss-Newton steps towards the least squared error, gain and offset of grey levels free."""
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


def _explained(one: np.ndarray, other: np.ndarray, place: np.ndarray) -> float:
    """The similarity of two thumbnails, other laid on one by a map (2, 2)."""
    x, y = (scale * _GRID + shift for scale, shift in place)
    columns, rows = ((each > _RING) & (each < 1 - _RING) for each in (x, y))
    columns[[0, -1]] = rows[[0, -1]] = False
    sizes = np.abs(place[:, 0])
    overlap = float(columns.mean() * rows.mean() * min(1.0, sizes.prod()))
    if overlap < _LEAST_OVERLAP or min(columns.sum(), rows.sum()) < 2 * _BLOCK:
        return 0.0
    for axis, size in ((1, sizes[0]), (0, sizes[1])):
        # A crop stretched to the thumbnail's size is the sharper of the two.
        if size < 1:
            one = _soften(one, axis, _BLUR_VARIANCE * (1 / size**2 - 1))
        else:
            other = _soften(other, axis, _BLUR_VARIANCE * (size**2 - 1))
    laid = _sample(other[None], x[None, columns], y[None, rows])[0, 0]
    mine = one[np.ix_(rows, columns)]
    if min(mine.var(), laid.var()) < _LEAST_VARIANCE:
        return 0.0
    # Where one is clipped at white, its levels follow from the other's but not the reverse.
    return max(_unaltered(mine, laid), _unaltered(laid, mine))


def _unaltered(seen: np.ndarray, source: np.ndarray) -> float:
    """How much of `seen` is a function of `source`'s grey levels, as a whole and in every block."""
    levels = (source - source.mean()) / source.std()
    powers = np.stack((np.ones_like(levels), levels, levels**2, levels**3), axis=2).reshape(-1, 4)
    curve = np.linalg.lstsq(powers.astype(np.float64), seen.ravel(), rcond=None)[0]
    error = (seen - (powers @ curve).reshape(seen.shape)) ** 2
    variance = float(seen.var())
    contrast = np.maximum(_variances(seen), _variances(levels) * variance)
    worst = (_means(error) / (contrast + _LEAST_CONTRAST * variance)).max()
    return max(0.0, 1 - max(float(error.mean()) / variance, float(worst) / _BLOCK_SHARE))


def _soften(levels: np.ndarray, axis: int, variance: float) -> np.ndarray:
    """Levels blurred along an axis by `variance` pixels squared, as far as three taps can."""
    side = min(variance / 2, 1 / 3)
    levels = levels.swapaxes(0, axis)
    padded = np.concatenate((levels[:1], levels, levels[-1:]))
    return ((1 - 2 * side) * levels + side * (padded[:-2] + padded[2:])).swapaxes(0, axis)


def _means(levels: np.ndarray) -> np.ndarray:
    """Mean over each block of _BLOCK x _BLOCK pixels, wherever it starts."""
    sums = np.zeros((levels.shape[0] + 1, levels.shape[1] + 1))
    sums[1:, 1:] = levels.cumsum(0, dtype=np.float64).cumsum(1)
    rows = sums[_BLOCK:] - sums[:-_BLOCK]
    return (rows[:, _BLOCK:] - rows[:, :-_BLOCK]) / _BLOCK**2


def _variances(levels: np.ndarray) -> np.ndarray:
    """Variance within each such block."""
    levels = levels - levels.mean()
    return np.maximum(_means(levels**2) - _means(levels) ** 2, 0)
