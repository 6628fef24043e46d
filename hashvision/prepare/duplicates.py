"""Near-duplicates among the posts, and posts that leak photos of evaluation sets, as a Beam join.

Photos meet in bands, by equal bytes or by a key of their fingerprints whose rectangles agree; those
that meet are compared by the fingerprints alone. A photo has some hundred bands, far too many to be
elements of a PCollection each: they lie in the spool as arrays, cut into as many parts as there is
work for, and what travels is where the arrays lie.

    posts, evaluation > bands (by band) > meetings (by post) > matches
"""

import collections
import io
import os
import struct
import typing
import zlib
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import numpy as np
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from PIL import Image, ImageDraw, ImageFont

from hashvision import storage
from hashvision.errors import UserError
from hashvision.prepare import spool
from hashvision.prepare.alignment import DUPLICATE, agree, similarity
from hashvision.prepare.fingerprints import BITS, THUMBNAIL, Fingerprint, fingerprint
from hashvision.sources import files, pictures

# Photos of one band may meet so many of its first posts, and as many evaluation photos: in a band
# of n photos at most 2 * REPRESENTATIVES * n rectangles are laid upon each other. On 7,161 photos
# of Flickr8k the largest band had 58. Copies in a larger one still meet in any of their others.
REPRESENTATIVES = 64
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

ORDER = 40  # bytes of an order
_PHOTO = [
    ("rank", "u1"),  # 0 of an evaluation photo, 1 of a post: evaluation photos come first
    ("order", f"S{ORDER}"),
    ("file", "S32"),  # where its fingerprint lies
    ("offset", "<u8"),
    ("size", "<u4"),
]
_RECTANGLE = [("box", "u1", 4), ("spectrum", "i1", BITS)]
_BAND = np.dtype([("band", "<u8"), *_PHOTO, *_RECTANGLE])
_MEETING = np.dtype([("post", _PHOTO), ("partner", _PHOTO)])
# Bands of equal bytes are the digest's first 8, with this bit; those of keys have 32 bits.
_DIGEST = np.uint64(1 << 63)
_WHOLE = np.array([((0, 0, 255, 255), 1)], _RECTANGLE)  # what equal bytes have, for all to agree
_SCATTER = np.uint64(0x9E3779B97F4A7C15)
_TOGETHER = 500  # photos whose bands are written at once
_CHUNK = 1 << 16  # pairs of rectangles that are laid upon each other at once
_KNOWN = 4096  # fingerprints that a comparison keeps
_FURTHER = 8  # posts that a post is compared with once it has a match


class Match(typing.NamedTuple):
    """Why a post is dropped."""

    order: bytes
    name: str
    # "removed" where it shows a removed photo, "leak" of an evaluation photo, or "duplicate" of a
    # post that comes before
    kind: str
    partner: str  # the name of that photo or post
    similarity: float  # from DUPLICATE to 1
    also: tuple[str, ...] = ()  # names of other posts before it that it shows, some at least


class FindDuplicates(beam.PTransform):
    """Posts and evaluation photos, each (order, name, Fingerprint), to a Match per post to drop.

    A post that shows an evaluation photo is dropped as a leak of the one it resembles most. Any
    other is dropped if it shows the same photo as a post before it in `order`, with the first such
    as the partner, whether or not that one is dropped in its turn: so of a chain of copies, each
    near to the next alone, the first is kept. Removed photos come in among the evaluation photos
    and before them, each with "" for its name: no Match names it, and what else a post shows does
    not count beside it. Orders are ORDER bytes, compared as bytes, each once
    among the posts and once among the evaluation photos. What comes out depends on no bundling and
    no worker's order.
    """

    def __init__(self, folder: str, parts: int = 16):
        """Takes what is needed to write things down.

        Args:
          folder: of the spool.
          parts: into how many parts bands and meetings are cut; each fits into memory.
        """
        super().__init__()
        self.folder, self.parts = folder, parts

    def expand(self, input_or_inputs: typing.Any) -> pvalue.PCollection:
        """Takes {"posts": PCollection, "evaluation": PCollection}."""
        return (
            [
                input_or_inputs[name]
                | f"Write{name.title()}" >> beam.ParDo(WriteBands(self.folder, self.parts, rank))
                for rank, name in enumerate(("evaluation", "posts"))
            ]
            | "Bands" >> beam.Flatten()
            | "ByBand" >> beam.GroupByKey()
            | "Meet" >> beam.ParDo(Meet(self.folder, self.parts))
            | "ByPost" >> beam.GroupByKey()
            | "Compare" >> beam.ParDo(Compare(self.folder))
        )


