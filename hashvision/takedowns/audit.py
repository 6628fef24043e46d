"""What a dataset still holds of a removal list, and which checkpoints saw it, how often."""

import json
import os
import typing
from collections.abc import Sequence

import numpy as np

from hashvision import storage
from hashvision.data import dataset as datasets
from hashvision.data import reader, removals
from hashvision.errors import UserError
from hashvision.takedowns import replay
from hashvision.training import workdir as workdirs

_SCREENFUL = 40  # lines of a table; --json has all
_PLACES = 3  # of a removal's records that are named in the table
_WIDTH = 40  # characters of a value
_COPIES = (
    "Copies: the record shows a copy of a removed post, which was left out because the record"
    " shows the same photo."
)
_SHOWS = ("a removed post", "a copy of a removed post")
_NO_COPIES = (
    "which notes no copies: whether a record shows a copy of a removed post is not known until the"
    " dataset is prepared again."
)


class DatasetAudit(typing.NamedTuple):
    """What a dataset still holds."""

    source: datasets.Dataset
    listed: Sequence[removals.Removal]
    found: replay.Named

    @property
    def code(self) -> int:
        """Exit code: 1 where anything is still inside."""
        return int(bool(self.found))

    def _by_removal(self) -> list[list[tuple[int, bool]]]:
        """For each line the records it names, and whether each shows a copy only."""
        places = [[] for _ in self.listed]
        for position, lines in sorted(self.found.items()):
            for number, copy in lines.items():
                places[number].append((position, copy))
        return places

    def table(self) -> str:
        """The lines that are printed."""
        matched = self._by_removal()
        rows = [["kind", "value", "reason", "received_at", "records", "copies", "shard:position"]]
        for removal, places in zip(self.listed, matched, strict=True):
            if places:
                where = ", ".join(_place(self.source, *place) for place in places[:_PLACES])
                where += " ..." * (len(places) > _PLACES)
                copies = sum(copy for _, copy in places)
                rows.append([*removal, f"{len(places) - copies:,}", f"{copies:,}", where])
        totals = [["kind", "removals", "of these match", "records", "copies"]]
        for kind in removals.KINDS:
            of_kind = [n for n, removal in enumerate(self.listed) if removal.kind == kind]
            match = [n for n in of_kind if matched[n]]
            held = {(position, copy) for n in match for position, copy in matched[n]}
            direct = {position for position, copy in held if not copy}
            copies = {position for position, _ in held} - direct
            numbers = (len(of_kind), len(match), len(direct), len(copies))
            totals.append([kind, *(f"{number:,}" for number in numbers)])
        lines = _aligned(rows, right=(4, 5)) + [""] * (len(rows) > 1)
        lines += [*_aligned(totals, right=(1, 2, 3, 4)), ""]
        if any(copy for places in matched for _, copy in places):
            lines.append(_COPIES)
        missed = [line for line, places in zip(self.listed, matched, strict=True) if not places]
        lines.append(removals.nothing_matched(missed, len(matched), "it"))
        if self.source.version == 1:
            lines.append(f"{self.source.path} is of version 1, {_NO_COPIES}")
        held = f"{len(self.found):,} of the {len(self.source):,} records of {self.source.path}"
        remedy = "`prepare --removals` makes a dataset without them; meanwhile `train --removals`"
        remedy = f" {remedy} does not show them." if self.found else ""
        lines.append(f"{held} are on the list.{remedy}")
        return "\n".join(lines)

    def as_json(self) -> str:
        """Every removal and every record."""
        lines = [
            {**removal._asdict(), "records": [_where(self.source, *place) for place in places]}
            for removal, places in zip(self.listed, self._by_removal(), strict=True)
        ]
        found = {"dataset": self.source.path, "still_inside": len(self.found)}
        return json.dumps({**found, "removals": lines}, indent=1)


class RemovedRecord(typing.NamedTuple):
    """What checkpoints saw of one removed record."""

    source: datasets.Dataset
    lines: dict[int, bool]  # numbers of those that name it, and whether by a copy only
    shown: replay.Shown


