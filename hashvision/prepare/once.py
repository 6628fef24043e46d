"""Each photo once: the steps of the graph that leave out ids that come twice, copies and leaks."""

import hashlib
import itertools
import json
import os
import typing
from collections.abc import Iterable, Sequence

import apache_beam as beam

from hashvision.prepare import duplicates, spool
from hashvision.prepare.fingerprints import Fingerprint
from hashvision.prepare.reading import Photo, dropped
from hashvision.sources.reasons import Dropped

REASON = {"leak": "evaluation_photo", "duplicate": "duplicate_photo"}
FIELDS = ("post", "kind", "of", "similarity")
SHOWN = 48  # pairs on the contact sheet
_BUCKETS = 64  # groups of ids a part
_NO_DATE = "~"  # sorts behind all dates


class FingerprintFiles(beam.DoFn):
    """Name and path of an evaluation photo to its place in the join; what does not decode is left.

    No post that decodes can be the same photo then.
    """

    def __init__(self, short_side: int):
        """Takes the pixels to which the posts' photos are reduced."""
        self.short_side = short_side

    def process(self, element: str) -> Iterable[tuple[bytes, str, Fingerprint]]:
        """Takes [name, path] in JSON, since Beam takes no path that is not UTF-8.

        Yields:
          (order, [name, path] in JSON, fingerprint).
        """
        _, path = json.loads(element)
        try:
            print_ = duplicates.fingerprint_file(path, self.short_side)
        except Dropped:
            return
        order = hashlib.blake2b(os.fsencode(path), digest_size=duplicates.ORDER).digest()
        yield order, element, print_


def place(element: tuple[Photo, Fingerprint]) -> tuple[bytes, str, Fingerprint]:
    """A post's place in the join: of copies the oldest is kept, undated ones last."""
    photo, print_ = element
    date = (photo.created_at or _NO_DATE).encode()[: duplicates.ORDER - 16]
    order = date.ljust(duplicates.ORDER - 16, b"\0") + _key(photo)
    return order, json.dumps([photo.id, *photo.spot]), print_


def _key(photo: Photo) -> bytes:
    """16 bytes: the hash of the id, and the place in the dump."""
    return b"".join(number.to_bytes(8, "big") for number in photo.order)


def _bucket(key: bytes, buckets: int) -> int:
    """Ids are grouped some hundred together: each group costs a runner memory of its own."""
    return int.from_bytes(key[:8], "big") * buckets >> 64


def _choose(_: int, joined: dict[str, Iterable[typing.Any]]) -> Iterable[typing.Any]:
    """Of the posts of each id the first, if it is no copy; the others and a copy as "dropped"."""
    matches = {match.order[-16:]: match for match in joined["matches"]}
    photos = sorted(map(Photo.unpack, joined["photos"]), key=lambda photo: photo.order)
    for _, same in itertools.groupby(photos, key=lambda photo: photo.order[0]):
        chosen, *others = same
        for photo in others:
            yield dropped("duplicate_id", photo.id)
        match = matches.get(_key(chosen))
        if match:
            yield dropped(REASON[match.kind], chosen.id)
        else:
            yield chosen


class Once(beam.PTransform):
    """{"photos", "fingerprints", "evaluation"} to "photos", "dropped" and "matches"."""

    def __init__(self, staging: str, parts: int, keep_duplicates: bool):
        """Takes what the join needs, and what is to be done with what it finds.

        Args:
          staging: folder in which the spool lies.
          parts: into how many parts the join is cut.
          keep_duplicates: whether copies among the posts are kept; leaks never are.
        """
        super().__init__()
        self.folder, self.parts = f"{staging}/{spool.FOLDER}", parts
        self.keep_duplicates = keep_duplicates

    def expand(self, input_or_inputs: typing.Any) -> typing.Any:
        """Takes Photos, (Photo, Fingerprint), and what FingerprintFiles makes."""
        found = input_or_inputs
        matches = {
            "posts": found["fingerprints"] | "Place" >> beam.Map(place),
            "evaluation": found["evaluation"],
        } | "FindDuplicates" >> duplicates.FindDuplicates(self.folder, self.parts)
        if self.keep_duplicates:
            matches = matches | "Leaks" >> beam.Filter(lambda match: match.kind == "leak")
        ids = self.parts * _BUCKETS
        chosen = (
            {
                "photos": found["photos"]
                | "ById" >> beam.Map(lambda photo, n: (_bucket(_key(photo), n), photo.pack()), ids),
                "matches": matches
                | "MatchById"
                >> beam.Map(lambda match, n: (_bucket(match.order[-16:], n), match), ids),
            }
            | "SameId" >> beam.CoGroupByKey()
            | "Choose" >> beam.FlatMapTuple(_choose).with_outputs("dropped", main="photos")
        )
        return {"photos": chosen.photos, "dropped": chosen.dropped, "matches": matches}


def row(match: duplicates.Match) -> tuple[str, str, str, str]:
    """What stands of a match in duplicates-*.csv: FIELDS."""
    post, partner = json.loads(match.name)[0], json.loads(match.partner)[0]
    return post, REASON[match.kind], partner, f"{match.similarity:.4f}"


def pair(match: duplicates.Match) -> tuple[float, str, str, str]:
    """What the contact sheet needs of a match, the least alike first."""
    return -match.similarity, match.kind, match.name, match.partner


def contact_sheet(path: str, staging: str, pairs: Sequence[Sequence[typing.Any]]) -> None:
    """Draws pairs of photos that were taken for the same.

    Args:
      path: of the PNG to write.
      staging: folder in which the spool lies.
      pairs: as `pair` makes them.
    """
    reader = spool.Reader(f"{staging}/{spool.FOLDER}")

    def picture(name: str) -> bytes:
        _, *where = json.loads(name)
        if len(where) == 1:
            return duplicates.files.read(where[0])
        return reader.read(spool.Spot(*where))

    duplicates.contact_sheet(
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
