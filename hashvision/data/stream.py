"""Which record comes at which step: position is arithmetic, so one integer resumes a run exactly.

The dataset is cut into lanes, runs of neighbouring records, always the same number whatever the
hosts. Each lane is an endless stream: epoch after epoch of its own records, each as often as its
repeat factor says, in an order drawn for that epoch. A global batch takes the next few items of
every lane; a host reads the lanes that are its own. Every draw is a hash of (seed, epoch, record),
and the record is known by the hash of its post id, so nothing depends on shards or workers.
"""

import os
import typing
from collections.abc import Iterator

import numpy as np

from hashvision.data import photos, records, sampling
from hashvision.data.dataset import Dataset
from hashvision.errors import UserError

if typing.TYPE_CHECKING:
    import tensorflow as tf

# What a draw is for; keeps draws of the same (seed, epoch, record) independent of each other.
_REPEAT, _ORDER, _CROP = range(3)

# Records are read by their offset, a seek each; a buffer of about one photo saves reading further.
_READ_BYTES = 1 << 16


def draws(seed: int, epoch: np.ndarray | int, record: np.ndarray, purpose: int) -> np.ndarray:
    """64 random bits for each record, a function of the arguments alone.

    The finaliser of SplitMix64 (Steele et al. 2014), once over (seed, purpose), once over the
    epoch, once over the record.

    Args:
      seed: of the run.
      epoch: int, or int (N,).
      record: uint64 (N,), id hashes.
      purpose: a small number.

    Returns:
      uint64 (N,).
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):
        state = mix(
            np.array([seed], np.int64).astype(np.uint64) * np.uint64(8) + np.uint64(purpose)
        )
        state = mix(state ^ np.asarray(epoch, np.int64).astype(np.uint64))
        return mix(state ^ record)


class Items(typing.NamedTuple):
    """Items of a stream: (N,) each."""

    record: np.ndarray  # int64, position in the dataset's index
    epoch: np.ndarray  # int64, of the lane
    copy: np.ndarray  # int64, which of the record's repeats in that epoch


class Lane:
    """The endless stream of one run of records."""

    def __init__(self, first: int, ids: np.ndarray, factors: np.ndarray, seed: int) -> None:
        """Makes the stream of records first to first + N.

        Args:
          first: position of the lane's first record in the dataset's index.
          ids: uint64 (N,), id hashes.
          factors: float64 (N,), repeat factors.
          seed: of the run.
        """
        self._first, self._ids, self._factors, self._seed = first, ids, factors, seed
        self._starts = [0]  # at which item each epoch begins, as far as known
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def _repeats(self, epoch: int) -> np.ndarray:
        bits = draws(self._seed, epoch, self._ids, _REPEAT)
        return sampling.repeats(self._factors, (bits >> np.uint64(11)) * 2.0**-53)

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + int(self._repeats(len(self._starts) - 1).sum()))
        return self._starts[epoch]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The records (within the lane) and copies of an epoch, in its order."""
        if self._cached is None or self._cached[0] != epoch:
            repeats = self._repeats(epoch)
            record = np.repeat(np.arange(len(repeats)), repeats)
            copy = np.arange(len(record)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            keys = draws(self._seed, epoch, _of_copy(self._ids[record], copy), _ORDER)
            order = np.argsort(keys, kind="stable")
            self._cached = epoch, record[order], copy[order]
        return self._cached[1:]

    def items(self, start: int, count: int) -> Items:
        """Items start to start + count of the stream."""
        epoch = 0
        while self._start(epoch + 1) <= start:
            epoch += 1
        parts = []
        while count:
            record, copy = self._order(epoch)
            offset = start - self._start(epoch)
            taken = record[offset : offset + count] + self._first
            parts.append(Items(taken, np.full(len(taken), epoch), copy[offset : offset + count]))
            start, count, epoch = start + len(taken), count - len(taken), epoch + 1
        return Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _of_copy(ids: np.ndarray, copy: np.ndarray) -> np.ndarray:
    """Gives every copy of a record a name of its own; the first keeps the record's."""
    with np.errstate(over="ignore"):
        return ids + copy.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)


