"""Which post is kept for each group of copies, and what it inherits from them, as Beam joins.

A DuplicatePair leads from a copy to an earlier post, which may be a copy too. Pointer jumping
(Wyllie 1979) follows these chains to their ends: each round doubles the reach of every link.

    pairs > links to an earlier post > links to the end of the chain > groups
"""

import collections
import itertools
import json
import operator
import typing
from collections.abc import Iterable, Iterator

import apache_beam as beam

from hashvision.data import records
from hashvision.duplicates import spool
from hashvision.duplicates.search import DuplicatePair
from hashvision.prepare.reading import Photo
from hashvision.sources.posts import MOST_TAGS

_ROUNDS = 2  # enough for chains of three links
_ONE_WORKER = -1  # stands for a bucket: all its links go to one worker

# Words that a post inherits at most. Half the posts of a platform may show one picture, so a post
# inherits the most common tags and words of its copies only.
_MAXIMUM_WORDS = 2000

KEPT = "kept"


class Link(typing.NamedTuple):
    """A post that is a copy, and the end of its chain as far as it is known."""

    pair: DuplicatePair
    key: bytes  # of the post
    end: bytes  # key of the post at the end of the chain
    fate: str  # of the post at the end: KEPT, or the kind of its pair; "" while it is unknown


def bucket(key: bytes, buckets: int) -> int:
    """Returns the bucket of a key, from 0 to buckets - 1.

    A bucket holds some hundred posts, because each group costs a runner memory of its own.
    """
    return int.from_bytes(key[:8], "big") * buckets >> 64


class FollowChains(beam.PTransform):
    """Turns DuplicatePairs, one per post, into Links to the ends of their chains.

    A chain ends at a post that is kept, or at one that shows a removed or an evaluation photo. One
    worker follows the few chains that are too long for the rounds, such as the frames of a slow
    film.
    """

    def __init__(self, buckets: int):
        """Takes the number of buckets that posts are grouped into."""
        super().__init__()
        self.buckets = buckets

    def expand(self, input_or_inputs: typing.Any) -> typing.Any:
        """Takes DuplicatePairs and returns Links."""
        links = input_or_inputs | "Link" >> beam.Map(_link)
        for number in range(_ROUNDS):
            links = self._round(links, str(number))
        links = (
            links
            | "Gather"
            >> beam.Map(
                lambda link, n: (bucket(link.key, n) if link.fate else _ONE_WORKER, link),
                self.buckets,
            )
            | "Together" >> beam.GroupByKey()
            | "Follow" >> beam.FlatMapTuple(_follow)
        )
        return self._round(links, "Last")

    def _round(self, links: typing.Any, name: str) -> typing.Any:
        """Each open link asks the post at its end where that post's own link leads."""
        return (
            links
            | f"Ask{name}" >> beam.FlatMap(_ask, self.buckets)
            | f"Round{name}" >> beam.GroupByKey()
            | f"Answer{name}" >> beam.FlatMapTuple(_answer)
        )


def _link(pair: DuplicatePair) -> typing.Any:
    key = pair.order[-16:]
    if pair.kind == "duplicate":
        return Link(pair=pair, key=key, end=Photo.unpack(pair.partner).key, fate="")
    return Link(pair=pair, key=key, end=key, fate=pair.kind)


def _ask(link: Link, buckets: int) -> Iterator[typing.Any]:
    """Yields (bucket, (asks, link)): asks is True where the link asks, False where it answers."""
    yield bucket(link.key, buckets), (False, link)
    if not link.fate:
        yield bucket(link.end, buckets), (True, link)


def _answer(_: int, grouped: Iterable[tuple[bool, Link]]) -> Iterator[typing.Any]:
    grouped = list(grouped)
    answers = {link.key: (link.end, link.fate) for asks, link in grouped if not asks}
    for asks, link in grouped:
        if asks:
            end, fate = answers.get(link.end, (link.end, KEPT))
            yield link._replace(end=end, fate=fate)
        elif link.fate:
            yield link


def _follow(_: int, links: Iterable[Link]) -> Iterator[typing.Any]:
    """Moves open links to the first post of their chain; chains lead to ever earlier posts."""
    ends: dict[bytes, bytes] = {}
    for link in sorted(links, key=lambda link: link.pair.order):
        if not link.fate:
            link = link._replace(end=ends.get(link.end, link.end))
            ends[link.key] = link.end
        yield link


class Group(typing.NamedTuple):
    """Copies of a post, and the tags and words that the post inherits from them."""

    key: bytes  # of the post
    copies: spool.Location  # of the list of copies, which `read` reads
    tags: frozenset[str]
    words: frozenset[str]


