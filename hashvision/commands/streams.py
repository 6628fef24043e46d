"""Makes stdout and stderr accept every character and survive a closed pipe."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any


class _Unread(io.RawIOBase):
    """A stream that discards output once its pipe is closed, as by `| head`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[self._stream.write(left) or 0 :]
        return len(content)


@contextlib.contextmanager
def robust() -> Iterator[None]:
    """Replaces stdout and stderr while it is open.

    Characters that their encoding lacks are printed as escapes, and a closed pipe raises nothing.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        buffered = getattr(stream, "buffer", None)
        raw = getattr(buffered, "raw", buffered)  # PYTHONUNBUFFERED leaves out the buffer
        if isinstance(raw, io.FileIO):  # not what a caller has put there
            stream.flush()
            unread: Any = _Unread(raw)
            text = io.TextIOWrapper(
                unread if raw is buffered else io.BufferedWriter(unread),
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, text)
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
