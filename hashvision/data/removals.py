"""Reads removal lists: photos that may no longer be used, by owner, post or file."""

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
COLUMNS = {"owner": "owner", "id": "id", "sha256": "photo"}  # in the index
_FIELDS = ("kind", "value", "reason", "received_at")
_LONGEST_LINE = 100_000  # bytes
_EXAMPLES = 3  # lines that a message about unmatched lines lists
# A quoted value, in which two quotes stand for one, or an unquoted value.
_CELL = re.compile(r'"((?:[^"]|"")*)"|([^",]*)')
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f]")  # a reason may contain a tab
_DIGEST = re.compile("[0-9a-fA-F]{64}")


class Removal(typing.NamedTuple):
    """One line of a removal list."""

    kind: str  # one of KINDS
    value: str  # an owner's id, a post's id, or the hex SHA-256 of the file as it was posted
    reason: str
    received_at: str

    def hash(self, key: Key) -> int:
        """Hashes the value as in the index of a dataset with this key.

        Datasets without a key have version 1, which does not convert names to canonical form.
        """
        if self.kind == "sha256":
            return key.hash(self.kind, bytes.fromhex(self.value))
        return key.hash(self.kind, ids.canonical(self.value) if key.secret else self.value)


# The matches of a list in a dataset, one row per record and value: position of the record, kind of
# the value (its index in KINDS), hash of the value, and whether the value names a copy instead of
# the record's own post. A copy is a post that `prepare` dropped because the record shows its photo.
HITS_DTYPE = np.dtype([("record", "<i8"), ("kind", "u1"), ("value", "<u8"), ("copy", "?")])


