"""Locks for paths that only one process may write, such as a workdir or the output of `prepare`.

A lock is a small file, or an object in a bucket, that names its holder. Processes change it by
compare-and-swap, so only one of several contenders gets it. The holder writes a heartbeat to it
every 5 seconds. When a holder is killed, the next process takes the lock over: immediately if the
holder ran on this machine, where its process can be checked, and otherwise after 60 seconds without
a heartbeat, by the clock of the waiting process.
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

_HEARTBEAT = 5.0  # seconds between two heartbeats
_TAKEOVER = 60.0  # seconds without a heartbeat before another machine's lock is taken over
_TIMEOUT = 30.0  # seconds for a request to a bucket
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_PID_NAMESPACE = "/proc/self/ns/pid"


class Lock:
    """A lock that a `with` statement holds."""

    def __init__(self, path: str, resource: str, remedy: str) -> None:
        """Describes the lock without taking it.

        Args:
          path: of the lock file.
          resource: what the lock protects; begins a sentence.
          remedy: what the user can do instead of waiting for the holder; ends a sentence.
        """
        self._path, self._resource, self._remedy = path, resource, remedy
        self._file = _open(path)
        self._holder = _this_process()
        self._stamp: typing.Any = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._run_heartbeat, name="lock", daemon=True)

    def __enter__(self) -> None:
        """Takes the lock.

        Raises:
          UserError: another process holds it, or the file is not a lock file.
          OSError: the lock cannot be written.
        """
        seen, since = None, 0.0
        while True:
            content, stamp = self._file.read()
            holder = _parse(content) if content else None
            if content and not holder:
                raise UserError(
                    f"{self._path} is not a lock file of hashvision; move that file away, or"
                    f" {self._remedy}."
                )
            if holder and holder.token == self._holder.token:  # a write succeeded without a reply
                self._stamp = stamp
                break
            if holder:
                alive = _is_alive(holder)
                if alive or (alive is None and seen not in (None, content)):
                    raise UserError(
                        f"{self._resource} is in use by {holder}; wait until it ends, or"
                        f" {self._remedy}."
                    )
                if alive is None and seen is None:
                    seen, since = content, time.monotonic()
                    print(
                        f"{self._resource} was last in use by {holder}; waiting up to"
                        f" {_TAKEOVER:g} s for its heartbeat.",
                        flush=True,
                    )
                if alive is None and time.monotonic() - since < _TAKEOVER:
                    time.sleep(_HEARTBEAT / 5)
                    continue
            self._stamp = self._file.swap(stamp, self._holder.json())
            if self._stamp is not None:
                break
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Releases the lock."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the next process then takes it over as abandoned
            self._file.swap(self._stamp, None)

    def _run_heartbeat(self) -> None:
        while not self._released.wait(_HEARTBEAT):
            with contextlib.suppress(OSError):  # a full disk, or a bucket that is unreachable
                self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        self._holder = self._holder._replace(beat=self._holder.beat + 1)
        stamp = self._file.swap(self._stamp, self._holder.json())
        if stamp is not None:
            self._stamp = stamp
            return
        content, stamp = self._file.read()
        other = _parse(content) if content else None
        if not content or (other and other.token == self._holder.token):
            self._stamp = stamp  # the file was deleted, or a write succeeded without a reply
            return
        # This process was suspended, perhaps with its machine, until another took the lock over.
        print(
            f"hashvision: {self._resource} was taken over by {other or 'another process'}, because"
            f" this process sent no heartbeat for {_TAKEOVER:g} s; this process stops.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def append(path: str, line: str) -> None:
    """Appends a line to a file atomically, also while other processes append to it."""
    file = _open(path)
    while True:
        before, stamp = file.read()
        if file.swap(stamp, (before or b"") + line.encode()) is not None:
            return


class _Holder(typing.NamedTuple):
    """The process that holds a lock; the fields are the keys of the JSON in the lock file."""

    token: str  # unique to one use of a lock
    host: str
    process: int  # process id
    since: str
    machine: str  # boot id of the kernel; "" if unknown
    processes: str  # PID namespace of `process`, since each container has its own; "" if unknown
    started: int  # start time of the process in clock ticks, since process ids are reused
    beat: int  # number of heartbeats so far

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    def json(self) -> bytes:
        return json.dumps(self._asdict()).encode() + b"\n"


def _this_process() -> _Holder:
    machine, processes = _machine_and_namespace()
    return _Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        process=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        machine=machine,
        processes=processes,
        started=_process_state(os.getpid())[1],
        beat=0,
    )


def _parse(content: bytes) -> _Holder | None:
    """Parses the content of a lock file; None if it is not one."""
    try:
        fields = json.loads(content)
        holder = _Holder(**{name: fields[name] for name in _Holder._fields})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    kinds = typing.get_type_hints(_Holder)
    fits = all(isinstance(value, kinds[name]) for name, value in holder._asdict().items())
    return holder if fits else None


def _machine_and_namespace() -> tuple[str, str]:
    """The kernel's boot id and this process's PID namespace; "" for both if not available."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            boot = file.read().strip()
        return boot, os.readlink(_PID_NAMESPACE)
    except OSError:
        return "", ""


