"""The first steps of the graph: from a dump to photos that are intact, public and allowed."""

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

# Lines per Chunk. Neighbouring lines go to one worker, because their photos are often in one tar.
LINES = 200


class Chunk(typing.NamedTuple):
    """The place of neighbouring lines in a dump.

    Lines may hold photos, so Beam passes on their place only.
    """

    path: str
    start: int  # byte offset of the first line
    end: int  # one more than the offset of the last line
    lines: int  # number of lines that are not blank


class Photo(typing.NamedTuple):
    """A post that has passed all checks but that of its labels; its picture is in the spool."""

    order: tuple[int, int]  # hash of the id, offset in the dump; records are sorted by it
    id: str
    owner: str
    when: int  # date, as returned by `dates.sortable`
    tags: tuple[str, ...]  # folded, sorted and unique
    words: tuple[str, ...]  # of the rest of the text, sorted and unique
    sha256: bytes  # of the posted file
    location: spool.Location
    copies: tuple[spool.Location, ...] = ()  # lists of the posts that show it too

    @property
    def key(self) -> bytes:
        """The order as 16 bytes, which no other post has."""
        return b"".join(number.to_bytes(8, "big") for number in self.order)

    def pack(self) -> bytes:
        """Packs the photo in a fifth of its memory; a local runner keeps all that it groups."""
        fields = self._replace(sha256=self.sha256.hex())
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, packed: bytes | str) -> "Photo":
        """Returns the photo that `pack` packed."""
        order, name, owner, when, tags, words, sha256, location, copies = json.loads(packed)
        return cls(
            order=(order[0], order[1]),
            id=name,
            owner=owner,
            when=when,
            tags=tuple(tags),
            words=tuple(words),
            sha256=bytes.fromhex(sha256),
            location=spool.Location(*location),
            copies=tuple(spool.Location(*each) for each in copies),
        )


def dropped(reason: str, offset: int) -> pvalue.TaggedOutput:
    """Returns the output of a step that drops a post: (reason, byte offset of its line)."""
    return pvalue.TaggedOutput("dropped", (reason, offset))


class ReadLines(beam.DoFn):
    """Cuts a range (path, start, end) of the dump into Chunks, and makes a State of each line."""

    def process(self, element: tuple[str, int, int]) -> Iterable[typing.Any]:
        """Yields Chunks of at most LINES lines, and States under "states"."""
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
        """Takes the settings.

        Args:
          images: folder of the photos.
          staging: folder of the spool folder.
          short_side: in pixels, to which larger photos are reduced.
          removed: posts that may not be used.
          keep_copies: whether other posts may show the photos of a removed owner.
        """
        self.images, self.short_side, self.removed = images, short_side, removed
        self.folder, self.keep_copies = f"{staging}/{spool.FOLDER}", keep_copies

    def start_bundle(self) -> None:
        """Opens a spool file for the bundle's photos."""
        self.writer = spool.SpoolWriter(self.folder)

    def finish_bundle(self) -> None:
        """Closes the file; steps that read the photos wait for the bundle."""
        self.writer.close()

    def process(self, element: tuple[int, Mapping[str, typing.Any]]) -> Iterable[typing.Any]:
        """Reads the posts of a chunk.

        Args:
          element: (start of the chunk, {"chunk": its Chunk, "superseded": (offset, reason) of its
            lines that do not count, from `states.superseded`}).

        Yields:
          Photos; under "fingerprints" (Photo, Fingerprint); under "removed" (offset, Fingerprint)
          of photos that no post may show; under "dropped" (reason, offset); and under "matched"
          (kind, hash) of the removals that name a post.
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
        """Yields the post's Photo and fingerprint; of a removed post the fingerprint only.

        The fingerprint of a removed post finds its copies.

        Args:
          offset: of its line.
          post: the post.
          reason: to drop it because of another line with its id, or None.

        Raises:
          Dropped: the post is not kept.
        """
        by_id = yield from self._holds("id", post.id)
        by_owner = yield from self._holds("owner", post.owner)
        drop_copies = by_id or (by_owner and not self.keep_copies)
        reason = self._reason(post, reason)
        if reason == "private" and not drop_copies:
            raise Dropped(reason)  # without opening its photo
        if reason != "private" and (by_id or by_owner):
            reason = "removed"
        try:
            encoded = posts.read_photo(post, self.images)
            digest = hashlib.sha256(encoded).digest()
            if reason != "private" and (yield from self._holds("sha256", digest)):
                drop_copies, reason = True, "removed"
            if reason and not drop_copies:
                raise Dropped(reason)
            image = pictures.normalize_photo(encoded, self.short_side)
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
        """Returns whether the list names an id, owner or file; yields its (kind, hash) if so."""
        named = self.removed.holds(kind, value)
        if named:
            name = kind, self.removed.key.hash(kind, value)
            yield pvalue.TaggedOutput("matched", name)
        return named

    def _reason(self, post: posts.Post, superseded: str | None) -> str | None:
        """Returns the reason to drop a post that its lines give, or None."""
        if superseded == "private":
            return superseded
        try:
            posts.check(post)
        except Dropped as why:
            return why.reason
        return superseded
