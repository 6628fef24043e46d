"""File access for every module, on local disks and in object storage (gs://BUCKET/...).

TensorFlow's client handles a path with "://"; it is imported at the first such path. Python's own
functions handle all other paths. Both raise OSError on failure. Object storage holds whole objects
only: an object appears when its file is closed, a folder exists while it contains an object,
nothing can be appended, and a move copies.
"""

import builtins
import contextlib
import errno
import fnmatch
import io
import os
import shutil
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

from hashvision.errors import UserError

# TensorFlow's client reads these once, when TensorFlow is imported. By default it fetches 64 MB for
# each record that is read by its offset, and caches a file's size for 5 s after another host has
# changed it.
os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(2**16))
os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")

_READ_BYTES = 2**19  # per request when a file is read sequentially; the client's own value
_THREADS = 32  # concurrent requests, which mostly wait
_SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)  # from folders of some network file systems

In = typing.TypeVar("In")
Out = typing.TypeVar("Out")


def is_remote(path: str) -> bool:
    """Whether a path is in object storage."""
    return "://" in path


def absolute(path: str) -> str:
    """Makes a path absolute and removes a trailing slash.

    Raises:
      UserError: the path is a file:// URL, an incomplete URL such as gs://, or empty, which would
        mean the current folder.
    """
    if path.startswith("file://"):
        raise UserError(f"{path} is a URL of a local file; give its path, {path[7:] or '/'}.")
    if not path:
        raise UserError("A path is empty; give the path of a file or a folder.")
    scheme, is_url, rest = path.partition("://")
    if is_url and "/" not in scheme and not (scheme and rest.strip("/")):
        raise UserError(
            f"{path} is an incomplete URL; give one such as gs://bucket/folder, or a path."
        )
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def parallel_map(call: Callable[[In], Out], items: Iterable[In], remote: bool) -> list[Out]:
    """Calls a function for each item, on up to 32 threads if it requests from remote storage.

    Args:
      call: the function; it must be safe to run on several threads.
      items: its arguments.
      remote: whether the calls wait for remote storage; if not, they run one after another.

    Returns:
      The results, in the order of the items.
    """
    if not remote:
        return [call(item) for item in items]
    with futures.ThreadPoolExecutor(_THREADS, "storage") as pool:
        return list(pool.map(call, items))


def _gfile() -> typing.Any:
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Converts TensorFlow's errors about `path` to OSErrors.

    EIO stands for errors that may be temporary. TensorFlow's message about a local disk ends with
    the text of the system's error, which gives the error number.
    """
    import tensorflow as tf

    numbers = {
        tf.errors.NotFoundError: errno.ENOENT,
        tf.errors.PermissionDeniedError: errno.EACCES,
        tf.errors.UnauthenticatedError: errno.EACCES,
        tf.errors.InvalidArgumentError: errno.EINVAL,
        tf.errors.FailedPreconditionError: errno.EINVAL,
        tf.errors.UnimplementedError: errno.EINVAL,
    }
    try:
        yield
    except tf.errors.OpError as error:
        number = numbers.get(type(error), errno.EIO)
        message = str(error.message).split("\n")[0][:300]
        if not is_remote(path):
            reason = message.rpartition("; ")[2]
            number = next((n for n in errno.errorcode if os.strerror(n) == reason), number)
            message = os.strerror(number)
        if number in (errno.ENOENT, errno.EACCES):
            message = os.strerror(number)
        raise OSError(number, message, path) from None


@contextlib.contextmanager
def add_path_to_errors(path: str) -> Iterator[None]:
    """Adds this path to OSErrors that name no file, such as those of a failed write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


class _Object(io.RawIOBase):
    """A remote object as a binary file, readable at any offset or writable from start to end."""

    def __init__(self, path: str, mode: str) -> None:
        self._path, self._mode = path, mode
        with as_os_errors(path):
            self._file = _gfile().GFile(path, mode)

    def readable(self) -> bool:
        return self._mode == "rb"

    def writable(self) -> bool:
        return self._mode == "wb"

    def seekable(self) -> bool:
        return self.readable()

    def readinto(self, buffer: typing.Any) -> int:
        with as_os_errors(self._path):
            chunk = self._file.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def readall(self) -> bytes:
        with as_os_errors(self._path):
            return b"".join(iter(lambda: self._file.read(_READ_BYTES), b""))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self.tell()
        elif whence == io.SEEK_END:
            offset += size(self._path)
        with as_os_errors(self._path):
            self._file.seek(offset)
        return offset

    def tell(self) -> int:
        with as_os_errors(self._path):
            return self._file.tell()

    def write(self, content: typing.Any) -> int:
        with as_os_errors(self._path):
            self._file.write(bytes(content))
        return len(content)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with as_os_errors(self._path):
                self._file.close()


