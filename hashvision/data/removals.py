"""The removal list: photos that may no longer be used, by owner, post or file, and who they are."""

import csv
import typing
from collections.abc import Sequence

import numpy as np

from hashvision import storage
from hashvision.data import records
from hashvision.errors import UserError

KINDS = ("owner", "id", "sha256")
COLUMNS = {"owner": "owner", "id": "id", "sha256": "photo"}  # of the index
_FIELDS = ("kind", "value", "reason", "received_at")


class Removal(typing.NamedTuple):
    """One line of a removal list."""

    kind: str  # one of KINDS
    value: str  # an owner's id, a post's id, or the hex SHA-256 of the file as it was posted
    reason: str
    received_at: str

    @property
    def hash(self) -> int:
        """The value as the index holds it."""
        if self.kind == "sha256":
            return records.photo_hash(bytes.fromhex(self.value))
        return records.id_hash(self.value)


class Names(typing.NamedTuple):
    """The values of a removal list as the index holds them: sorted uint64, one array a kind."""

    owner: np.ndarray
    id: np.ndarray
    sha256: np.ndarray

    def holds(self, kind: str, value: str | bytes) -> bool:
        """Whether the list names this id, owner (both canonical) or photo (a SHA-256 digest)."""
        hashed = records.photo_hash(value) if isinstance(value, bytes) else records.id_hash(value)
        values = getattr(self, kind)
        place = int(np.searchsorted(values, np.uint64(hashed)))
        return place < len(values) and int(values[place]) == hashed

    def match(self, rows: np.ndarray) -> np.ndarray:
        """Which records are to be removed: bool (N,) for INDEX_DTYPE (N,)."""
        found = np.zeros(len(rows), bool)
        for kind, values in zip(self._fields, self, strict=True):
            if len(values):
                found |= np.isin(rows[COLUMNS[kind]], values)
        return found


NOTHING = Names(*(np.empty(0, np.uint64) for _ in KINDS))


def read(path: str) -> list[Removal]:
    """Reads a removal list: a CSV file with the columns kind, value, reason and received_at.

    Every line must make sense: one that was passed over would keep a photo in.

    Raises:
      UserError: the file cannot be read, or a line is none of a removal.
    """
    found = []
    try:
        with storage.open(path, "r", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = {"kind", "value"} - {*(reader.fieldnames or ())}
            if missing:
                raise UserError(
                    f"The removal list {path} has no column {sorted(missing)[0]}; its first line"
                    f" must be {','.join(_FIELDS)}."
                )
            for row in reader:
                removal = Removal(*((row.get(field) or "").strip() for field in _FIELDS))
                _check(removal, path, reader.line_num)
                found.append(removal)
    except OSError as error:
        raise UserError(
            f"The removal list {path} cannot be read ({error.strerror}); give --removals a CSV file"
            f" with the columns {', '.join(_FIELDS)}."
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"The removal list {path} is no CSV file in UTF-8 ({error}).") from None
    return found


def _check(removal: Removal, path: str, line: int) -> None:
    where = f"Line {line} of the removal list {path}"
    if removal.kind not in KINDS:
        raise UserError(f"{where} has the kind {removal.kind!r}, none of {', '.join(KINDS)}.")
    if not removal.value:
        raise UserError(f"{where} has no value; give the {removal.kind} to remove.")
    if removal.kind == "sha256":
        try:
            whole = len(bytes.fromhex(removal.value)) == 32
        except ValueError:
            whole = False
        if not whole:
            raise UserError(f"{where} has {removal.value!r}, which is no SHA-256 in hexadecimal.")


def names(removals: Sequence[Removal]) -> Names:
    """The list's values as the index holds them."""
    return Names(
        *(
            np.unique(np.array([r.hash for r in removals if r.kind == kind], np.uint64))
            for kind in KINDS
        )
    )
