"""The Beam graph from a dump of posts to a dataset folder.

The graph, left to right; everything that grows with the dump stays in Beam, pictures even in files
beside the dataset, and what the vocabulary needs of it is bounded: the MAXIMUM_TAGS commonest tags
with a count each, MAXIMUM_TERMS terms, and for each frequent tag one vector of co-occurrence
counts, reduced to three numbers where it lies.

    ranges > chunks > posts > once > photos > labelled > shards
       '> states '^                    '> tags > counts, spreads > vocabulary '^
"""

import json
import typing
from collections.abc import Iterable, Mapping, Sequence

import apache_beam as beam
import numpy as np
from apache_beam import pvalue

from hashvision.data import records
from hashvision.data.keys import Key
from hashvision.data.removals import Names
from hashvision.duplicates import spool
from hashvision.prepare import copies, folder, once, reading, states
from hashvision.prepare.reading import Photo
from hashvision.tags import spread, vocabulary
from hashvision.tags.wordnet import Lexicon

MAXIMUM_TAGS = 1_000_000
EXAMPLES = 20
# Fewer records a shard would leave some shard empty now and then: ids fall to shards at random.
MINIMUM_RECORDS = 64
# Of the dump, to one part of the join of copies: some 15,000 posts, whose bands take 200 MB.
BYTES_A_PART = 4 * 2**20


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
        """Yields (photo, sorted class numbers), or "dropped" (reason, offset)."""
        labels = tuple(sorted({classes[tag] for tag in element.tags if tag in classes}))
        if labels or self.keep_untagged:
            yield element, labels
        else:
            yield reading.dropped("no_tag", element.order[1])


class WriteShard(beam.DoFn):
    """All records of a shard to its TFRecord file and its index."""

    def __init__(self, output: str, key: Key):
        """Takes the folder to write into, and the dataset's key."""
        self.output, self.key = output, key

    def process(
        self,
        element: tuple[int, Iterable[tuple[bytes, tuple[int, ...]]]],
        shards: int,
        counts: list[int],
    ) -> Iterable[dict[str, typing.Any]]:
        """Yields what the manifest says of the shard."""
        shard, labelled = element
        unpacked = ((Photo.unpack(photo), labels) for photo, labels in labelled)
        ordered = sorted(unpacked, key=lambda pair: pair[0].order)
        spooled = spool.SpoolReader(f"{self.output}/{spool.FOLDER}")
        rows = (
            records.Record(
                id=photo.id,
                owner=photo.owner,
                image=spooled.read(photo.location),
                labels=labels,
                sha256=photo.sha256,
                copies=copies.read(spooled, photo),
            )
            for photo, labels in ordered
        )
        yield folder.write_shard(
            self.output, shard, shards, rows, np.array(counts, np.int64), self.key
        )
        spooled.close()


class TermCounts(beam.CombineFn):
    """Posts in which each term came, as one vector: the memory of a tag, however frequent."""

    def create_accumulator(self) -> np.ndarray:
        """Int64 (2, spread.MAXIMUM_TERMS), words and tags."""
        return np.zeros((2, spread.MAXIMUM_TERMS), np.int64)

    def add_input(
        self, mutable_accumulator: np.ndarray, element: tuple[list[int], list[int]]
    ) -> np.ndarray:
        """Counts one post, given as the numbers of its words and of its tags."""
        for counts, terms in zip(mutable_accumulator, element, strict=True):
            counts[terms] += 1
        return mutable_accumulator

    def merge_accumulators(self, accumulators: Iterable[np.ndarray]) -> np.ndarray:
        """Adds."""
        return np.sum(list(accumulators), axis=0)

    def extract_output(self, accumulator: np.ndarray) -> np.ndarray:
        """As it stands."""
        return accumulator


class DropCounts(beam.CombineFn):
    """Count of the dropped posts of one reason, and where the first of them stand in the dump."""

    def create_accumulator(self) -> tuple[int, list[int]]:
        """Nothing dropped."""
        return 0, []

    def add_input(
        self, mutable_accumulator: tuple[int, list[int]], element: int
    ) -> tuple[int, list[int]]:
        """Adds one."""
        return self.merge_accumulators([mutable_accumulator, (1, [element])])

    def merge_accumulators(
        self, accumulators: Iterable[tuple[int, list[int]]]
    ) -> tuple[int, list[int]]:
        """Adds counts and keeps the first examples."""
        total, examples = 0, []
        for count, some in accumulators:
            total += count
            examples += some
        return total, sorted(examples)[:EXAMPLES]

    def extract_output(self, accumulator: tuple[int, list[int]]) -> tuple[int, list[int]]:
        """As it stands."""
        return accumulator


class Options(typing.NamedTuple):
    """What a run is told besides its dump."""

    minimum_count: int
    short_side: int
    shard_bytes: int
    keep_untagged: bool
    keep_duplicates: bool
    keep_copies_of_removed: bool