def open(path: str, mode: str = "rb", **text: typing.Any) -> typing.Any:
    """Opens a file in mode "rb", "wb", "r" or "w"; text is UTF-8 by default.

    A missing remote file raises at the first read, not here. A remote file that is written appears
    when it is closed.

    Args:
      path: of the file.
      mode: of these four.
      **text: Python's options for text files.

    Raises:
      OSError: the file does not exist or cannot be opened.
    """
    if "b" not in mode:
        text.setdefault("encoding", "utf-8")
    if not is_remote(path):
        return builtins.open(path, mode, **text)
    if mode[0] == "r":
        binary = io.BufferedReader(_Object(path, "rb"), _READ_BYTES)
    else:
        binary = io.BufferedWriter(_Object(path, "wb"), _READ_BYTES)
    return binary if "b" in mode else io.TextIOWrapper(binary, **text)


def read(path: str) -> bytes:
    """Reads all bytes of a file."""
    with open(path) as file:
        return file.read()


def write(path: str, content: str | bytes) -> None:
    """Writes a file atomically and makes its parent folders.

    No reader sees a partly written file. The file is on the disk when this returns, so a power cut
    leaves either the old content or the new.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        with open(path, "wb") as file:
            file.write(content)
        return
    make_folder(os.path.dirname(path))
    partial = f"{path}.{uuid.uuid4().hex}.partial"  # several processes may write this file
    try:
        with add_path_to_errors(path), open(partial, "wb") as file:
            file.write(content)
        sync(partial)
        move(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def sync(path: str) -> None:
    """Waits until a file or a folder's entries are on the disk; no effect on remote storage."""
    if is_remote(path):
        return
    file = os.open(path, os.O_RDONLY)
    try:
        with add_path_to_errors(path):
            os.fsync(file)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(file)


def create(path: str, content: str) -> None:
    """Writes a new file atomically; on a disk, only this user may read it.

    Raises:
      FileExistsError: the file exists.
    """
    if is_remote(path):
        if exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        return write(path, content)
    make_folder(os.path.dirname(path))
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with builtins.open(os.open(partial, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # this file system does not support hard links
            os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def exists(path: str) -> bool:
    """Whether a file or a folder exists."""
    if not is_remote(path):
        return os.path.exists(path)
    with as_os_errors(path):
        return _gfile().exists(path)


def is_folder(path: str) -> bool:
    """Whether a path is an existing folder."""
    if not is_remote(path):
        return os.path.isdir(path)
    with as_os_errors(path):
        return _gfile().isdir(path)


def is_file(path: str) -> bool:
    """Whether a path is an existing file."""
    return exists(path) and not is_folder(path) if is_remote(path) else os.path.isfile(path)


def size(path: str) -> int:
    """Size of a file in bytes."""
    if not is_remote(path):
        return os.path.getsize(path)
    with as_os_errors(path):
        return _gfile().stat(path).length


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks a folder tree from the top, in sorted order.

    Yields:
      For each folder its path, the names of its folders and the names of its files. A folder that
      does not exist yields nothing.

    Raises:
      OSError: a folder cannot be read.
    """
    if not is_remote(folder):
        for path, folders, files in os.walk(folder, onerror=_raise_unless_missing):
            folders.sort()
            yield path, folders, sorted(files)
        return
    try:
        with as_os_errors(folder):
            found = sorted(_gfile().listdir(folder))  # one request; gfile.walk makes one per entry
    except FileNotFoundError:
        return
    folders = [name.removesuffix("/") for name in found if name.endswith("/")]
    yield folder, folders, [name for name in found if not name.endswith("/")]
    for name in folders:
        yield from walk(f"{folder}/{name}")


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def names(folder: str, pattern: str = "*") -> list[str]:
    """Sorted names in a folder that match a pattern; empty if the folder does not exist."""
    _, folders, files = next(walk(folder), ("", [], []))
    return sorted(fnmatch.filter([*folders, *files], pattern))


def make_folder(path: str) -> None:
    """Makes a folder and its parents; does nothing for object storage, which has no folders."""
    if path and not is_remote(path):
        os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file."""
    if not is_remote(path):
        return os.remove(path)
    with as_os_errors(path):
        _gfile().remove(path)


def remove_folder(path: str) -> None:
    """Removes a folder and its contents, if it exists."""
    if not is_remote(path):
        if os.path.exists(path):
            shutil.rmtree(path)
        return
    objects = [f"{folder}/{name}" for folder, _, files in walk(path) for name in files]
    parallel_map(remove, objects, remote=True)
    # Other programs store marker objects for empty folders.
    with contextlib.suppress(FileNotFoundError), as_os_errors(path):
        _gfile().rmtree(path)


def move(path: str, target: str) -> None:
    """Moves a file or a folder, atomically on a disk and object by object in remote storage.

    It replaces a file at the target. On a disk, the new name survives a power cut.
    """
    if not is_remote(path):
        os.replace(path, target)
        return sync(os.path.dirname(target) or ".")
    with as_os_errors(path):
        _gfile().rename(path, target, overwrite=True)