class WriteBands(beam.DoFn):
    """(order, name, Fingerprint) to (part, where bands of that part lie)."""

    def __init__(self, folder: str, parts: int, rank: int):
        """Takes the spool's folder, the number of parts, and whether these are posts."""
        self.folder, self.parts, self.rank = folder, parts, rank

    def start_bundle(self) -> None:
        """Begins a file."""
        self.writer, self.rows = spool.Writer(self.folder), []

    def process(self, element: tuple[bytes, str, Fingerprint]) -> Iterable[tuple[int, spool.Spot]]:
        """Yields once in _TOGETHER photos."""
        order, name, print_ = element
        spot = self.writer.write(_pack(name, print_))
        digest = np.frombuffer(print_.digest[:8], "<u8") | _DIGEST
        keys, boxes, spectra = print_.rectangles
        rows = np.empty(1 + len(keys), _BAND)
        rows["band"] = np.concatenate([digest, keys.astype(np.uint64)])
        rows["box"] = np.concatenate([_WHOLE["box"], boxes])
        rows["spectrum"] = np.concatenate([_WHOLE["spectrum"], spectra])
        rows["rank"], rows["order"] = self.rank, order
        rows["file"], rows["offset"], rows["size"] = spot.file.encode(), spot.offset, spot.size
        self.rows.append(rows)
        if len(self.rows) == _TOGETHER:
            yield from self._write()

    def finish_bundle(self) -> typing.Any:
        """Yields the rest, and ends the file."""
        for each in self._write():
            yield WindowedValue(each, 0, (GlobalWindow(),))
        self.writer.close()

    def _write(self) -> Iterator[tuple[int, spool.Spot]]:
        if self.rows:
            rows = np.concatenate(self.rows)
            part = (rows["band"] * _SCATTER >> np.uint64(32)) % np.uint64(self.parts)
            yield from _write_parts(self.writer, rows, part.astype(np.int64))
        self.rows = []


def _write_parts(
    writer: spool.Writer, rows: np.ndarray, part: np.ndarray
) -> Iterator[tuple[int, spool.Spot]]:
    if not len(rows):
        return
    order = np.argsort(part, kind="stable")
    numbers, starts = np.unique(part[order], return_index=True)
    for number, chosen in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, writer.write(rows[chosen].tobytes())


def _read_parts(folder: str, spots: Iterable[spool.Spot], kind: np.dtype) -> np.ndarray:
    reader = spool.Reader(folder)
    found = [np.frombuffer(reader.read(spot), kind) for spot in sorted(spots)]
    reader.close()
    return np.concatenate(found)


class Meet(beam.DoFn):
    """The bands of a part to (part, where meetings lie), by posts now."""

    def __init__(self, folder: str, parts: int):
        """Takes the spool's folder and the number of parts."""
        self.folder, self.parts = folder, parts

    def process(
        self, element: tuple[int, Iterable[spool.Spot]]
    ) -> Iterable[tuple[int, spool.Spot]]:
        """Yields once a part."""
        met = meetings(_read_parts(self.folder, element[1], _BAND))
        writer = spool.Writer(self.folder)
        part = np.array([zlib.crc32(order) for order in met["post"]["order"]], np.int64)
        yield from _write_parts(writer, met, part % self.parts)
        writer.close()


