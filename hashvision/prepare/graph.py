"""The Beam graph from a dump of posts to a dataset folder.

The graph, left to right; everything that grows with the dump stays in Beam, and what the vocabulary
needs of it is bounded: the MAXIMUM_TAGS commonest tags with a count each, MAXIMUM_TERMS terms, and
for each frequent tag one vector of co-occurrence counts, reduced to three numbers where it lies.

    ranges > lines > posts > photos > labelled > shards
                              '> tags > counts, spreads > vocabulary '^
"""

import hashlib
import typing
from collections.abc import Iterable, Mapping, Sequence

import apache_beam as beam
import numpy as np
from apache_beam import pvalue

from hashvision.data import records
from hashvision.prepare import folder, hashtags, spread, vocabulary
from hashvision.prepare import posts as dump
from hashvision.prepare.wordnet import Lexicon

MAXIMUM_TAGS = 1_000_000
EXAMPLES = 20
LONGEST_EXAMPLE = 200  # characters of an id in the manifest
# Fewer records a shard would leave some shard empty now and then: ids fall to shards at random.
MINIMUM_RECORDS = 64


class Photo(typing.NamedTuple):
    """A post that has come through up to its labels."""

    order: tuple[int, int]  # hash of the id, place in the dump: the records' order
    id: str
    owner: str
    tags: tuple[str, ...]  # folded, sorted, each once
    words: tuple[str, ...]  # the same of the rest of the text
    image: bytes
    sha256: bytes  # of the file as it was posted


class ReadLines(beam.DoFn):
    """(path, start, end) of the dump to its lines."""

    def process(self, element: tuple[str, int, int]) -> Iterable[tuple[int, bytes | None]]:
        """Yields (byte offset, line or None)."""
        path, start, end = element
        with dump.open_file(path) as file:
            yield from dump.read_lines(file, start, end)


class ReadPost(beam.DoFn):
    """A line to a Photo, or to the reason why not under the tag "dropped"."""

    def __init__(self, images: str, short_side: int):
        """Takes the folder of the photos and the pixels to which they are reduced."""
        self.images = images
        self.short_side = short_side

    def process(self, element: tuple[int, bytes | None]) -> Iterable[typing.Any]:
        """Yields a Photo, or "dropped" (reason, example)."""
        offset, line = element
        example = f"byte {offset}"
        try:
            if line is None:
                raise dump.Dropped("broken_line")
            post = dump.parse(line)
            example = post.id
            encoded = dump.read_photo(post, self.images)
            image = dump.normalise_photo(encoded, self.short_side)
        except dump.Dropped as dropped:
            yield pvalue.TaggedOutput("dropped", (dropped.reason, example[:LONGEST_EXAMPLE]))
            return
        tags = {hashtags.fold(tag) for tag in hashtags.extract(post.text)} - {""}
        yield Photo(
            order=(records.id_hash(post.id), offset),
            id=post.id,
            owner=post.owner,
            tags=tuple(sorted(tags)),
            words=tuple(sorted(set(hashtags.words(post.text)))),
            image=image,
            sha256=hashlib.sha256(encoded).digest(),
        )


def shard_of(order: tuple[int, int], shards: int) -> int:
    """Shards cut the hashes' range evenly, so any shard is a random sample of the posts."""
    return order[0] * shards >> 64


