"""Files wherever they lie: on this machine's disks, or in object storage (gs://BUCKET/...).

A path with "://" goes to TensorFlow's client, which is imported with the first of them, any other
to Python's own functions. What goes wrong with either is an OSError. Object storage holds whole
objects and nothing else: one appears when its file is closed, a folder is there while something is
in it, nothing can be appended to, and what is moved is copied.
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

# TensorFlow's client reads these once, when TensorFlow is imported. It would fetch 64 MB for each
# record that is read by its offset, and remember for 5 s a size that another host has changed.
os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(2**16))
os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")

_BUFFER = 2**19  # bytes of a request where a file is read through, as the client has it
_AT_ONCE = 32  # requests: each takes long, and little work
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network file systems say so of their folders

In = typing.TypeVar("In")
Out = typing.TypeVar("Out")


def is_remote(path: str) -> bool:
    """Whether a path leads into object storage."""
    return "://" in path


def absolute(path: str) -> str:
    """The path as it is from everywhere, without a slash at its end.

    Raises:
      UserError: it is a file:// URL, a URL of nothing, such as gs://, or empty, which would be the
        current folder.
    """
    if path.startswith("file://"):
        raise UserError(f"{path} is a URL of a local file; give its path, {path[7:] or '/'}.")
    if not path:
        raise UserError("A path is empty; give the path of a file or a folder.")
    scheme, is_url, rest = path.partition("://")
    if is_url and "/" not in scheme and not (scheme and rest.strip("/")):
        raise UserError(
            f"{path} is a URL of nothing; give one such as gs://bucket/folder, or a path."
        )
    return path.rstrip("/") if is_remote(path) else os.path.abspath(path)


def each(do: Callable[[In], Out], items: Iterable[In], remote: bool) -> list[Out]:
    """What `do` makes of each item, in their order; many at once where that asks remote storage."""
    if not remote:
        return [do(item) for item in items]
    with futures.ThreadPoolExecutor(_AT_ONCE, "storage") as pool:
        return list(pool.map(do, items))


def _files() -> typing.Any:
    import tensorflow as tf

    return tf.io.gfile


@contextlib.contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Raises what TensorFlow raises inside, which loses its way at `path`, as OSErrors.

    EIO is what may go away by itself. TensorFlow ends its errors of a disk with the system's words.
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
        told = str(error.message).split("\n")[0][:300]
        if not is_remote(path):
            words = told.rpartition("; ")[2]
            number = next((n for n in errno.errorcode if os.strerror(n) == words), number)
            told = os.strerror(number)
        if number in (errno.ENOENT, errno.EACCES):
            told = os.strerror(number)
        raise OSError(number, told, path) from None


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Gives the OSErrors raised inside this path where they have none: a write knows no name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise


class _Object(io.RawIOBase):
    """An object of remote storage as a file to read, or to write from its beginning to its end."""

    def __init__(self, path: str, mode: str) -> None:
        self._path, self._mode = path, mode
        with as_os_errors(path):
            self._file = _files().GFile(path, mode)

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
            return b"".join(iter(lambda: self._file.read(_BUFFER), b""))

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
    """Opens a file: "rb", "wb", "r" or "w", with Python's options for text, in UTF-8.

    A remote one that is not there is noticed when it is read, and one that is written appears when
    it is closed.

    Raises:
      OSError: there is none, or it may not be opened.
    """
    if "b" not in mode:
        text.setdefault("encoding", "utf-8")
    if not is_remote(path):
        return builtins.open(path, mode, **text)
    if mode[0] == "r":
        binary = io.BufferedReader(_Object(path, "rb"), _BUFFER)
    else:
        binary = io.BufferedWriter(_Object(path, "wb"), _BUFFER)
    return binary if "b" in mode else io.TextIOWrapper(binary, **text)


def read(path: str) -> bytes:
    """All bytes of a file."""
    with open(path) as file:
        return file.read()


def write(path: str, content: str | bytes) -> None:
    """Writes a file so that nobody ever sees half of it, and makes the folders it lies in.

    The file is on the disk when this returns: a power cut leaves the old content or the new.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        with open(path, "wb") as file:
            file.write(content)
        return
    make_folder(os.path.dirname(path))
    partial = f"{path}.{uuid.uuid4().hex}.partial"  # another process may write the same
    try:
        with naming(path), open(partial, "wb") as file:
            file.write(content)
        sync(partial)
        move(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def sync(path: str) -> None:
    """Returns when a file, or the names in a folder, are on the disk; remote storage needs none."""
    if is_remote(path):
        return
    file = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(file)


def create(path: str, content: str) -> None:
    """Writes a file that is not there yet and that this user alone may read, all of it or nothing.

    Raises:
      FileExistsError: it is there.
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
        except OSError:  # this file system has no links
            os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def exists(path: str) -> bool:
    """Whether a file or a folder is there."""
    if not is_remote(path):
        return os.path.exists(path)
    with as_os_errors(path):
        return _files().exists(path)


def is_folder(path: str) -> bool:
    """Whether a folder is there."""
    if not is_remote(path):
        return os.path.isdir(path)
    with as_os_errors(path):
        return _files().isdir(path)


def is_file(path: str) -> bool:
    """Whether a file is there."""
    return exists(path) and not is_folder(path) if is_remote(path) else os.path.isfile(path)


def size(path: str) -> int:
    """Bytes of a file."""
    if not is_remote(path):
        return os.path.getsize(path)
    with as_os_errors(path):
        return _files().stat(path).length


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders from the uppermost on: (path, names of folders, names of files), sorted.

    Nothing comes of a folder that is not there.

    Raises:
      OSError: one of them cannot be read.
    """
    if not is_remote(folder):
        for path, folders, files in os.walk(folder, onerror=_unless_absent):
            folders.sort()
            yield path, folders, sorted(files)
        return
    try:
        with as_os_errors(folder):
            found = sorted(_files().listdir(folder))  # a request, where its own walk asks of each
    except FileNotFoundError:
        return
    folders = [name.removesuffix("/") for name in found if name.endswith("/")]
    yield folder, folders, [name for name in found if not name.endswith("/")]
    for name in folders:
        yield from walk(f"{folder}/{name}")


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def names(folder: str, pattern: str = "*") -> list[str]:
    """The names in a folder that fit a pattern, sorted; none where it is not there."""
    _, folders, files = next(walk(folder), ("", [], []))
    return sorted(fnmatch.filter([*folders, *files], pattern))


def make_folder(path: str) -> None:
    """Makes a folder and those it lies in, where storage has such things."""
    if path and not is_remote(path):
        os.makedirs(path, exist_ok=True)


def remove(path: str) -> None:
    """Removes a file."""
    if not is_remote(path):
        return os.remove(path)
    with as_os_errors(path):
        _files().remove(path)


def remove_folder(path: str) -> None:
    """Removes a folder and all that is in it, if it is there."""
    if not is_remote(path):
        if os.path.exists(path):
            shutil.rmtree(path)
        return
    every = [f"{folder}/{name}" for folder, _, files in walk(path) for name in files]
    each(remove, every, remote=True)
    # What is left are objects that others have put there in place of empty folders.
    with contextlib.suppress(FileNotFoundError), as_os_errors(path):
        _files().rmtree(path)


def move(path: str, target: str) -> None:
    """Moves a file or a folder: in one step on a disk, object by object elsewhere.

    A file that lies at the target is replaced. On a disk the new name is there after a power cut.
    """
    if not is_remote(path):
        os.replace(path, target)
        return sync(os.path.dirname(target) or ".")
    with as_os_errors(path):
        _files().rename(path, target, overwrite=True)
