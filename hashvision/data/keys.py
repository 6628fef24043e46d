"""The secret key of a dataset, in a file next to it, that hashes the ids of posts and owners.

The index, the copies files and WORKDIR/removed.jsonl contain ids and owners as keyed hashes. Anyone
can reverse an unkeyed hash of a short id in seconds by trying all ids. A keyed hash is safe as long
as the key is stored apart from the data that it protects.
"""

import dataclasses
import hashlib
import os
import re
import secrets

from hashvision import storage
from hashvision.data import records
from hashvision.errors import UserError

_BYTES = 32
_TEXT = re.compile(rb"[0-9a-f]{%d}\n?" % (2 * _BYTES))


@dataclasses.dataclass(frozen=True)
class Key:
    """Hashes ids, owners and files for the index.

    Attributes:
      secret: 32 bytes; empty for a dataset of version 1, whose hashes are not keyed.
    """

    secret: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def id(self) -> str | None:
        """16 hexadecimal digits that identify the key but do not reveal it; None if it is empty."""
        if not self.secret:
            return None
        return hashlib.blake2b(key=self.secret, digest_size=8, person=b"id of the key").hexdigest()

    def hash(self, kind: str, value: str | bytes) -> int:
        """Keyed BLAKE2b, 64 bits, of an "id" or "owner" (text) or of a file's "sha256" (bytes)."""
        if self.secret:
            encoded = value if isinstance(value, bytes) else records.encoded(value)
            person = kind.encode()
            found = hashlib.blake2b(encoded, key=self.secret, digest_size=8, person=person)
            return int.from_bytes(found.digest(), "little")
        return records.photo_hash(value) if isinstance(value, bytes) else records.id_hash(value)


NO_KEY = Key()


def beside(dataset: str) -> str:
    """Path of a dataset's key: DATASET.key, next to the folder after following links."""
    remote = storage.is_remote(dataset)
    return f"{storage.absolute(dataset) if remote else os.path.realpath(dataset)}.key"


def make(path: str) -> Key:
    """Reads the key in a file, or makes a new one if the file does not exist.

    Commands that run at the same time all get the same key.

    Raises:
      UserError: the file cannot be written or read, or does not contain a key.
    """
    try:
        if not storage.exists(path):
            storage.create(path, f"{secrets.token_hex(_BYTES)}\n")
    except FileExistsError:
        pass  # another command has just made it
    except OSError as error:
        raise UserError(
            f"The key {path} cannot be written ({error.strerror}); give --key a file in a writable"
            " folder outside the dataset."
        ) from None
    return read(path)


def read(path: str) -> Key:
    """Reads the key in a file.

    Raises:
      UserError: the file cannot be read, or does not contain a key.
    """
    try:
        text = storage.read(path)
    except OSError as error:
        raise UserError(
            f"The key {path} cannot be read ({error.strerror}), but removal lists need it; copy the"
            " file that `prepare` wrote next to the dataset, give --key its path or, if the key is"
            " lost, prepare the dataset again from the posts."
        ) from None
    if not _TEXT.fullmatch(text):
        raise UserError(
            f"{path} is not the key of a dataset, which has {2 * _BYTES} hexadecimal digits; copy"
            " the file again that `prepare` wrote next to the dataset."
        )
    return Key(bytes.fromhex(text.decode()))
