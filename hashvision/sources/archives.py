"""Reads photos from tar files in place, for `posts.read_photo`; nothing is extracted.

It reads uncompressed tars only, because a member of a compressed tar cannot be read without all
members before it. Only regular files whose names stay inside the tar count. If a name occurs twice,
the last member counts, as when a tar is extracted. A tar must not change while it is being read.
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

INDEXES = 64  # tars whose index a process caches, at 24 bytes per member
# Limit on header bytes per tar: 80,000 to 250,000 members at 512 to 1,536 bytes each.
HEADER_BYTES = 128 * 2**20
LONGEST_HEADER = 2**16  # bytes; no file name needs a longer one


class Index(typing.NamedTuple):
    """Positions of the members of a tar."""

    names: np.ndarray  # uint64 (N,), hashes of the names, sorted
    extents: np.ndarray  # int64 (N, 2), offset and size of each, in bytes
    complete: bool  # whether the tar ends with an end-of-archive block


class _Tar(tarfile.TarFile):
    members: list[tarfile.TarInfo]  # missing from the type stubs of tarfile


class _HeaderReader:
    """A tar file that limits how many bytes can be read as headers."""

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
    """Reads one member of a tar.

    Args:
      path: of the tar.
      member: the member's name, without "." and empty parts.

    Raises:
      Dropped: "missing_file", "too_large", or "broken_archive" if the tar is damaged and the member
        is not complete before the damage.
      OSError: as `files.read`.
    """
    try:
        index = _index(path, _file_version(path))
        key = _hash(member)
        row = int(np.searchsorted(index.names, key))
        if row == len(index.names) or index.names[row] != key:
            raise Dropped("missing_file" if index.complete else "broken_archive")
        offset, size = index.extents[row].tolist()
        if size > files.LARGEST_FILE:
            raise Dropped("too_large")
        with storage.open(path) as file:
            file.seek(offset)
            encoded = file.read(size)
    except (OSError, ValueError) as error:
        if files.storage_failed(path, error):
            raise
        raise Dropped("missing_file") from None
    if len(encoded) < size:
        raise Dropped("broken_archive")
    return encoded


def _file_version(path: str) -> tuple[int, ...]:
    """Size and modification time of a local file; empty for a remote one, to save a request."""
    if storage.is_remote(path):
        return ()
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=INDEXES)
def _index(path: str, version: tuple[int, ...]) -> Index:
    del version  # only part of the cache key
    extents: dict[int, tuple[int, int]] = {}
    with storage.open(path) as file:
        complete = _find_members(file, extents)
    names = np.array(list(extents), np.uint64)
    order = np.argsort(names)
    columns = np.array(list(extents.values()), np.int64).reshape(-1, 2)
    return Index(names=names[order], extents=columns[order], complete=complete)


def _find_members(file: typing.BinaryIO, extents: dict[int, tuple[int, int]]) -> bool:
    """Adds the members before any damage to `extents`; returns whether the tar is complete."""
    try:
        headers = typing.cast("typing.IO[bytes]", _HeaderReader(file))
        with _Tar.open(fileobj=headers, mode="r:", encoding="utf-8") as tar:
            while (entry := tar.next()) is not None:
                # Otherwise tarfile keeps every member in memory.
                tar.members, tar.pax_headers = [], {}
                if not 0 <= entry.size < 2**62:  # a negative size would loop
                    return False
                parts = [part for part in entry.name.split("/") if part not in ("", ".")]
                if entry.name.startswith("/") or ".." in parts:
                    continue
                key = _hash("/".join(parts))
                extents.pop(key, None)
                if entry.isreg() and not entry.issparse():
                    extents[key] = (entry.offset_data, entry.size)
            # tarfile treats an invalid header as the end of the archive.
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            return bool(block) and not block.strip(b"\0")
    except OSError:
        raise
    except Exception:
        # On malicious input tarfile can raise any exception, even RecursionError.
        return False


def _hash(name: str) -> int:
    encoded = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