def build(
    pipeline: beam.Pipeline,
    ranges: Sequence[tuple[str, int, int]],
    images: str,
    output: str,
    lexicon: Lexicon | None,
    removed: Names,
    evaluation: Sequence[tuple[str, str]],
    options: Options,
) -> None:
    """Adds the whole graph to `pipeline`; it writes the shards and its summary into `output`.

    Args:
      pipeline: to add to.
      ranges: of the dump, as (path, start, end).
      images: folder of the photos.
      output: folder to write into.
      lexicon: by which tags are merged, or None.
      removed: posts that may not be used, by the dataset's key.
      evaluation: (name, path) of the photos that no post may show.
      options: the rest.
    """
    minimum_count, shard_bytes = options.minimum_count, options.shard_bytes
    parts = 16 + sum(end - start for _, start, end in ranges) // BYTES_A_PART
    read = (
        pipeline
        | "Ranges" >> beam.Create(ranges)
        | "SpreadRanges" >> beam.Reshuffle()
        | "ReadLines" >> beam.ParDo(reading.ReadLines()).with_outputs("states", main="chunks")
    )
    superseded = (
        read.states
        | "StatesById"
        >> beam.Map(
            lambda state, n: (copies.bucket(state.key, n), state.pack()), parts * once.BUCKETS
        )
        | "SameId" >> beam.GroupByKey()
        | "Superseded" >> beam.FlatMapTuple(lambda _, packed: states.superseded(packed))
    )
    # A range is quick to read, its photos are slow: so chunks are spread among all workers.
    posts = (
        {
            "chunk": read.chunks | "ByStart" >> beam.Map(lambda chunk: (chunk.start, chunk)),
            "superseded": superseded,
        }
        | "SpreadChunks" >> beam.CoGroupByKey()
        | "ReadPosts"
        >> beam.ParDo(
            reading.ReadPosts(
                images, output, options.short_side, removed, options.keep_copies_of_removed
            )
        ).with_outputs("dropped", "fingerprints", "removed", "matched", main="photos")
    )
    leaks = (
        pipeline
        | "Evaluation" >> beam.Create([json.dumps(each) for each in evaluation])
        | "SpreadEvaluation" >> beam.Reshuffle()
        | "FingerprintFiles" >> beam.ParDo(once.FingerprintFiles(options.short_side))
    )
    single = {
        "photos": posts.photos,
        "fingerprints": posts.fingerprints,
        "removed": posts.removed,
        "evaluation": leaks,
    } | "Once" >> once.Once(output, parts, options.keep_duplicates)
    photos = single["photos"]
    start = pipeline | "Start" >> beam.Create([None])

    # Tags, counted and measured.
    contexts = photos | "Contexts" >> beam.Map(lambda photo: (photo.tags, photo.words))
    number = pvalue.AsSingleton(contexts | "CountPosts" >> beam.combiners.Count.Globally())
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
        | "CountTerms" >> beam.CombinePerKey(TermCounts())
        | "Spreads" >> beam.Map(spread.spread_of, counts, word_terms, tag_terms, number)
    )

    # Classes.
    assignment = pvalue.AsSingleton(
        start
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
    finished = start | "Vocabulary" >> beam.Map(
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
    labelled = photos | "Label" >> beam.ParDo(
        Label(options.keep_untagged), pvalue.AsSingleton(classes)
    ).with_outputs("dropped", main="photos")
    shards = pvalue.AsSingleton(
        labelled.photos
        | "Sizes" >> beam.Map(lambda pair: (1, pair[0].location.size))
        | "TotalSize" >> beam.CombineGlobally(_sum_pairs)
        | "CountShards" >> beam.Map(count_shards, shard_bytes)
    )
    written = (
        labelled.photos
        | "ShardOf"
        >> beam.Map(lambda pair, n: (shard_of(pair[0].order, n), (pair[0].pack(), pair[1])), shards)
        | "Shards" >> beam.GroupByKey()
        | "Write"
        >> beam.ParDo(WriteShard(output, removed.key), shards, pvalue.AsSingleton(post_counts))
    )

    # What the driver is told.
    dropped = (
        (posts.dropped, single["dropped"], labelled.dropped)
        | "AllDropped" >> beam.Flatten()
        | "CountDropped" >> beam.CombinePerKey(DropCounts())
    )
    pairs = (
        single["matches"]
        | "Pairs" >> beam.Map(once.pair)
        | "LeastAlike" >> beam.combiners.Top.Of(once.SHOWN)
    )
    _ = (
        single["matches"]
        | "Rows" >> beam.Map(once.row)
        | "RowShard"
        >> beam.Map(lambda row, n: (shard_of((records.id_hash(row[0]), 0), n), row), shards)
        | "RowsOfShard" >> beam.GroupByKey()
        | "WriteRows"
        >> beam.Map(lambda pair, n: folder.write_duplicates(output, pair[0], n, pair[1]), shards)
    )
    labels = (
        labelled.photos | "LabelsOfPhoto" >> beam.Map(lambda pair: len(pair[1])) | _count("Labels")
    )
    _ = start | "Summary" >> beam.Map(
        lambda _, *sides: folder.write_json(
            f"{output}/{folder.SUMMARY}", folder.Summary(*sides)._asdict()
        ),
        pvalue.AsDict(dropped),
        pvalue.AsSingleton(finished),
        pvalue.AsDict(labels),
        pvalue.AsList(written),
        shards,
        pvalue.AsSingleton(
            read.chunks
            | "LinesOf" >> beam.Map(lambda chunk: chunk.lines)
            | "CountLines" >> beam.CombineGlobally(sum)
        ),
        pvalue.AsSingleton(pairs),
        pvalue.AsList(posts.matched | "EachOnce" >> beam.Distinct()),
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
