"""Who meets whom: a band holds a row of each photo that has one key, and some of its rows meet.

In a band of at most CELL rows all are compared. A larger one, as there are among many millions of
photos, is cut into cells of at most CELL rows that are alike, PASSES times anew. Each cut halves a
group of rows by where they lie between two of them, drawn at random (a random projection tree,
Dasgupta and Freund 2008). Copies differ far less from each other than strangers do who share a key,
so few cuts part them, and those of another pass do not. Over all passes a row keeps its NEAREST.

Spectra are small integers, so products of them are exact: what is found depends neither on the
order of rows nor on the machine.
"""

from collections.abc import Iterator

import numpy as np

from hashvision.duplicates import alignment
from hashvision.duplicates.fingerprints import BITS, SPECTRUM, Fingerprint, unpack_spectra

# All measured by tests/bench/bands.py on bands of a million rows.
CELL = 256
PASSES = 8
NEAREST = 4  # posts before it that a row of a large band may meet, and photos of lower rank

REMOVED, EVALUATION, POST = range(3)  # ranks: what no post may show comes before the posts
ORDER = 8  # bytes of an order that a row holds
_WHERE = [("file", "<u8"), ("offset", "<u4")]  # of a photo's fingerprint in the spool
_STANDING = [("rank", "u1"), ("order", "<u8")]
# Equal bytes make a band too: its rows have no box, and the digest in place of a spectrum.
ROW = np.dtype(
    [("band", "<u4"), *_STANDING, *_WHERE, ("box", "u1", 4), ("spectrum", "u1", SPECTRUM)]
)
MEETING = np.dtype([("post", _WHERE), ("partner", [*_STANDING, *_WHERE])])
_DIGEST = 16  # bytes
_NOBODY = 255  # the rank of what fills up cells
_PAIRS_AT_ONCE = 1 << 21
_ROWS_AT_ONCE = 1 << 16
_LIKENESS = 24  # bits
_LAST = 2**31 - 1  # the highest number of a row


