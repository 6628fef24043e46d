"""Which line of a post counts where its id comes twice: private anywhere wins, else the latest."""

import itertools
import struct
import typing
from collections.abc import Iterable, Iterator

from hashvision.data import records
from hashvision.sources import dates
from hashvision.sources.posts import Post

_PACKED = struct.Struct(">8sQQQ?")


class State(typing.NamedTuple):
    """What one line says of its post."""

    key: bytes  # 8, the hash of the id
    when: int  # as `dates.sortable` has it
    offset: int  # of the line in the dump
    chunk: int  # start of the line's Chunk
    public: bool

    def pack(self) -> bytes:
        """The state in 33 bytes: there is one for each line of the dump."""
        return _PACKED.pack(*self)


def state_of(post: Post, offset: int, chunk: int) -> State:
    """The state of the post on the line at `offset`."""
    when = dates.sortable(post.created_at)
    key = records.id_hash(post.id).to_bytes(8, "big")
    return State(key, when, offset, chunk, post.visibility == "public")


def superseded(packed: Iterable[bytes]) -> Iterator[tuple[int, tuple[int, str]]]:
    """The public lines that do not count.

    The latest state has the latest date; of equal dates it is the one later in the dump.

    Args:
      packed: all states of some posts.

    Yields:
      (chunk, (offset, "private" or "duplicate_id")).
    """
    states = sorted(State(*_PACKED.unpack(each)) for each in packed)
    for _, same in itertools.groupby(states, key=lambda state: state.key):
        *earlier, latest = same
        if all(state.public for state in (*earlier, latest)):
            lines, reason = earlier, "duplicate_id"
        else:
            lines, reason = [state for state in (*earlier, latest) if state.public], "private"
        yield from ((state.chunk, (state.offset, reason)) for state in lines)
