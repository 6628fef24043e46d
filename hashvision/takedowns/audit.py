"""`audit`: which records of a dataset a removal list names, and how often checkpoints saw them."""

import json
import os
import typing
from collections.abc import Sequence

import numpy as np

from hashvision import storage
from hashvision.data import reader, removals
from hashvision.data.dataset import MANIFEST, Dataset, fingerprint
from hashvision.data.dataset import load as load_dataset
from hashvision.errors import UserError
from hashvision.takedowns import replay
from hashvision.training import run

_TABLE_ROWS = 40  # --json holds all
_PLACES = 3  # records of a removal that the table names
_WIDTH = 40  # characters of a cell
_COPIES = (
    "Copies: the record shows the same photo as a removed post, which `prepare` dropped as a copy"
    " of it."
)
_SHOWS = ("a removed post", "a copy of a removed post")
_NO_COPIES = (
    "which lists no copies: whether a record shows a copy of a removed post is unknown until you"
    " prepare the dataset again."
)


class DatasetAudit(typing.NamedTuple):
    """Which records of a dataset a removal list names."""

    source: Dataset
    listed: Sequence[removals.Removal]
    found: replay.Named

    @property
    def code(self) -> int:
        """The exit code: 1 if the dataset holds any such record, else 0."""
        return int(bool(self.found))

    def _by_removal(self) -> list[list[tuple[int, bool]]]:
        """Returns for each line the records it names, and whether each shows only a copy."""
        places = [[] for _ in self.listed]
        for position, lines in sorted(self.found.items()):
            for number, copy in lines.items():
                places[number].append((position, copy))
        return places

    def table(self) -> str:
        """Returns the report to print."""
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
        lines.append(removals.describe_unmatched(missed, len(matched), "it"))
        if self.source.version == 1:
            lines.append(f"{self.source.path} is of version 1, {_NO_COPIES}")
        held = f"{len(self.found):,} of the {len(self.source):,} records of {self.source.path}"
        remedy = "`prepare --removals` makes a dataset without them; until then, `train --removals`"
        remedy = f" {remedy} does not use them." if self.found else ""
        lines.append(f"{held} are on the list.{remedy}")
        return "\n".join(lines)

    def as_json(self) -> str:
        """Returns every removal and its records as JSON."""
        lines = [
            {**removal._asdict(), "records": [_where(self.source, *place) for place in places]}
            for removal, places in zip(self.listed, self._by_removal(), strict=True)
        ]
        found = {"dataset": self.source.path, "still_inside": len(self.found)}
        return json.dumps({**found, "removals": lines}, indent=1)


class RemovedRecord(typing.NamedTuple):
    """A record that the removal list names, and how often each checkpoint saw it."""

    source: Dataset
    lines: dict[int, bool]  # numbers of the lines that name it, and whether only by a copy
    shown: replay.Shown