@dataclasses.dataclass(frozen=True)
class Names:
    """The values of a removal list, hashed as in the index.

    Attributes:
      values: for each of KINDS its hashes, sorted uint64.
      key: of the dataset, which the hashes use.
      keep_copies: whether the removal of an owner keeps records that show copies of their photos.
    """

    values: Mapping[str, np.ndarray]
    key: Key = NO_KEY
    keep_copies: bool = False

    def __bool__(self) -> bool:
        """Whether the list names anything."""
        return any(map(len, self.values.values()))

    @property
    def digest(self) -> bytes:
        """32 bytes that differ if two lists name different values."""
        found = hashlib.sha256(repr((self.key.id, self.keep_copies)).encode())
        for kind in KINDS:
            found.update(len(self.values[kind]).to_bytes(8, "big") + self.values[kind].tobytes())
        return found.digest()

    def holds(self, kind: str, value: str | bytes) -> bool:
        """Whether the list has this id or owner (canonical) or photo (SHA-256 digest)."""
        values = self.values[kind]
        if not len(values):
            return False
        hashed = self.key.hash(kind, value)
        place = int(np.searchsorted(values, np.uint64(hashed)))
        return place < len(values) and int(values[place]) == hashed

    def hits(self, first: int, rows: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """Finds the records that the list names, or that show a copy which it names.

        Args:
          first: position of the first record.
          rows: INDEX_DTYPE (N,), the index of N records from there.
          copies: COPIES_DTYPE (C,), their copies; `record` is a position in the dataset.

        Returns:
          HITS_DTYPE (M,).
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
        """Bool (values,), kind by kind: which values have a match in `hits`, HITS_DTYPE (M,)."""
        marks = [
            np.isin(self.values[kind], hits["value"][hits["kind"] == number])
            for number, kind in enumerate(KINDS)
        ]
        return np.concatenate(marks)


def marks(hits: np.ndarray, first: int, size: int) -> np.ndarray:
    """Bool (size,): which of the records from position `first` have a match in HITS_DTYPE (M,)."""
    found = np.zeros(size, bool)
    found[hits["record"] - first] = True
    return found


NOTHING = Names({kind: np.empty(0, np.uint64) for kind in KINDS})


class RemovalList(typing.NamedTuple):
    """The removal options of a command.

    Attributes:
      lines: of --removals.
      key: path of the dataset's key, or None if it is next to the dataset.
      keep_copies: as in Names.
    """

    lines: Sequence[Removal] = ()
    key: str | None = None
    keep_copies: bool = False

    def names(self, key: Key) -> Names:
        """Hashes the list's values as in the index of a dataset with this key."""
        return names(self.lines, key, self.keep_copies)

    def unmatched(self, names: Names, matched: np.ndarray) -> list[Removal]:
        """The lines whose values have no match; `matched` is from `Names.matched`."""
        kinds = [kind for kind in KINDS for _ in names.values[kind]]
        values = np.concatenate([names.values[kind] for kind in KINDS]).tolist()
        missing = {*itertools.compress(zip(kinds, values, strict=True), ~matched)}
        return [line for line in self.lines if (line.kind, line.hash(names.key)) in missing]


NO_LIST = RemovalList()


def names(lines: Iterable[Removal], key: Key = NO_KEY, keep_copies: bool = False) -> Names:
    """Hashes the values of these lines as in the index of a dataset with this key."""
    hashes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for line in lines:
        hashes[line.kind].append(line.hash(key))
    values = {kind: np.unique(np.array(each, np.uint64)) for kind, each in hashes.items()}
    return Names(values, key, keep_copies)


def describe_unmatched(unmatched: Sequence[Removal], lines: int, where: str) -> str:
    """One sentence with the number of lines that match nothing, and the first three of them."""
    summary = f"{len(unmatched):,} of the {lines:,} removals match nothing in {where}"
    if not unmatched:
        return f"{summary}."
    first = ", ".join(f"{line.kind} {line.value}" for line in unmatched[:_EXAMPLES])
    first = "".join(c if c.isprintable() else " " for c in first)
    return f"{summary}: {first}{', ...' if len(unmatched) > _EXAMPLES else '.'}"


def read(path: str) -> list[Removal]:
    """Reads a removal list: a CSV file with the columns kind, value, reason and received_at.

    Parsing is strict (RFC 4180, and quotes must close on their own line), because a skipped or
    misread line would keep a photo that must be removed. Ids and owners are compared in the form of
    `names.canonical`. Other columns and empty lines are ignored.

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
            raise UserError(f"{where} has two columns named {name!r}; delete one of them.")
    for where, cells in rows:
        if len(cells) != len(columns):
            raise UserError(
                f"{where} has {len(cells)} values, but the first line has {len(columns)} names; put"
                " values that contain a comma in double quotes."
            )
        row = dict(zip(columns, cells, strict=True))
        yield _removal(*(row.get(field, "").strip() for field in _FIELDS), where=where)


def _removal(kind: str, value: str, reason: str, received_at: str, where: str) -> Removal:
    if kind not in KINDS:
        raise UserError(f"{where} has the kind {kind!r}; use one of {', '.join(KINDS)}.")
    if not value:
        raise UserError(f"{where} has no value; give the {kind} to remove.")
    if kind != "sha256":
        try:
            ids.canonical(value)
        except ValueError as error:
            raise UserError(f"{where} has an invalid {kind} ({error}); correct it.") from None
    elif not _DIGEST.fullmatch(value):
        raise UserError(
            f"{where} has {value!r}, which is not a SHA-256; give its 64 hexadecimal digits."
        )
    return Removal(kind, value, reason, received_at)


def _rows(path: str, file: typing.BinaryIO) -> Iterator[tuple[str, list[str]]]:
    """Yields a description of the position and the cells of each line that is not empty."""
    lines = iter(lambda: file.readline(_LONGEST_LINE + 1), b"")
    for number, line in enumerate(lines, 1):
        where = f"Line {number} of the removal list {path}"
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{where} has more than {_LONGEST_LINE:,} bytes; shorten it.")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8; save the list as CSV in UTF-8.") from None
        text = text.removesuffix("\n").removesuffix("\r")
        if _CONTROL.search(text):
            raise UserError(f"{where} contains control characters; save the list as plain CSV.")
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
                f"{where} has a double quote in the wrong place, at character {place + 1}; put"
                " quotes around a whole value, and double a quote inside a value."
            )
        place += 1
