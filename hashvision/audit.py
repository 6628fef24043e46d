"""What a dataset still holds of a removal list, and which checkpoints saw it, how often."""

import json
import os
import typing
from collections.abc import Sequence

import numpy as np

from hashvision import storage
from hashvision.data import dataset as datasets
from hashvision.data import reader, removals, replay
from hashvision.errors import UserError
from hashvision.training import workdir as workdirs

_SCREENFUL = 40  # lines of a table; --json has all
_PLACES = 3  # of a removal's records that are named in the table
_WIDTH = 40  # characters of a value


class Inside(typing.NamedTuple):
    """What a dataset still holds."""

    source: datasets.Dataset
    listed: Sequence[removals.Removal]
    found: dict[int, list[int]]  # position of a record -> numbers of the removals that name it

    @property
    def code(self) -> int:
        """Exit code: 1 where anything is still inside."""
        return int(bool(self.found))

    def _by_removal(self) -> list[list[int]]:
        positions = [[] for _ in self.listed]
        for position, numbers in self.found.items():
            for number in numbers:
                positions[number].append(position)
        return positions

    def table(self) -> str:
        """The lines that are printed."""
        matched = self._by_removal()
        rows = [["kind", "value", "reason", "received_at", "records", "shard:position"]]
        for removal, positions in zip(self.listed, matched, strict=True):
            if positions:
                places = ", ".join(_place(self.source, n) for n in positions[:_PLACES])
                places += " ..." * (len(positions) > _PLACES)
                rows.append([*removal, f"{len(positions):,}", places])
        totals = [("kind", "removals", "of these match", "records")]
        for kind in removals.KINDS:
            of_kind = [n for n, removal in enumerate(self.listed) if removal.kind == kind]
            match = [n for n in of_kind if matched[n]]
            held = len({position for n in match for position in matched[n]})
            totals.append((kind, f"{len(of_kind):,}", f"{len(match):,}", f"{held:,}"))
        nothing = sum(not positions for positions in matched)
        lines = _aligned(rows, right=(4,)) + [""] * (len(rows) > 1)
        lines += [*_aligned(totals, right=(1, 2, 3)), ""]
        lines.append(f"{nothing:,} of {len(matched):,} removals match nothing in it.")
        held = f"{len(self.found):,} of the {len(self.source):,} records of {self.source.path}"
        remedy = "`prepare --removals` makes a dataset without them; meanwhile `train --removals`"
        remedy = f" {remedy} does not show them." if self.found else ""
        lines.append(f"{held} are on the list.{remedy}")
        return "\n".join(lines)

    def as_json(self) -> str:
        """Every removal and every record."""
        lines = [
            {**removal._asdict(), "records": [_where(self.source, n) for n in positions]}
            for removal, positions in zip(self.listed, self._by_removal(), strict=True)
        ]
        found = {"dataset": self.source.path, "still_inside": len(self.found)}
        return json.dumps({**found, "removals": lines}, indent=1)


class Photo(typing.NamedTuple):
    """What checkpoints saw of one removed record."""

    source: datasets.Dataset
    numbers: list[int]  # of the removals that name it
    shown: replay.Shown


