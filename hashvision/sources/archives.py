"""Reads photos out of tar files where they lie; nothing is ever extracted.

Only plain, uncompressed tars: of a compressed one no member can be read without all before it. A
member counts if it is a regular file and its name leads nowhere else; of two of one name the last
does, as it would if the tar were extracted. A tar must not change while it is read from.
"""

import functools
import hashlib
import os
import tarfile
import typing

import numpy as np

from hashvision import storage
from hashvision.sources import files
from hashvision.sources.reasons import Dropped

INDEXES = 64  # tars whose members a process remembers, of 24 bytes each
# Bytes that are read of a tar's headers: at 512 to 1,536 a member, some 80,000 to 250,000 of them.
HEADER_BYTES = 128 * 2**20
LONGEST_HEADER = 2**16  # bytes; a longer one holds no file name


class Index(typing.NamedTuple):
    """Where the members of a tar lie."""

    names: np.ndarray  # uint64 (N,), hashes of the names, sorted
    places: np.ndarray  # int64 (N, 2), offset and size of each
    whole: bool  # whether the tar ends as tars do


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # known to the library, not to its types


class _Headers:
    """A tar file of which no more can be read than reasonable headers take."""

    def __init__(self, file: typing.BinaryIO):
        self.file = file
        self.left = HEADER_BYTES
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= min(LONGEST_HEADER, self.left):
            raise tarfile.ReadError("headers too long")
        self.left -= size
        return self.file.read(size)

    def seek(self, offset: int) -> int:
        if not 0 <= offset < 2**62:
            raise tarfile.ReadError("offset out of range")
        return self.file.seek(offset)


def read_member(path: str, member: str) -> bytes:
    """The bytes of one member of a tar.

    Args:
      path: the tar.
      member: the member's name, without "." and empty parts.

    Raises:
      Dropped: "missing_file", "too_large", or "broken_archive" where the tar is broken and the
        member does not lie, whole, before the break.
      OSError: as `files.read`.
    """
    try:
        index = _index(path, _version(path))
        key = _hash(member)
        row = int(np.searchsorted(index.names, key))
        if row == len(index.names) or index.names[row] != key:
            raise Dropped("missing_file" if index.whole else "broken_archive")
        offset, size = index.places[row].tolist()
        if size > files.LARGEST_FILE:
            raise Dropped("too_large")
        with storage.open(path) as file:
            file.seek(offset)
            encoded = file.read(size)
    except (OSError, ValueError) as error:
        if files.does_not_answer(path, error):
            raise
        raise Dropped("missing_file") from None
    if len(encoded) < size:
        raise Dropped("broken_archive")
    return encoded


def _version(path: str) -> tuple[int, ...]:
    """What tells one state of a local file from another; elsewhere asking costs a request."""
    if storage.is_remote(path):
        return ()
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=INDEXES)
def _index(path: str, version: tuple[int, ...]) -> Index:
    del version  # part of the cache's key alone
    places: dict[int, tuple[int, int]] = {}
    with storage.open(path) as file:
        whole = _walk(file, places)
    names = np.array(list(places), np.uint64)
    order = np.argsort(names)
    columns = np.array(list(places.values()), np.int64).reshape(-1, 2)
    return Index(names[order], columns[order], whole)


def _walk(file: typing.BinaryIO, places: dict[int, tuple[int, int]]) -> bool:
    """Adds the members up to the first break to `places`; returns whether there is none."""
    try:
        headers = typing.cast("typing.IO[bytes]", _Headers(file))
        with _Tar.open(fileobj=headers, mode="r:", encoding="utf-8") as tar:
            while (entry := tar.next()) is not None:
                # What tarfile remembers would grow with the tar.
                tar.members, tar.pax_headers = [], {}
                if not 0 <= entry.size < 2**62:  # below, the next header would be this one again
                    return False
                parts = [part for part in entry.name.split("/") if part not in ("", ".")]
                if entry.name.startswith("/") or ".." in parts:
                    continue
                key = _hash("/".join(parts))
                places.pop(key, None)
                if entry.isreg() and not entry.issparse():
                    places[key] = (entry.offset_data, entry.size)
            # tarfile takes a header that is none for the end.
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            return bool(block) and not block.strip(b"\0")
    except OSError:
        raise
    except Exception:
        # tarfile raises whatever comes up on bytes made to break it, RecursionError included.
        return False


def _hash(name: str) -> int:
    encoded = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