def meetings(bands: np.ndarray) -> np.ndarray:
    """Whom each post is compared with: _MEETING (M,) for _BAND (N,), in any order."""
    order = np.argsort(bands["band"], kind="stable")
    same = np.diff(bands["band"][order]) == 0
    bands = bands[order[np.r_[same, False] | np.r_[False, same]]]  # most have nobody to meet
    if not len(bands):
        return np.empty(0, _MEETING)
    bands = bands[np.lexsort((bands["order"], bands["rank"], bands["band"]))]
    starts = np.flatnonzero(np.r_[True, bands["band"][1:] != bands["band"][:-1]])
    sizes = np.diff(np.r_[starts, len(bands)])
    # Of each row: where its band begins, where its band's posts do, where they end that come before
    # it, and how many it may meet. Who meets the first of equal bytes has found all there is.
    begins = np.repeat(starts, sizes)
    posts = begins + np.repeat(np.add.reduceat(bands["rank"] == 0, starts, dtype=np.int64), sizes)
    before = np.arange(len(bands))
    most = np.where(bands["band"] >= _DIGEST, 1, REPRESENTATIVES)
    most = np.minimum(most, np.repeat(sizes, sizes))
    pairs = [np.empty((2, 0), np.int64)]
    own = np.flatnonzero(bands["rank"] == 1)
    for number in range(REPRESENTATIVES):
        own = own[most[own] > number]
        for first, end in ((begins, posts), (posts, before)):
            post = own[first[own] + number < end[own]]
            pairs += _agreeing(bands, np.stack((post, first[post] + number)))
    pairs = np.concatenate(pairs, axis=1)
    met = np.empty(pairs.shape[1], _MEETING)
    for field, places in zip(("post", "partner"), pairs, strict=True):
        for name, *_ in _PHOTO:
            met[field][name] = bands[name][places]
    return met


def _agreeing(bands: np.ndarray, pairs: np.ndarray) -> Iterator[np.ndarray]:
    """Of pairs of rows, int64 (2, n), those whose rectangles agree."""
    for start in range(0, pairs.shape[1], _CHUNK):
        chunk = pairs[:, start : start + _CHUNK]
        rows = bands[["box", "spectrum"]][chunk]
        agreed = agree(rows["box"][0], rows["spectrum"][0], rows["box"][1], rows["spectrum"][1])
        yield chunk[:, agreed]


class Compare(beam.DoFn):
    """The meetings of a part's posts to matches."""

    def __init__(self, folder: str):
        """Takes the spool's folder."""
        self.folder = folder

    def process(self, element: tuple[int, Iterable[spool.Spot]]) -> Iterable[Match]:
        """Yields Matches."""
        met = _read_parts(self.folder, element[1], _MEETING)
        post, partner = met["post"], met["partner"]
        order = np.lexsort((partner["order"], partner["rank"], post["order"]))
        self.reader, self.known = spool.Reader(self.folder), collections.OrderedDict()
        begin = 0
        for end in [*(np.flatnonzero(np.diff(_numbers(post["order"][order]))) + 1), len(order)]:
            partners = {}  # each once, though they met in many bands
            for place in order[begin:end].tolist():
                partners[int(partner["rank"][place]), bytes(partner["order"][place])] = place
            match = self._match(post[order[begin]], [partner[p] for p in partners.values()])
            if match:
                yield match
            begin = end
        self.reader.close()

    def _match(self, post: typing.Any, partners: Sequence[typing.Any]) -> Match | None:
        """The Match of a post with the photos it met, in their order, if it has one."""
        (name, one), match, also, tried = self._photo(post), None, [], 0
        whole = bytes(post["order"]).ljust(ORDER, b"\0")  # NumPy's strings end at their last byte
        for each in partners:
            partner, other = self._photo(each)
            kind = "duplicate" if each["rank"] else "leak" if partner else "removed"
            if match and kind == "duplicate":
                if tried == _FURTHER:
                    break
                tried += 1
            alike = similarity(one, other)
            if alike < DUPLICATE:
                continue
            if match is None or (
                kind == "removed" != match.kind
                or (kind == match.kind == "leak" and alike > match.similarity)
            ):
                match = Match(whole, name, kind, partner, alike)
            elif kind == "duplicate":
                also.append(partner)
        return match and match._replace(also=tuple(also))

    def _photo(self, photo: typing.Any) -> tuple[str, Fingerprint]:
        spot = spool.Spot(photo["file"].decode(), int(photo["offset"]), int(photo["size"]))
        if spot not in self.known:
            self.known[spot] = _unpack(self.reader.read(spot))
        self.known.move_to_end(spot)
        if len(self.known) > _KNOWN:
            self.known.popitem(last=False)
        return self.known[spot]


