"""The first steps of the graph: a dump to photos that are whole, public and allowed."""

import hashlib
import json
import typing
from collections.abc import Generator, Iterable, Iterator, Mapping

import apache_beam as beam
from apache_beam import pvalue

from hashvision import storage
from hashvision.data import records
from hashvision.data.removals import Names
from hashvision.duplicates import spool
from hashvision.duplicates.fingerprints import fingerprint
from hashvision.prepare import states
from hashvision.sources import dates, pictures, posts
from hashvision.sources.reasons import Dropped
from hashvision.tags import hashtags

# Neighbouring lines go to one worker: their photos often lie in one tar.
LINES = 200


class Chunk(typing.NamedTuple):
    """Where neighbouring lines of a dump lie: lines may hold photos, and do not travel."""

    path: str
    start: int  # byte offset of the first line
    end: int  # behind the first byte of the last line
    lines: int  # that are not blank


class Photo(typing.NamedTuple):
    """A post that has come through up to its labels; its picture lies in the spool."""

    order: tuple[int, int]  # hash of the id, place in the dump: the records' order
    id: str
    owner: str
    when: int  # as `dates.sortable` has it
    tags: tuple[str, ...]  # folded, sorted, each once
    words: tuple[str, ...]  # the same of the rest of the text
    sha256: bytes  # of the file as it was posted
    location: spool.Location
    copies: tuple[spool.Location, ...] = ()  # where the posts lie that show it too

    @property
    def key(self) -> bytes:
        """The order as 16 bytes; no other post has them."""
        return b"".join(number.to_bytes(8, "big") for number in self.order)

    def pack(self) -> bytes:
        """The photo in a fifth of the memory: a runner in one process keeps what it groups."""
        fields = self._replace(sha256=self.sha256.hex())
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, packed: bytes | str) -> "Photo":
        """The photo that was packed."""
        order, name, owner, when, tags, words, sha256, location, copies = json.loads(packed)
        return cls(
            (order[0], order[1]),
            name,
            owner,
            when,
            tuple(tags),
            tuple(words),
            bytes.fromhex(sha256),
            spool.Location(*location),
            tuple(spool.Location(*each) for each in copies),
        )


def dropped(reason: str, offset: int) -> pvalue.TaggedOutput:
    """What a step says of a post that does not come through: (reason, byte offset of its line)."""
    return pvalue.TaggedOutput("dropped", (reason, offset))


class ReadLines(beam.DoFn):
    """Cuts a range (path, start, end) of the dump into Chunks, and finds the State of each line."""

    def process(self, element: tuple[str, int, int]) -> Iterable[typing.Any]:
        """Yields Chunks of LINES lines, and States under "states"."""
        path, start, end = element
        first, last, lines = start, start, 0
        with storage.open(path) as file:
            for offset, line in posts.read_lines(file, start, end):
                if lines == LINES:
                    yield Chunk(path, first, last + 1, lines)
                    lines = 0
                first, last, lines = offset if not lines else first, offset, lines + 1
                try:
                    state = states.state_of(posts.parse(line or b""), offset, first)
                except Dropped:
                    continue
                yield pvalue.TaggedOutput("states", state)
        if lines:
            yield Chunk(path, first, last + 1, lines)


class ReadPosts(beam.DoFn):
    """Reads the lines of chunks again, and the photos of their posts."""

    def __init__(
        self, images: str, staging: str, short_side: int, removed: Names, keep_copies: bool
    ):
        """Takes what the steps need.

        Args:
          images: folder of the photos.
          staging: folder in which the spool lies.
          short_side: pixels to which photos are reduced.
          removed: what may not be used.
          keep_copies: whether other posts may show what a removed owner posted.
        """
        self.images, self.short_side, self.removed = images, short_side, removed
        self.folder, self.keep_copies = f"{staging}/{spool.FOLDER}", keep_copies

    def start_bundle(self) -> None:
        """Begins a file for the bundle's photos."""
        self.writer = spool.SpoolWriter(self.folder)

    def finish_bundle(self) -> None:
        """Ends it: what reads the photos waits for the bundle."""
        self.writer.close()

    def process(self, element: tuple[int, Mapping[str, typing.Any]]) -> Iterable[typing.Any]:
        """Yields what becomes of each line of a chunk.

        Args:
          element: where the chunk starts; the "chunk" itself, and its "superseded" lines as
            `states.superseded` yields them.

        Yields:
          Photos; under "fingerprints" (Photo, Fingerprint); under "removed" (offset, Fingerprint)
          of photos that no post may show; under "dropped" (reason, offset); and under "matched"
          (kind, hash) of the names on the list.
        """
        superseded = dict(element[1]["superseded"])
        for path, start, end, _ in element[1]["chunk"]:
            with storage.open(path) as file:
                for offset, line in posts.read_lines(file, start, end):
                    try:
                        post = posts.parse(line or b"")
                        yield from self._read(offset, post, superseded.get(offset))
                    except Dropped as why:
                        yield dropped(why.reason, offset)

    def _read(self, offset: int, post: posts.Post, reason: str | None) -> Iterator[typing.Any]:
        """Yields the post's Photo and fingerprint, or the fingerprint alone to find its copies by.

        Args:
          offset: of its line.
          post: the post.
          reason: for which another line with its id has it dropped, if one has.

        Raises:
          Dropped: the post is not kept.
        """
        by_id = yield from self._holds("id", post.id)
        by_owner = yield from self._holds("owner", post.owner)
        followed = by_id or (by_owner and not self.keep_copies)
        reason = self._reason(post, reason)
        if reason == "private" and not followed:
            raise Dropped(reason)  # its photo is never opened
        if reason != "private" and (by_id or by_owner):
            reason = "removed"
        try:
            encoded = posts.read_photo(post, self.images)
            digest = hashlib.sha256(encoded).digest()
            if reason != "private" and (yield from self._holds("sha256", digest)):
                followed, reason = True, "removed"
            if reason and not followed:
                raise Dropped(reason)
            image = pictures.normalise_photo(encoded, self.short_side)
        except Dropped as why:
            raise Dropped(reason or why.reason) from None
        if reason:
            yield pvalue.TaggedOutput("removed", (offset, fingerprint(image)))
            raise Dropped(reason)
        tags = {hashtags.fold(tag) for tag in hashtags.extract(post.text)} - {""}
        photo = Photo(
            order=(records.id_hash(post.id), offset),
            id=post.id,
            owner=post.owner,
            when=dates.sortable(post.created_at),
            tags=tuple(sorted(tags)),
            words=tuple(sorted(set(hashtags.words(post.text)))),
            sha256=digest,
            location=self.writer.write(image),
        )
        yield photo
        yield pvalue.TaggedOutput("fingerprints", (photo, fingerprint(image)))

    def _holds(self, kind: str, value: str | bytes) -> Generator[typing.Any, None, bool]:
        """Whether the list names an id, an owner or a file; yields the name as it is there."""
        named = self.removed.holds(kind, value)
        if named:
            name = kind, self.removed.key.hash(kind, value)
            yield pvalue.TaggedOutput("matched", name)
        return named

    def _reason(self, post: posts.Post, superseded: str | None) -> str | None:
        """Why a post is dropped, as far as its lines tell."""
        if superseded == "private":
            return superseded
        try:
            posts.check(post)
        except Dropped as why:
            return why.reason
        return superseded
