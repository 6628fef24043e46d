"""Which photos are compared: a band holds one row of each photo with one key, and pairs its rows.

In a band of at most CELL rows, all pairs are compared. Larger bands occur among many millions of
photos. They are cut into cells of at most CELL similar rows, PASSES times with different cuts. Each
cut halves a group of rows along the line through two of them, drawn at random (a random projection
tree, Dasgupta and Freund 2008). Copies differ far less from each other than other photos that share
a key. So few cuts separate them, and the cuts of another pass do not. A row keeps its NEAREST
partners over all passes.

Spectra are small integers, so their products are exact. The result depends neither on the order of
the rows nor on the machine.
"""

from collections.abc import Iterator

import numpy as np

from hashvision.duplicates import alignment
from hashvision.duplicates.fingerprints import BITS, SPECTRUM, Fingerprint, unpack_spectra

# Measured with tests/bench/bands.py on bands of a million rows.
CELL = 256
PASSES = 8
# In a large band a row meets at most so many earlier posts, and as many photos of lower rank.
NEAREST = 4

REMOVED, EVALUATION, POST = range(3)  # ranks: photos that no post may show come before the posts
ORDER = 8  # bytes of an order that a row holds
_LOCATION = [("file", "<u8"), ("offset", "<u4")]  # of a photo's fingerprint in the spool
_POSITION = [("rank", "u1"), ("order", "<u8")]
# Photos with equal bytes form a band too, whose rows have no box and the digest as spectrum.
ROW = np.dtype(
    [("band", "<u4"), *_POSITION, *_LOCATION, ("box", "u1", 4), ("spectrum", "u1", SPECTRUM)]
)
MEETING = np.dtype([("post", _LOCATION), ("partner", [*_POSITION, *_LOCATION])])
_DIGEST = 16  # bytes
_PADDING = 255  # the rank of the row that fills up cells
_PAIRS_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 1 << 16
_CORRELATION_BITS = 24
_LARGEST_ROW = 2**31 - 1  # the highest number of a row


def rows(print_: Fingerprint, rank: int, order: bytes, file: str, offset: int) -> np.ndarray:
    """Returns the rows of a photo, ROW (n,): one for its bytes and one for each key.

    Args:
      print_: its fingerprint.
      rank: REMOVED, EVALUATION or POST.
      order: of the photo among those of its rank; the first ORDER bytes should differ for most.
      file: name of the spool file with the fingerprint, 16 hexadecimal digits.
      offset: of the fingerprint in that file, below 2^32.
    """
    keys, boxes, _ = print_.rectangles
    made = np.zeros(1 + len(keys), ROW)
    made["band"][0] = np.frombuffer(print_.digest, "<u4", 1)[0]
    made["spectrum"][0, :_DIGEST] = np.frombuffer(print_.digest, np.uint8)
    made["band"][1:], made["box"][1:] = keys, boxes
    made["spectrum"][1:] = np.frombuffer(print_.spectra, np.uint8).reshape(-1, SPECTRUM)
    made["rank"], made["order"] = rank, int.from_bytes(order[:ORDER].ljust(ORDER, b"\0"), "big")
    made["file"], made["offset"] = int(file, 16), offset
    return made


def meetings(rows: np.ndarray) -> np.ndarray:
    """Returns the pairs to compare, in any order; a pair may occur several times.

    A post meets photos of lower rank, earlier posts, and posts whose orders begin with the same
    ORDER bytes. Among photos with its own bytes, it meets the first of each rank. In a band of at
    most CELL rows, it meets all photos whose rectangles agree with its own. In a larger band, it
    meets the NEAREST of those with which it shared a cell, and as many of lower rank.

    Args:
      rows: all rows of some bands, ROW (n,), in any order.

    Returns:
      MEETING (m,).
    """
    whole = ~rows["box"].any(axis=1)
    pairs = [*_same_bytes(rows, np.flatnonzero(whole)), *_agreeing(rows, np.flatnonzero(~whole))]
    post, partner = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
    met = np.empty(len(post), MEETING)
    for field, places in (("post", post), ("partner", partner)):
        for name in MEETING[field].names or ():
            met[field][name] = rows[name][places]
    return met


