"""The Beam graph from a dump of posts to a dataset folder, which `prepare` runs.

Everything that grows with the dump stays in Beam, and photos stay in spool files beside the
dataset. What the vocabulary needs is bounded: the MAXIMUM_TAGS most common tags with a count each,
MAXIMUM_TERMS terms, and for each frequent tag one vector of co-occurrence counts, which the worker
reduces to three numbers.

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
# With fewer records per shard a shard would sometimes be empty, because ids choose their shards
# at random.
MINIMUM_RECORDS = 64
# Of the dump, per part of the join of copies: some 15,000 posts, whose bands take 200 MB.
BYTES_PER_PART = 4 * 2**20


class Options(typing.NamedTuple):
    """The settings of a run, as `prepare` documents them."""

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
    """Adds the whole graph to `pipeline`; it writes the shards and a summary in `output`.

    Args:
      pipeline: to add to.
      ranges: of the dump, as (path, start, end).
      images: folder of the photos.
      output: folder to write in.
      lexicon: WordNet, for merging tags; None to merge them by spelling only.
      removed: posts that may not be used, hashed with the dataset's key.
      evaluation: (name, path) of the photos that no post may show.
      options: the other settings.
    """
    minimum_count, shard_bytes = options.minimum_count, options.shard_bytes
    parts = 16 + sum(end - start for _, start, end in ranges) // BYTES_PER_PART
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
    # Lines are quick to read and photos are slow, so chunks are spread among all workers.
    posts = (
        {
            "chunk": read.chunks | "ByStart" >> beam.Map(lambda chunk: (chunk.start, chunk)),
            "superseded": superseded,
        }
        | "SpreadChunks" >> beam.CoGroupByKey()
        | "ReadPosts"
        >> beam.ParDo(
            reading.ReadPosts(
                images,
                staging=output,
                short_side=options.short_side,
                removed=removed,
                keep_copies=options.keep_copies_of_removed,
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
    } | "Once" >> once.Once(output, parts=parts, keep_duplicates=options.keep_duplicates)
    photos = single["photos"]
    start = pipeline | "Start" >> beam.Create([None])

    # Counts and spreads of the tags.
    contexts = photos | "Contexts" >> beam.Map(lambda photo: (photo.tags, photo.words))
    number = pvalue.AsSingleton(contexts | "CountPosts" >> beam.combiners.Count.Globally())
    tag_counts = contexts | "Tags" >> beam.FlatMap(lambda context: context[0]) | _count("Tags")
    word_counts = contexts | "Words" >> beam.FlatMap(lambda context: context[1]) | _count("Words")
    word_terms = _terms("Word", word_counts)
    tag_terms = _terms("Tag", tag_counts)
    counts = pvalue.AsSingleton(
        tag_counts | "CommonestTags" >> _most_common(MAXIMUM_TAGS) | "Counts" >> beam.Map(dict)
    )
    spreads = (
        contexts
        | "TermsByTag" >> beam.FlatMap(spread.terms_by_tag, counts, word_terms, tag_terms)
        | "CountTerms" >> beam.CombinePerKey(TermCounts())
        | "Spreads" >> beam.Map(spread.measure_tag, counts, word_terms, tag_terms, number)
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

    # The summary for the driver.
    dropped = (
        (posts.dropped, single["dropped"], labelled.dropped)
        | "AllDropped" >> beam.Flatten()
        | "CountDropped" >> beam.CombinePerKey(DropCounts())
    )
    pairs = (
        single["pairs"]
        | "Pairs" >> beam.Map(once.sheet_entry)
        | "LeastAlike" >> beam.combiners.Top.Of(once.SHOWN)
    )
    _ = (
        single["pairs"]
        | "Rows" >> beam.Map(once.csv_row)
        | "RowShard"
        >> beam.Map(lambda row, n: (shard_of((records.id_hash(row[0]), 0), n), row), shards)
        | "RowsOfShard" >> beam.GroupByKey()
        | "WriteRows"
        >> beam.Map(
            lambda pair, n: folder.write_duplicates(output, shard=pair[0], shards=n, rows=pair[1]),
            shards,
        )
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
        | f"Commonest{name}Terms" >> _most_common(spread.MAXIMUM_TERMS)
        | f"Number{name}Terms" >> beam.Map(spread.number_terms)
    )


def _most_common(count: int) -> beam.PTransform:
    """Returns the most common of (element, count) as one list; ties go to the larger element."""
    return beam.combiners.Top.Of(count, key=lambda pair: (pair[1], pair[0]))


def _sum_pairs(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    first, second = 0, 0
    for one, other in pairs:
        first, second = first + one, second + other
    return first, second


class TermCounts(beam.CombineFn):
    """Counts the posts that have each term, in one array of a fixed size."""

    def create_accumulator(self) -> np.ndarray:
        """Returns zeros, int64 (2, spread.MAXIMUM_TERMS), for words and tags."""
        return np.zeros((2, spread.MAXIMUM_TERMS), np.int64)

    def add_input(
        self, mutable_accumulator: np.ndarray, element: tuple[list[int], list[int]]
    ) -> np.ndarray:
        """Counts one post, given as the numbers of its words and of its tags."""
        for counts, terms in zip(mutable_accumulator, element, strict=True):
            counts[terms] += 1
        return mutable_accumulator

    def merge_accumulators(self, accumulators: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the sum."""
        return np.sum(list(accumulators), axis=0)

    def extract_output(self, accumulator: np.ndarray) -> np.ndarray:
        """Returns the accumulator."""
        return accumulator


