"""Finds duplicate posts, and posts that show evaluation or removed photos, as a Beam join.

Photos meet in bands: by equal bytes, or by a shared key of their fingerprints whose rectangles
agree. Photos that meet are compared by their fingerprints. A photo has some hundred bands, too many
to be elements of a PCollection. So bands are arrays in the spool, cut into parts, and Beam passes
on only the locations of the arrays.

    posts, evaluation, removed > bands (by band) > meetings (by post) > pairs
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
_PHOTOS_PER_WRITE = 4000  # their bands take 22 MB
_LARGEST_OFFSET = 2**31  # of a fingerprint in its file; rows have four bytes for it
_FIRST_READ = 6000  # bytes; holds a fingerprint unless its name is long
_LABELS = ".jsonl"  # suffix of a file of labels
_CACHED = 4096  # fingerprints that a comparison keeps in memory
_KINDS = ("removed", "leak", "duplicate")  # of pairs, by the partner's rank
_FURTHER_POSTS = 8  # that a post is compared with after its first duplicate


class DuplicatePair(typing.NamedTuple):
    """A post, and the photo or earlier post that it duplicates."""

    order: bytes  # ORDER, of the post
    name: str  # of the post
    kind: str  # of its partner: "removed" photo, "leak" for an evaluation photo, "duplicate" post
    partner: str  # name of the photo or post
    similarity: float  # from DUPLICATE to 1
    also: tuple[str, ...] = ()  # names of other earlier posts that it duplicates, maybe not all


class FindDuplicates(beam.PTransform):
    """Turns posts, and photos that they may not show, into a DuplicatePair for each post to drop.

    Inputs are (order, name, Fingerprint). Orders are ORDER bytes and compare as bytes; each occurs
    once among the photos of a rank. Posts whose orders share the first `bands.ORDER` bytes take
    more time. The result depends neither on bundles nor on the order of workers.

    - A post that shows a removed photo gets a pair of kind "removed", whose partner has no name.
    - Any other post that shows an evaluation photo gets one with the most similar of these.
    - Any other post that shows the same photo as an earlier post gets one with the first such post,
      even if that post is dropped, too. So the first post of a chain of copies is kept, even if
      each copy is similar only to the next.

    This holds for photos that meet (`bands.meetings`). Two photos meet if they share a band of at
    most `bands.CELL` rows; in larger bands, a post meets the nearest of the earlier posts. So the
    first of many copies is always kept. Another copy is dropped if it meets any earlier copy in any
    band, and then that copy is its partner, which may not be the first of all.
    """

    def __init__(self, folder: str, parts: int = 16):
        """Takes the settings.

        Args:
          folder: of the spool.
          parts: number of parts that bands and meetings are cut into; each must fit in memory.
        """
        super().__init__()
        self.folder, self.parts = folder, parts

    def expand(self, input_or_inputs: typing.Any) -> pvalue.PCollection:
        """Takes {"posts": PCollection}, and maybe "evaluation" and "removed"; returns the pairs."""
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
    """Turns (order, name, Fingerprint) into (part, location of bands of that part)."""

    def __init__(self, folder: str, parts: int, rank: int):
        """Takes the spool's folder, the number of parts, and the rank of the photos."""
        self.folder, self.parts, self.rank = folder, parts, rank

    def start_bundle(self) -> None:
        """Starts a spool file."""
        self.writer, self.rows = spool.SpoolWriter(self.folder), []

    def process(
        self, element: tuple[bytes, str, Fingerprint]
    ) -> Iterable[tuple[int, spool.Location]]:
        """Yields after every _PHOTOS_PER_WRITE photos."""
        order, name, print_ = element
        location = self.writer.write(_pack(order, name, print_))
        self.rows.append(bands.rows(print_, self.rank, order, location.file, location.offset))
        if len(self.rows) == _PHOTOS_PER_WRITE or location.offset > _LARGEST_OFFSET:
            yield from self._write()

    def finish_bundle(self) -> typing.Any:
        """Yields the rest and closes the file."""
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
    """Writes each row to the part of its key, an unsigned integer; yields (part, location)."""
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
    """Turns the bands of a part into (part, location of meetings), with parts now by post."""

    def __init__(self, folder: str, parts: int):
        """Takes the spool's folder and the number of parts."""
        self.folder, self.parts = folder, parts

    def process(
        self, element: tuple[int, Iterable[spool.Location]]
    ) -> Iterable[tuple[int, spool.Location]]:
        """Yields once for each part that gets meetings."""
        met = bands.meetings(_read_parts(self.folder, element[1], bands.ROW))
        writer = spool.SpoolWriter(self.folder)
        keys = met["post"]["file"] + met["post"]["offset"]
        yield from _write_parts(writer, met, keys, self.parts)
        writer.close()


def _columns(photos: np.ndarray, *names: str) -> list[np.ndarray]:
    return [photos[name] for name in names or ("file", "offset")]


class _Photo(typing.NamedTuple):
    """A photo whose fingerprint has been read."""

    order: bytes
    name: str
    print_: Fingerprint


