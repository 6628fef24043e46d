"""The removal list: photos that may no longer be used, by owner, post or file, and who they are."""

import dataclasses
import hashlib
import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from hashvision import storage
from hashvision.data.keys import NO_KEY, Key
from hashvision.errors import UserError
from hashvision.sources import names as ids

KINDS = ("owner", "id", "sha256")
COLUMNS = {"owner": "owner", "id": "id", "sha256": "photo"}  # of the index
_FIELDS = ("kind", "value", "reason", "received_at")
_LONGEST_LINE = 100_000  # bytes
_SHOWN = 3  # of the lines that match nothing
# A value in quotes, in which two quotes stand for one, or one without quotes.
_CELL = re.compile(r'"((?:[^"]|"")*)"|([^",]*)')
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # a tab may stand in a reason
_DIGEST = re.compile("[0-9a-fA-F]{64}")


class Removal(typing.NamedTuple):
    """One line of a removal list."""

    kind: str  # one of KINDS
    value: str  # an owner's id, a post's id, or the hex SHA-256 of the file as it was posted
    reason: str
    received_at: str

    def hash(self, key: Key) -> int:
        """The value as the index of a dataset with this key holds it.

        Datasets without a key are of version 1, which knew no canonical form of names.
        """
        if self.kind == "sha256":
            return key.hash(self.kind, bytes.fromhex(self.value))
        return key.hash(self.kind, ids.canonical(self.value) if key.secret else self.value)


# What a list finds in a dataset, one row for each record and value: the record's position, the
# value's kind (its place in KINDS) and hash, and whether it names the record's own post or a copy,
# that is a post which was left out because the record shows its photo.
HITS_DTYPE = np.dtype([("record", "<i8"), ("kind", "u1"), ("value", "<u8"), ("copy", "?")])


