"""The key of a dataset: a file beside it, without which its index names neither posts nor people.

The index, the notes on copies and WORKDIR/removed.jsonl hold ids and owners as keyed hashes. An
unkeyed hash of a short id is found within seconds by trying all ids; a keyed one is not, as long as
the key lies apart from what it protects.
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
    """Turns ids, owners and files into what the index holds of them.

    Attributes:
      secret: 32 bytes; none for a dataset of version 1, whose hashes are not keyed.
    """

    secret: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def id(self) -> str | None:
        """16 hexadecimal digits by which a dataset knows its key; they tell nothing of it."""
        if not self.secret:
            return None
        return hashlib.blake2b(key=self.secret, digest_size=8, person=b"id of the key").hexdigest()

    def hash(self, kind: str, value: str | bytes) -> int:
        """64 bits: keyed BLAKE2b of an "id" or an "owner" (text), or a file's "sha256" (bytes)."""
        if self.secret:
            encoded = value if isinstance(value, bytes) else records.encoded(value)
            person = kind.encode()
            found = hashlib.blake2b(encoded, key=self.secret, digest_size=8, person=person)
            return int.from_bytes(found.digest(), "little")
        return records.photo_hash(value) if isinstance(value, bytes) else records.id_hash(value)


NO_KEY = Key()


def beside(dataset: str) -> str:
    """Where the key of a dataset lies: DATASET.key, beside the folder that links lead to."""
    remote = storage.is_remote(dataset)
    return f"{storage.absolute(dataset) if remote else os.path.realpath(dataset)}.key"


def make(path: str) -> Key:
    """The key in a file; a new one where there is no file yet.

    Of two commands that make it at once one wins, and both get the same key.

    Raises:
      UserError: the file cannot be written or read, or holds no key.
    """
    try:
        if not storage.exists(path):
            storage.create(path, f"{secrets.token_hex(_BYTES)}\n")
    except FileExistsError:
        pass  # it was made in this moment
    except OSError as error:
        raise UserError(
            f"The key {path} cannot be written ({error.strerror}); give --key a file in a folder"
            " that can be, but not in the dataset."
        ) from None
    return read(path)


def read(path: str) -> Key:
    """The key in a file.

    Raises:
      UserError: the file cannot be read, or holds no key.
    """
    try:
        text = storage.read(path)
    except OSError as error:
        raise UserError(
            f"The key {path} cannot be read ({error.strerror}); copy it from beside the dataset as"
            " `prepare` made it, or give --key the file. Without its key a dataset can be trained"
            " on, but not compared with a removal list: if the key is lost, prepare the dataset"
            " again from the posts."
        ) from None
    if not _TEXT.fullmatch(text):
        raise UserError(
            f"{path} is not the key of a dataset, which has {2 * _BYTES} hexadecimal digits; copy"
            " it again from beside the dataset as `prepare` made it."
        )
    return Key(bytes.fromhex(text.decode()))
