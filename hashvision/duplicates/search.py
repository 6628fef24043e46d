"""Near-duplicates among the posts, and posts that leak photos of evaluation sets, as a Beam join.

Photos meet in bands, by equal bytes or by a key of their fingerprints whose rectangles agree; those
that meet are compared by the fingerprints alone. A photo has some hundred bands, far too many to be
elements of a PCollection each: they lie in the spool as arrays, cut into as many parts as there is
work for, and what travels is where the arrays lie.

    posts, evaluation > bands (by band) > meetings (by post) > matches
"""

import collections
import io
import json
import os
import struct
import typing
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import numpy as np
from apache_beam import pvalue
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue
from PIL import Image, ImageDraw, ImageFont

from hashvision import storage
from hashvision.duplicates import bands, spool
from hashvision.duplicates.alignment import DUPLICATE, similarity
from hashvision.duplicates.fingerprints import SPECTRUM, THUMBNAIL, Fingerprint, fingerprint
from hashvision.errors import UserError
from hashvision.sources import files, pictures
from hashvision.sources.reasons import Dropped

ORDER = 40  # bytes of an order
_SCATTER = np.uint64(0x9E3779B97F4A7C15)
_TOGETHER = 4000  # photos whose bands are written at once: 22 MB
_LARGEST_OFFSET = 2**31  # of a fingerprint in its file; rows have four bytes for it
_FIRST_READ = 6000  # bytes, of a fingerprint whose name is not long
_LABELS = ".jsonl"  # of a file that says what photos show
_KNOWN = 4096  # fingerprints that a comparison keeps
_KINDS = ("removed", "leak", "duplicate")  # of matches, by the partner's rank
_FURTHER = 8  # posts that a post is compared with once it has a match


class DuplicatePair(typing.NamedTuple):
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
    """Posts and photos they may not show, (order, name, Fingerprint), to a DuplicatePair per post to drop.

    A post that shows an evaluation photo is dropped as a leak of the one it resembles most. Any
    other is dropped if it shows the same photo as a post before it in `order`, with the first such
    as the partner, whether or not that one is dropped in its turn: so of a chain of copies, each
    near to the next alone, the first is kept. A removed photo counts before all others: no DuplicatePair
    names it. Orders are ORDER bytes, compared as bytes, each once among the photos of a rank; posts
    whose orders share the first `bands.ORDER` bytes cost more. What comes out depends on no
    bundling and no worker's order.

    All this is so where photos meet (`bands.meetings`). Two that share a band of at most
    `bands.CELL` rows do; of larger bands a post finds those before it that are nearest. So the
    first of many copies is kept wherever it stands, and another is left out if in any band it
    meets any copy before it; that one, not always the first of all, is then the partner.
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
        """Takes {"posts": PCollection}, and others of "evaluation" and "removed" photos."""
        return (
            [
                input_or_inputs[name]
                | f"Write{name.title()}" >> beam.ParDo(WriteBands(self.folder, self.parts, rank))
                for rank, name in enumerate(("removed", "evaluation", "posts"))
                if name in input_or_inputs
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
        """Takes the spool's folder, the number of parts, and the photos' rank."""
        self.folder, self.parts, self.rank = folder, parts, rank

    def start_bundle(self) -> None:
        """Begins a file."""
        self.writer, self.rows = spool.SpoolWriter(self.folder), []

    def process(
        self, element: tuple[bytes, str, Fingerprint]
    ) -> Iterable[tuple[int, spool.Location]]:
        """Yields once in _TOGETHER photos."""
        order, name, print_ = element
        location = self.writer.write(_pack(order, name, print_))
        self.rows.append(bands.rows(print_, self.rank, order, location.file, location.offset))
        if len(self.rows) == _TOGETHER or location.offset > _LARGEST_OFFSET:
            yield from self._write()

    def finish_bundle(self) -> typing.Any:
        """Yields the rest, and ends the file."""
        for each in self._write():
            yield WindowedValue(each, 0, (GlobalWindow(),))

    def _write(self) -> Iterator[tuple[int, spool.Location]]:
        if self.rows:
            rows = np.concatenate(self.rows)
            yield from _write_parts(self.writer, rows, rows["band"], self.parts)
        self.rows = []
        self.writer.close()


def _write_parts(
    writer: spool.SpoolWriter, rows: np.ndarray, keys: np.ndarray, parts: int
) -> Iterator[tuple[int, spool.Location]]:
    """Writes rows by the part to which their keys, unsigned integers, belong."""
    if not len(rows):
        return
    part = (keys.astype(np.uint64) * _SCATTER >> np.uint64(32)) % np.uint64(parts)
    order = np.argsort(part, kind="stable")
    numbers, starts = np.unique(part[order], return_index=True)
    for number, chosen in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, writer.write(rows[chosen].tobytes())


def _read_parts(folder: str, locations: Iterable[spool.Location], kind: np.dtype) -> np.ndarray:
    reader = spool.SpoolReader(folder)
    found = [np.frombuffer(reader.read(location), kind) for location in sorted(locations)]
    reader.close()
    return np.concatenate(found)


class Meet(beam.DoFn):
    """The bands of a part to (part, where meetings lie), by posts now."""

    def __init__(self, folder: str, parts: int):
        """Takes the spool's folder and the number of parts."""
        self.folder, self.parts = folder, parts

    def process(
        self, element: tuple[int, Iterable[spool.Location]]
    ) -> Iterable[tuple[int, spool.Location]]:
        """Yields once a part."""
        met = bands.meetings(_read_parts(self.folder, element[1], bands.ROW))
        writer = spool.SpoolWriter(self.folder)
        keys = met["post"]["file"] + met["post"]["offset"]
        yield from _write_parts(writer, met, keys, self.parts)
        writer.close()