def rows(print_: Fingerprint, rank: int, order: bytes, file: str, offset: int) -> np.ndarray:
    """The rows of a photo, ROW (n,): one for its bytes and one for each key.

    Args:
      print_: its fingerprint.
      rank: POST or less.
      order: among photos of that rank; the first ORDER bytes should tell most of them apart.
      file: of the spool in which the fingerprint is, 16 hexadecimal digits.
      offset: in that file, below 2^32.
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
    """Whom each post is compared with, in any order, some several times.

    A post meets photos of lower rank, posts before it, and those whose orders begin with the same
    ORDER bytes. Of equal bytes it meets the first of each rank. In a band of at most CELL rows it
    meets all whose rectangles agree with its own; in a larger one the NEAREST of these with which
    it shared a cell, and as many of lower rank.

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
    """Where runs of rows start whose values are equal, and how long they are: int64 (r,) each."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    starts = np.flatnonzero(new)
    return starts, np.diff(np.append(starts, len(new)))


def _same_bytes(rows: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs int64 (2, n) of posts and the first photos, of each rank, with the same bytes."""
    digests = np.ascontiguousarray(rows["spectrum"][chosen, :_DIGEST]).view("<u8").T
    ranks, orders = rows["rank"][chosen], rows["order"][chosen]
    sort = np.lexsort((orders, ranks, *digests))
    chosen, digests, ranks, orders = chosen[sort], digests[:, sort], ranks[sort], orders[sort]
    starts, sizes = runs(*digests, ranks)
    # Several, where their orders begin alike.
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
    """Pairs int64 (2, n) of posts and partners of one band whose rectangles agree."""
    chosen = chosen[np.argsort(rows["band"][chosen], kind="stable")]
    starts, sizes = runs(rows["band"][chosen])
    size_of = np.repeat(sizes, sizes)
    small = chosen[(size_of > 1) & (size_of <= CELL)]  # most have nobody to meet
    for pairs in _all_pairs(_Cells(rows[small])):
        yield small[pairs]
    for start, size in zip(starts[sizes > CELL], sizes[sizes > CELL], strict=True):
        large = chosen[start : start + size]
        # Of what is equal in all of these it does not matter which comes first.
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
    """Rows of bands, unpacked, which are compared cell by cell; the last is nobody, to fill up."""

    def __init__(self, rows: np.ndarray):
        """Takes ROW (n,)."""
        spectra = unpack_spectra(rows["spectrum"])
        self.bands = rows["band"]
        self.spectra = np.concatenate((spectra, np.ones((1, BITS), np.int8)))
        self.boxes = np.concatenate((rows["box"], np.zeros((1, 4), np.uint8)))
        self.orders = np.append(rows["order"], np.uint64(0))
        self.ranks = np.append(rows["rank"], np.uint8(_NOBODY))

    def likeness(self, cells: np.ndarray) -> np.ndarray:
        """How alike posts are to those whom they may meet, 0 where that is too little.

        Args:
          cells: numbers of rows, int (c, m); those of a cell are compared with each other.

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
        """Which photos overlap, bool (n,), laid upon each other by their rows, int (n,) each."""
        return alignment.overlapping(self.boxes[posts], self.boxes[partners])


def _portions(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Some cells at a time, of equal size, whose pairs fit into memory."""
    most = max(1, _PAIRS_AT_ONCE // cells.shape[1] ** 2)
    return (cells[start : start + most] for start in range(0, len(cells), most))


def _all_pairs(rows: _Cells) -> Iterator[np.ndarray]:
    """Pairs int64 (2, n) of posts and partners in bands of at most CELL rows."""
    starts, sizes = runs(rows.bands)
    for size in np.unique(sizes).tolist():
        for cells in _portions(starts[sizes == size][:, None] + np.arange(size)):
            cell, post, partner = np.nonzero(rows.likeness(cells))
            pairs = np.stack((cells[cell, post], cells[cell, partner]))
            yield pairs[:, rows.overlapping(*pairs)]


def _nearest(rows: _Cells, seed: int) -> np.ndarray:
    """Pairs int64 (2, n) of posts of one band and their NEAREST among those in their cells.

    Posts and photos of lower rank are counted apart.
    """
    kinds = [rows.ranks < POST, rows.ranks == POST]
    best = [np.zeros((len(rows.ranks), NEAREST), np.uint64) for _ in kinds]
    for number in range(PASSES):
        for cells in _portions(_cut(rows, np.random.default_rng((seed, number)))):
            likeness = rows.likeness(cells)
            for kind, known in zip(kinds, best, strict=True):
                which = kind[cells][:, None, :]
                if which.any():
                    _remember(rows, cells, likeness * which, known)
    pairs = []
    for known in best:
        post, place = np.nonzero(known)
        pairs.append(np.stack((post, _LAST - (known[post, place] & np.uint64(_LAST)).astype(int))))
    return np.concatenate(pairs, axis=1)


def _cut(rows: _Cells, random: np.random.Generator) -> np.ndarray:
    """All rows in cells of at most CELL, by halving: int32 (c, m), ascending in each cell."""
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


def _remember(rows: _Cells, cells: np.ndarray, likeness: np.ndarray, known: np.ndarray) -> None:
    """Keeps the NEAREST of those known and those in the same cell.

    Args:
      rows: of the band.
      cells: int (c, m).
      likeness: float32 (c, m, m), 0 for what does not count.
      known: uint64 (n, NEAREST) of each row, to change: the likeness, and below it _LAST less the
        number of the partner, so that of two that are equally alike the first is the greater.
    """
    size = cells.shape[1]
    most = min(size, 2 * NEAREST)  # of which some do not overlap
    scores = np.minimum(likeness * 2**_LIKENESS, 2**_LIKENESS - 1).astype(np.uint32)
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
        | (_LAST - partners).astype(np.uint64),
        np.uint64(0),
    )
    found.sort(axis=2)
    found[:, :, 1:][found[:, :, 1:] == found[:, :, :-1]] = 0  # met before
    found.sort(axis=2)
    known[cells] = found[:, :, -NEAREST:]
