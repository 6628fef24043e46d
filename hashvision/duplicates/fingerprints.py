"""Fingerprints of photos, for the duplicate search: keys that copies share, and a thumbnail.

A copy may be recompressed, rescaled, squeezed, mirrored, cropped, framed, brightened or grey. So
nothing is measured relative to the whole photo, which a crop changes. Instead, each pair of blobs
of the picture (Lowe 2004, section 3) spans a rectangle. Its content is stretched to a square, and
the signs of the square's low frequencies give the key, as in perceptual hashing (Zauner 2010,
section 3.2.1). A crop, a frame or a squeeze moves the rectangles along with the blobs. A change of
grey levels changes the size of a coefficient but seldom its sign. Mirroring inverts known signs.
Photos that share a key and whose rectangles look similar are candidates, and the two rectangles
give the map from one to the other.
"""

import hashlib
import io
import typing

import numpy as np
from PIL import Image

SIDE = 64  # pixels; every photo is squeezed to a square of this side
THUMBNAIL = 32
# Measured on photos of Flickr8k at NOISE 0: a photo shares a key with 7 in 100,000 others. With 44
# bits it is 2 in 100,000, but more copies are lost that are cropped by a tenth on all four sides;
# these settings lose 1 in 30 of them, and fewer blobs and keys (28 and 64) lose 1 in 8.
BITS = 35
BLOBS = 36
KEYS = 96
SHORTEST = 14.0  # side of a rectangle, in pixels of SIDE; smaller ones look too similar
# A coefficient counts as positive above this share of the coefficients' root mean square. At 0, the
# empty fine frequencies of a smooth picture give random bits: of recompressed smooth pictures, 58%
# kept a key. At 0.1 it is 88%, and at 0.2 it is 100%, but different photos share four times as many
# keys.
NOISE = 0.15
FAINTEST = 1.0  # contrast of a blob in grey levels; fainter ones are compression noise
# ... and this share of the picture's standard deviation. Photos of only a horizon or a shadow have
# nothing but noise away from that edge, and must not share keys.
FAINTEST_SHARE = 0.04
FEWEST_BLOBS = (
    6  # pictures with fewer, such as a gradient or a lone mark, are compared by their bytes only
)
# A frame consists of lines whose mean difference from the outermost line's level is at most
# FRAME_NOISE, followed by a line that differs by FRAME_STEP. So a sky that darkens slowly is not a
# frame.
FRAME_NOISE = 8.0
FRAME_STEP = 20.0
_NARROWEST = 32  # pixels; narrower photos are not searched for a frame


def _blur(sigma: float) -> np.ndarray:
    """Returns the matrix that blurs a column, mirrored at its ends: float32 (SIDE, SIDE)."""
    reach = int(4 * sigma + 1)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    places = np.arange(SIDE)[:, None] + np.arange(-reach, reach + 1)
    places = np.where(places % (2 * SIDE) < SIDE, places % SIDE, SIDE - 1 - places % SIDE)
    matrix = np.zeros((SIDE, SIDE))
    np.add.at(matrix, (np.arange(SIDE)[:, None], places), weights / weights.sum())
    return matrix.astype(np.float32)


_FINE, _COARSE = _blur(1.2), _blur(2.4)
# The thumbnail is smooth, so that its pixels hardly depend on where their borders are.
_SHRINK = _blur(1.4).reshape(THUMBNAIL, 2, SIDE).mean(1)
_CELLS = 8
_DCT = np.cos(np.pi * np.outer(np.arange(_CELLS), np.arange(_CELLS) + 0.5) / _CELLS)
_DCT = _DCT.astype(np.float32)
_FREQUENCIES = sorted(
    ((down, across) for down in range(_CELLS) for across in range(_CELLS) if down + across),
    key=lambda frequency: (sum(frequency), frequency),
)[:BITS]
_DOWN, _ACROSS = np.array(_FREQUENCIES).T
_WHITEN = np.hypot(_DOWN, _ACROSS).astype(np.float32)  # photos' amplitudes fall as 1 / frequency
# Six bits per coefficient. Of 175,000 keys that photos of Flickr8k share with their copies, 1 in
# 10,000 agrees with eight bits but not with six, and no copy lost its last key.
_LEVELS = 31  # on either side of 0
_SPECTRUM_UNIT = 1 / 9  # of a level, in root mean squares; levels reach to 3.4 of these
SPECTRUM = -(-6 * BITS // 8)  # bytes
_BIT = np.uint64(1) << np.arange(BITS, dtype=np.uint64)
_SCATTER = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, volume 3, section 6.4)