class GroupCopies(beam.PTransform):
    """Turns Links to the ends of their chains into Groups; a post may get several.

    The copies of a kept post are the posts whose chains end there, and other posts that show its
    photo. The post inherits the tags and words of the first. Where duplicates are kept, the copies
    of each post are all posts whose chains end where its own ends, others that show its photo, and
    others whose photo it shows.
    """

    def __init__(self, folder: str, buckets: int, keep_duplicates: bool):
        """Takes the settings.

        Args:
          folder: of the spool.
          buckets: number of buckets that posts are grouped into.
          keep_duplicates: whether copies among the posts are kept.
        """
        super().__init__()
        self.folder, self.buckets, self.keep_duplicates = folder, buckets, keep_duplicates

    def expand(self, input_or_inputs: typing.Any) -> typing.Any:
        """Takes Links and returns Groups."""
        return (
            input_or_inputs
            | "Showing" >> beam.FlatMap(_copies_of_posts, self.keep_duplicates)
            | "ByShown" >> beam.Map(lambda each, n: (bucket(each[0], n), each), self.buckets)
            | "SameShown" >> beam.GroupByKey()
            | "WriteGroups" >> beam.ParDo(_WriteGroups(self.folder, self.keep_duplicates))
        )


# (key of a post, whether the chain of a copy ends there, that copy, the post itself or "" where
# only its key is known). Posts are packed Photos.
_CopyOfPost = tuple[bytes, bool, str, str]


def _copies_of_posts(link: Link, keep_duplicates: bool) -> Iterator[typing.Any]:
    """Yields a _CopyOfPost for each post whose photo the link's post shows."""
    name, partner = link.pair.name, link.pair.partner
    if link.pair.kind == "duplicate" and (
        link.fate == KEPT or (keep_duplicates and link.fate == "leak")
    ):
        yield link.end, True, name, partner if Photo.unpack(partner).key == link.end else ""
    for each in link.pair.also:
        yield Photo.unpack(each).key, False, name, each


def _most_common(of_copies: Iterable[Iterable[str]], most: int) -> frozenset[str]:
    """Returns the terms that most copies have; ties go to the first in alphabetical order."""
    counts = collections.Counter(term for terms in of_copies for term in set(terms))
    ordered = sorted(counts, key=lambda term: (-counts[term], term))
    return frozenset(ordered[:most])


class _WriteGroups(beam.DoFn):
    """Turns the _CopyOfPosts of a bucket into Groups, and writes their copies to the spool."""

    def __init__(self, folder: str, keep_duplicates: bool):
        self.folder, self.keep_duplicates = folder, keep_duplicates

    def start_bundle(self) -> None:
        self.writer = spool.SpoolWriter(self.folder)

    def finish_bundle(self) -> None:
        self.writer.close()

    def process(self, element: tuple[int, Iterable[_CopyOfPost]]) -> Iterator[typing.Any]:
        for key, same in itertools.groupby(sorted(element[1]), key=operator.itemgetter(0)):
            same = list(same)
            ending, others = (
                [Photo.unpack(copy) for _, ends, copy, _ in same if ends is wanted]
                for wanted in (True, False)
            )
            if not self.keep_duplicates:
                yield Group(
                    key=key,
                    copies=self._write([*ending, *others]),
                    tags=_most_common((photo.tags for photo in ending), MOST_TAGS),
                    words=_most_common((photo.words for photo in ending), _MAXIMUM_WORDS),
                )
                continue
            own = Photo.unpack(max(post for *_, post in same))
            chain = [own, *ending] if ending else []
            for members, copies in ((chain, chain), ([own], others), (others, [own])):
                if members and copies:
                    location = self._write(copies)
                    for member in members:
                        yield Group(
                            key=member.key, copies=location, tags=frozenset(), words=frozenset()
                        )

    def _write(self, copies: list[Photo]) -> spool.Location:
        rows = [(photo.id, photo.owner, photo.sha256.hex()) for photo in copies]
        return self.writer.write(json.dumps(rows).encode())


def read(spooled: spool.SpoolReader, photo: Photo) -> tuple[records.Copy, ...]:
    """Returns the copies of a photo, sorted by id: the posts in its Groups except its own."""
    rows = {tuple(row) for location in photo.copies for row in json.loads(spooled.read(location))}
    return tuple(
        records.Copy(name, owner, bytes.fromhex(sha256))
        for name, owner, sha256 in sorted(rows)
        if name != photo.id
    )
