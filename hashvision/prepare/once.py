"""The steps of the graph that drop copies, evaluation photos, and copies of removed photos."""

import collections
import hashlib
import json
import os
import typing
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam

from hashvision.duplicates import search, spool
from hashvision.duplicates.fingerprints import Fingerprint
from hashvision.prepare import copies
from hashvision.prepare.copies import Link
from hashvision.prepare.reading import Photo, dropped
from hashvision.sources import dates, files
from hashvision.sources.reasons import Dropped

REASON = {
    "removed": "removed_copy",
    "leak": "evaluation_photo",
    "duplicate": "duplicate_photo",
}
FIELDS = ("post", "kind", "of", "similarity")
SHOWN = 48  # pairs on the contact sheet
BUCKETS = 64  # groups of posts per part of the join


class Once(beam.PTransform):
    """Keeps each photo once: "photos" to "photos", "dropped", and "pairs" to be reported."""

    def __init__(self, staging: str, parts: int, keep_duplicates: bool):
        """Takes the settings.

        Args:
          staging: folder of the spool folder, in which the join writes.
          parts: number of parts that the join is cut into.
          keep_duplicates: whether copies among the posts are kept; evaluation photos and copies of
            removed photos are always dropped.
        """
        super().__init__()
        self.folder, self.parts = f"{staging}/{spool.FOLDER}", parts
        self.keep_duplicates = keep_duplicates

    def expand(self, input_or_inputs: typing.Any) -> typing.Any:
        """Takes a dictionary and returns one.

        In: "photos", Photo; "fingerprints", (Photo, Fingerprint); "removed", (offset, Fingerprint)
        of removed photos; "evaluation", as FingerprintFiles yields.
        Out: "photos", Photo with its copies; "dropped", (reason, offset); "pairs", DuplicatePair
        for each post that is dropped, except those that show a removed photo.
        """
        found, buckets = input_or_inputs, self.parts * BUCKETS
        links = (
            {
                "posts": found["fingerprints"] | "Place" >> beam.Map(join_input),
                "evaluation": found["evaluation"],
                "removed": found["removed"] | "PlaceRemoved" >> beam.Map(removed_join_input),
            }
            | "FindDuplicates" >> search.FindDuplicates(self.folder, self.parts)
            | "FollowChains" >> copies.FollowChains(buckets)
        )
        reasons = links | "Reason" >> beam.FlatMap(_reasons, self.keep_duplicates)
        keyed = {
            "photos": found["photos"] | "Pack" >> beam.Map(lambda photo: (photo.key, photo.pack())),
            "reasons": reasons | "ReasonOf" >> beam.MapTuple(lambda link, why: (link.key, why)),
            "groups": links
            | "GroupCopies" >> copies.GroupCopies(self.folder, buckets, self.keep_duplicates)
            | "GroupOf" >> beam.Map(lambda group: (group.key, group)),
        }
        chosen = (
            {
                name: each
                | f"Bucket{name.title()}"
                >> beam.Map(lambda pair, n: (copies.bucket(pair[0], n), pair), buckets)
                for name, each in keyed.items()
            }
            | "SamePost" >> beam.CoGroupByKey()
            | "Choose" >> beam.FlatMapTuple(_choose).with_outputs("dropped", main="photos")
        )
        pairs = (
            reasons
            | "Named" >> beam.Filter(lambda pair: pair[1] != REASON["removed"])
            | "Pairs" >> beam.MapTuple(lambda link, _: link.pair)
        )
        return {"photos": chosen.photos, "dropped": chosen.dropped, "pairs": pairs}


class FingerprintFiles(beam.DoFn):
    """Turns name and path of an evaluation photo into an input of the join.

    It passes over files that cannot be decoded, because no post that decodes shows the same photo.
    """

    def __init__(self, short_side: int):
        """Takes the short side, in pixels, that the posts' photos are reduced to."""
        self.short_side = short_side

    def process(self, element: str) -> Iterable[tuple[bytes, str, Fingerprint]]:
        """Takes [name, path] in JSON, because Beam takes no path that is not UTF-8.

        Yields:
          (order, [name, path] in JSON, fingerprint).
        """
        _, path = json.loads(element)
        try:
            print_ = search.fingerprint_file(path, self.short_side)
        except Dropped:
            return
        order = hashlib.blake2b(os.fsencode(path), digest_size=search.ORDER).digest()
        yield order, element, print_