class Label(beam.DoFn):
    """Turns a Photo into (Photo, class numbers), or drops it if it has no class."""

    def __init__(self, keep_untagged: bool):
        """Takes whether to keep photos without a class."""
        self.keep_untagged = keep_untagged

    def process(self, element: Photo, classes: Mapping[str, int]) -> Iterable[typing.Any]:
        """Yields (photo, sorted class numbers), or "dropped" (reason, offset)."""
        labels = tuple(sorted({classes[tag] for tag in element.tags if tag in classes}))
        if labels or self.keep_untagged:
            yield element, labels
        else:
            yield reading.dropped("no_tag", element.order[1])


def count_shards(records_bytes: tuple[int, int], shard_bytes: int) -> int:
    """Returns the number of shards of about `shard_bytes` for (records, bytes), at least 1."""
    kept, total = records_bytes
    return max(1, min(round(total / shard_bytes), kept // MINIMUM_RECORDS))


def shard_of(order: tuple[int, int], shards: int) -> int:
    """Returns the shard of a post; shards cut the range of id hashes evenly.

    So every shard is a random sample of the posts.

    Args:
      order: of the post, as Photo has it: (hash of the id, offset of its line).
      shards: number of shards.
    """
    return order[0] * shards >> 64


class WriteShard(beam.DoFn):
    """Writes all records of a shard to its TFRecord file, its index and its table of copies."""

    def __init__(self, output: str, key: Key):
        """Takes the folder to write in, and the dataset's key."""
        self.output, self.key = output, key

    def process(
        self,
        element: tuple[int, Iterable[tuple[bytes, tuple[int, ...]]]],
        shards: int,
        counts: list[int],
    ) -> Iterable[dict[str, typing.Any]]:
        """Yields the shard's entry in the manifest."""
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
            self.output,
            shard=shard,
            shards=shards,
            rows=rows,
            counts=np.array(counts, np.int64),
            key=self.key,
        )
        spooled.close()


class DropCounts(beam.CombineFn):
    """Counts the dropped posts of one reason, and keeps the offsets of the first EXAMPLES."""

    def create_accumulator(self) -> tuple[int, list[int]]:
        """Returns a count of 0 and no offsets."""
        return 0, []

    def add_input(
        self, mutable_accumulator: tuple[int, list[int]], element: int
    ) -> tuple[int, list[int]]:
        """Adds the post whose line starts at byte `element`."""
        return self.merge_accumulators([mutable_accumulator, (1, [element])])

    def merge_accumulators(
        self, accumulators: Iterable[tuple[int, list[int]]]
    ) -> tuple[int, list[int]]:
        """Adds the counts and keeps the first offsets."""
        total, examples = 0, []
        for count, some in accumulators:
            total += count
            examples += some
        return total, sorted(examples)[:EXAMPLES]

    def extract_output(self, accumulator: tuple[int, list[int]]) -> tuple[int, list[int]]:
        """Returns the accumulator."""
        return accumulator