class Fingerprint(typing.NamedTuple):
    """The fingerprint of a photo, about 4.4 KB, as plain bytes that any worker can read.

    Attributes:
      digest: 16 bytes, BLAKE2b of the file.
      thumbnail: uint8 (THUMBNAIL, THUMBNAIL), the grey picture within its frame, squeezed square.
      keys: uint32 (n,) little-endian, ascending, n <= KEYS; none if the picture holds too little.
      boxes: uint8 (n, 4), each key's rectangle on the thumbnail in 255ths of its side: left, top,
        right, bottom; left and right swapped where the key is of the mirrored picture.
      spectra: uint8 (n, SPECTRUM), the packed coefficients whose signs form the key.
    """

    digest: bytes
    thumbnail: bytes
    keys: bytes
    boxes: bytes
    spectra: bytes

    @property
    def pixels(self) -> np.ndarray:
        """The thumbnail, float32 (THUMBNAIL, THUMBNAIL) in [0, 255]."""
        levels = np.frombuffer(self.thumbnail, np.uint8).astype(np.float32)
        return levels.reshape(THUMBNAIL, THUMBNAIL)

    @property
    def rectangles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys uint32 (n,), their boxes uint8 (n, 4) and their spectra int8 (n, BITS)."""
        boxes = np.frombuffer(self.boxes, np.uint8).reshape(-1, 4)
        spectra = np.frombuffer(self.spectra, np.uint8).reshape(-1, SPECTRUM)
        return np.frombuffer(self.keys, "<u4"), boxes, unpack_spectra(spectra)


def pack_spectra(spectra: np.ndarray) -> np.ndarray:
    """Packs spectra int8 (n, BITS), from -_LEVELS to _LEVELS, into uint8 (n, SPECTRUM)."""
    bits = np.unpackbits((spectra + (_LEVELS + 1)).astype(np.uint8)[:, :, None], axis=2)
    return np.packbits(bits[:, :, 2:].reshape(len(spectra), 6 * BITS), axis=1)


def unpack_spectra(packed: np.ndarray) -> np.ndarray:
    """Unpacks uint8 (n, SPECTRUM) into spectra int8 (n, BITS)."""
    bits = np.zeros((len(packed), BITS, 8), np.uint8)
    bits[:, :, 2:] = np.unpackbits(packed, axis=1, count=6 * BITS).reshape(-1, BITS, 6)
    return np.packbits(bits, axis=2)[:, :, 0].astype(np.int8) - np.int8(_LEVELS + 1)


def fingerprint(image: bytes) -> Fingerprint:
    """Returns the fingerprint of a JPEG file of any size, a pure function of its bytes."""
    picture = _picture(image)
    thumbnail = _SHRINK @ picture @ _SHRINK.T
    keys, boxes, spectra = _keys(picture)
    return Fingerprint(
        digest=hashlib.blake2b(image, digest_size=16).digest(),
        thumbnail=np.clip(np.rint(thumbnail), 0, 255).astype(np.uint8).tobytes(),
        keys=keys.astype("<u4").tobytes(),
        boxes=np.rint(boxes * (255 / SIDE)).astype(np.uint8).tobytes(),
        spectra=pack_spectra(_quantised(spectra)).tobytes(),
    )


def _quantised(spectra: np.ndarray) -> np.ndarray:
    levels = np.rint(spectra / _SPECTRUM_UNIT)
    return np.clip(levels, -_LEVELS, _LEVELS).astype(np.int8)


def _picture(image: bytes) -> np.ndarray:
    """Returns the grey levels within the photo's frame, float32 (SIDE, SIDE)."""
    with Image.open(io.BytesIO(image), formats=("JPEG",)) as file:
        file.draft("L", (2 * SIDE, 2 * SIDE))  # decodes only the resolution needed, and only grey
        grey = file.convert("L")
    levels = np.asarray(grey, np.float32)
    left, top, right, bottom = 0, 0, grey.width, grey.height
    for _ in range(2):  # a frame may have a frame
        inner = levels[top:bottom, left:right]
        rows, columns = inner, inner.T
        top, bottom = top + _frame(rows), bottom - _frame(rows[::-1])
        left, right = left + _frame(columns), right - _frame(columns[::-1])
    box = (left, top, right, bottom)
    small = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
    return np.asarray(small, np.float32)