def join_input(element: tuple[Photo, Fingerprint]) -> tuple[bytes, str, Fingerprint]:
    """Returns (order, packed Photo, fingerprint) of a post.

    Posts are ordered by date, those without one last, so that the oldest of some copies is kept.
    """
    photo, print_ = element
    # The first 8 bytes distinguish most posts of one date, too.
    spare = 64 - dates.BITS
    start = photo.when << spare | photo.order[0] >> 64 - spare
    order = start.to_bytes(8, "big") + photo.key.rjust(search.ORDER - 8, b"\0")
    return order, photo.pack().decode(), print_


def removed_join_input(element: tuple[int, Fingerprint]) -> tuple[bytes, str, Fingerprint]:
    """Returns (order, "", fingerprint) of a removed photo, whose name the join does not get."""
    offset, print_ = element
    return offset.to_bytes(8, "big").ljust(search.ORDER, b"\0"), "", print_


def _reasons(link: Link, keep_duplicates: bool) -> Iterator[tuple[typing.Any, str]]:
    """Yields a link and the reason to drop its post.

    A copy of a copy of a removed photo counts as a copy of the removed photo.
    """
    kind = "removed" if link.fate == "removed" else link.pair.kind
    if kind != "duplicate" or not keep_duplicates:
        yield link, REASON[kind]


def _choose(_: int, joined: dict[str, Iterable[typing.Any]]) -> Iterable[typing.Any]:
    """Yields the photos to keep, with their copies, and the others as "dropped"."""
    reasons, groups = dict(joined["reasons"]), collections.defaultdict(list)
    for key, group in joined["groups"]:
        groups[key].append(group)
    for key, packed in joined["photos"]:
        photo = Photo.unpack(packed)
        if key in reasons:
            yield dropped(reasons[key], photo.order[1])
            continue
        yield photo._replace(
            tags=tuple(sorted({*photo.tags}.union(*(group.tags for group in groups[key])))),
            words=tuple(sorted({*photo.words}.union(*(group.words for group in groups[key])))),
            copies=tuple(group.copies for group in groups[key]),
        )


def csv_row(pair: search.DuplicatePair) -> tuple[str, str, str, str]:
    """Returns the row of a pair in duplicates-*.csv, whose columns are FIELDS."""
    post, partner = (json.loads(name)[0] for name in _picture_names(pair))
    return post, REASON[pair.kind], partner, f"{pair.similarity:.4f}"


def sheet_entry(pair: search.DuplicatePair) -> tuple[float, str, str, str]:
    """Returns what the contact sheet needs of a pair; the least similar pair has the largest."""
    return -pair.similarity, pair.kind, *_picture_names(pair)


def _picture_names(pair: search.DuplicatePair) -> tuple[str, str]:
    """Returns a pair's post and partner, each as JSON: [id, *Location] or [name, path]."""
    names = []
    for name, is_post in ((pair.name, True), (pair.partner, pair.kind == "duplicate")):
        if is_post:
            photo = Photo.unpack(name)
            name = json.dumps([photo.id, *photo.location])
        names.append(name)
    return names[0], names[1]


def write_duplicate_pairs(path: str, staging: str, pairs: Sequence[Sequence[typing.Any]]) -> None:
    """Draws the least similar pairs of photos that count as the same photo.

    Args:
      path: of the PNG file to write.
      staging: folder of the spool folder.
      pairs: as `sheet_entry` returns them.
    """
    reader = spool.SpoolReader(f"{staging}/{spool.FOLDER}")

    def picture(name: str) -> bytes:
        _, *where = json.loads(name)
        if len(where) == 1:
            return files.read(where[0])
        return reader.read(spool.Location(*where))

    search.write_contact_sheet(
        path,
        [
            (
                picture(post),
                picture(partner),
                f"{REASON[kind]} {-alike:.3f}\n{json.loads(post)[0]}  {json.loads(partner)[0]}",
            )
            for alike, kind, post, partner in pairs
        ],
    )
    reader.close()