class Compare(beam.DoFn):
    """Compares the posts of a part with the photos that they meet."""

    def __init__(self, folder: str):
        """Takes the spool's folder."""
        self.folder = folder

    def process(self, element: tuple[int, Iterable[spool.Location]]) -> Iterable[DuplicatePair]:
        """Yields DuplicatePairs."""
        met = _read_parts(self.folder, element[1], bands.MEETING)
        post, partner = met["post"], met["partner"]
        columns = (*_columns(post), *_columns(partner, "rank", "order"), *_columns(partner))
        sort = np.lexsort(columns[::-1])
        columns = [each[sort] for each in columns]
        once, _ = bands.runs(*columns)  # drops meetings in further bands
        met, (file, offset, *_) = met[sort][once], [each[once] for each in columns]
        self.reader, self.known = spool.SpoolReader(self.folder), collections.OrderedDict()
        for start, size in zip(*bands.runs(file, offset), strict=True):
            same = met[start : start + size]
            pair = self._compare(self._photo(same["post"][0]), same["partner"])
            if pair:
                yield pair
        self.reader.close()

    def _compare(self, post: _Photo, partners: np.ndarray) -> DuplicatePair | None:
        """Returns the pair of a post, or None.

        Args:
          post: the post.
          partners: the photos that it meets, sorted by rank and the first bytes of their orders.
        """
        pair, also, further = None, [], 0
        for rank, other in self._in_order(partners):
            if rank == bands.POST and (other.order >= post.order or further == _FURTHER_POSTS):
                break
            if pair and rank == bands.POST:
                further += 1
            elif pair and pair.kind == "removed":
                continue
            found = similarity(post.print_, other.print_)
            if found < DUPLICATE:
                continue
            if pair is None or (rank == bands.EVALUATION and found > pair.similarity):
                pair = DuplicatePair(
                    order=post.order,
                    name=post.name,
                    kind=_KINDS[rank],
                    partner=other.name,
                    similarity=found,
                )
            elif rank == bands.POST:
                also.append(other.name)
        return pair and pair._replace(also=tuple(also))

    def _in_order(self, partners: np.ndarray) -> Iterator[tuple[int, _Photo]]:
        """Yields (rank, photo) by rank and order; reads photos only when they are needed."""
        for start, size in zip(*bands.runs(*_columns(partners, "rank", "order")), strict=True):
            same = partners[start : start + size]
            for photo in sorted(map(self._photo, same), key=lambda photo: photo.order):
                yield int(same["rank"][0]), photo

    def _photo(self, where: typing.Any) -> _Photo:
        """Reads the photo of a `file` and `offset`, as rows of bands hold them."""
        location = spool.Location(f"{where['file']:016x}", int(where["offset"]), _FIRST_READ)
        if location not in self.known:
            packed = self.reader.read(location)
            size = _packed_ends(packed)[-1]
            if size > len(packed):
                packed = self.reader.read(location._replace(size=size))
            self.known[location] = _unpack(packed)
        self.known.move_to_end(location)
        if len(self.known) > _CACHED:
            self.known.popitem(last=False)
        return self.known[location]


_HEAD = struct.Struct(f"<II{ORDER}s")  # bytes of the name, bytes of the keys, the order


def _pack(order: bytes, name: str, print_: Fingerprint) -> bytes:
    encoded = name.encode("utf-8", "surrogatepass")
    head = _HEAD.pack(len(encoded), len(print_.keys), order)
    return b"".join((head, *print_, encoded))


def _packed_ends(packed: bytes) -> list[int]:
    """Returns where the parts of a packed fingerprint end, from its head; the name is the last."""
    name, keys, _ = _HEAD.unpack_from(packed)
    sizes = [_HEAD.size, 16, THUMBNAIL**2, keys, keys, keys // 4 * SPECTRUM, name]
    return np.cumsum(sizes).tolist()


def _unpack(packed: bytes) -> _Photo:
    ends = _packed_ends(packed)
    *parts, name = [packed[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    order = _HEAD.unpack_from(packed)[2]
    return _Photo(order, name.decode("utf-8", "surrogatepass"), Fingerprint(*parts))


def evaluation_photos(folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the files that may be photos of evaluation sets, whatever their names.

    These are all files below the folders, and files elsewhere that a labels.jsonl there names. So
    they include all that `evaluate` would read; files that are not photos fail to decode later.

    Args:
      folders: of photos, in any layout; a labels.jsonl stands for its folder.

    Yields:
      (name, path), in a fixed order; the name is the path relative to the folder's parent.

    Raises:
      UserError: a folder does not exist, is a dataset folder, or holds no photo.
    """
    for folder in folders:
        root = storage.absolute(folder)
        if root.endswith(_LABELS) and storage.is_file(root):
            root = os.path.dirname(root)
        if not storage.is_folder(root):
            raise UserError(
                f"The evaluation set {folder} does not exist; give --evaluation_sets folders of"
                " photos."
            )
        if storage.is_file(f"{root}/manifest.json"):
            raise UserError(
                f"The evaluation set {folder} is a dataset folder, whose photos are not files; give"
                " --evaluation_sets folders of photos."
            )
        found = False
        for path in _files_below(root):
            found = found or _is_photo(path)
            name = path.removeprefix(os.path.dirname(root)).lstrip("/")
            yield files.printable(name), path
        if not found:
            raise UserError(
                f"The evaluation set {folder} holds no photo that can be decoded; give"
                " --evaluation_sets folders of photos."
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
    """Yields the paths that a file of labels names, as far as it can be read."""
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
    """Returns the fingerprint of an image file of any kind, reduced like the posts' photos.

    Args:
      path: of the file.
      short_side: in pixels, the same as for the posts; so even a flat photo matches a post with
        its bytes.

    Raises:
      Dropped: as `files.read` and `pictures.normalize_photo` do.
    """
    return fingerprint(pictures.normalize_photo(files.read(path), short_side))


def write_contact_sheet(
    path: str, pairs: Sequence[tuple[bytes, bytes, str]], columns: int = 4, size: int = 112
) -> None:
    """Writes a PNG file of pairs of photos side by side, with a caption below each pair.

    Args:
      path: of the PNG file.
      pairs: (bytes of an image file, bytes of another, caption), drawn row by row.
      columns: pairs per row.
      size: longer side of each photo, in pixels.
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