def _numbers(orders: np.ndarray) -> np.ndarray:
    """Int64 (N,), which of the distinct values each is, for values that are sorted."""
    return np.cumsum(np.r_[0, orders[1:] != orders[:-1]])


def _pack(name: str, print_: Fingerprint) -> bytes:
    encoded = name.encode("utf-8", "surrogatepass")
    lengths = struct.pack("<II", len(encoded), len(print_.keys))
    return b"".join((lengths, encoded, *print_))


def _unpack(packed: bytes) -> tuple[str, Fingerprint]:
    name, keys = struct.unpack_from("<II", packed)
    ends = np.cumsum([8, name, 16, THUMBNAIL**2, keys, keys, keys // 4 * BITS]).tolist()
    parts = [packed[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    return parts[0].decode("utf-8", "surrogatepass"), Fingerprint(*parts[1:])


def evaluation_photos(folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The photos of evaluation sets: all image files below their folders.

    Args:
      folders: a set's layout does not matter.

    Yields:
      (name, path), in an order of their own; the name is the path from the folder's own name on.

    Raises:
      UserError: a folder does not exist or has no image in it.
    """
    for folder in folders:
        if not storage.is_folder(folder):
            raise UserError(
                f"the evaluation set {folder} does not exist; give --evaluation_sets folders of "
                "photos"
            )
        root, found = storage.absolute(folder), False
        for parent, _, names in storage.walk(root):
            for file in names:
                if file.lower().endswith(SUFFIXES):
                    path, found = os.path.join(parent, file), True
                    yield path.removeprefix(os.path.dirname(root)).lstrip("/"), path
        if not found:
            raise UserError(
                f"the evaluation set {folder} has no photo in it ({', '.join(SUFFIXES)}); give "
                "--evaluation_sets folders of photos"
            )


def fingerprint_file(path: str, short_side: int) -> Fingerprint:
    """The fingerprint of an image file of any kind and size, reduced as the posts' photos are.

    Args:
      path: of the file.
      short_side: as of the posts, for a post of the same bytes to be found even if it is flat.

    Raises:
      Dropped: as `files.read` and `pictures.normalise_photo` do.
    """
    return fingerprint(pictures.normalise_photo(files.read(path), short_side))


def contact_sheet(
    path: str, pairs: Sequence[tuple[bytes, bytes, str]], columns: int = 4, size: int = 112
) -> None:
    """Draws pairs of photos side by side, each with a caption below.

    Args:
      path: of the PNG file to write.
      pairs: (image file's bytes, image file's bytes, caption) each, drawn row by row.
      columns: pairs a row.
      size: pixels of a photo's longer side.
    """
    gap, words = 6, 28
    font = ImageFont.load_default(10)
    across, down = 2 * size + gap, size + words
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * across + gap, rows * down + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (one, other, caption) in enumerate(pairs):
        x, y = gap + number % columns * across, gap + number // columns * down
        for side, encoded in enumerate((one, other)):
            with Image.open(io.BytesIO(encoded)) as file:
                photo = file.convert("RGB")
            scale = size / max(photo.size)
            width, height = (max(1, round(edge * scale)) for edge in photo.size)
            sheet.paste(photo.resize((width, height)), (x + side * size, y))
        line = ""
        lines = []
        for letter in caption:
            if font.getlength(line + letter) > across - gap or letter == "\n":
                lines.append(line)
                line = ""
            line += letter.strip("\n")
        draw.multiline_text((x, y + size), "\n".join([*lines, line][:2]), "black", font, spacing=1)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    storage.write(path, file.getvalue())