def count_shards(records_bytes: tuple[int, int], shard_bytes: int) -> int:
    """Number of shards of about `shard_bytes` for (records, bytes)."""
    kept, total = records_bytes
    return max(1, min(round(total / shard_bytes), kept // MINIMUM_RECORDS))


class Label(beam.DoFn):
    """A Photo to (Photo, class numbers), or dropped for want of one."""

    def __init__(self, keep_untagged: bool):
        """Takes whether photos of no class are kept."""
        self.keep_untagged = keep_untagged

    def process(self, element: Photo, classes: Mapping[str, int]) -> Iterable[typing.Any]:
        """Yields (photo, sorted class numbers), or "dropped" (reason, example)."""
        labels = tuple(sorted({classes[tag] for tag in element.tags if tag in classes}))
        if labels or self.keep_untagged:
            yield element, labels
        else:
            yield pvalue.TaggedOutput("dropped", ("no_tag", element.id[:LONGEST_EXAMPLE]))


class WriteShard(beam.DoFn):
    """All records of a shard to its TFRecord file and its index."""

    def __init__(self, output: str):
        """Takes the folder to write into."""
        self.output = output

    def process(
        self,
        element: tuple[int, Iterable[tuple[Photo, tuple[int, ...]]]],
        shards: int,
        counts: list[int],
    ) -> Iterable[dict[str, typing.Any]]:
        """Yields what the manifest says of the shard."""
        shard, labelled = element
        ordered = sorted(labelled, key=lambda pair: pair[0].order)
        rows = (
            records.Record(photo.id, photo.owner, photo.image, labels, photo.sha256)
            for photo, labels in ordered
        )
        yield folder.write_shard(self.output, shard, shards, rows, np.array(counts, np.int64))


class DropCounts(beam.CombineFn):
    """Count of the dropped posts of one reason, and the first examples in the order of ids."""

    def create_accumulator(self) -> tuple[int, list[str]]:
        """Nothing dropped."""
        return 0, []

    def add_input(
        self, mutable_accumulator: tuple[int, list[str]], element: str
    ) -> tuple[int, list[str]]:
        """Adds one."""
        return self.merge_accumulators([mutable_accumulator, (1, [element])])

    def merge_accumulators(
        self, accumulators: Iterable[tuple[int, list[str]]]
    ) -> tuple[int, list[str]]:
        """Adds counts and keeps the first examples."""
        total, examples = 0, []
        for count, some in accumulators:
            total += count
            examples += some
        return total, sorted(examples)[:EXAMPLES]

    def extract_output(self, accumulator: tuple[int, list[str]]) -> tuple[int, list[str]]:
        """As it stands."""
        return accumulator


def build(
    pipeline: beam.Pipeline,
    ranges: Sequence[tuple[str, int, int]],
    images: str,
    output: str,
    lexicon: Lexicon | None,
    minimum_count: int,
    short_side: int,
    shard_bytes: int,
    keep_untagged: bool,
) -> None:
    """Adds the whole graph to `pipeline`; it writes the shards and its summary into `output`."""
    lines = (
        pipeline
        | "Ranges" >> beam.Create(ranges)
        | "SpreadRanges" >> beam.Reshuffle()
        | "ReadLines" >> beam.ParDo(ReadLines())
    )
    read = (
        lines
        | "SpreadLines" >> beam.Reshuffle()  # a range is quick to read, its photos are slow
        | "ReadPosts"
        >> beam.ParDo(ReadPost(images, short_side)).with_outputs("dropped", main="photos")
    )
    once = pipeline | "Once" >> beam.Create([None])

    # Tags, counted and measured.
    contexts = read.photos | "Contexts" >> beam.Map(lambda photo: (photo.tags, photo.words))
    posts = pvalue.AsSingleton(contexts | "CountPosts" >> beam.combiners.Count.Globally())
    tag_counts = contexts | "Tags" >> beam.FlatMap(lambda context: context[0]) | _count("Tags")
    word_counts = contexts | "Words" >> beam.FlatMap(lambda context: context[1]) | _count("Words")
    word_terms = _terms("Word", word_counts)
    tag_terms = _terms("Tag", tag_counts)
    counts = pvalue.AsSingleton(
        tag_counts | "CommonestTags" >> _commonest(MAXIMUM_TAGS) | "Counts" >> beam.Map(dict)
    )
    spreads = (
        contexts
        | "TermsByTag" >> beam.FlatMap(spread.terms_by_tag, counts, word_terms, tag_terms)
        | "CountTerms" >> beam.CombinePerKey(spread.TermCounts())
        | "Spreads" >> beam.Map(spread.spread_of, counts, word_terms, tag_terms, posts)
    )

    # Classes.
    assignment = pvalue.AsSingleton(
        once
        | "Assign"
        >> beam.Map(
            lambda _, counts, spreads, lexicon: vocabulary.assign(counts, spreads, lexicon),
            counts,
            pvalue.AsDict(spreads),
            lexicon,
        )
    )
    class_counts = (
        contexts
        | "CandidatesOfPost"
        >> beam.FlatMap(
            lambda context, assignment: {
                assignment.classes[tag] for tag in context[0] if tag in assignment.classes
            },
            assignment,
        )
        | _count("Candidates")
    )
    wordnet_name = lexicon.name if lexicon else None
    finished = once | "Vocabulary" >> beam.Map(
        lambda _, made, tags, classes: vocabulary.finish(
            made, tags, classes, minimum_count, wordnet_name
        ),
        assignment,
        counts,
        pvalue.AsDict(class_counts),
    )
    classes = finished | "TagsToNumbers" >> beam.Map(
        lambda made: {tag: n for n, entry in enumerate(made["classes"]) for tag in entry["tags"]}
    )
    post_counts = finished | "PostsByClass" >> beam.Map(
        lambda made: [entry["count"] for entry in made["classes"]]
    )

    # Records.
    labelled = read.photos | "Label" >> beam.ParDo(
        Label(keep_untagged), pvalue.AsSingleton(classes)
    ).with_outputs("dropped", main="photos")
    shards = pvalue.AsSingleton(
        labelled.photos
        | "Sizes" >> beam.Map(lambda pair: (1, len(pair[0].image)))
        | "TotalSize" >> beam.CombineGlobally(_sum_pairs)
        | "CountShards" >> beam.Map(count_shards, shard_bytes)
    )
    written = (
        labelled.photos
        | "ShardOf" >> beam.Map(lambda pair, n: (shard_of(pair[0].order, n), pair), shards)
        | "Shards" >> beam.GroupByKey()
        | "Write" >> beam.ParDo(WriteShard(output), shards, pvalue.AsSingleton(post_counts))
    )

    # What the driver is told.
    dropped = (
        (read.dropped, labelled.dropped)
        | "AllDropped" >> beam.Flatten()
        | "CountDropped" >> beam.CombinePerKey(DropCounts())
    )
    labels = (
        labelled.photos | "LabelsOfPhoto" >> beam.Map(lambda pair: len(pair[1])) | _count("Labels")
    )
    _ = once | "Summary" >> beam.Map(
        lambda _, *sides: folder.write_json(
            f"{output}/{folder.SUMMARY}", folder.Summary(*sides)._asdict()
        ),
        pvalue.AsDict(dropped),
        pvalue.AsSingleton(finished),
        pvalue.AsDict(labels),
        pvalue.AsList(written),
        shards,
        pvalue.AsSingleton(lines | "CountLines" >> beam.combiners.Count.Globally()),
    )


def _count(name: str) -> beam.PTransform:
    return f"Count{name}" >> beam.combiners.Count.PerElement()


def _terms(name: str, counted: typing.Any) -> pvalue.AsSingleton:
    return pvalue.AsSingleton(
        counted
        | f"Commonest{name}Terms" >> _commonest(spread.MAXIMUM_TERMS)
        | f"Number{name}Terms" >> beam.Map(spread.number_terms)
    )


def _commonest(count: int) -> beam.PTransform:
    """The commonest of (element, count), ties by the element's own order, as one list."""
    return beam.combiners.Top.Of(count, key=lambda pair: (pair[1], pair[0]))


def _sum_pairs(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    first, second = 0, 0
    for one, other in pairs:
        first, second = first + one, second + other
    return first, second
