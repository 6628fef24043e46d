"""Which records a removal list names, and how often a run was shown them: its stream once more.

The stream is replayed with what was barred at each step, for the lanes alone that hold such a
record, and not while all of these are barred: 3 s of one core for 10 million items of such lanes,
in the memory of one lane's epoch.
"""

import bisect
import collections
import itertools
import typing
from collections.abc import Iterable, Sequence

import numpy as np

from hashvision.data import reader, removals, stream
from hashvision.data.dataset import Dataset

# Items of a lane that are counted at once: 24 bytes each, and as much again on the way.
_ITEMS = 1 << 20


class Interval(typing.NamedTuple):
    """Steps first to last, from 0, of one list and one dataset."""

    first: int
    last: int
    removed: removals.Names
    source: Dataset


# By position of a record: the numbers of the lines that name it, and whether each does so only by a
# copy: a post that was left out because the record shows its photo.
Named = dict[int, dict[int, bool]]


class Shown(typing.NamedTuple):
    """How often one record was shown; steps count from 1, as `train` says them."""

    position: int
    name: int  # hash of the post's id
    times: np.ndarray  # int64 (checkpoints,), up to each
    first: int  # step at which it was shown first; 0 where it never was
    last: int


def named(source: Dataset, lines: Sequence[removals.Removal], names: removals.Names) -> Named:
    """Which records a list names, themselves or by a copy that they stand for.

    Reads the index once, shard by shard.

    Args:
      source: the dataset.
      lines: of the list.
      names: the same, by the dataset's key.
    """
    numbers: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    if names:
        for number, line in enumerate(lines):
            numbers[removals.KINDS.index(line.kind), line.hash(names.key)].append(number)
    found: Named = {}
    for begin, end in itertools.pairwise(source.starts.tolist()):
        for position, kind, value, copy in source.named(begin, end, names).tolist():
            by_line = found.setdefault(position, {})
            for number in numbers[kind, value]:
                by_line[number] = by_line.get(number, True) and copy
    return found


def shown(
    intervals: Sequence[Interval],
    options: dict[str, typing.Any],
    faults: Sequence[reader.Fault],
    checkpoints: Sequence[int],
    positions: np.ndarray,
) -> Iterable[Shown]:
    """How often records of one dataset were shown up to each checkpoint.

    Args:
      intervals: of the run, those on that dataset, at least one.
      options: of stream.Stream, but for the host and what is removed.
      faults: of the run, in the order of steps.
      checkpoints: ascending, the steps up to which to count; no interval goes beyond the last.
      positions: int (N,), of the records, ascending.

    Raises:
      UserError: no stream has such options.
    """
    source = intervals[0].source
    bounds = stream.lane_bounds(len(source), options["lanes"])
    broken: dict[int, list[reader.Fault]] = collections.defaultdict(list)
    for fault in faults:
        ends = np.array([fault.record, fault.record + fault.records - 1])
        first, last = np.searchsorted(bounds, ends, side="right") - 1
        for lane in range(first, last + 1):
            broken[lane].append(fault)
    for lane in np.unique(np.searchsorted(bounds, positions, side="right") - 1).tolist():
        photos = stream.Stream(source, host=lane, hosts=options["lanes"], **options)
        rows = source.rows(photos.first, photos.last)
        copies = source.copies(photos.first, photos.last)
        own = positions[(positions >= photos.first) & (positions < photos.last)]
        times = np.zeros((len(own), len(checkpoints)), np.int64)
        first, last = np.full(len(own), np.iinfo(np.int64).max), np.zeros(len(own), np.int64)
        for interval in intervals:
            hits = interval.removed.hits(photos.first, rows, copies)
            removed = removals.marks(hits, photos.first, len(rows))
            for begin, end, barred in _barred(photos, interval, removed, broken[lane], checkpoints):
                if barred[own - photos.first].all():
                    continue
                photos.unbar()
                photos.bar(barred)
                column = bisect.bisect_left(checkpoints, end)
                for place, step in _counted(photos, own, begin, end):
                    times[:, column] += np.bincount(place, minlength=len(own))
                    np.minimum.at(first, place, step)
                    np.maximum.at(last, place, step)
        first[last == 0] = 0
        times, names = np.cumsum(times, 1), rows["id"][own - photos.first].tolist()
        steps = zip(first.tolist(), last.tolist(), strict=True)
        for position, name, row, span in zip(own.tolist(), names, times, steps, strict=True):
            yield Shown(position, name, row, *span)


def _barred(
    photos: stream.Stream,
    interval: Interval,
    removed: np.ndarray,
    faults: Sequence[reader.Fault],
    checkpoints: Sequence[int],
) -> Iterable[tuple[int, int, np.ndarray]]:
    """(first step, last, bool (records of the lane,)): what was not shown when."""
    cuts = {interval.first, interval.last, *checkpoints, *(fault.step for fault in faults)}
    cuts = sorted(cut for cut in cuts if interval.first <= cut <= interval.last)
    for begin, end in itertools.pairwise(cuts):
        known = {(f.record, f.records): f for f in faults if f.step <= begin}
        barred = removed.copy()
        for fault in known.values():
            if fault.cause:
                place = max(fault.record - photos.first, 0)
                barred[place : max(fault.record + fault.records - photos.first, 0)] = True
        yield begin, end, barred


def _counted(
    photos: stream.Stream, own: np.ndarray, begin: int, end: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Which of the records `own`, ascending, was shown at which step, from 1: int (N,) each."""
    steps = max(1, _ITEMS // photos.host_batch)
    for first in range(begin, end, steps):
        record = photos.items_of(first, min(first + steps, end)).record
        place = np.minimum(np.searchsorted(own, record), len(own) - 1)
        hit = np.flatnonzero(own[place] == record)
        yield place[hit], first + hit // photos.host_batch + 1


def merge(one: Shown, other: Shown) -> Shown:
    """How often a record was shown that came in two datasets."""
    return other._replace(
        times=one.times + other.times,
        first=min(one.first or other.first, other.first or one.first),
        last=max(one.last, other.last),
    )
