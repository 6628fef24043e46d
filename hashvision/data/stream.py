"""Which record comes at which step: position is arithmetic, so one integer resumes a run exactly.

The dataset is cut into lanes, runs of neighbouring records, always the same number whatever the
hosts. Each lane is an endless stream: epoch after epoch of its own records, each as often as its
repeat factor says, in an order drawn for that epoch. A global batch takes the next few items of
every lane; a host reads the lanes that are its own. Every draw is a hash of (seed, epoch, record),
and the record is known by the hash of its post id, so nothing depends on shards or workers.

A record that may not be shown, removed or broken, keeps its places in the stream; in each of them
another of its lane is shown. So no other record's place changes, whenever it becomes excluded.
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

# What a draw is for; keeps draws of the same (seed, epoch, record) independent of each other.
_REPEAT, _ORDER, _CROP, _SUBSTITUTE = range(4)

_FIRST_SUBSTITUTE = 1 << 32  # copies from here on stand in for others; no repeat factor is as large


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
        self.first, self.ids = first, ids
        self.excluded = np.zeros(len(ids), bool)
        self._factors, self._seed = factors, seed
        self._starts = [0]  # at which item each epoch begins, as far as known
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None
        self._stand_ins = np.flatnonzero(factors)

    def exclude(self, excluded: np.ndarray) -> None:
        """Shows these records, bool (N,), no more.

        Raises:
          UserError: nothing is left to show.
        """
        self.excluded = self.excluded | excluded
        self._stand_ins = np.flatnonzero((self._factors > 0) & ~self.excluded)
        if not len(self._stand_ins):
            raise UserError(
                f"Of the records {self.first:,} to {self.first + len(self.ids) - 1:,}, one of"
                " data.lanes, none is left that is neither removed nor broken; prepare the dataset"
                " again."
            )

    def include_all(self) -> None:
        """Shows all records again, as a start without faults or removals does."""
        self.excluded = np.zeros(len(self.ids), bool)
        self._stand_ins = np.flatnonzero(self._factors)

    def _repeats(self, epoch: int) -> np.ndarray:
        bits = draws(self._seed, epoch, self.ids, _REPEAT)
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
            keys = draws(self._seed, epoch, _of_copy(self.ids[record], copy), _ORDER)
            order = _sorted_places(keys)
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
            record, copy = record[offset : offset + count], copy[offset : offset + count]
            record, copy = self._shown(epoch, record, copy)
            parts.append(Items(record + self.first, np.full(len(record), epoch), copy))
            start, count, epoch = start + len(record), count - len(record), epoch + 1
        return Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _shown(
        self, epoch: int, record: np.ndarray, copy: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Puts another record in each place of one that is excluded.

        It is the one drawn, or the next after it that is not excluded itself: a function of what is
        excluded now, not of the order in which that became known.
        """
        places = np.flatnonzero(self.excluded[record])
        if not len(places):
            return record, copy
        record, copy = record.copy(), copy.copy()
        names = _of_copy(self.ids[record[places]], copy[places])
        bits = draws(self._seed, epoch, names, _SUBSTITUTE)
        drawn = (bits % np.uint64(len(self.ids))).astype(np.int64)
        after = np.searchsorted(self._stand_ins, drawn) % len(self._stand_ins)
        record[places] = self._stand_ins[after]
        copy[places] = _FIRST_SUBSTITUTE + (bits >> np.uint64(34)).astype(np.int64)
        return record, copy


def _sorted_places(keys: np.ndarray) -> np.ndarray:
    """int64 (N,), the places of keys, uint64 (N,), in the order of their upper bits.

    The lower bits give way to the place itself, which settles ties and makes of argsort a plain
    sort of numbers, faster and the same on every machine.
    """
    mask = np.uint64((1 << len(keys).bit_length()) - 1)
    places = np.arange(len(keys), dtype=np.uint64)
    return (np.sort(keys & ~mask | places) & mask).astype(np.int64)