class Stream:
    """What one host reads: its share of the lanes."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        lanes: int,
        seed: int,
        method: str,
        threshold: float | None = None,
        tagged_only: bool = False,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        """Cuts the dataset into lanes and takes this host's.

        Args:
          dataset: what `dataset.load` returns.
          batch_size: photos of a global batch, a multiple of `lanes`.
          lanes: into how many runs of records the dataset is cut, a multiple of `hosts`.
          seed: of the run.
          method: one of sampling.METHODS.
          threshold: WSL's t; the mean class frequency if None.
          tagged_only: leaves out photos without a tag.
          host: which host this is.
          hosts: how many there are.

        Raises:
          UserError: the numbers do not divide, or there are more lanes than records, or a lane
            without a photo to show.
        """
        if batch_size % lanes or lanes % hosts:
            raise UserError(
                f"batch_size={batch_size} must be a multiple of data.lanes={lanes}, and that of the"
                f" {hosts} hosts; set --config.data.lanes to a divisor of the batch."
            )
        size = len(dataset.index)
        if size < lanes:
            raise UserError(
                f"{dataset.path} holds {size:,} records, fewer than data.lanes={lanes}; lower"
                " --config.data.lanes or prepare more posts."
            )
        if threshold is None:
            threshold = sampling.default_threshold(dataset.class_counts, size)
        factors = sampling.repeat_factors(dataset.index["rarest"], size, threshold, method)
        if tagged_only:
            factors = np.where(dataset.index["rarest"] > 0, factors, 0.0)
        bounds = np.arange(lanes + 1) * size // lanes
        if not np.add.reduceat(factors, bounds[:-1]).all():
            raise UserError(
                f"{dataset.path} has too few photos with a tag for data.lanes={lanes}; prepare more"
                " posts, lower --config.data.lanes, or learn without tags"
                " (--config=configs/demo_swav.py)."
            )
        own = range(host * lanes // hosts, (host + 1) * lanes // hosts)
        self.dataset, self.seed = dataset, seed
        self.epoch_length = float(factors.sum())
        self.host_batch = batch_size // hosts
        self._per_lane = batch_size // lanes
        self._lanes = [
            Lane(
                int(bounds[lane]),
                dataset.index["id"][bounds[lane] : bounds[lane + 1]],
                factors[bounds[lane] : bounds[lane + 1]],
                seed,
            )
            for lane in own
        ]

    def items(self, step: int) -> Items:
        """This host's part of the batch of `step`, (host_batch,) each."""
        start = step * self._per_lane
        parts = [lane.items(start, self._per_lane) for lane in self._lanes]
        return Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def keys(self, items: Items) -> np.ndarray:
        """uint32 (N, 2): the key of every draw about an item, from (seed, epoch, record, copy)."""
        names = _of_copy(self.dataset.index["id"][items.record], items.copy)
        bits = draws(self.seed, items.epoch, names, _CROP)
        return np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)

    def batches(
        self,
        side: int,
        max_labels: int,
        start: int = 0,
        threads: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Host batches from step `start` on, without end.

        Args:
          side: in pixels, that no photo's longer one is above; larger photos are shrunk.
          max_labels: tags kept of a photo, a draw of them where it has more; rows are padded.
          start: the first step.
          threads: of tf.data; one a core if None.

        Yields:
          photos uint8 (host_batch, side, side, 3), each in the upper left corner, zeros beyond it;
          shape int32 (host_batch, 2), its height and width; labels int32 (host_batch, max_labels)
          padded with -1; key uint32 (host_batch, 2).
        """
        import tensorflow as tf

        threads = threads or os.cpu_count() or 1
        index, shard = self.dataset.index, self.dataset.shard
        shards = tf.constant(self.dataset.shards)

        def positions() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            step = start
            while True:
                items = self.items(step)
                offsets = index["offset"][items.record].astype(np.int64)
                yield shard[items.record], offsets, self.keys(items)
                step += 1

        def read(
            shard: "tf.Tensor", offset: "tf.Tensor", key: "tf.Tensor"
        ) -> dict[str, "tf.Tensor"]:
            record = records.parse(_record_at(shards[shard], offset))
            seed = tf.bitcast(key, tf.int32)
            chosen = _choose(tf.cast(record["labels"], tf.int32), max_labels, seed)
            pixels = photos.decode(record["image"], side)
            shape = tf.shape(pixels)[:2]
            return {"photos": pixels, "shape": shape, "labels": chosen, "key": key}

        signature = (
            tf.TensorSpec([self.host_batch], tf.int32),
            tf.TensorSpec([self.host_batch], tf.int64),
            tf.TensorSpec([self.host_batch, 2], tf.uint32),
        )
        padded_shapes = {
            "photos": [side, side, 3],
            "shape": [2],
            "labels": [max_labels],
            "key": [2],
        }
        dataset = (
            tf.data.Dataset.from_generator(positions, output_signature=signature)
            .unbatch()
            .map(read, num_parallel_calls=threads, deterministic=True)
            .padded_batch(self.host_batch, padded_shapes, drop_remainder=True)
            .prefetch(2)
        )
        options = tf.data.Options()
        # Tuned by hand, since the tuner takes from the step's cores and can hold up the end for
        # half a minute.
        options.autotune.enabled = False
        options.threading.private_threadpool_size = threads
        for batch in dataset.with_options(options).as_numpy_iterator():
            yield typing.cast("dict[str, np.ndarray]", batch)


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
