"""Host batches of a stream: photos read and decoded by tf.data, whatever lies broken in the shards.

What cannot be read is found by the batch it broke: the pipeline ends, each record of that batch is
tried by itself, those that fail are excluded from the stream (another of their lane is shown in each
of their places), and a new pipeline begins at the same step.
"""

import collections
import json
import os
import re
import typing
from collections.abc import Iterator

import numpy as np

from hashvision import storage
from hashvision.data import decode, records
from hashvision.data.stream import Items, Stream
from hashvision.errors import UserError

if typing.TYPE_CHECKING:
    import tensorflow as tf

Batch = dict[str, np.ndarray]

# Records are read by their offset, a seek each; a buffer of about one photo saves reading further.
_READ_BYTES = 1 << 16
# What no record explains, such as storage that is away for a moment, is met by trying again.
_TRIES = 3


class Fault(typing.NamedTuple):
    """Neighbouring records that could not be read, or can be again."""

    step: int  # from which on that holds
    record: int  # position of the first
    records: int
    shard: str  # file name
    offset: int  # of the first, in bytes
    cause: str  # empty where they can be read again


class Faults:
    """The broken records of a run, in WORKDIR/broken-HOST.jsonl, and how many it may pass over."""

    def __init__(self, workdir: str | None = None, host: int = 0, share: float = 0.0) -> None:
        """Reads what all hosts of this run have found so far.

        Args:
          workdir: of the run; nothing is written where there is none.
          host: which host this is.
          share: of a host's records, how many may be broken before the run is to stop.
        """
        self.share = share
        self._known: dict[tuple[int, int], list[Fault]] = {}  # of the same records, by step
        self._path = os.path.join(workdir, f"broken-{host:05d}.jsonl") if workdir else None
        for name in storage.names(workdir, "broken-*.jsonl") if workdir else ():
            own: dict[tuple[int, int], list[Fault]] = {}
            for line in storage.read(os.path.join(workdir or "", name)).splitlines():
                try:
                    _note(own, Fault(**json.loads(line)))
                except (ValueError, TypeError):
                    continue  # the last line of a host that was killed: it is found again
            for place, faults in own.items():
                known = self._known.setdefault(place, [])
                known[:] = sorted([*known, *faults], key=lambda fault: fault.step)

    @property
    def history(self) -> list[Fault]:
        """All that counts of what was found, in the order of steps."""
        every = [fault for faults in self._known.values() for fault in faults]
        return sorted(every, key=lambda fault: fault.step)

    @property
    def unresolved(self) -> list[Fault]:
        """Those of which nothing else is known since, in the order of steps."""
        last = {(fault.record, fault.records): fault for fault in self.history}
        return [fault for fault in last.values() if fault.cause]

    def add(self, fault: Fault) -> None:
        """Notes a fault, or its end, says so, and writes it down."""
        _note(self._known, fault)
        now = f"cannot be read, so not shown: {fault.cause}" if fault.cause else "reads again"
        where = f"{fault.shard}, from byte {fault.offset:,} on"
        print(f"{fault.records:,} of {where}, {now}", flush=True)
        if self._path:
            self._write(json.dumps(fault._asdict()).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        path = typing.cast(str, self._path)
        if storage.is_remote(path):
            before = storage.read(path) if storage.exists(path) else b""
            return storage.write(path, before + line)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a kill has cut the last line short
                    file.write(b"\n")
            file.write(line)


def _note(known: dict[tuple[int, int], list[Fault]], fault: Fault) -> None:
    """Adds what is found; what was said of these records in later steps, done again, is void."""
    before = known.setdefault((fault.record, fault.records), [])
    while before and before[-1].step >= fault.step:
        before.pop()
    before.append(fault)


class BatchReader:
    """Reads the photos of a host's share of the lanes."""

    def __init__(
        self,
        stream: Stream,
        side: int,
        max_labels: int,
        faults: Faults | None = None,
        threads: int | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
          stream: which records come when.
          side: in pixels, that no photo's longer one is above; larger photos are shrunk.
          max_labels: tags kept of a photo, a draw of them where it has more; rows are padded.
          faults: of this run; the first ends it where None is given.
          threads: of tf.data; one a core if None, and four where they wait for remote storage.
          classes: int32 (K,), the number to put in the place of each class; none changes if None.
        """
        self._stream, self._side, self._max_labels = stream, side, max_labels
        self._classes = classes
        waiting = 4 if storage.is_remote(stream.dataset.path) else 1
        self._threads = threads or waiting * (os.cpu_count() or 1)
        self._faults = faults or Faults()
        self._broken = np.zeros(stream.last - stream.first, bool)

    def batches(self, start: int = 0) -> Iterator[tuple[Items, Batch]]:
        """The host batches from step `start` on, without end.

        Yields:
          what comes in the batch, and the batch: photos uint8 (host_batch, side, side, 3), each in
          the upper left corner, zeros beyond it; shape int32 (host_batch, 2), its height and width;
          labels int32 (host_batch, max_labels) padded with -1; key uint32 (host_batch, 2).

        Raises:
          UserError: more is broken than may be, or the batch cannot be read, though each of its
            records can.
        """
        import tensorflow as tf

        self._take_up(start)
        step, tries = start, 0
        while True:
            try:
                for items, batch in self._pipeline(step):
                    yield items, batch
                    step, tries = step + 1, 0
            except tf.errors.OpError as error:
                tries = 0 if self._examine(step) else tries + 1
                if tries == _TRIES:
                    raise UserError(
                        f"{self._stream.dataset.path} cannot be read ({_cause(error)}); see that"
                        " its storage is there, and the same command goes on."
                    ) from None

    def _pipeline(self, start: int) -> Iterator[tuple[Items, Batch]]:
        import tensorflow as tf

        stream, side, max_labels = self._stream, self._side, self._max_labels
        ahead: collections.deque[Items] = collections.deque()

        def places() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            step = start
            while True:
                items = stream.items(step)
                ahead.append(items)
                shards = stream.dataset.shard_of(items.record).astype(np.int32)
                yield shards, stream.offsets(items.record), stream.keys(items)
                step += 1

        signature = (
            tf.TensorSpec([stream.host_batch], tf.int32),
            tf.TensorSpec([stream.host_batch], tf.int64),
            tf.TensorSpec([stream.host_batch, 2], tf.uint32),
        )
        padded_shapes = {
            "photos": [side, side, 3],
            "shape": [2],
            "labels": [max_labels],
            "key": [2],
        }
        dataset = (
            tf.data.Dataset.from_generator(places, output_signature=signature)
            .unbatch()
            .map(self._read, num_parallel_calls=self._threads, deterministic=True)
            .padded_batch(stream.host_batch, padded_shapes, drop_remainder=True)
            .prefetch(2)
        )
        options = tf.data.Options()
        # Tuned by hand, since the tuner takes from the step's cores and can hold up the end for
        # half a minute.
        options.autotune.enabled = False
        options.threading.private_threadpool_size = self._threads
        for batch in dataset.with_options(options).as_numpy_iterator():
            yield ahead.popleft(), typing.cast(Batch, batch)

    def _read(
        self, shard: "tf.Tensor", offset: "tf.Tensor", key: "tf.Tensor"
    ) -> dict[str, "tf.Tensor"]:
        import tensorflow as tf

        path = tf.constant(self._stream.dataset.shards)[shard]
        record = records.parse(_record_at(path, offset))
        seed = tf.bitcast(key, tf.int32)
        labels = tf.cast(record["labels"], tf.int32)
        if self._classes is not None:
            labels = tf.gather(tf.constant(self._classes), labels)
        chosen = _choose(labels, self._max_labels, seed)
        pixels = decode.decode_photo(record["image"], self._side)
        return {"photos": pixels, "shape": tf.shape(pixels)[:2], "labels": chosen, "key": key}

    def _take_up(self, step: int) -> None:
        """Bars what shards are cut short of, and what earlier runs found broken and still is."""
        stream, remote = self._stream, storage.is_remote(self._stream.dataset.path)
        own = stream.dataset.shard_of(np.array([stream.first, stream.last - 1]))
        shards = range(int(own[0]), int(own[1]) + 1)
        for shard, found in zip(
            shards, storage.parallel_map(self._size, shards, remote), strict=True
        ):
            self._bar_what_is_missing(shard, *found, step)
        missing = self._broken.copy()
        for fault in self._faults.unresolved:
            if stream.first <= fault.record < stream.last:
                if missing[fault.record - stream.first]:
                    continue  # with the rest of a shard
                cause = self._try(fault.record)
                if cause is None or fault.records > 1:  # of a shard that has its length again
                    self._faults.add(fault._replace(step=step, cause=""))
                if cause is not None:
                    now = fault._replace(step=step, records=1, cause=cause)
                    if fault.records > 1 or fault.step > step:
                        self._faults.add(now)
                    self._bar(now, self._marks(fault.record, fault.record + 1))

    def _examine(self, step: int) -> bool:
        """Finds and bars what is broken in the batch of `step`; whether there was anything."""
        stream, before = self._stream, int(self._broken.sum())
        items = stream.items(step)
        for shard in np.unique(stream.dataset.shard_of(items.record)).tolist():
            self._bar_what_is_missing(shard, *self._size(shard), step)
        for record in np.unique(items.record).tolist():
            if self._broken[record - stream.first]:
                continue
            cause = self._try(record)
            if cause is not None:
                fault = self._fault(step, record, 1, cause)
                self._faults.add(fault)
                self._bar(fault, self._marks(record, record + 1))
        return int(self._broken.sum()) > before

    def _try(self, record: int) -> str | None:
        """Why a record cannot be read; None where it can."""
        import tensorflow as tf

        position = np.array([record])
        shard = tf.constant(int(self._stream.dataset.shard_of(position)[0]))
        offset = tf.constant(int(self._stream.offsets(position)[0]), tf.int64)
        try:
            self._read(shard, offset, tf.zeros(2, tf.uint32))
        except tf.errors.OpError as error:
            return _cause(error)
        return None

    def _size(self, shard: int) -> tuple[int, str]:
        """Bytes that a shard has, and what is wrong with that."""
        dataset = self._stream.dataset
        try:
            size = storage.size(dataset.shards[shard])
        except OSError as error:
            return 0, error.strerror or str(error)
        return size, f"the file has {size:,} bytes, not {dataset.shard_bytes[shard]:,}"

    def _bar_what_is_missing(self, shard: int, size: int, cause: str, step: int) -> None:
        """Bars those of a shard's records that lie beyond the end of its file."""
        stream, dataset = self._stream, self._stream.dataset
        first = max(int(dataset.starts[shard]), stream.first)
        last = min(int(dataset.starts[shard + 1]), stream.last)
        if first >= last:
            return
        if size == dataset.shard_bytes[shard]:
            return
        own = np.arange(first, last)
        # A record ends where the next begins; that of the shard's last is the file's end.
        ends = np.append(stream.offsets(own[1:]), dataset.shard_bytes[shard])
        if last < dataset.starts[shard + 1]:
            ends[-1] = dataset.rows(last, last + 1)["offset"][0]
        marks = self._marks(first, last)
        marks[own - stream.first] = ends > size
        new = np.flatnonzero(marks & ~self._broken)
        if len(new):
            # Between them lie only such as were known to be broken.
            count = int(new[-1] - new[0]) + 1
            fault = self._fault(step, int(new[0]) + stream.first, count, cause)
            self._faults.add(fault)
            self._bar(fault, marks)

    def _fault(self, step: int, record: int, count: int, cause: str) -> Fault:
        position = np.array([record])
        shard = self._stream.dataset.shards[int(self._stream.dataset.shard_of(position)[0])]
        offset = int(self._stream.offsets(position)[0])
        return Fault(step, record, count, os.path.basename(shard), offset, cause)

    def _marks(self, first: int, last: int) -> np.ndarray:
        marks = np.zeros(len(self._broken), bool)
        marks[first - self._stream.first : last - self._stream.first] = True
        return marks

    def _bar(self, fault: Fault, marks: np.ndarray) -> None:
        """Bars records of the stream, for this fault, as long as they are few enough."""
        self._broken |= marks
        broken, share = int(self._broken.sum()), self._faults.share
        path = os.path.join(self._stream.dataset.path, fault.shard)
        if broken > share * len(self._broken):
            raise UserError(
                f"{broken:,} of this host's {len(self._broken):,} records cannot be read, more than"
                f" --config.data.broken={share:g} allows, the last in {path} ({fault.cause}); copy"
                " that file again from where the dataset was made, or raise --config.data.broken,"
                " and the same command goes on."
            )
        self._stream.exclude(marks)


def _cause(error: "tf.errors.OpError") -> str:
    """What TensorFlow says, without where in its graph it said so."""
    first_line = str(error.message).split("\n")[0]
    return re.sub(r"^\{\{.*?\}\} | \[Op:.*", "", first_line)[:300]


def _record_at(path: "tf.Tensor", offset: "tf.Tensor") -> "tf.Tensor":
    """The serialized record that begins at byte `offset` of the TFRecord file `path`."""
    import tensorflow as tf

    variant = tf.raw_ops.TFRecordDatasetV2(
        filenames=path[None],
        compression_type="",
        buffer_size=tf.constant(_READ_BYTES, tf.int64),
        byte_offsets=offset[None],
    )
    spec = tf.TensorSpec([], tf.string)
    return tf.data.experimental.from_variant(variant, spec).take(1).get_single_element()


def _choose(labels: "tf.Tensor", most: int, seed: "tf.Tensor") -> "tf.Tensor":
    """`most` of the labels, drawn without repetition where there are more, padded with -1."""
    import tensorflow as tf

    order = tf.argsort(tf.random.stateless_uniform(tf.shape(labels), seed))
    labels = tf.sort(tf.gather(labels, order[:most]))
    return tf.ensure_shape(
        tf.pad(labels, [[0, most - tf.size(labels)]], constant_values=-1), [most]
    )