def _of_copy(ids: np.ndarray, copy: np.ndarray) -> np.ndarray:
    """Gives every copy of a record a name of its own; the first keeps the record's."""
    with np.errstate(over="ignore"):
        return ids + copy.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)


def lane_bounds(size: int, lanes: int) -> np.ndarray:
    """int64 (lanes + 1,): at which record each lane of `size` records begins, and `size`."""
    return np.arange(lanes + 1) * size // lanes


def check_lanes(batch_size: int, lanes: int, hosts: int) -> None:
    """Refuses lanes that a batch does not divide into, or that do not divide over the hosts.

    Args:
      batch_size: photos of a global batch.
      lanes: into how many runs of records the dataset is cut.
      hosts: how many there are.

    Raises:
      UserError: names the nearest number of lanes that fits, where there is any.
    """
    if batch_size % lanes == 0 and lanes % hosts == 0:
        return
    fitting = [each for each in range(hosts, batch_size + 1, hosts) if batch_size % each == 0]
    remedy = f"--config.batch_size to a multiple of {hosts}"
    if fitting:
        nearest = min(fitting, key=lambda each: abs(each - lanes))
        remedy = f"--config.data.lanes={nearest}"
    raise UserError(
        f"batch_size={batch_size} must be a multiple of data.lanes={lanes}, and that of the number"
        f" of hosts, {hosts}; set {remedy}."
    )


class Stream:
    """What one host reads: its share of the lanes.

    Attributes:
      dataset: what the stream is of.
      first: position of the host's first record.
      last: that after its last.
      hits: removals.HITS_DTYPE (M,), what the removal list finds among them.
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
          removed: names of what is not shown, by the dataset's key.

        Raises:
          UserError: the numbers do not divide, or there are more lanes than records, or a lane
            without a photo to show.
        """
        check_lanes(batch_size, lanes, hosts)
        size = len(dataset)
        if size < lanes:
            raise UserError(
                f"{dataset.path} holds {size:,} records, fewer than data.lanes={lanes}; lower"
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
        self._lock = threading.Lock()  # the input pipeline asks from a thread of its own
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
        """Shows these of this host's records, bool (last - first,), no more; see `Lane.exclude`."""
        with self._lock:
            for lane in self._lanes:
                begin = lane.first - self.first
                lane.exclude(excluded[begin : begin + len(lane.ids)])

    def include_all(self) -> None:
        """Shows all of this host's records again; see `Lane.include_all`."""
        with self._lock:
            for lane in self._lanes:
                lane.include_all()

    @property
    def excluded(self) -> np.ndarray:
        """Bool (last - first,), which of this host's records are not shown."""
        return np.concatenate([lane.excluded for lane in self._lanes])

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """int64 (N,), at which byte of its shard each of these records of this host begins."""
        return self._offsets[positions - self.first]

    def items(self, step: int) -> Items:
        """This host's part of the batch of `step`, (host_batch,) each."""
        return self.items_of(step, step + 1)

    def items_of(self, first: int, last: int) -> Items:
        """What this host reads in steps `first` to `last`, lane after lane."""
        start, count = first * self._per_lane, (last - first) * self._per_lane
        with self._lock:
            parts = list(self._pool.map(lambda lane: lane.items(start, count), self._lanes))
        return Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def names(self, items: Items) -> np.ndarray:
        """uint64 (N,): id hashes of the records."""
        return self._ids[items.record - self.first]

    def keys(self, items: Items) -> np.ndarray:
        """uint32 (N, 2): the key of every draw about an item, from (seed, epoch, record, copy)."""
        names = _of_copy(self.names(items), items.copy)
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
    """The stream that a config asks for: the one way by which training and `audit` get theirs.

    `audit` replays this stream to tell which photos a checkpoint saw. That holds only as long as
    both make it from the same settings.

    Args:
      config: of the run.
      dataset: what `dataset.load` returns.
      host: number of this host.
      hosts: number of hosts.
      removed: names of the photos to leave out, hashed with the dataset's key.

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