class RunAudit(typing.NamedTuple):
    """Which removed records the checkpoints of a run saw."""

    workdir: str
    init_from: str
    listed: Sequence[removals.Removal]
    checkpoints: list[int]  # steps, ascending
    records: list[RemovedRecord]  # named by the list, the most often shown first
    sources: list[Dataset]  # datasets that the run was trained on

    @property
    def code(self) -> int:
        """The exit code: 1 if a checkpoint saw such a record, else 0."""
        return int(any(record.shown.first for record in self.records))

    def table(self) -> str:
        """Returns the report to print."""
        lines, given = [], f"Of the records in the data of {self.workdir}"
        if not self.checkpoints:
            lines.append(
                f"{self.workdir} holds no checkpoint that could have seen a removed record."
            )
        elif not self.code:
            lines.append(
                f"{given}, {len(self.records):,} are on the list; no checkpoint saw any of them."
                " Continue with `train --removals` to keep it so."
            )
        else:
            lines += [f"{given}, {len(self.records):,} are on the list.", "", *self._checkpoints()]
            lines += ["", *self._shown(), "", "Weights do not forget. " + self._remedy()]
        if any(record.lines[number] for record in self.records for number in record.lines):
            lines.append(_COPIES)
        if self.checkpoints:
            named = {number for record in self.records for number in record.lines}
            missed = [line for number, line in enumerate(self.listed) if number not in named]
            lines.append(removals.describe_unmatched(missed, len(self.listed), "the run's data"))
        for source in self.sources:
            if source.version == 1:
                lines.append(f"{source.path} is of version 1, {_NO_COPIES}")
        if self.init_from:
            lines.append(
                f"The run started from the trunk of {self.init_from}; audit that run, too."
            )
        return "\n".join(lines)

    def _checkpoints(self) -> list[str]:
        times = np.array([record.shown.times for record in self.records])
        rows = [["checkpoint", "removed records seen", "times in all"]]
        for step, column in zip(self.checkpoints, times.T, strict=True):
            rows.append([f"{n:,}" for n in (step, np.count_nonzero(column), column.sum())])
        return _aligned(rows, right=(0, 1, 2))

    def _shown(self) -> list[str]:
        rows = [["kind", "value", "reason", "shard:position", "shown", "first step", "last step"]]
        for source, lines, shown in self.records:
            if shown.first:
                first = min(lines, key=lambda number: (lines[number], number))
                place = _place(source, shown.position, lines[first])
                steps = [f"{n:,}" for n in (shown.times[-1], shown.first, shown.last)]
                rows.append([*self.listed[first][:3], place, *steps])
        return _aligned(rows, right=(4, 5, 6))

    def _remedy(self) -> str:
        first = min(record.shown.first for record in self.records if record.shown.first)
        free = max((step for step in self.checkpoints if step < first), default=None)
        again = "from the start, in a new --workdir: no checkpoint here"
        if free is not None:
            folder = os.path.join(self.workdir, "checkpoints")
            again = (
                f"from the checkpoint of step {free:,}, where training resumes once you delete the"
                f" later ones in {folder}: it"
            )
        return (
            "A checkpoint that was trained on a removed photo keeps what it learnt from it, even"
            " after the photo has left the dataset. To get a network without it, train again with"
            f" --removals, {again} is from before step {first:,}, the first that showed one."
        )

    def as_json(self) -> str:
        """Returns every record, and how often it was shown up to each checkpoint, as JSON."""
        records = [
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
        return json.dumps({**found, "checkpoints": self.checkpoints, "records": records}, indent=1)


def audit_dataset(path: str, listed: removals.RemovalList) -> DatasetAudit:
    """Finds the records of a dataset folder that a removal list names.

    It reads the index once, shard by shard: 2 s on one core for 10 million records.

    Raises:
      UserError: the folder is not a dataset, or its key cannot be read.
    """
    source = load_dataset(path)
    found = replay.named(source, listed.lines, source.names(listed))
    return DatasetAudit(source=source, listed=listed.lines, found=found)


def verify_dataset(path: str) -> str:
    """Compares every byte of a dataset folder with the digests in its manifest.

    Returns:
      One or two sentences for the user.

    Raises:
      UserError: the folder is not a dataset, or a file in it is missing or damaged.
    """
    source = load_dataset(path)
    source.verify()
    report = f"{path} is intact: {len(source.shards):,} shards of {int(source.shard_bytes.sum()):,}"
    report += f" bytes, {len(source):,} records and their index match {MANIFEST}."
    if source.version == 1:
        report += " It is of version 1, which has digests of the shards only."
    return report


def audit_run(workdir: str, listed: removals.RemovalList, given: str | None = None) -> RunAudit:
    """Counts exactly how often the checkpoints of a run were shown the records that a list names.

    `replay.shown` documents the method and its cost. A photo that was in two datasets with
    different keys counts as two.

    Args:
      workdir: of the run.
      listed: the removal list.
      given: where the dataset is now, if it has moved.

    Raises:
      UserError: `workdir` is not a workdir, its dataset is missing or has been replaced, or the
        dataset's key cannot be read.
    """
    config, _ = run.read(workdir)
    checkpoints, init_from = run.checkpoints(workdir), config.init_from
    intervals = _intervals(workdir, checkpoints[-1], given) if checkpoints else []
    faults = reader.Faults(workdir).history
    sources = [*{id(interval.source): interval.source for interval in intervals}.values()]
    records: dict[tuple[str | None, int], RemovedRecord] = {}  # by post id, across datasets
    for source in sources:
        own = [interval for interval in intervals if interval.source is source]
        names = source.names(listed)
        found = replay.named(source, listed.lines, names)
        positions = np.array(sorted(found), np.int64)
        for shown in replay.shown(
            own,
            config=config,
            faults=faults,
            checkpoints=checkpoints,
            positions=positions,
        ):
            name, lines = (names.key.id, shown.name), found[shown.position]
            before = records.get(name)
            if before:
                shown = replay.merge(before.shown, shown)
                lines = {
                    n: before.lines.get(n, True) and lines.get(n, True)
                    for n in before.lines | lines
                }
            records[name] = RemovedRecord(source, lines, shown)
    ordered = sorted(
        records.values(), key=lambda each: (-each.shown.times[-1], each.shown.position)
    )
    return RunAudit(
        workdir=workdir,
        init_from=init_from,
        listed=listed.lines,
        checkpoints=checkpoints,
        records=ordered,
        sources=sources,
    )


def _intervals(workdir: str, end: int, given: str | None) -> list[replay.Interval]:
    """Returns the intervals of a run up to step `end`, in order."""
    folder, manifest = run.last_dataset(workdir)
    last = {
        "dataset": folder,
        "fingerprint": fingerprint(manifest),
        "keep_copies_of_removed": False,
    }
    starts = [{**last, **start} for start in run.starts(workdir)]
    if not starts or starts[0]["step"] > 0:  # by an earlier version, without lists
        nothing = {kind: [] for kind in removals.KINDS}
        starts = [{**last, "step": 0, "removed": nothing}, *starts]
    starts = [start for start in starts if start["step"] < end]
    opened: dict[str, Dataset] = {}
    for start in starts:
        if start["fingerprint"] not in opened:
            opened[start["fingerprint"]] = _open(workdir, start, given)
    if given and given not in {source.path for source in opened.values()}:
        raise UserError(
            f"--dataset={given} is not the dataset that {workdir} was trained on, which is"
            f" {folder}; omit --dataset."
        )
    ends = [*(start["step"] for start in starts[1:]), end]
    return [
        replay.Interval(
            first=start["step"],
            last=stop,
            removed=_barred(start),
            source=opened[start["fingerprint"]],
        )
        for start, stop in zip(starts, ends, strict=True)
    ]


def _barred(start: dict[str, typing.Any]) -> removals.Names:
    """Returns the list that a start applied, with hashes as in the index of its dataset."""
    values = {kind: np.array(start["removed"][kind], np.uint64) for kind in removals.KINDS}
    return removals.Names(values, keep_copies=start["keep_copies_of_removed"])


def _open(workdir: str, start: dict[str, typing.Any], given: str | None) -> Dataset:
    """Opens the dataset of a start, in the folder given or in its former one."""
    noted, states = start["dataset"], []
    for path in filter(None, (given, noted)):
        if not storage.exists(os.path.join(path, "manifest.json")):
            states.append(f"{path} does not exist")
            continue
        source = load_dataset(path)
        if fingerprint(source.manifest) == start["fingerprint"]:
            return source
        states.append(f"{path} is another dataset")
    raise UserError(
        f"The dataset {noted} that {workdir} was trained on from step {start['step'] + 1:,} on was"
        f" not found ({', '.join(dict.fromkeys(states))}); give --dataset its folder."
    )


def _where(source: Dataset, position: int, copy: bool) -> dict[str, typing.Any]:
    shard = int(source.shard_of(np.array([position]))[0])
    return {
        "shard": shard,
        "file": os.path.basename(source.shards[shard]),
        "position": position - int(source.starts[shard]),
        "shows": _SHOWS[copy],
    }


def _place(source: Dataset, position: int, copy: bool) -> str:
    where = _where(source, position, copy)
    return f"{where['shard']}:{where['position']}{' (copy)' * copy}"


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Formats a table of at most _TABLE_ROWS rows; the first row holds the names of the columns.

    Args:
      rows: cells of each row.
      right: numbers of the columns that are aligned to the right.
    """
    more = len(rows) - 1 - _TABLE_ROWS

    def shown(text: str) -> str:  # a list may hold characters that move a cursor
        text = "".join(c if c.isprintable() else " " for c in text)
        return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."

    cells = [[shown(text) for text in row] for row in rows[: _TABLE_ROWS + 1]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if place in right else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return lines + ([f"and {more:,} more; --json lists all."] if more > 0 else [])