def _columns(photos: np.ndarray, *names: str) -> list[np.ndarray]:
    return [photos[name] for name in names or ("file", "offset")]


class _Seen(typing.NamedTuple):
    """A photo whose fingerprint was read."""

    order: bytes
    name: str
    print_: Fingerprint


class Compare(beam.DoFn):
    """The meetings of a part's posts to matches."""

    def __init__(self, folder: str):
        """Takes the spool's folder."""
        self.folder = folder

    def process(self, element: tuple[int, Iterable[spool.Location]]) -> Iterable[DuplicatePair]:
        """Yields Matches."""
        met = _read_parts(self.folder, element[1], bands.MEETING)
        post, partner = met["post"], met["partner"]
        columns = (*_columns(post), *_columns(partner, "rank", "order"), *_columns(partner))
        sort = np.lexsort(columns[::-1])
        columns = [each[sort] for each in columns]
        once, _ = bands.runs(*columns)  # though many met in several bands
        met, (file, offset, *_) = met[sort][once], [each[once] for each in columns]
        self.reader, self.known = spool.SpoolReader(self.folder), collections.OrderedDict()
        for start, size in zip(*bands.runs(file, offset), strict=True):
            same = met[start : start + size]
            match = self._match(self._photo(same["post"][0]), same["partner"])
            if match:
                yield match
        self.reader.close()

    def _match(self, post: _Seen, partners: np.ndarray) -> DuplicatePair | None:
        """The DuplicatePair of a post with the photos it met, by rank and the beginning of their order."""
        match, also, tried = None, [], 0
        for rank, other in self._in_order(partners):
            if rank == bands.POST and (other.order >= post.order or tried == _FURTHER):
                break
            if match and rank == bands.POST:
                tried += 1
            elif match and match.kind == "removed":
                continue
            alike = similarity(post.print_, other.print_)
            if alike < DUPLICATE:
                continue
            if match is None or (rank == bands.EVALUATION and alike > match.similarity):
                match = DuplicatePair(post.order, post.name, _KINDS[rank], other.name, alike)
            elif rank == bands.POST:
                also.append(other.name)
        return match and match._replace(also=tuple(also))

    def _in_order(self, partners: np.ndarray) -> Iterator[tuple[int, _Seen]]:
        """(rank, photo) by rank and order; photos are read as late as may be."""
        for start, size in zip(*bands.runs(*_columns(partners, "rank", "order")), strict=True):
            same = partners[start : start + size]
            for photo in sorted(map(self._photo, same), key=lambda photo: photo.order):
                yield int(same["rank"][0]), photo

    def _photo(self, where: typing.Any) -> _Seen:
        """The photo whose fingerprint lies there, as rows of bands have it."""
        location = spool.Location(f"{where['file']:016x}", int(where["offset"]), _FIRST_READ)
        if location not in self.known:
            packed = self.reader.read(location)
            size = _packed_ends(packed)[-1]
            if size > len(packed):
                packed = self.reader.read(location._replace(size=size))
            self.known[location] = _unpack(packed)
        self.known.move_to_end(location)
        if len(self.known) > _KNOWN:
            self.known.popitem(last=False)
        return self.known[location]


_HEAD = struct.Struct(f"<II{ORDER}s")  # bytes of the name, bytes of the keys, the order