class RunAudit(typing.NamedTuple):
    """What the checkpoints of a run saw."""

    workdir: str
    init_from: str
    listed: Sequence[removals.Removal]
    checkpoints: list[int]  # steps, ascending
    records: list[RemovedRecord]  # those the list names, by how often they were shown
    sources: list[datasets.Dataset]  # that it was given

    @property
    def code(self) -> int:
        """Exit code: 1 where a checkpoint saw any."""
        return int(any(photo.shown.first for photo in self.records))

    def table(self) -> str:
        """The lines that are printed."""
        lines, given = [], f"Of the records that {self.workdir} was given"
        if not self.checkpoints:
            lines.append(f"{self.workdir} holds no checkpoint that could have seen any.")
        elif not self.code:
            lines.append(
                f"{given}, {len(self.records):,} are on the list; no checkpoint saw any of them."
                " `train --removals` keeps it so."
            )
        else:
            lines += [f"{given}, {len(self.records):,} are on the list.", "", *self._checkpoints()]
            lines += ["", *self._seen(), "", "Weights do not forget. " + self._remedy()]
        if any(photo.lines[number] for photo in self.records for number in photo.lines):
            lines.append(_COPIES)
        if self.checkpoints:
            named = {number for photo in self.records for number in photo.lines}
            missed = [line for number, line in enumerate(self.listed) if number not in named]
            lines.append(removals.nothing_matched(missed, len(self.listed), "what it was given"))
        for source in self.sources:
            if source.version == 1:
                lines.append(f"{source.path} is of version 1, {_NO_COPIES}")
        if self.init_from:
            lines.append(f"The run began from the trunk of {self.init_from}: audit that too.")
        return "\n".join(lines)

    def _checkpoints(self) -> list[str]:
        times = np.array([photo.shown.times for photo in self.records])
        rows = [["checkpoint", "removed records seen", "times in all"]]
        for step, column in zip(self.checkpoints, times.T, strict=True):
            rows.append([f"{n:,}" for n in (step, np.count_nonzero(column), column.sum())])
        return _aligned(rows, right=(0, 1, 2))

    def _seen(self) -> list[str]:
        rows = [["kind", "value", "reason", "shard:position", "shown", "first step", "last step"]]
        for source, lines, shown in self.records:
            if shown.first:
                first = min(lines, key=lambda number: (lines[number], number))
                place = _place(source, shown.position, lines[first])
                steps = [f"{n:,}" for n in (shown.times[-1], shown.first, shown.last)]
                rows.append([*self.listed[first][:3], place, *steps])
        return _aligned(rows, right=(4, 5, 6))

    def _remedy(self) -> str:
        first = min(photo.shown.first for photo in self.records if photo.shown.first)
        free = max((step for step in self.checkpoints if step < first), default=None)
        again = f"from the start, into a new --workdir: none here is from before step {first:,},"
        if free is not None:
            folder = os.path.join(self.workdir, "checkpoints")
            again = (
                f"from that of step {free:,}, on which training goes on once the later ones in"
                f" {folder} are deleted: it is from before step {first:,},"
            )
        return (
            "A checkpoint that was trained on a removed photo keeps what it learnt of it, whatever"
            " is taken out of the dataset. To be free of that, train again with --removals,"
            f" {again} the first to show one."
        )

    def as_json(self) -> str:
        """Every record, and how often it was shown up to each checkpoint."""
        photos = [
            {
                **_where(source, shown.position, all(lines.values())),
                "removals": [
                    {**self.listed[number]._asdict(), "shows": _SHOWS[copy]}
                    for number, copy in sorted(lines.items())
                ],
                "shown": dict(zip(self.checkpoints, shown.times.tolist(), strict=True)),
                "first_step": shown.first or None,
                "last_step": shown.last or None,
            }
            for source, lines, shown in self.records
        ]
        found = {"workdir": self.workdir, "init_from": self.init_from}
        return json.dumps({**found, "checkpoints": self.checkpoints, "records": photos}, indent=1)


def audit_dataset(path: str, listed: removals.RemovalList) -> DatasetAudit:
    """What of a removal list a dataset folder still holds.

    Reads the index once, shard by shard: 2 s of one core for 10 million records.

    Raises:
      UserError: the folder is no dataset, or its key is not at hand.
    """
    source = datasets.load(path)
    return DatasetAudit(
        source, listed.lines, replay.named(source, listed.lines, source.names(listed))
    )


def verify_dataset(path: str) -> str:
    """Compares every byte of a dataset folder with what its manifest says; tells what it found.

    Raises:
      UserError: the folder is no dataset, or a file in it is missing or damaged.
    """
    source = datasets.load(path)
    source.verify()
    told = f"{path} is whole: {len(source.shards):,} shards of {int(source.shard_bytes.sum()):,}"
    told += f" bytes, {len(source):,} records and their index are as {datasets.MANIFEST} says."
    if source.version == 1:
        told += " It is of version 1, which has digests of the shards alone."
    return told


