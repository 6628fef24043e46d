"""Which records a removal list names, and how often a run was shown them, for `audit`.

It replays the run's stream with the records that were excluded at each step. It replays only lanes
with a named record, and only the steps in which at least one of these was not excluded. It takes
3 s on one core for 10 million items of such lanes, and the memory of one lane's epoch.
"""

import bisect
import collections
import itertools
import typing
from collections.abc import Iterable, Sequence

import numpy as np

from hashvision.config import Config
from hashvision.data import reader, removals, stream
from hashvision.data.dataset import Dataset

# Items of a lane that are counted at once; each takes 24 bytes, and 24 more temporarily.
_ITEMS = 1 << 20


class Interval(typing.NamedTuple):
    """The steps of a run under one dataset and one removal list."""

    first: int  # step, from 0
    last: int  # one more than the last step
    removed: removals.Names  # the list that was applied
    source: Dataset


# By position of a record: the numbers of the lines that name it, and whether each names only a
# copy, that is a post which `prepare` dropped because the record shows the same photo.
Named = dict[int, dict[int, bool]]


class Shown(typing.NamedTuple):
    """How often one record was shown; steps count from 1, as `train` prints them."""

    position: int
    name: int  # hash of the post's id
    times: np.ndarray  # int64 (checkpoints,), up to each checkpoint
    first: int  # step at which it was first shown; 0 if never
    last: int  # step at which it was last shown; 0 if never


def named(source: Dataset, lines: Sequence[removals.Removal], names: removals.Names) -> Named:
    """Finds the records that a list names, by themselves or by a dropped copy of their photo.

    It reads the index once, shard by shard.

    Args:
      source: the dataset.
      lines: of the list.
      names: the same lines, hashed with the dataset's key.
    """
    numbers: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    if names:
        for number, line in enumerate(lines):
            numbers[removals.KINDS.index(line.kind), line.hash(names.key)].append(number)
    found: Named = {}
    for begin, end in itertools.pairwise(source.starts.tolist()):
        for position, kind, value, copy in source.find_removed(begin, end, names).tolist():
            by_line = found.setdefault(position, {})
            for number in numbers[kind, value]:
                by_line[number] = by_line.get(number, True) and copy
    return found


def shown(
    intervals: Sequence[Interval],
    config: Config,
    faults: Sequence[reader.Fault],
    checkpoints: Sequence[int],
    positions: np.ndarray,
) -> Iterable[Shown]:
    """Counts how often records of one dataset were shown up to each checkpoint.

    Args:
      intervals: of the run on that dataset, at least one.
      config: of the run.
      faults: of the run, in the order of steps.
      checkpoints: steps, ascending; no interval extends beyond the last.
      positions: of the records, int (N,), ascending.

    Raises:
      UserError: the config does not fit the dataset.
    """
    source = intervals[0].source
    bounds = stream.lane_bounds(len(source), config.data.lanes)
    broken: dict[int, list[reader.Fault]] = collections.defaultdict(list)
    for fault in faults:
        ends = np.array([fault.record, fault.record + fault.records - 1])
        first, last = np.searchsorted(bounds, ends, side="right") - 1
        for lane in range(first, last + 1):
            broken[lane].append(fault)
    for lane in np.unique(np.searchsorted(bounds, positions, side="right") - 1).tolist():
        photos = stream.from_config(config, source, host=lane, hosts=config.data.lanes)
        rows = source.rows(photos.first, photos.last)
        copies = source.copies(photos.first, photos.last)
        own = positions[(positions >= photos.first) & (positions < photos.last)]
        times = np.zeros((len(own), len(checkpoints)), np.int64)
        first, last = np.full(len(own), np.iinfo(np.int64).max), np.zeros(len(own), np.int64)
        for interval in intervals:
            hits = interval.removed.hits(photos.first, rows, copies)
            removed = removals.marks(hits, photos.first, len(rows))
            for begin, end, excluded in _excluded_steps(
                photos,
                interval=interval,
                removed=removed,
                faults=broken[lane],
                checkpoints=checkpoints,
            ):
                if excluded[own - photos.first].all():
                    continue
                photos.include_all()
                photos.exclude(excluded)
                column = bisect.bisect_left(checkpoints, end)
                for place, step in _shown_steps(photos, own, begin=begin, end=end):
                    times[:, column] += np.bincount(place, minlength=len(own))
                    np.minimum.at(first, place, step)
                    np.maximum.at(last, place, step)
        first[last == 0] = 0
        times, names = np.cumsum(times, 1), rows["id"][own - photos.first].tolist()
        steps = zip(first.tolist(), last.tolist(), strict=True)
        for position, name, row, span in zip(own.tolist(), names, times, steps, strict=True):
            yield Shown(position, name, row, *span)


def _excluded_steps(
    photos: stream.Stream,
    interval: Interval,
    removed: np.ndarray,
    faults: Sequence[reader.Fault],
    checkpoints: Sequence[int],
) -> Iterable[tuple[int, int, np.ndarray]]:
    """Yields (first step, last step, excluded): which records were excluded, bool (records,)."""
    cuts = {interval.first, interval.last, *checkpoints, *(fault.step for fault in faults)}
    cuts = sorted(cut for cut in cuts if interval.first <= cut <= interval.last)
    for begin, end in itertools.pairwise(cuts):
        known = {(f.record, f.records): f for f in faults if f.step <= begin}
        excluded = removed.copy()
        for fault in known.values():
            if fault.cause:
                place = max(fault.record - photos.first, 0)
                excluded[place : max(fault.record + fault.records - photos.first, 0)] = True
        yield begin, end, excluded


def _shown_steps(
    photos: stream.Stream, own: np.ndarray, begin: int, end: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yields (places in `own`, steps from 1) of its records that were shown: int (N,) each."""
    steps = max(1, _ITEMS // photos.host_batch)
    for first in range(begin, end, steps):
        record = photos.items_of(first, min(first + steps, end)).record
        place = np.minimum(np.searchsorted(own, record), len(own) - 1)
        hit = np.flatnonzero(own[place] == record)
        yield place[hit], first + hit // photos.host_batch + 1


def merge(one: Shown, other: Shown) -> Shown:
    """Adds up how often a record was shown that was in two datasets."""
    return other._replace(
        times=one.times + other.times,
        first=min(one.first or other.first, other.first or one.first),
        last=max(one.last, other.last),
    )