def _is_alive(holder: _Holder) -> bool | None:
    """Whether the process runs; None if only its heartbeats can tell."""
    if not holder.machine or (holder.machine, holder.processes) != _machine_and_namespace():
        return None
    try:
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, started = _process_state(holder.process)
    if not state:
        return None
    return started == holder.started and state not in "ZX"  # Z and X: dead, but not reaped


def _process_state(process: int) -> tuple[str, int]:
    """State and start time (clock ticks) of a process; "" and 0 if not available."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0


def _open(path: str) -> "_LocalFile | _RemoteObject":
    return _RemoteObject(path) if storage.is_remote(path) else _LocalFile(path)


class _LocalFile:
    """A file with compare-and-swap; `None` is the content of a file that does not exist."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self) -> tuple[bytes | None, bytes]:
        """Returns the content and its stamp, which `swap` compares."""
        try:
            content = storage.read(self._path)
        except FileNotFoundError:
            content = b""
        return content or None, content

    def swap(self, stamp: bytes, content: bytes | None) -> bytes | None:
        """Replaces the content that has this stamp.

        Args:
          stamp: from `read` or the last `swap`.
          content: the new content; None removes the file.

        Returns:
          The new stamp, or None if the file has changed since.
        """
        with self._exclusively():
            current = storage.read(self._path)
            if current == stamp and content is not None:
                storage.write(self._path, content)
                return content
            if current == stamp or not current:
                os.remove(self._path)
            return b"" if current == stamp else None

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Excludes other users of this class from this file."""
        storage.make_folder(os.path.dirname(self._path))
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as error:
                    # Some network file systems have no locks; a short race remains there.
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                        raise
                if self._is_current(file):  # another process may have replaced or removed it
                    yield
                    return
            finally:
                os.close(file)

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        except FileNotFoundError:
            return False


class _RemoteObject:
    """The same for a remote object, by TensorStore, whose writes can be conditional."""

    def __init__(self, path: str) -> None:
        self._path, self._opened = path, None

    def read(self) -> tuple[bytes | None, bytes]:
        with self._as_os_errors():
            found = self._store().read("").result(timeout=_TIMEOUT)
        return found.value or None, found.stamp.generation

    def swap(self, stamp: bytes, content: bytes | None) -> bytes | None:
        with self._as_os_errors():
            written = self._store().write("", content, if_equal=stamp).result(timeout=_TIMEOUT)
        return written.generation or None

    def _store(self) -> typing.Any:
        if self._opened is None:
            import tensorstore

            self._opened = tensorstore.KvStore.open(self._path).result(timeout=_TIMEOUT)
        return self._opened

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        """Converts TensorStore's ValueErrors, whose message starts with a status, to OSErrors."""
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
            message = str(error).split(" [")[0][:300]
            # The block holds only calls of TensorStore, so another status, as of a URL it cannot
            # parse, is about the path too.
            number = numbers.get(message.partition(":")[0], errno.EINVAL)
            if isinstance(error, TimeoutError):
                number, message = errno.EIO, f"no answer within {_TIMEOUT:g} s"
            if number in (errno.ENOENT, errno.EACCES):
                message = os.strerror(number)
            raise OSError(number, message, self._path) from None
