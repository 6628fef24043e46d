"""Which post is kept for each copy, and what that post takes over from its copies, as Beam joins.

A match leads from a copy to an earlier post, which may be a copy too. Pointer jumping (Wyllie 1979)
follows these chains to their ends: each round doubles the reach of every link.

    matches > links to an earlier post > links to the end of the chain > groups
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
_ONE_WORKER = -1  # in place of a bucket

# What a post takes over at most: of a picture that half a platform posted, what most of them wrote.
_MOST_WORDS = 2000

KEPT = "kept"


class Link(typing.NamedTuple):
    """A post with a match, and the end of its chain as far as it is known."""

    match: DuplicatePair
    key: bytes  # of the post
    end: bytes  # key of the post at the end
    fate: str  # of the post at the end: KEPT, or the kind of its match; "" while this is open


def bucket(key: bytes, buckets: int) -> int:
    """Groups some hundred posts by their keys: each group costs a runner memory of its own."""
    return int.from_bytes(key[:8], "big") * buckets >> 64


class FollowChains(beam.PTransform):
    """Turns Matches, one a post, into Links to the ends of their chains.

    A chain ends at a post that is kept, or at one that shows a removed or an evaluation photo. One
    worker follows the few chains that are longer than some rounds reach (frames of a slow film).
    """

    def __init__(self, buckets: int):
        """Takes into how many buckets posts are grouped."""
        super().__init__()
        self.buckets = buckets

    def expand(self, input_or_inputs: typing.Any) -> typing.Any:
        """Takes Matches and returns Links."""
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
        """Each open link asks the post at its end where that one leads."""
        return (
            links
            | f"Ask{name}" >> beam.FlatMap(_ask, self.buckets)
            | f"Round{name}" >> beam.GroupByKey()
            | f"Answer{name}" >> beam.FlatMapTuple(_answer)
        )


def _link(match: DuplicatePair) -> typing.Any:
    key = match.order[-16:]
    if match.kind == "duplicate":
        return Link(match, key, Photo.unpack(match.partner).key, "")
    return Link(match, key, key, match.kind)


def _ask(link: Link, buckets: int) -> Iterator[typing.Any]:
    """(bucket, (whether the link asks there or answers, link))."""
    yield bucket(link.key, buckets), (False, link)
    if not link.fate:
        yield bucket(link.end, buckets), (True, link)


def _answer(_: int, met: Iterable[tuple[bool, Link]]) -> Iterator[typing.Any]:
    met = list(met)
    answers = {link.key: (link.end, link.fate) for asks, link in met if not asks}
    for asks, link in met:
        if asks:
            end, fate = answers.get(link.end, (link.end, KEPT))
            yield link._replace(end=end, fate=fate)
        elif link.fate:
            yield link


def _follow(_: typing.Any, links: Iterable[Link]) -> Iterator[typing.Any]:
    """Moves open links on to the first post that has none; chains lead to ever earlier posts."""
    ends: dict[bytes, bytes] = {}
    for link in sorted(links, key=lambda link: link.match.order):
        if not link.fate:
            link = link._replace(end=ends.get(link.end, link.end))
            ends[link.key] = link.end
        yield link


class Group(typing.NamedTuple):
    """Copies of a post, and what it takes over from them."""

    key: bytes  # of the post
    copies: spool.Location  # where `read` finds them
    tags: frozenset[str]
    words: frozenset[str]


class GroupCopies(beam.PTransform):
    """Turns Links to the ends of their chains into Groups; a post may get several.

    The copies of a kept post are the posts whose chains end there, whose tags and words it takes
    over, and other posts that were found to show its photo. Where duplicates are kept, the copies
    of each post are all whose chains end where its own does, and others that show its photo or
    whose photo it shows.
    """

    def __init__(self, folder: str, buckets: int, keep_duplicates: bool):
        """Takes the spool's folder, and into how many buckets posts are grouped."""
        super().__init__()
        self.folder, self.buckets, self.keep_duplicates = folder, buckets, keep_duplicates

    def expand(self, input_or_inputs: typing.Any) -> typing.Any:
        """Takes Links and returns Groups."""
        return (
            input_or_inputs
            | "Showing" >> beam.FlatMap(_showing, self.keep_duplicates)
            | "ByShown" >> beam.Map(lambda each, n: (bucket(each[0], n), each), self.buckets)
            | "SameShown" >> beam.GroupByKey()
            | "WriteGroups" >> beam.ParDo(_WriteGroups(self.folder, self.keep_duplicates))
        )


# Key of a post; whether the chain of a copy ends there; that copy; the post itself, or "" where
# only its key is known. Posts are packed Photos.
_Showing = tuple[bytes, bool, str, str]


def _showing(link: Link, keep_duplicates: bool) -> Iterator[typing.Any]:
    name, partner = link.match.name, link.match.partner
    if link.match.kind == "duplicate" and (
        link.fate == KEPT or (keep_duplicates and link.fate == "leak")
    ):
        yield link.end, True, name, partner if Photo.unpack(partner).key == link.end else ""
    for each in link.match.also:
        yield Photo.unpack(each).key, False, name, each


def _commonest(of_copies: Iterable[Iterable[str]], most: int) -> frozenset[str]:
    """What most copies have, the first by name among equals."""
    counts = collections.Counter(term for terms in of_copies for term in set(terms))
    ordered = sorted(counts, key=lambda term: (-counts[term], term))
    return frozenset(ordered[:most])


class _WriteGroups(beam.DoFn):
    """Turns the _Showings of a bucket into Groups, whose lists of copies go to the spool."""

    def __init__(self, folder: str, keep_duplicates: bool):
        self.folder, self.keep_duplicates = folder, keep_duplicates

    def start_bundle(self) -> None:
        self.writer = spool.SpoolWriter(self.folder)

    def finish_bundle(self) -> None:
        self.writer.close()

    def process(self, element: tuple[int, Iterable[_Showing]]) -> Iterator[typing.Any]:
        for key, same in itertools.groupby(sorted(element[1]), key=operator.itemgetter(0)):
            same = list(same)
            ending, others = (
                [Photo.unpack(copy) for _, ends, copy, _ in same if ends is wanted]
                for wanted in (True, False)
            )
            if not self.keep_duplicates:
                tags = _commonest((photo.tags for photo in ending), MOST_TAGS)
                words = _commonest((photo.words for photo in ending), _MOST_WORDS)
                yield Group(key, self._write([*ending, *others]), tags, words)
                continue
            own = Photo.unpack(max(post for *_, post in same))
            circle = [own, *ending] if ending else []
            for told, copies in ((circle, circle), ([own], others), (others, [own])):
                if told and copies:
                    location = self._write(copies)
                    yield from (Group(p.key, location, frozenset(), frozenset()) for p in told)

    def _write(self, copies: list[Photo]) -> spool.Location:
        rows = [(photo.id, photo.owner, photo.sha256.hex()) for photo in copies]
        return self.writer.write(json.dumps(rows).encode())


def read(spooled: spool.SpoolReader, photo: Photo) -> tuple[records.Copy, ...]:
    """The copies of a photo: the posts in its Groups without its own, in the order of ids."""
    rows = {tuple(row) for location in photo.copies for row in json.loads(spooled.read(location))}
    return tuple(
        records.Copy(name, owner, bytes.fromhex(sha256))
        for name, owner, sha256 in sorted(rows)
        if name != photo.id
    )
