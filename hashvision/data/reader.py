"""Reads the host batches of a stream with tf.data, and excludes records that cannot be read.

When a record cannot be read, the tf.data pipeline ends at its batch. The reader then tries each
record of that batch alone and excludes those that fail from the stream, which substitutes other
records of their lane. Then it starts a new pipeline at the same step.
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

# Each record is read by its offset. A buffer of about one photo avoids reading more than needed.
_READ_BYTES = 1 << 16
# Attempts at a batch whose records can all be read alone, such as after a short storage outage.
_ATTEMPTS = 3


class Fault(typing.NamedTuple):
    """Neighbouring records that could not be read, or that can be read again; a line of JSON."""

    step: int  # the first to which this applies
    record: int  # position of the first record
    records: int  # number of records
    shard: str  # file name
    offset: int  # of the first record, in bytes
    cause: str  # "" if they can be read again


class Faults:
    """The broken records of a run, in WORKDIR/broken-HOST.jsonl, and how many it tolerates."""

    def __init__(self, workdir: str | None = None, host: int = 0, share: float = 0.0) -> None:
        """Reads the faults that all hosts of this run have found so far.

        Args:
          workdir: of the run; if None, nothing is written.
          host: number of this host.
          share: of a host's records that may be broken before the run stops, in [0, 1].
        """
        self.share = share
        self._known: dict[tuple[int, int], list[Fault]] = {}  # faults of the same records, by step
        self._path = os.path.join(workdir, f"broken-{host:05d}.jsonl") if workdir else None
        for name in storage.names(workdir, "broken-*.jsonl") if workdir else ():
            own: dict[tuple[int, int], list[Fault]] = {}
            for line in storage.read(os.path.join(workdir or "", name)).splitlines():
                try:
                    _note(own, Fault(**json.loads(line)))
                except (ValueError, TypeError):
                    continue  # cut off when a host was killed; the fault is found again
            for records_, faults in own.items():
                known = self._known.setdefault(records_, [])
                known[:] = sorted([*known, *faults], key=lambda fault: fault.step)

    @property
    def history(self) -> list[Fault]:
        """All faults and their ends that apply to the run, in the order of steps."""
        faults = [fault for known in self._known.values() for fault in known]
        return sorted(faults, key=lambda fault: fault.step)

    @property
    def unresolved(self) -> list[Fault]:
        """The faults that have not ended, in the order of steps."""
        last = {(fault.record, fault.records): fault for fault in self.history}
        return [fault for fault in last.values() if fault.cause]

    def add(self, fault: Fault) -> None:
        """Adds a fault or its end, prints it and writes it to the file."""
        _note(self._known, fault)
        count = f"{fault.records:,} {'record' if fault.records == 1 else 'records'}"
        where = f"{count} of {fault.shard}, from byte {fault.offset:,}"
        if fault.cause:
            print(f"Excluded {where}, cannot be read: {fault.cause}", flush=True)
        else:
            print(f"Included {where}, can be read again", flush=True)
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
                if file.read() != b"\n":  # the last line was cut off when a host was killed
                    file.write(b"\n")
            file.write(line)


def _note(known: dict[tuple[int, int], list[Fault]], fault: Fault) -> None:
    """Adds a fault and drops those of the same records from later steps, which the run repeats."""
    before = known.setdefault((fault.record, fault.records), [])
    while before and before[-1].step >= fault.step:
        before.pop()
    before.append(fault)


class BatchReader:
    """Reads the batches of one host."""

    def __init__(
        self,
        stream: Stream,
        side: int,
        max_labels: int,
        faults: Faults | None = None,
        threads: int | None = None,
        classes: np.ndarray | None = None,
    ) -> None:
        """Stores the settings; reads nothing yet.

        Args:
          stream: decides which records each batch contains.
          side: largest longer side of a photo in pixels; larger photos are shrunk.
          max_labels: tags kept per photo; if it has more, a random sample. Rows are padded.
          faults: of this run; if None, the first broken record ends the run.
          threads: of tf.data; if None, one per core, or four per core for remote storage.
          classes: int32 (K,), the number that replaces each class; if None, no class changes.
        """
        self._stream, self._side, self._max_labels = stream, side, max_labels
        self._classes = classes
        waiting = 4 if storage.is_remote(stream.dataset.path) else 1
        self._threads = threads or waiting * (os.cpu_count() or 1)
        self._faults = faults or Faults()
        self._broken = np.zeros(stream.last - stream.first, bool)

    def batches(self, start: int = 0) -> Iterator[tuple[Items, Batch]]:
        """Yields the host's batches from step `start`, endlessly.

        Yields:
          The items of the batch, and the batch: photos uint8 (host_batch, side, side, 3), each in
          the upper left corner with zeros around it; shape int32 (host_batch, 2), their height and
          width in pixels; labels int32 (host_batch, max_labels), padded with -1; key uint32
          (host_batch, 2).

        Raises:
          UserError: more records are broken than allowed, or the batch cannot be read although each
            of its records can.
        """
        import tensorflow as tf

        self._exclude_known_faults(start)
        step, attempts = start, 0
        while True:
            try:
                for items, batch in self._pipeline(step):
                    yield items, batch
                    step, attempts = step + 1, 0
            except tf.errors.OpError as error:
                attempts = 0 if self._exclude_broken(step) else attempts + 1
                if attempts == _ATTEMPTS:
                    raise UserError(
                        f"{self._stream.dataset.path} cannot be read ({_cause(error)}); check that"
                        " its storage is available, then run the same command to resume."
                    ) from None

    def _pipeline(self, start: int) -> Iterator[tuple[Items, Batch]]:
        import tensorflow as tf

        stream, side, max_labels = self._stream, self._side, self._max_labels
        ahead: collections.deque[Items] = collections.deque()

        def locations() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
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
        # AutoGraph has nothing to convert in it, and would take a second to find out.
        read = tf.autograph.experimental.do_not_convert(self._read)
        dataset = (
            tf.data.Dataset.from_generator(locations, output_signature=signature)
            .unbatch()
            .map(read, num_parallel_calls=self._threads, deterministic=True)
            .padded_batch(stream.host_batch, padded_shapes, drop_remainder=True)
            .prefetch(2)
        )
        options = tf.data.Options()
        # Autotuning takes cores from the train step and can delay the end by half a minute.
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
        chosen = _sample_labels(labels, self._max_labels, seed)
        pixels = decode.decode_photo(record["image"], self._side)
        return {"photos": pixels, "shape": tf.shape(pixels)[:2], "labels": chosen, "key": key}

    def _exclude_known_faults(self, step: int) -> None:
        """Excludes records beyond the end of truncated shards, and known faults that persist."""
        stream, remote = self._stream, storage.is_remote(self._stream.dataset.path)
        own = stream.dataset.shard_of(np.array([stream.first, stream.last - 1]))
        shards = range(int(own[0]), int(own[1]) + 1)
        for shard, found in zip(
            shards, storage.parallel_map(self._size, shards, remote), strict=True
        ):
            self._exclude_truncated(shard, *found, step)
        missing = self._broken.copy()
        for fault in self._faults.unresolved:
            if stream.first <= fault.record < stream.last:
                if missing[fault.record - stream.first]:
                    continue  # excluded with the rest of a truncated shard
                cause = self._check(fault.record)
                if cause is None or fault.records > 1:  # the shard has its full length again
                    self._faults.add(fault._replace(step=step, cause=""))
                if cause is not None:
                    now = fault._replace(step=step, records=1, cause=cause)
                    if fault.records > 1 or fault.step > step:
                        self._faults.add(now)
                    self._exclude(now, self._mask(fault.record, fault.record + 1))

    def _exclude_broken(self, step: int) -> bool:
        """Excludes the broken records in the batch of `step`; returns whether there are any."""
        stream, before = self._stream, int(self._broken.sum())
        items = stream.items(step)
        for shard in np.unique(stream.dataset.shard_of(items.record)).tolist():
            self._exclude_truncated(shard, *self._size(shard), step)
        for record in np.unique(items.record).tolist():
            if self._broken[record - stream.first]:
                continue
            cause = self._check(record)
            if cause is not None:
                fault = self._fault(step, record, 1, cause)
                self._faults.add(fault)
                self._exclude(fault, self._mask(record, record + 1))
        return int(self._broken.sum()) > before

    def _check(self, record: int) -> str | None:
        """Reads a record; returns why it cannot be read, or None."""
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
        """Returns the size of a shard in bytes, and why it may be wrong."""
        dataset = self._stream.dataset
        try:
            size = storage.size(dataset.shards[shard])
        except OSError as error:
            return 0, error.strerror or str(error)
        return size, f"the file has {size:,} bytes, not {dataset.shard_bytes[shard]:,}"

    def _exclude_truncated(self, shard: int, size: int, cause: str, step: int) -> None:
        """Excludes the records of a shard that are beyond the end of its file."""
        stream, dataset = self._stream, self._stream.dataset
        first = max(int(dataset.starts[shard]), stream.first)
        last = min(int(dataset.starts[shard + 1]), stream.last)
        if first >= last:
            return
        if size == dataset.shard_bytes[shard]:
            return
        own = np.arange(first, last)
        # A record ends where the next one begins, and the last one at the end of the shard.
        ends = np.append(stream.offsets(own[1:]), dataset.shard_bytes[shard])
        if last < dataset.starts[shard + 1]:
            ends[-1] = dataset.rows(last, last + 1)["offset"][0]
        mask = self._mask(first, last)
        mask[own - stream.first] = ends > size
        new = np.flatnonzero(mask & ~self._broken)
        if len(new):
            # All records between them were already known to be broken.
            count = int(new[-1] - new[0]) + 1
            fault = self._fault(step, int(new[0]) + stream.first, count, cause)
            self._faults.add(fault)
            self._exclude(fault, mask)

    def _fault(self, step: int, record: int, count: int, cause: str) -> Fault:
        position = np.array([record])
        shard = self._stream.dataset.shards[int(self._stream.dataset.shard_of(position)[0])]
        offset = int(self._stream.offsets(position)[0])
        return Fault(step, record, count, os.path.basename(shard), offset, cause)

    def _mask(self, first: int, last: int) -> np.ndarray:
        mask = np.zeros(len(self._broken), bool)
        mask[first - self._stream.first : last - self._stream.first] = True
        return mask

    def _exclude(self, fault: Fault, mask: np.ndarray) -> None:
        """Excludes records from the stream because of a fault, unless too many are broken."""
        self._broken |= mask
        broken, share = int(self._broken.sum()), self._faults.share
        path = os.path.join(self._stream.dataset.path, fault.shard)
        if broken > share * len(self._broken):
            raise UserError(
                f"{broken:,} of this host's {len(self._broken):,} records cannot be read, more than"
                f" --config.data.broken={share:g} allows, the last in {path} ({fault.cause}); copy"
                " that file again from the original dataset or raise --config.data.broken, then run"
                " the same command to resume."
            )
        self._stream.exclude(mask)


def _cause(error: "tf.errors.OpError") -> str:
    """TensorFlow's message without its position in the graph."""
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


def _sample_labels(labels: "tf.Tensor", most: int, seed: "tf.Tensor") -> "tf.Tensor":
    """Draws `most` labels without replacement if there are more; sorts, and pads with -1."""
    import tensorflow as tf

    order = tf.argsort(tf.random.stateless_uniform(tf.shape(labels), seed))
    labels = tf.sort(tf.gather(labels, order[:most]))
    return tf.ensure_shape(
        tf.pad(labels, [[0, most - tf.size(labels)]], constant_values=-1), [most]
    )
