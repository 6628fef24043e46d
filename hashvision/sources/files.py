"""Finds and opens the files that posts name: regular files below the dump's folder only."""

import errno
import os
import re
import stat
import unicodedata

from hashvision import storage
from hashvision.sources.reasons import Dropped

LARGEST_FILE = 64 * 2**20  # bytes; 200-megapixel cameras write less
LONGEST_PATH = 1024  # characters; object stores allow as many bytes
_ESCAPED = ("Cc", "Cs")  # Unicode's categories of control characters and surrogates
_DRIVE = re.compile(r"[A-Za-z]:")
_TAR = (".tar",)
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


def locate(folder: str, path: str) -> tuple[str, str]:
    """Finds the file that contains a post's photo.

    In "shards/0001.tar/abc.jpg" the first part that is a tar file is the file, and the rest names
    its member. In remote storage the first part with a tar's name counts as a tar, because checking
    would cost a request.

    Args:
      folder: that paths are relative to.
      path: as in the post.

    Returns:
      The path of a file that is safe to open, and the name of the member or "".

    Raises:
      Dropped: "path_outside", "missing_file", or "broken_archive" for a compressed tar.
    """
    parts = _parts(path)
    for length in range(1, len(parts)):
        name = parts[length - 1].lower()
        if name.endswith((*_TAR, *_COMPRESSED_TAR)):
            archive = _inside(folder, parts[:length])
            if storage.is_remote(archive) or os.path.isfile(archive):
                if not name.endswith(_TAR):
                    raise Dropped("broken_archive")
                return archive, "/".join(parts[length:])
    file = _inside(folder, parts)
    # Opening a pipe could block, and reading a device might never end.
    if not storage.is_remote(file) and not os.path.isfile(file):
        raise Dropped("missing_file")
    return file, ""


def _parts(path: str) -> list[str]:
    """Splits a relative path into its parts and rejects one that leads outside the folder."""
    if path.startswith(("/", "\\")) or storage.is_remote(path) or _DRIVE.match(path):
        raise Dropped("path_outside")
    if ".." in path.replace("\\", "/").split("/"):
        raise Dropped("path_outside")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or "\0" in path or len(path) > LONGEST_PATH:
        raise Dropped("missing_file")
    return parts


def _inside(folder: str, parts: list[str]) -> str:
    """Joins folder and parts, follows all links, and rejects a file outside the folder."""
    if storage.is_remote(folder):
        return "/".join([folder.rstrip("/"), *parts])
    root = os.path.realpath(folder)
    file = os.path.realpath(os.path.join(root, *parts))
    if os.path.commonpath([root, file]) != root:
        raise Dropped("path_outside")
    return file


def read(path: str) -> bytes:
    """Reads all bytes of an untrusted file.

    It checks type and size of a local file first, so it never blocks on a pipe, reads a device or
    fills memory from a sparse file.

    Raises:
      Dropped: "missing_file", also for anything but a regular file, or "too_large".
      OSError: remote storage fails; to continue would drop photos that exist.
    """
    try:
        if not storage.is_remote(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise Dropped("missing_file")
            if status.st_size > LARGEST_FILE:
                raise Dropped("too_large")
        with storage.open(path) as file:
            encoded = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        if storage_failed(path, error):
            raise
        raise Dropped("missing_file") from None
    if len(encoded) > LARGEST_FILE:
        raise Dropped("too_large")
    return encoded


def printable(name: str) -> str:
    r"""Escapes a file name for printing and for JSON.

    It escapes control characters and bytes that are not UTF-8 (such as a Latin-1 name), which
    Python represents as lone surrogates: caf\udce9.jpg.
    """

    def escaped(c: str) -> str:
        return c.encode("unicode_escape").decode() if unicodedata.category(c) in _ESCAPED else c

    return "".join(map(escaped, name))


def storage_failed(path: str, error: Exception) -> bool:
    """Whether an error means that remote storage failed, not that the file is unreadable."""
    return storage.is_remote(path) and getattr(error, "errno", None) == errno.EIO
