"""The first steps of the graph: lines of the dump to photos that are whole, public and allowed."""

import hashlib
import json
import typing
from collections.abc import Iterable

import apache_beam as beam
from apache_beam import pvalue

from hashvision import storage
from hashvision.data import records
from hashvision.data.removals import Names
from hashvision.prepare import hashtags, posts, spool
from hashvision.prepare.fingerprints import Fingerprint, fingerprint
from hashvision.sources import pictures
from hashvision.sources.reasons import Dropped

LONGEST_EXAMPLE = 200  # characters of an id in the manifest
# Neighbouring lines go to one worker: their photos often lie in one tar.
LINES = 200

Line = tuple[int, bytes | None]  # its byte offset; None if it is too long


class Photo(typing.NamedTuple):
    """A post that has come through up to its labels; its picture lies in the spool."""

    order: tuple[int, int]  # hash of the id, place in the dump: the records' order
    id: str
    owner: str
    created_at: str
    tags: tuple[str, ...]  # folded, sorted, each once
    words: tuple[str, ...]  # the same of the rest of the text
    sha256: bytes  # of the file as it was posted
    spot: spool.Spot

    def pack(self) -> bytes:
        """The photo in a fifth of the memory: a runner in one process keeps what it groups."""
        fields = self._replace(sha256=self.sha256.hex())
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> "Photo":
        """The photo that was packed."""
        order, name, owner, created_at, tags, words, sha256, spot = json.loads(packed)
        return cls(
            (order[0], order[1]),
            name,
            owner,
            created_at,
            tuple(tags),
            tuple(words),
            bytes.fromhex(sha256),
            spool.Spot(*spot),
        )


def dropped(reason: str, example: str) -> pvalue.TaggedOutput:
    """What a step says of a post that does not come through: (reason, example)."""
    return pvalue.TaggedOutput("dropped", (reason, example[:LONGEST_EXAMPLE]))


class ReadLines(beam.DoFn):
    """(path, start, end) of the dump to its lines, LINES neighbours together."""

    def process(self, element: tuple[str, int, int]) -> Iterable[list[Line]]:
        """Yields lists of (byte offset, line or None)."""
        path, start, end = element
        lines = []
        with storage.open(path) as file:
            for line in posts.read_lines(file, start, end):
                lines.append(line)
                if len(lines) == LINES:
                    yield lines
                    lines = []
        if lines:
            yield lines


class ReadPosts(beam.DoFn):
    """Lines to photos, their fingerprints under "fingerprints", and reasons under "dropped"."""

    def __init__(
        self, images: str, staging: str, short_side: int, removed: Names, fingerprints: bool
    ):
        """Takes what the steps need.

        Args:
          images: folder of the photos.
          staging: folder in which the spool lies.
          short_side: pixels to which photos are reduced.
          removed: what may not be used.
          fingerprints: whether to make them.
        """
        self.images, self.short_side, self.removed = images, short_side, removed
        self.folder, self.fingerprints = f"{staging}/{spool.FOLDER}", fingerprints

    def start_bundle(self) -> None:
        """Begins a file for the bundle's photos."""
        self.writer = spool.Writer(self.folder)

    def finish_bundle(self) -> None:
        """Ends it: what reads the photos waits for the bundle."""
        self.writer.close()

    def process(self, element: list[Line]) -> Iterable[typing.Any]:
        """Yields Photos, "fingerprints" (Photo, Fingerprint) and "dropped" (reason, example)."""
        for offset, line in element:
            example = f"byte {offset}"
            try:
                if line is None:
                    raise Dropped("broken_line")
                post = posts.parse(line)
                example = post.id
                photo, print_ = self._read(offset, post)
            except Dropped as why:
                yield dropped(why.reason, example)
                continue
            yield photo
            if print_:
                yield pvalue.TaggedOutput("fingerprints", (photo, print_))

    def _read(self, offset: int, post: posts.Post) -> tuple[Photo, Fingerprint | None]:
        posts.check(post)
        if self.removed.holds("id", post.id) or self.removed.holds("owner", post.owner):
            raise Dropped("removed")
        encoded = posts.read_photo(post, self.images)
        digest = hashlib.sha256(encoded).digest()
        if self.removed.holds("sha256", digest):
            raise Dropped("removed")
        image = pictures.normalise_photo(encoded, self.short_side)
        tags = {hashtags.fold(tag) for tag in hashtags.extract(post.text)} - {""}
        photo = Photo(
            order=(records.id_hash(post.id), offset),
            id=post.id,
            owner=post.owner,
            created_at=post.created_at,
            tags=tuple(sorted(tags)),
            words=tuple(sorted(set(hashtags.words(post.text)))),
            sha256=digest,
            spot=self.writer.write(image),
        )
        return photo, fingerprint(image) if self.fingerprints else None