def _frame(lines: np.ndarray) -> int:
    """Returns how many of the first lines, float32 (lines, length), are a frame; 0 without one."""
    if len(lines) < _NARROWEST:
        return 0
    outer = lines[: len(lines) // 5 + 3]
    off = np.abs(outer - np.median(outer[0])).mean(1)
    width = int(np.argmax(off > FRAME_NOISE))
    if not width or off[width : width + 2].max() < FRAME_STEP:
        return 0
    return width + 1  # includes the line in which frame and picture mix


def _blobs(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the BLOBS strongest extrema of the difference of Gaussians.

    Returns:
      x and y in pixels, and whether the blob is light; (n,) each.
    """
    response = _FINE @ picture @ _FINE.T - _COARSE @ picture @ _COARSE.T
    centre = response[1:-1, 1:-1]
    sign, strength = np.sign(centre), np.abs(centre)
    extreme = strength > max(FAINTEST, FAINTEST_SHARE * picture.std())
    for down in (0, 1, 2):
        for across in (0, 1, 2):
            if (down, across) != (1, 1):
                beside = response[down : down + SIDE - 2, across : across + SIDE - 2]
                extreme &= (centre - beside) * sign > 0
    extreme[[0, -1]] = extreme[:, [0, -1]] = False  # a blob at the edge may extend beyond it
    y, x = np.nonzero(extreme)
    chosen = np.argsort(-strength[y, x], kind="stable")[:BLOBS]
    y, x = y[chosen] + 1, x[chosen] + 1
    peak = response[y, x]
    above, below = response[y - 1, x], response[y + 1, x]
    before, behind = response[y, x - 1], response[y, x + 1]
    # The vertex of the parabola through three pixels. The peak is strict, so no divisor is 0.
    shift_x = np.clip((before - behind) / (before + behind - 2 * peak) / 2, -0.5, 0.5)
    shift_y = np.clip((above - below) / (above + below - 2 * peak) / 2, -0.5, 0.5)
    return x + 0.5 + shift_x, y + 0.5 + shift_y, peak > 0


def _keys(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns keys uint32 (n,), ascending, boxes float (n, 4) in pixels, spectra (n, BITS)."""
    x, y, light = _blobs(picture)
    one, other = np.triu_indices(len(x), 1)
    apart = (np.abs(x[one] - x[other]) >= SHORTEST) & (np.abs(y[one] - y[other]) >= SHORTEST)
    one, other = one[apart], other[apart]
    if len(x) < FEWEST_BLOBS or not len(one):
        return np.zeros(0, np.uint32), np.zeros((0, 4)), np.zeros((0, BITS))
    upper, lower = np.where(y[one] < y[other], (one, other), (other, one))
    left, right = np.minimum(x[one], x[other]), np.maximum(x[one], x[other])
    spectra = _spectra(picture, left, right, y[upper], y[lower])
    # A picture and its mirror image share the key of the one whose upper blob is on the left.
    spectra[np.ix_(x[upper] > x[lower], _ACROSS % 2 == 1)] *= -1
    spectra /= np.sqrt((spectra**2).mean(1, keepdims=True))
    # Keep the keys least likely to change: their weakest coefficients are farthest from NOISE.
    weakest = np.partition(np.abs(spectra - NOISE), 2, axis=1)[:, :3].sum(1)
    chosen = np.argsort(-weakest, kind="stable")[:KEYS]
    upper, lower, spectra = upper[chosen], lower[chosen], spectra[chosen]
    signs = np.bitwise_or.reduce(np.where(spectra > NOISE, _BIT, np.uint64(0)), axis=1)
    codes = signs << np.uint64(2) | light[upper] * np.uint64(2) | light[lower]
    keys = ((codes * _SCATTER) >> np.uint64(32)).astype(np.uint32)
    boxes = np.stack((x[upper], y[upper], x[lower], y[lower]), axis=1)
    keys, first = np.unique(keys, return_index=True)
    return keys, boxes[first], spectra[first]


def _spectra(
    picture: np.ndarray, left: np.ndarray, right: np.ndarray, top: np.ndarray, bottom: np.ndarray
) -> np.ndarray:
    """Returns whitened DCT coefficients, float (n, BITS), of n rectangles averaged to 8x8 cells.

    The corners of cells are between pixels, so their sums are interpolated in the integral image.
    """
    integral = np.zeros((SIDE + 1, SIDE + 1), np.float32)
    integral[1:, 1:] = (picture - picture.mean()).cumsum(0).cumsum(1)
    steps = np.arange(_CELLS + 1) / _CELLS
    x = left[:, None] + (right - left)[:, None] * steps
    y = top[:, None] + (bottom - top)[:, None] * steps
    column, row = x.astype(np.intp), y.astype(np.intp)
    part_x, part_y = (x - column)[:, None, :], (y - row)[:, :, None]
    corner = row[:, :, None] * (SIDE + 1) + column[:, None, :]
    sums = integral.ravel()
    upper = sums[corner] * (1 - part_x) + sums[corner + 1] * part_x
    corner += SIDE + 1
    lower = sums[corner] * (1 - part_x) + sums[corner + 1] * part_x
    cells = np.diff(np.diff(upper * (1 - part_y) + lower * part_y, axis=1), axis=2)
    cells /= ((right - left) * (bottom - top))[:, None, None]
    return (_DCT @ cells @ _DCT.T)[:, _DOWN, _ACROSS] * _WHITEN
