"""Locks on what one process at a time may write: a workdir, the output of `prepare`.

A lock is a small file, or an object in a bucket, that names its holder. Each change to it replaces
exactly the content that was read before, so of two processes that want it one gets it. The holder
writes a sign of life into it every few seconds. A lock whose holder was killed is taken over: at
once where the holder ran on this machine, which knows its processes, and otherwise after a minute
without a sign of life, by the clock of the process that waits.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import typing
import uuid
from collections.abc import Iterator

from hashvision import storage
from hashvision.errors import UserError

_BEAT = 5.0  # seconds between two signs of life
_PATIENCE = 60.0  # seconds without one after which a lock of another machine is taken over
_ANSWER = 30.0  # seconds that a bucket may take
_BOOT = "/proc/sys/kernel/random/boot_id"
_PROCESSES = "/proc/self/ns/pid"


class Lock:
    """A lock that is held from entering to leaving it."""

    def __init__(self, path: str, thing: str, remedy: str) -> None:
        """Names the lock.

        Args:
          path: of the file that is the lock.
          thing: what it protects, to begin a sentence with.
          remedy: what to do other than wait for the holder's end, to end a sentence with.
        """
        self._path, self._thing, self._remedy = path, thing, remedy
        self._cell = _Object(path) if storage.is_remote(path) else _File(path)
        self._holder = _this_process()
        self._stamp: typing.Any = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> None:
        """Takes the lock.

        Raises:
          UserError: another process holds it, or the file is no lock.
          OSError: the lock cannot be written.
        """
        seen, since = None, 0.0
        while True:
            content, stamp = self._cell.read()
            holder = _parse(content) if content else None
            if content and not holder:
                raise UserError(
                    f"{self._path} is not a lock that hashvision wrote; move that file away, or"
                    f" {self._remedy}."
                )
            if holder and holder.token == self._holder.token:  # the answer to a write was lost
                self._stamp = stamp
                break
            if holder:
                alive = _is_alive(holder)
                if alive or (alive is None and seen not in (None, content)):
                    raise UserError(
                        f"{self._thing} is in use by {holder}; wait until that ends, or"
                        f" {self._remedy}."
                    )
                if alive is None and seen is None:
                    seen, since = content, time.monotonic()
                    print(
                        f"{self._thing} was last in use by {holder}; waiting up to"
                        f" {_PATIENCE:g} s for a sign of life.",
                        flush=True,
                    )
                if alive is None and time.monotonic() - since < _PATIENCE:
                    time.sleep(_BEAT / 5)
                    continue
            self._stamp = self._cell.swap(stamp, self._holder.json())
            if self._stamp is not None:
                break
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Gives the lock back."""
        self._left.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # then it is taken over as that of a killed process
            self._cell.swap(self._stamp, None)

    def _beat(self) -> None:
        while not self._left.wait(_BEAT):
            with contextlib.suppress(OSError):  # of a full disk, or a bucket that is away
                self._show_life()

    def _show_life(self) -> None:
        self._holder = self._holder._replace(beat=self._holder.beat + 1)
        stamp = self._cell.swap(self._stamp, self._holder.json())
        if stamp is not None:
            self._stamp = stamp
            return
        content, stamp = self._cell.read()
        other = _parse(content) if content else None
        if not content or (other and other.token == self._holder.token):
            self._stamp = stamp  # somebody deleted the file, or the answer to a write was lost
            return
        # This process stood still for so long, with its machine say, that another went on.
        print(
            f"hashvision: {self._thing} was taken over by {other or 'another'}, since this process"
            f" had shown no sign of life for {_PATIENCE:g} s; it ends here.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def append(path: str, line: str) -> None:
    """Adds a line to a file, whole or not at all; what stands there stays, whoever else adds."""
    cell = _Object(path) if storage.is_remote(path) else _File(path)
    while True:
        before, stamp = cell.read()
        if cell.swap(stamp, (before or b"") + line.encode()) is not None:
            return


class _Holder(typing.NamedTuple):
    """Who holds a lock."""

    token: str  # of this one time
    host: str
    process: int
    since: str
    machine: str  # the kernel's, from its start on; "" where it has none
    processes: str  # among which `process` counts: a container has its own
    started: int  # when the process was, in the kernel's ticks, as numbers of processes come again
    beat: int  # grows while it lives

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    def json(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"


def _this_process() -> _Holder:
    machine, processes = _machine()
    return _Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        process=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        machine=machine,
        processes=processes,
        started=_state(os.getpid())[1],
        beat=0,
    )


def _parse(content: bytes) -> _Holder | None:
    """Who holds a lock by its content; None if that is not a lock's."""
    try:
        said = json.loads(content)
        holder = _Holder(**{name: said[name] for name in _Holder._fields})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    kinds = typing.get_type_hints(_Holder)
    fits = all(isinstance(value, kinds[name]) for name, value in holder._asdict().items())
    return holder if fits else None


def _machine() -> tuple[str, str]:
    """What tells this kernel, and this set of processes in it, from all others; "" without."""
    try:
        with open(_BOOT, encoding="ascii") as file:
            boot = file.read().strip()
        return boot, os.readlink(_PROCESSES)
    except OSError:
        return "", ""


def _is_alive(holder: _Holder) -> bool | None:
    """Whether the process lives; None if only its signs of life can tell."""
    if not holder.machine or (holder.machine, holder.processes) != _machine():
        return None
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, started = _state(holder.process)
    if not state:
        return None
    return started == holder.started and state not in "ZX"  # dead, but its parent has not asked


def _state(process: int) -> tuple[str, int]:
    """A process's state and when it was started; "" and 0 where the system does not tell."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0


class _File:
    """A file that changes only from what was read; `None` stands for one that is not there."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> tuple[bytes | None, bytes]:
        """The content, and the stamp by which `swap` knows it."""
        try:
            content = storage.read(self._path)
        except FileNotFoundError:
            content = b""
        return content or None, content

    def swap(self, stamp: bytes, content: bytes | None) -> bytes | None:
        """Replaces what had this stamp: the new one; None if something else is there by now."""
        with self._alone():
            there = storage.read(self._path)
            if there == stamp and content is not None:
                storage.write(self._path, content)
                return content
            if there == stamp or not there:
                os.remove(self._path)
            return b"" if there == stamp else None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes of this class, on this file, out."""
        storage.make_folder(os.path.dirname(self._path))
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as error:  # a network file system without: a moment's risk is left
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                        raise
                if self._is(file):  # and not one that another has replaced or removed meanwhile
                    yield
                    return
            finally:
                os.close(file)

    def _is(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False


class _Object:
    """The same in a bucket, by TensorStore: TensorFlow's client has no conditional writes."""

    def __init__(self, path: str) -> None:
        self._path, self._opened = path, None

    def read(self) -> tuple[bytes | None, bytes]:
        with self._as_os_errors():
            found = self._store().read("").result(timeout=_ANSWER)
        return found.value or None, found.stamp.generation

    def swap(self, stamp: bytes, content: bytes | None) -> bytes | None:
        with self._as_os_errors():
            written = self._store().write("", content, if_equal=stamp).result(timeout=_ANSWER)
        return written.generation or None

    def _store(self) -> typing.Any:
        if self._opened is None:
            import tensorstore

            self._opened = tensorstore.KvStore.open(self._path).result(timeout=_ANSWER)
        return self._opened

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        """TensorStore raises ValueErrors that begin with the name of what went wrong."""
        numbers = {
            "PERMISSION_DENIED": errno.EACCES,
            "UNAUTHENTICATED": errno.EACCES,
            "NOT_FOUND": errno.ENOENT,
            "UNAVAILABLE": errno.EIO,
            "DEADLINE_EXCEEDED": errno.EIO,
            "ABORTED": errno.EIO,
            "INTERNAL": errno.EIO,
            "UNKNOWN": errno.EIO,
            "RESOURCE_EXHAUSTED": errno.EIO,
        }
        try:
            yield
        except (ValueError, NotImplementedError, TimeoutError) as error:
            told = str(error).split(" [")[0][:300]
            number = numbers.get(told.partition(":")[0], errno.EINVAL)
            if isinstance(error, TimeoutError):
                number, told = errno.EIO, f"no answer in {_ANSWER:g} s"
            if number in (errno.ENOENT, errno.EACCES):
                told = os.strerror(number)
            raise OSError(number, told, self._path) from None