def runs(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds runs of rows with equal values: their starts and lengths, int64 (r,) each."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    starts = np.flatnonzero(new)
    return starts, np.diff(np.append(starts, len(new)))


def _same_bytes(rows: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Yields pairs int64 (2, n) of posts and the first photos of each rank with the same bytes."""
    digests = np.ascontiguousarray(rows["spectrum"][chosen, :_DIGEST]).view("<u8").T
    ranks, orders = rows["rank"][chosen], rows["order"][chosen]
    sort = np.lexsort((orders, ranks, *digests))
    chosen, digests, ranks, orders = chosen[sort], digests[:, sort], ranks[sort], orders[sort]
    starts, sizes = runs(*digests, ranks)
    # Several photos are first if their orders begin with the same bytes.
    first = np.flatnonzero(orders == np.repeat(orders[starts], sizes))
    starts, sizes = runs(*digests)
    group = np.repeat(np.arange(len(starts)), sizes)
    begin = np.searchsorted(group[first], np.arange(len(starts) + 1))
    posts = np.flatnonzero(ranks == POST)
    for number in range(max(np.diff(begin), default=0)):
        posts = posts[begin[group[posts]] + number < begin[group[posts] + 1]]
        partners = first[begin[group[posts]] + number]
        yield np.stack((chosen[posts], chosen[partners]))[:, posts != partners]


def _agreeing(rows: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Yields pairs int64 (2, n) of posts and partners of one band whose rectangles agree."""
    chosen = chosen[np.argsort(rows["band"][chosen], kind="stable")]
    starts, sizes = runs(rows["band"][chosen])
    size_of = np.repeat(sizes, sizes)
    small = chosen[(size_of > 1) & (size_of <= CELL)]  # most bands have one row
    for pairs in _all_pairs(_Cells(rows[small])):
        yield small[pairs]
    for start, size in zip(starts[sizes > CELL], sizes[sizes > CELL], strict=True):
        large = chosen[start : start + size]
        # Rows that are equal in all of these fields are interchangeable.
        fields = rows[large]
        sort = np.lexsort(
            (
                fields["spectrum"].copy().view(f"S{SPECTRUM}")[:, 0],
                fields["box"].copy().view("<u4")[:, 0],
                fields["order"],
                fields["rank"],
            )
        )
        yield large[sort][_nearest(_Cells(fields[sort]), int(fields["band"][0]))]


class _Cells:
    """Unpacked rows of bands, which are compared cell by cell; the last row is padding."""

    def __init__(self, rows: np.ndarray):
        """Takes ROW (n,)."""
        spectra = unpack_spectra(rows["spectrum"])
        self.bands = rows["band"]
        self.spectra = np.concatenate((spectra, np.ones((1, BITS), np.int8)))
        self.boxes = np.concatenate((rows["box"], np.zeros((1, 4), np.uint8)))
        self.orders = np.append(rows["order"], np.uint64(0))
        self.ranks = np.append(rows["rank"], np.uint8(_PADDING))

    def correlations(self, cells: np.ndarray) -> np.ndarray:
        """Returns the correlation of posts with partners that they may meet; 0 below ALIKE.

        Args:
          cells: numbers of rows, int (c, m); the rows of a cell are compared with each other.

        Returns:
          float32 (c, m, m): cell, post, partner.
        """
        spectra = self.spectra[cells].astype(np.float32)
        found = alignment.correlation(spectra, spectra)
        ranks, orders = self.ranks[cells], self.orders[cells]
        may = (orders[:, None, :] <= orders[:, :, None]) & (ranks == POST)[:, None, :]
        may |= (ranks < POST)[:, None, :]
        may &= (ranks == POST)[:, :, None] & ~np.eye(cells.shape[1], dtype=bool)
        return np.where(may & (found > alignment.ALIKE), found, np.float32(0))

    def overlapping(self, posts: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Returns which photos overlap, bool (n,), when aligned by their rows, int (n,) each."""
        return alignment.overlapping(self.boxes[posts], self.boxes[partners])


def _batches(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Yields some of the cells (c, m) at a time, whose pairs fit in memory."""
    most = max(1, _PAIRS_AT_ONCE // cells.shape[1] ** 2)
    return (cells[start : start + most] for start in range(0, len(cells), most))


def _all_pairs(rows: _Cells) -> Iterator[np.ndarray]:
    """Yields pairs int64 (2, n) of posts and partners in bands of at most CELL rows."""
    starts, sizes = runs(rows.bands)
    for size in np.unique(sizes).tolist():
        for cells in _batches(starts[sizes == size][:, None] + np.arange(size)):
            cell, post, partner = np.nonzero(rows.correlations(cells))
            pairs = np.stack((cells[cell, post], cells[cell, partner]))
            yield pairs[:, rows.overlapping(*pairs)]


def _nearest(rows: _Cells, seed: int) -> np.ndarray:
    """Returns pairs int64 (2, n) of one band's posts and their NEAREST partners in their cells.

    Posts and photos of lower rank are counted separately.
    """
    kinds = [rows.ranks < POST, rows.ranks == POST]
    best = [np.zeros((len(rows.ranks), NEAREST), np.uint64) for _ in kinds]
    for number in range(PASSES):
        for cells in _batches(_cut(rows, np.random.default_rng((seed, number)))):
            correlations = rows.correlations(cells)
            for kind, known in zip(kinds, best, strict=True):
                which = kind[cells][:, None, :]
                if which.any():
                    _update_nearest(rows, cells, correlations * which, known)
    pairs = []
    for known in best:
        post, place = np.nonzero(known)
        partner = _LARGEST_ROW - (known[post, place] & np.uint64(_LARGEST_ROW)).astype(int)
        pairs.append(np.stack((post, partner)))
    return np.concatenate(pairs, axis=1)


def _cut(rows: _Cells, random: np.random.Generator) -> np.ndarray:
    """Cuts all rows into cells of at most CELL by halving: int32 (c, m), ascending in each cell."""
    number = len(rows.ranks) - 1
    halvings = (-(-number // CELL) - 1).bit_length()
    cells = np.full((1, -(-number // 2**halvings) << halvings), number, np.int32)
    cells[0, :number] = np.arange(number)
    for _ in range(halvings):
        groups, size = cells.shape
        ends = random.integers((0, 1), size, (groups, 2)).cumsum(axis=1) % size
        one, other = (
            rows.spectra[np.take_along_axis(cells, ends, 1)].astype(np.float32).swapaxes(0, 1)
        )
        direction = one - other
        places = np.empty(cells.size, np.float32)
        for start in range(0, len(places), _ROWS_AT_ONCE):
            some = np.arange(start, min(start + _ROWS_AT_ONCE, len(places)))
            spectra = rows.spectra[cells.ravel()[some]].astype(np.float32)
            places[some] = np.einsum("ij,ij->i", spectra, direction[some // size])
        sort = np.argsort(places.reshape(groups, size), axis=1, kind="stable")
        cells = np.take_along_axis(cells, sort, 1).reshape(2 * groups, size // 2)
    return np.sort(cells, axis=1)


def _update_nearest(
    rows: _Cells, cells: np.ndarray, correlations: np.ndarray, known: np.ndarray
) -> None:
    """Updates each row's NEAREST partners with those in its cell.

    Args:
      rows: of the band.
      cells: int (c, m).
      correlations: float32 (c, m, m), 0 for pairs that do not count.
      known: uint64 (n, NEAREST) for each row, changed in place. The high bits are the correlation
        and the low bits _LARGEST_ROW minus the partner's number, so that of two equal correlations
        that of the first partner is the greater.
    """
    size = cells.shape[1]
    most = min(size, 2 * NEAREST)  # some of these do not overlap
    scale = 2**_CORRELATION_BITS
    scores = np.minimum(correlations * scale, scale - 1).astype(np.uint32)
    scores = scores << np.uint32(8) | np.arange(size)[::-1].astype(np.uint32)
    scores = np.partition(scores, size - most, axis=2)[:, :, size - most :]
    cell, post, place = np.nonzero(scores >> np.uint32(8))
    score = scores[cell, post, place]
    posts = cells[cell, post]
    partners = cells[cell, size - 1 - (score & np.uint32(255))]
    found = np.zeros((len(cells), size, NEAREST + most), np.uint64)
    found[:, :, :NEAREST] = known[cells]
    found[cell, post, NEAREST + place] = np.where(
        rows.overlapping(posts, partners),
        (score >> np.uint32(8)).astype(np.uint64) << np.uint64(32)
        | (_LARGEST_ROW - partners).astype(np.uint64),
        np.uint64(0),
    )
    found.sort(axis=2)
    found[:, :, 1:][found[:, :, 1:] == found[:, :, :-1]] = 0  # met before
    found.sort(axis=2)
    known[cells] = found[:, :, -NEAREST:]