@dataclasses.dataclass(frozen=True)
class Names:
    """The values of a removal list as the index holds them.

    Attributes:
      values: for each of KINDS the hashes, sorted uint64.
      key: of the dataset, by which they are hashed.
      keep_copies: whether an owner's removal leaves the records that show copies of their photos.
    """

    values: Mapping[str, np.ndarray]
    key: Key = NO_KEY
    keep_copies: bool = False

    def __bool__(self) -> bool:
        """Whether the list names anything."""
        return any(map(len, self.values.values()))

    @property
    def digest(self) -> bytes:
        """32 bytes that differ where two of these name something else."""
        found = hashlib.sha256(repr((self.key.id, self.keep_copies)).encode())
        for kind in KINDS:
            found.update(len(self.values[kind]).to_bytes(8, "big") + self.values[kind].tobytes())
        return found.digest()

    def holds(self, kind: str, value: str | bytes) -> bool:
        """Whether the list names this id, owner (both canonical) or photo (a SHA-256 digest)."""
        values = self.values[kind]
        if not len(values):
            return False
        hashed = self.key.hash(kind, value)
        place = int(np.searchsorted(values, np.uint64(hashed)))
        return place < len(values) and int(values[place]) == hashed

    def hits(self, first: int, rows: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """What the list finds: HITS_DTYPE (M,).

        Args:
          first: position of the first of the records.
          rows: INDEX_DTYPE (N,), of the records from there on.
          copies: COPIES_DTYPE (C,), of these records; `record` is a position in the dataset.
        """
        found = [np.empty(0, HITS_DTYPE)]
        for number, kind in enumerate(KINDS):
            values = self.values[kind]
            tables = (rows,) if kind == "owner" and self.keep_copies else (rows, copies)
            for table in tables if len(values) else ():
                hashes = table[COLUMNS[kind]]
                places = np.flatnonzero(np.isin(hashes, values))
                hits = np.empty(len(places), HITS_DTYPE)
                hits["record"] = first + places if table is rows else table["record"][places]
                hits["kind"], hits["value"], hits["copy"] = number, hashes[places], table is copies
                found.append(hits)
        return np.concatenate(found)

    def matched(self, hits: np.ndarray) -> np.ndarray:
        """Which values were found, kind by kind: bool (values,) for HITS_DTYPE (M,)."""
        marks = [
            np.isin(self.values[kind], hits["value"][hits["kind"] == number])
            for number, kind in enumerate(KINDS)
        ]
        return np.concatenate(marks)


def marks(hits: np.ndarray, first: int, size: int) -> np.ndarray:
    """Which of `size` records from `first` on are among the hits, HITS_DTYPE (M,): bool (size,)."""
    found = np.zeros(size, bool)
    found[hits["record"] - first] = True
    return found


NOTHING = Names({kind: np.empty(0, np.uint64) for kind in KINDS})


class RemovalList(typing.NamedTuple):
    """What a command is told of photos that may not be used.

    Attributes:
      lines: of --removals.
      key: where the dataset's key lies, if not beside it.
      keep_copies: as in Names.
    """

    lines: Sequence[Removal] = ()
    key: str | None = None
    keep_copies: bool = False

    def names(self, key: Key) -> Names:
        """The list's values as the index of a dataset with this key holds them."""
        return names(self.lines, key, self.keep_copies)

    def unmatched(self, names: Names, matched: np.ndarray) -> list[Removal]:
        """The lines whose values are not marked in `Names.matched`."""
        kinds = [kind for kind in KINDS for _ in names.values[kind]]
        values = np.concatenate([names.values[kind] for kind in KINDS]).tolist()
        missing = {*itertools.compress(zip(kinds, values, strict=True), ~matched)}
        return [line for line in self.lines if (line.kind, line.hash(names.key)) in missing]


NO_LIST = RemovalList()


def names(lines: Iterable[Removal], key: Key = NO_KEY, keep_copies: bool = False) -> Names:
    """The values of these lines as the index of a dataset with this key holds them."""
    hashes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for line in lines:
        hashes[line.kind].append(line.hash(key))
    values = {kind: np.unique(np.array(each, np.uint64)) for kind, each in hashes.items()}
    return Names(values, key, keep_copies)


def nothing_matched(unmatched: Sequence[Removal], lines: int, where: str) -> str:
    """One sentence: how many of the lines match nothing, and the first of them."""
    told = f"{len(unmatched):,} of the {lines:,} removals match nothing in {where}"
    if not unmatched:
        return f"{told}."
    first = ", ".join(f"{line.kind} {line.value}" for line in unmatched[:_SHOWN])
    first = "".join(c if c.isprintable() else " " for c in first)
    return f"{told}: {first}{', ...' if len(unmatched) > _SHOWN else '.'}"


def read(path: str) -> list[Removal]:
    """Reads a removal list: a CSV file with the columns kind, value, reason and received_at.

    It is read strictly (RFC 4180, and quotes close on their own line): a line that was passed over,
    or read as another, would keep a photo in. Ids and owners are compared as `names.canonical` has
    them. Columns of other names are passed over, and so are empty lines.

    Raises:
      UserError: the file cannot be read, or a line is not a removal.
    """
    try:
        with storage.open(path) as file:
            return list(_removals(path, file))
    except OSError as error:
        raise UserError(
            f"The removal list {path} cannot be read ({error.strerror}); give --removals a CSV file"
            f" with the columns {', '.join(_FIELDS)}."
        ) from None


def _removals(path: str, file: typing.BinaryIO) -> Iterator[Removal]:
    rows = _rows(path, file)
    where, header = next(rows, (f"The removal list {path}", []))
    columns = [name.strip() for name in header]
    for name in ("kind", "value"):
        if name not in columns:
            raise UserError(
                f"The removal list {path} has no column {name}; its first line must be"
                f" {','.join(_FIELDS)}."
            )
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{where} names two columns {name!r}; leave one of them out.")
    for where, cells in rows:
        if len(cells) != len(columns):
            raise UserError(
                f"{where} has {len(cells)} values and not {len(columns)}, as many as its first line"
                " has names; put a value that holds a comma in double quotes."
            )
        row = dict(zip(columns, cells, strict=True))
        yield _removal(*(row.get(field, "").strip() for field in _FIELDS), where=where)


def _removal(kind: str, value: str, reason: str, received_at: str, where: str) -> Removal:
    if kind not in KINDS:
        raise UserError(f"{where} has the kind {kind!r}, which is none of {', '.join(KINDS)}.")
    if not value:
        raise UserError(f"{where} has no value; give the {kind} to remove.")
    if kind != "sha256":
        try:
            ids.canonical(value)
        except ValueError as error:
            raise UserError(f"{where} has no {kind} that could be one ({error}).") from None
    elif not _DIGEST.fullmatch(value):
        raise UserError(
            f"{where} has {value!r}, which is not a SHA-256; give its 64 hexadecimal digits."
        )
    return Removal(kind, value, reason, received_at)


def _rows(path: str, file: typing.BinaryIO) -> Iterator[tuple[str, list[str]]]:
    """(words for where it stands, cells) of each line that is not empty."""
    lines = iter(lambda: file.readline(_LONGEST_LINE + 1), b"")
    for number, line in enumerate(lines, 1):
        where = f"Line {number} of the removal list {path}"
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{where} has more than {_LONGEST_LINE:,} bytes; split it.")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8; save the list as CSV in UTF-8.") from None
        text = text.removesuffix("\n").removesuffix("\r")
        if _CONTROL.search(text):
            raise UserError(f"{where} holds control characters; save the list as plain CSV.")
        if text.strip():
            yield where, _cells(text, where)


def _cells(text: str, where: str) -> list[str]:
    cells, place = [], 0
    while True:
        found = typing.cast("re.Match[str]", _CELL.match(text, place))
        quoted, plain = found.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        place = found.end()
        if place == len(text):
            return cells
        if text[place] != ",":
            raise UserError(
                f"{where} has a double quote in the wrong place, at character {place + 1}; quotes"
                " stand around a whole value, and one inside a value is written twice."
            )
        place += 1
