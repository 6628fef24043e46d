"""Opens photos' files: plain files and no others, those that posts name below the folder given."""

import errno
import os
import re
import stat
import unicodedata

from hashvision import storage
from hashvision.sources.reasons import Dropped

LARGEST_FILE = 64 * 2**20  # bytes; cameras of 200 megapixels write less
LONGEST_PATH = 1024  # characters; object stores allow as many bytes
_ESCAPED = ("Cc", "Cs")  # Unicode's categories of control characters and surrogates
_DRIVE = re.compile(r"[A-Za-z]:")
_TAR = (".tar",)
_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


def locate(folder: str, path: str) -> tuple[str, str]:
    """Where the photo lies that a post names.

    Of "shards/0001.tar/abc.jpg" the first part that is a tar file is the file, and the rest names
    a member of it. On remote storage, where it would cost a request to ask, each part that is named
    so is taken for one.

    Args:
      folder: the folder that paths are relative to.
      path: as the post has it.

    Returns:
      (path of a file that may be opened, name of the member or "").

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
    # A pipe would be waited for and a device read without end.
    if not storage.is_remote(file) and not os.path.isfile(file):
        raise Dropped("missing_file")
    return file, ""


def _parts(path: str) -> list[str]:
    """The names on the way to a file; none of them leads upwards."""
    if path.startswith(("/", "\\")) or storage.is_remote(path) or _DRIVE.match(path):
        raise Dropped("path_outside")
    if ".." in path.replace("\\", "/").split("/"):
        raise Dropped("path_outside")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or "\0" in path or len(path) > LONGEST_PATH:
        raise Dropped("missing_file")
    return parts


def _inside(folder: str, parts: list[str]) -> str:
    """The file of that name, with all links followed; none of them leads out of the folder."""
    if storage.is_remote(folder):
        return "/".join([folder.rstrip("/"), *parts])
    root = os.path.realpath(folder)
    file = os.path.realpath(os.path.join(root, *parts))
    if os.path.commonpath([root, file]) != root:
        raise Dropped("path_outside")
    return file


def read(path: str) -> bytes:
    """All bytes of a file: the one opener of foreign files.

    Of a file on disk kind and size are asked first: nothing waits for a pipe, reads a device
    without end, or fills memory with a sparse file's holes.

    Raises:
      Dropped: "missing_file", also for what is not a regular file, or "too_large".
      OSError: remote storage does not answer; to go on would lose what is there.
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
        if does_not_answer(path, error):
            raise
        raise Dropped("missing_file") from None
    if len(encoded) > LARGEST_FILE:
        raise Dropped("too_large")
    return encoded


def shown(name: str) -> str:
    r"""A file's name as it can be printed and written as JSON.

    Control characters become escapes, and so do bytes that are not UTF-8 (a name in Latin-1), which
    Python holds as lone surrogates: caf\udce9.jpg.
    """

    def escaped(c: str) -> str:
        return c.encode("unicode_escape").decode() if unicodedata.category(c) in _ESCAPED else c

    return "".join(map(escaped, name))


def does_not_answer(path: str, error: Exception) -> bool:
    """Whether the storage failed, and not what was asked of it."""
    return storage.is_remote(path) and getattr(error, "errno", None) == errno.EIO