def _pack(order: bytes, name: str, print_: Fingerprint) -> bytes:
    encoded = name.encode("utf-8", "surrogatepass")
    head = _HEAD.pack(len(encoded), len(print_.keys), order)
    return b"".join((head, *print_, encoded))


def _packed_ends(packed: bytes) -> list[int]:
    """Where the parts of a fingerprint end, by its first bytes; the name is the last."""
    name, keys, _ = _HEAD.unpack_from(packed)
    sizes = [_HEAD.size, 16, THUMBNAIL**2, keys, keys, keys // 4 * SPECTRUM, name]
    return np.cumsum(sizes).tolist()


def _unpack(packed: bytes) -> _Seen:
    ends = _packed_ends(packed)
    *parts, name = [packed[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    order = _HEAD.unpack_from(packed)[2]
    return _Seen(order, name.decode("utf-8", "surrogatepass"), Fingerprint(*parts))


def evaluation_photos(folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The files that may be photos of evaluation sets, whatever their names.

    What they are shows when they are decoded. So all that `evaluate` would read is among them:
    every file below the folders, and what a labels.jsonl there names outside of them.

    Args:
      folders: of photos, in any layout; a labels.jsonl stands for its folder.

    Yields:
      (name, path), in an order of their own; the name is the path from the folder's own name on.

    Raises:
      UserError: a folder does not exist, is a dataset folder or has no photo in it.
    """
    for folder in folders:
        root = storage.absolute(folder)
        if root.endswith(_LABELS) and storage.is_file(root):
            root = os.path.dirname(root)
        if not storage.is_folder(root):
            raise UserError(
                f"the evaluation set {folder} does not exist; give --evaluation_sets folders of "
                "photos"
            )
        if storage.is_file(f"{root}/manifest.json"):
            raise UserError(
                f"the evaluation set {folder} is a dataset folder, in which photos are not files; "
                "give --evaluation_sets folders of photos"
            )
        found = False
        for path in _files_below(root):
            found = found or _is_photo(path)
            name = path.removeprefix(os.path.dirname(root)).lstrip("/")
            yield files.shown(name), path
        if not found:
            raise UserError(
                f"the evaluation set {folder} has no photo in it that can be decoded; give "
                "--evaluation_sets folders of photos"
            )


def _files_below(root: str) -> Iterator[str]:
    outside: dict[str, None] = {}
    for parent, _, names in storage.walk(root):
        for name in names:
            yield f"{parent}/{name}"
            if name.endswith(_LABELS):
                outside |= dict.fromkeys(_labelled(parent, name))
    yield from (path for path in outside if not path.startswith(f"{root}/"))


def _labelled(folder: str, name: str) -> Iterator[str]:
    """The paths that a file of labels names, as far as it can be read."""
    try:
        lines = files.read(f"{folder}/{name}").split(b"\n")
    except Dropped:
        return
    for line in lines:
        try:
            path = os.path.join(folder, json.loads(line)["image"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        yield path if storage.is_remote(path) else os.path.normpath(path)


def _is_photo(path: str) -> bool:
    try:
        fingerprint_file(path, THUMBNAIL)
    except Dropped:
        return False
    return True


def fingerprint_file(path: str, short_side: int) -> Fingerprint:
    """The fingerprint of an image file of any kind and size, reduced as the posts' photos are.

    Args:
      path: of the file.
      short_side: as of the posts, for a post of the same bytes to be found even if it is flat.

    Raises:
      Dropped: as `files.read` and `pictures.normalise_photo` do.
    """
    return fingerprint(pictures.normalise_photo(files.read(path), short_side))


def write_contact_sheet(
    path: str, pairs: Sequence[tuple[bytes, bytes, str]], columns: int = 4, size: int = 112
) -> None:
    """Draws pairs of photos side by side, each with a caption below.

    Args:
      path: of the PNG file to write.
      pairs: (image file's bytes, image file's bytes, caption) each, drawn row by row.
      columns: pairs a row.
      size: pixels of a photo's longer side.
    """

    def shrink(photo: Image.Image) -> Image.Image:
        width, height = (max(1, round(edge * size / max(photo.size))) for edge in photo.size)
        return photo.resize((width, height))

    gap, words = 6, 28
    font = ImageFont.load_default(10)
    across, down = 2 * size + gap, size + words
    rows = max(1, -(-len(pairs) // columns))
    sheet = Image.new("RGB", (columns * across + gap, rows * down + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (one, other, caption) in enumerate(pairs):
        x, y = gap + number % columns * across, gap + number // columns * down
        for side, encoded in enumerate((one, other)):
            sheet.paste(pictures.decode(encoded, shrink), (x + side * size, y))
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