class Seen(typing.NamedTuple):
    """What the checkpoints of a run saw."""

    workdir: str
    init_from: str
    listed: Sequence[removals.Removal]
    checkpoints: list[int]  # steps, ascending
    photos: list[Photo]  # those the list names, by how often they were shown

    @property
    def code(self) -> int:
        """Exit code: 1 where a checkpoint saw any."""
        return int(any(photo.shown.first for photo in self.photos))

    def table(self) -> str:
        """The lines that are printed."""
        lines, given = [], f"Of the records that {self.workdir} was given"
        if not self.checkpoints:
            lines.append(f"{self.workdir} holds no checkpoint that could have seen any.")
        elif not self.code:
            lines.append(
                f"{given}, {len(self.photos):,} are on the list; no checkpoint saw any of them."
                " `train --removals` keeps it so."
            )
        else:
            lines += [f"{given}, {len(self.photos):,} are on the list.", "", *self._checkpoints()]
            lines += ["", *self._seen(), "", "Weights do not forget. " + self._remedy()]
        if self.init_from:
            lines.append(f"The run began from the trunk of {self.init_from}: audit that too.")
        return "\n".join(lines)

    def _checkpoints(self) -> list[str]:
        times = np.array([photo.shown.times for photo in self.photos])
        rows = [["checkpoint", "removed records seen", "times in all"]]
        for step, column in zip(self.checkpoints, times.T, strict=True):
            rows.append([f"{n:,}" for n in (step, np.count_nonzero(column), column.sum())])
        return _aligned(rows, right=(0, 1, 2))

    def _seen(self) -> list[str]:
        rows = [["kind", "value", "reason", "shard:position", "shown", "first step", "last step"]]
        for source, numbers, shown in self.photos:
            if shown.first:
                place = _place(source, shown.position)
                steps = [f"{n:,}" for n in (shown.times[-1], shown.first, shown.last)]
                rows.append([*self.listed[numbers[0]][:3], place, *steps])
        return _aligned(rows, right=(4, 5, 6))

    def _remedy(self) -> str:
        first = min(photo.shown.first for photo in self.photos if photo.shown.first)
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
                **_where(source, shown.position),
                "removals": [self.listed[number]._asdict() for number in numbers],
                "shown": dict(zip(self.checkpoints, shown.times.tolist(), strict=True)),
                "first_step": shown.first or None,
                "last_step": shown.last or None,
            }
            for source, numbers, shown in self.photos
        ]
        found = {"workdir": self.workdir, "init_from": self.init_from}
        return json.dumps({**found, "checkpoints": self.checkpoints, "records": photos}, indent=1)


def dataset(path: str, listed: Sequence[removals.Removal]) -> Inside:
    """What of a removal list a dataset folder still holds.

    Reads the index once, shard by shard: 2 s of one core for 10 million records.

    Raises:
      UserError: the folder is no dataset.
    """
    source = datasets.load(path)
    return Inside(source, listed, replay.named(source, listed))


def run(workdir: str, listed: Sequence[removals.Removal], given: str | None = None) -> Seen:
    """How often the checkpoints of a run were shown what a removal list names: exact counts.

    See `replay.shown` for how, and what it costs.

    Args:
      workdir: of the run.
      listed: what `removals.read` returns.
      given: where the dataset lies now, if not where it was.

    Raises:
      UserError: `workdir` is none, or its dataset is gone or another by now.
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
        stretches = _stretches(workdir, checkpoints[-1], given) if checkpoints else []
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{workdir} is not as `train` leaves a workdir ({type(error).__name__}: {error}); copy"
            " config.json, dataset.json and removed.jsonl again from where it ran."
        ) from None
    faults = reader.Faults(workdir).history
    photos: dict[int, Photo] = {}  # by the hash of the post's id, whichever dataset held it
    for source in {id(stretch.source): stretch.source for stretch in stretches}.values():
        own = [stretch for stretch in stretches if stretch.source is source]
        found = replay.named(source, listed)
        positions = np.array(sorted(found), np.int64)
        for shown in replay.shown(own, options, faults, checkpoints, positions):
            before = photos.get(shown.name)
            shown = replay.both(before.shown, shown) if before else shown
            photos[shown.name] = Photo(source, found[shown.position], shown)
    ordered = sorted(photos.values(), key=lambda p: (-p.shown.times[-1], p.shown.position))
    return Seen(workdir, init_from, listed, checkpoints, ordered)


def _stretches(workdir: str, end: int, given: str | None) -> list[replay.Stretch]:
    folder, manifest = workdirs.seen(workdir)
    last = {"dataset": folder, "fingerprint": datasets.fingerprint(manifest)}
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
        replay.Stretch(
            start["step"],
            stop,
            removals.Names(**{k: np.array(v, np.uint64) for k, v in start["removed"].items()}),
            opened[start["fingerprint"]],
        )
        for start, stop in zip(starts, ends, strict=True)
    ]


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


def _where(source: datasets.Dataset, position: int) -> dict[str, typing.Any]:
    shard = int(source.shard_of(np.array([position]))[0])
    name = os.path.basename(source.shards[shard])
    return {"shard": shard, "file": name, "position": position - int(source.starts[shard])}


def _place(source: datasets.Dataset, position: int) -> str:
    return "{shard}:{position}".format(**_where(source, position))


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