def audit_run(workdir: str, listed: removals.RemovalList, given: str | None = None) -> RunAudit:
    """How often the checkpoints of a run were shown what a removal list names: exact counts.

    See `replay.shown` for how, and what it costs. A photo that lay in two datasets of different
    keys counts as two.

    Args:
      workdir: of the run.
      listed: photos to look for.
      given: where the dataset lies now, if not where it was.

    Raises:
      UserError: `workdir` is none, its dataset is gone or another by now, or the key of that is not
        at hand.
    """
    try:
        config, _ = workdirs.read(workdir)
        options = {
            "batch_size": int(config.batch_size),
            "lanes": int(config.data.lanes),
            "seed": int(config.seed),
            "method": config.data.sampling,
            "threshold": config.data.sampling_threshold,
            "tagged_only": config.objective.name == "hashtag",
        }
        checkpoints, init_from = workdirs.checkpoints(workdir), config.init_from
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{workdir}/config.json is not as `train` leaves it ({type(error).__name__}: {error});"
            " copy it again from where the run was."
        ) from None
    intervals = _intervals(workdir, checkpoints[-1], given) if checkpoints else []
    faults = reader.Faults(workdir).history
    sources = [*{id(interval.source): interval.source for interval in intervals}.values()]
    photos: dict[
        tuple[str | None, int], RemovedRecord
    ] = {}  # by the post's id, whichever dataset held it
    for source in sources:
        own = [interval for interval in intervals if interval.source is source]
        names = source.names(listed)
        found = replay.named(source, listed.lines, names)
        positions = np.array(sorted(found), np.int64)
        for shown in replay.shown(own, options, faults, checkpoints, positions):
            name, lines = (names.key.id, shown.name), found[shown.position]
            before = photos.get(name)
            if before:
                shown = replay.merge(before.shown, shown)
                lines = {
                    n: before.lines.get(n, True) and lines.get(n, True)
                    for n in before.lines | lines
                }
            photos[name] = RemovedRecord(source, lines, shown)
    ordered = sorted(photos.values(), key=lambda p: (-p.shown.times[-1], p.shown.position))
    return RunAudit(workdir, init_from, listed.lines, checkpoints, ordered, sources)


def _intervals(workdir: str, end: int, given: str | None) -> list[replay.Interval]:
    folder, manifest = workdirs.seen(workdir)
    last = {
        "dataset": folder,
        "fingerprint": datasets.fingerprint(manifest),
        "keep_copies_of_removed": False,
    }
    starts = [{**last, **start} for start in workdirs.starts_of(workdir)]
    if not starts or starts[0]["step"] > 0:  # by an earlier version, which knew no lists
        nothing = {kind: [] for kind in removals.KINDS}
        starts = [{**last, "step": 0, "removed": nothing}, *starts]
    starts = [start for start in starts if start["step"] < end]
    opened: dict[str, datasets.Dataset] = {}
    for start in starts:
        if start["fingerprint"] not in opened:
            opened[start["fingerprint"]] = _open(workdir, start, given)
    if given and given not in {source.path for source in opened.values()}:
        raise UserError(
            f"--dataset={given} is not the dataset that {workdir} was trained on, which lies in"
            f" {folder}; leave --dataset away."
        )
    ends = [*(start["step"] for start in starts[1:]), end]
    return [
        replay.Interval(start["step"], stop, _barred(start), opened[start["fingerprint"]])
        for start, stop in zip(starts, ends, strict=True)
    ]


def _barred(start: dict[str, typing.Any]) -> removals.Names:
    """What was not shown from a start on; its hashes are as the index of its dataset holds them."""
    values = {kind: np.array(start["removed"][kind], np.uint64) for kind in removals.KINDS}
    return removals.Names(values, keep_copies=start["keep_copies_of_removed"])


def _open(workdir: str, start: dict[str, typing.Any], given: str | None) -> datasets.Dataset:
    """The dataset of a start, at the place given or where it was."""
    noted, states = start["dataset"], []
    for path in filter(None, (given, noted)):
        if not storage.exists(os.path.join(path, "manifest.json")):
            states.append(f"{path} is gone")
            continue
        source = datasets.load(path)
        if datasets.fingerprint(source.manifest) == start["fingerprint"]:
            return source
        states.append(f"{path} is another dataset")
    raise UserError(
        f"What {workdir} was shown from step {start['step'] + 1:,} on was {noted} as it was then"
        f" ({', '.join(dict.fromkeys(states))}); give --dataset the folder where that lies now."
    )


def _where(source: datasets.Dataset, position: int, copy: bool) -> dict[str, typing.Any]:
    shard = int(source.shard_of(np.array([position]))[0])
    return {
        "shard": shard,
        "file": os.path.basename(source.shards[shard]),
        "position": position - int(source.starts[shard]),
        "shows": _SHOWS[copy],
    }


def _place(source: datasets.Dataset, position: int, copy: bool) -> str:
    where = _where(source, position, copy)
    return f"{where['shard']}:{where['position']}{' (copy)' * copy}"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows in columns, the first being their names; no more of them than a screen shows."""
    more = len(rows) - 1 - _SCREENFUL

    def shown(text: str) -> str:  # a list may hold what moves a terminal's cursor
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."

    cells = [[shown(text) for text in row] for row in rows[: _SCREENFUL + 1]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return lines + ([f"and {more:,} more; --json has all."] if more > 0 else [])
