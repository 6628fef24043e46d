"""Near-duplicates among the posts, and posts that leak photos of evaluation sets, as a Beam join.

Photos meet in bands, by equal bytes or by a key of their fingerprints; those that meet are compared
by the fingerprints alone. What grows with the dump stays in Beam; the pictures themselves never
travel.

    posts, evaluation > bands > meetings > fingerprints of both > matches
"""

import heapq
import io
import os
import typing
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam import pvalue
from PIL import Image, ImageDraw, ImageFont

from hashvision.errors import UserError
from hashvision.prepare import files, pictures
from hashvision.prepare.alignment import DUPLICATE, similarity
from hashvision.prepare.fingerprints import Fingerprint, fingerprint

# Photos of one band are compared with so many of its first posts, and as many evaluation photos:
# a band of n photos costs at most 2 * REPRESENTATIVES * n comparisons. On 7,161 photos of Flickr8k
# the largest band had 58. Two copies in a larger one still meet in any of their other bands.
REPRESENTATIVES = 16
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# (0, name) of an evaluation photo, (1, its order) of a post: evaluation photos come first.
Place = tuple[int, tuple[str, ...]]
Photo = tuple[tuple, str, tuple]  # order, name, fingerprint as a plain tuple


class Match(typing.NamedTuple):
    """Why a post is dropped."""

    order: tuple[typing.Any, ...]
    name: str
    kind: str  # "leak" of an evaluation photo, or "duplicate" of a post that comes before
    partner: str  # the name of that photo or post
    similarity: float  # from DUPLICATE to 1


class FindDuplicates(beam.PTransform):
    """Posts and evaluation photos, each (order, name, Fingerprint), to a Match per post to drop.

    A post that shows an evaluation photo is dropped as a leak of the one it resembles most. Any
    other is dropped if it shows the same photo as a post before it in `order`, with the first such
    as the partner, whether or not that one is dropped in its turn: so of a chain of copies, each
    near to the next alone, the first is kept. Orders are tuples of integers and strings, each once
    among the posts; evaluation photos are told apart by their names. What comes out depends on no
    bundling and no worker's order.
    """

    def expand(self, input_or_inputs: typing.Any) -> pvalue.PCollection:
        """Takes {"posts": PCollection, "evaluation": PCollection}."""
        photos = (
            input_or_inputs["posts"] | "PlacePosts" >> beam.MapTuple(_place_post),
            input_or_inputs["evaluation"] | "PlaceEvaluation" >> beam.MapTuple(_place_evaluation),
        ) | "Photos" >> beam.Flatten()
        meetings = (
            photos
            | "Bands" >> beam.FlatMapTuple(bands)
            | "Meet" >> beam.GroupByKey()
            | "Meetings" >> beam.FlatMapTuple(meetings_of)
            | "EachOnce" >> beam.Distinct()
        )
        partners = (
            {"fingerprint": photos, "posts": meetings}
            | "JoinPartners" >> beam.CoGroupByKey()
            | "Partners" >> beam.FlatMapTuple(_hand_out)
        )
        return (
            {"fingerprint": photos, "partners": partners}
            | "JoinPosts" >> beam.CoGroupByKey()
            | "Compare" >> beam.FlatMapTuple(_compare)
        )


def _place_post(order: tuple, name: str, print_: Fingerprint) -> tuple[Place, Photo]:
    # Integers as text of one length, for Beam groups by no integer above 63 bits: hashes have 64.
    text = (f"{key + 2**64:021d}" if isinstance(key, int) else key for key in order)
    return (1, tuple(text)), (order, name, tuple(print_))


def _place_evaluation(order: tuple, name: str, print_: Fingerprint) -> tuple[Place, Photo]:
    return (0, (name,)), (order, name, tuple(print_))


def bands(place: Place, photo: Photo) -> Iterator[tuple[bytes, Place]]:
    """The bands in which a photo meets others: one of its bytes (16 bytes), and its keys (4)."""
    print_ = Fingerprint(*photo[2])
    yield print_.digest, place
    for start in range(0, len(print_.keys), 4):
        yield print_.keys[start : start + 4], place


def meetings_of(_: bytes, places: Iterable[Place]) -> Iterator[tuple[Place, Place]]:
    """Whom each post of a band is compared with.

    Yields:
      (place of an evaluation photo or of an earlier post, place of the post).
    """
    evaluation = heapq.nsmallest(REPRESENTATIVES, (place for place in places if not place[0]))
    first = heapq.nsmallest(REPRESENTATIVES, (place for place in places if place[0]))
    for place in places:
        if place[0]:
            for partner in evaluation:
                yield partner, place
            for partner in first:
                if partner < place:
                    yield partner, place


def _hand_out(
    partner: Place, joined: dict[str, Iterable]
) -> Iterator[tuple[Place, tuple[Place, Photo]]]:
    """To each post that is compared with a photo, that photo."""
    for photo in joined["fingerprint"]:
        for place in joined["posts"]:
            yield place, (partner, photo)


def _compare(place: Place, joined: dict[str, Iterable]) -> Iterator[Match]:
    """The Match of a post with the photos it met, if it has one."""
    partners = sorted(joined["partners"])
    leak = None
    for order, name, print_ in joined["fingerprint"] if partners else ():
        one = Fingerprint(*print_)
        for (rank, _), (_, partner, other) in partners:
            if rank and leak:
                break
            alike = similarity(one, Fingerprint(*other))
            if alike < DUPLICATE:
                continue
            if rank:
                yield Match(order, name, "duplicate", partner, alike)
                return
            if leak is None or alike > leak.similarity:
                leak = Match(order, name, "leak", partner, alike)
    if leak:
        yield leak


def evaluation_photos(folders: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The photos of evaluation sets: all image files below their folders.

    Args:
      folders: of this machine's disk; a set's layout does not matter.

    Yields:
      (name, path), in an order of their own; the name is the path from the folder's own name on.

    Raises:
      UserError: a folder does not exist or has no image in it.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(
                f"the evaluation set {folder} does not exist; give --evaluation_sets folders of "
                "photos"
            )
        root, found = os.path.abspath(folder), False
        for parent, children, names in os.walk(root):
            children.sort()
            for file in sorted(names):
                if file.lower().endswith(SUFFIXES):
                    path, found = os.path.join(parent, file), True
                    yield os.path.relpath(path, os.path.dirname(root)), path
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
    sheet.save(path, "PNG")
