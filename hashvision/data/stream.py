"""Decides which record is in which step; one integer, the step, resumes a run exactly.

The dataset is split into lanes of neighbouring records. Their number does not depend on the number
of hosts. Each lane is an endless stream of epochs: every epoch contains each record of the lane as
often as its repeat factor says, in a random order. A global batch takes the next few items of every
lane, and each host reads its own lanes. Every random draw is a hash of (seed, epoch, record), where
the hash of the post's id stands for the record, so nothing depends on shards or workers.

An excluded record (removed or broken) keeps its positions in the stream, and another record of its
lane is substituted at each of them. So excluding a record never moves the others.
"""

import threading
import typing
from concurrent import futures

import numpy as np

from hashvision.config import Config
from hashvision.config.objectives import OBJECTIVES
from hashvision.data import removals, sampling
from hashvision.data.dataset import Dataset
from hashvision.errors import UserError

# Purposes of draws; they make draws with the same (seed, epoch, record) independent.
_REPEAT, _ORDER, _CROP, _SUBSTITUTE = range(4)

_FIRST_SUBSTITUTE = 1 << 32  # copy numbers from here mark substitutes; repeat factors are smaller


def draws(seed: int, epoch: np.ndarray | int, record: np.ndarray, purpose: int) -> np.ndarray:
    """Draws 64 random bits per record that depend on the arguments only.

    It applies the finaliser of SplitMix64 (Steele et al. 2014) to (seed, purpose), then to the
    epoch, then to the record.

    Args:
      seed: of the run.
      epoch: int, or int (N,).
      record: uint64 (N,), id hashes.
      purpose: what the draw is for, in [0, 8).

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
    """Items of a stream; each field has shape (N,)."""

    record: np.ndarray  # int64, position in the dataset
    epoch: np.ndarray  # int64, epoch of the lane
    copy: np.ndarray  # int64, number of the record's repeat in that epoch


class Lane:
    """The endless stream of one lane, N neighbouring records."""

    def __init__(self, first: int, ids: np.ndarray, factors: np.ndarray, seed: int) -> None:
        """Makes the stream of the records at positions first to first + N.

        Args:
          first: position of the lane's first record in the dataset.
          ids: uint64 (N,), id hashes.
          factors: float64 (N,), repeat factors.
          seed: of the run.
        """
        self.first, self.ids = first, ids
        self.excluded = np.zeros(len(ids), bool)
        self._factors, self._seed = factors, seed
        self._starts = [0]  # first item of each epoch, computed on demand
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None
        self._substitutes = np.flatnonzero(factors)

    def exclude(self, excluded: np.ndarray) -> None:
        """Excludes these records, bool (N,), in addition to those excluded before.

        Raises:
          UserError: no record is left.
        """
        self.excluded = self.excluded | excluded
        self._substitutes = np.flatnonzero((self._factors > 0) & ~self.excluded)
        if not len(self._substitutes):
            raise UserError(
                f"All records {self.first:,} to {self.first + len(self.ids) - 1:,}, one of the"
                " data.lanes, are removed or broken; prepare the dataset again."
            )

    def include_all(self) -> None:
        """Includes all records again, as at a start without faults or removals."""
        self.excluded = np.zeros(len(self.ids), bool)
        self._substitutes = np.flatnonzero(self._factors)

    def _repeats(self, epoch: int) -> np.ndarray:
        bits = draws(self._seed, epoch, self.ids, _REPEAT)
        return sampling.repeats(self._factors, (bits >> np.uint64(11)) * 2.0**-53)

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + int(self._repeats(len(self._starts) - 1).sum()))
        return self._starts[epoch]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the records (relative to the lane) and copies of an epoch, in its order."""
        if self._cached is None or self._cached[0] != epoch:
            repeats = self._repeats(epoch)
            record = np.repeat(np.arange(len(repeats)), repeats)
            copy = np.arange(len(record)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            keys = draws(self._seed, epoch, _hash_copies(self.ids[record], copy), _ORDER)
            order = _argsort(keys)
            self._cached = epoch, record[order], copy[order]
        return self._cached[1:]

    def items(self, start: int, count: int) -> Items:
        """Returns items start to start + count (exclusive) of the stream."""
        epoch = 0
        while self._start(epoch + 1) <= start:
            epoch += 1
        parts = []
        while count:
            record, copy = self._order(epoch)
            offset = start - self._start(epoch)
            record, copy = record[offset : offset + count], copy[offset : offset + count]
            record, copy = self._substitute(epoch, record, copy)
            parts.append(Items(record + self.first, np.full(len(record), epoch), copy))
            start, count, epoch = start + len(record), count - len(record), epoch + 1
        return Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _substitute(
        self, epoch: int, record: np.ndarray, copy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replaces each excluded record by another one.

        The substitute is a random record or the next one after it that is not excluded. It depends
        on which records are excluded now, not on the order in which they were.
        """
        places = np.flatnonzero(self.excluded[record])
        if not len(places):
            return record, copy
        record, copy = record.copy(), copy.copy()
        names = _hash_copies(self.ids[record[places]], copy[places])
        bits = draws(self._seed, epoch, names, _SUBSTITUTE)
        drawn = (bits % np.uint64(len(self.ids))).astype(np.int64)
        after = np.searchsorted(self._substitutes, drawn) % len(self._substitutes)
        record[places] = self._substitutes[after]
        copy[places] = _FIRST_SUBSTITUTE + (bits >> np.uint64(34)).astype(np.int64)
        return record, copy


def _argsort(keys: np.ndarray) -> np.ndarray:
    """Sorts keys, uint64 (N,), by their upper bits; returns their indices, int64 (N,).

    The index replaces the lower bits of each key. This breaks ties and reduces argsort to sorting
    numbers, which is faster and gives the same result on every machine.
    """
    mask = np.uint64((1 << len(keys).bit_length()) - 1)
    places = np.arange(len(keys), dtype=np.uint64)
    return (np.sort(keys & ~mask | places) & mask).astype(np.int64)


def _hash_copies(ids: np.ndarray, copy: np.ndarray) -> np.ndarray:
    """Gives each copy of a record a hash of its own; the first copy keeps the record's hash."""
    with np.errstate(over="ignore"):
        return ids + copy.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)


def lane_bounds(size: int, lanes: int) -> np.ndarray:
    """int64 (lanes + 1,): the first record of each lane of `size` records, and `size`."""
    return np.arange(lanes + 1) * size // lanes


def check_lanes(batch_size: int, lanes: int, hosts: int) -> None:
    """Checks that the lanes divide the batch size and are a multiple of the hosts.

    Args:
      batch_size: photos in a global batch.
      lanes: number of lanes of the dataset.
      hosts: number of hosts.

    Raises:
      UserError: they do not; names the nearest number of lanes that fits, if there is one.
    """
    if batch_size % lanes == 0 and lanes % hosts == 0:
        return
    fitting = [each for each in range(hosts, batch_size + 1, hosts) if batch_size % each == 0]
    remedy = f"--config.batch_size to a multiple of {hosts}"
    if fitting:
        nearest = min(fitting, key=lambda each: abs(each - lanes))
        remedy = f"--config.data.lanes={nearest}"
    raise UserError(
        f"batch_size={batch_size} must be a multiple of data.lanes={lanes}, and data.lanes of the"
        f" number of hosts, {hosts}; set {remedy}."
    )


class Stream:
    """The stream of one host: its share of the lanes.

    Attributes:
      dataset: that the records belong to.
      seed: of the run.
      epoch_length: expected number of photos in an epoch of the whole dataset.
      host_batch: photos per step on this host.
      first: position of the host's first record.
      last: position after the host's last record.
      hits: removals.HITS_DTYPE (M,), the matches of the removal list among them.
    """

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
        removed: removals.Names = removals.NOTHING,
    ) -> None:
        """Splits the dataset into lanes and reads the index of this host's lanes.

        Args:
          dataset: from `dataset.load`.
          batch_size: photos in a global batch, a multiple of `lanes`.
          lanes: number of lanes of the dataset, a multiple of `hosts`.
          seed: of the run.
          method: one of sampling.METHODS.
          threshold: t of `sampling`; if None, the mean class frequency.
          tagged_only: whether to leave out photos without a tag.
          host: number of this host.
          hosts: number of hosts.
          removed: removal list, hashed with the dataset's key.

        Raises:
          UserError: the numbers are not multiples as above, there are more lanes than records, or a
            lane has no photo left.
        """
        check_lanes(batch_size, lanes, hosts)
        size = len(dataset)
        if size < lanes:
            raise UserError(
                f"{dataset.path} has {size:,} records, fewer than data.lanes={lanes}; lower"
                " --config.data.lanes or prepare more posts."
            )
        if threshold is None:
            threshold = sampling.default_threshold(dataset.class_counts, size)
        rarest, photos = dataset.rarest
        if tagged_only:
            rarest, photos = rarest[rarest > 0], photos[rarest > 0]
        self.dataset, self.seed = dataset, seed
        self.epoch_length = sampling.epoch_length(rarest, photos, size, threshold, method)
        self.host_batch = batch_size // hosts
        self._per_lane = batch_size // lanes
        self._lock = threading.Lock()  # the input pipeline runs on another thread
        self._pool = futures.ThreadPoolExecutor(thread_name_prefix="lanes")

        bounds = lane_bounds(size, lanes)
        own = range(host * lanes // hosts, (host + 1) * lanes // hosts)
        self.first, self.last = int(bounds[own.start]), int(bounds[own.stop])
        rows = dataset.rows(self.first, self.last)
        self._offsets = rows["offset"].astype(np.int64)
        self._ids = np.ascontiguousarray(rows["id"])
        self._lanes = []
        for lane in own:
            part = rows[bounds[lane] - self.first : bounds[lane + 1] - self.first]
            factors = sampling.repeat_factors(part["rarest"], size, threshold, method)
            if tagged_only:
                factors = np.where(part["rarest"] > 0, factors, 0.0)
            if not factors.any():
                raise UserError(
                    f"{dataset.path} has too few photos with a tag for data.lanes={lanes}; prepare"
                    " more posts, lower --config.data.lanes, or learn without tags"
                    " (--config=configs/demo_swav.py)."
                )
            begin = int(bounds[lane])
            ids = self._ids[begin - self.first : int(bounds[lane + 1]) - self.first]
            self._lanes.append(Lane(begin, ids, factors, seed))
        self.hits = np.empty(0, removals.HITS_DTYPE)
        if removed:
            copies = dataset.copies(self.first, self.last)
            self.hits = removed.hits(self.first, rows, copies)
            self.exclude(removals.marks(self.hits, self.first, len(rows)))

    def exclude(self, excluded: np.ndarray) -> None:
        """Excludes these of this host's records, bool (last - first,), too; see `Lane.exclude`."""
        with self._lock:
            for lane in self._lanes:
                begin = lane.first - self.first
                lane.exclude(excluded[begin : begin + len(lane.ids)])

    def include_all(self) -> None:
        """Includes all of this host's records again; see `Lane.include_all`."""
        with self._lock:
            for lane in self._lanes:
                lane.include_all()

    @property
    def excluded(self) -> np.ndarray:
        """Bool (last - first,), which of this host's records are excluded."""
        return np.concatenate([lane.excluded for lane in self._lanes])

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """int64 (N,), the first byte in its shard of each of this host's records at `positions`."""
        return self._offsets[positions - self.first]

    def items(self, step: int) -> Items:
        """Returns this host's items in the batch of `step`, (host_batch,) each."""
        return self.items_of(step, step + 1)

    def items_of(self, first: int, last: int) -> Items:
        """Returns this host's items in steps `first` to `last` (exclusive), lane after lane."""
        start, count = first * self._per_lane, (last - first) * self._per_lane
        with self._lock:
            parts = list(self._pool.map(lambda lane: lane.items(start, count), self._lanes))
        return Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def names(self, items: Items) -> np.ndarray:
        """uint64 (N,), the id hashes of the records."""
        return self._ids[items.record - self.first]

    def keys(self, items: Items) -> np.ndarray:
        """uint32 (N, 2), the random key of each item, from (seed, epoch, record, copy)."""
        names = _hash_copies(self.names(items), items.copy)
        bits = draws(self.seed, items.epoch, names, _CROP)
        return np.stack([bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)


def from_config(
    config: Config,
    dataset: Dataset,
    *,
    host: int = 0,
    hosts: int = 1,
    removed: removals.Names = removals.NOTHING,
) -> Stream:
    """Makes the stream of a config, for both training and `audit`.

    `audit` replays this stream to find the photos that a checkpoint saw, so both must make it from
    the same settings.

    Args:
      config: of the run.
      dataset: from `dataset.load`.
      host: number of this host.
      hosts: number of hosts.
      removed: removal list, hashed with the dataset's key.

    Raises:
      UserError: as Stream.
    """
    return Stream(
        dataset,
        batch_size=config.batch_size,
        lanes=config.data.lanes,
        seed=config.seed,
        method=config.data.sampling,
        threshold=config.data.sampling_threshold,
        tagged_only=OBJECTIVES[config.objective.name].needs_tags,
        host=host,
        hosts=hosts,
        removed=removed,
    )
