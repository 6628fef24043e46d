"""Which line of a post counts if its id occurs several times: any private line, else the latest.

`reading` makes a PostState of each line; `graph` groups them by id and drops the superseded lines.
"""

import itertools
import struct
import typing
from collections.abc import Iterable, Iterator

from hashvision.data import records
from hashvision.sources import dates
from hashvision.sources.posts import Post

_PACKED = struct.Struct(">8sQQQ?")


class PostState(typing.NamedTuple):
    """What one line says about its post."""

    key: bytes  # 8, the hash of the id
    when: int  # date, as returned by `dates.sortable`
    offset: int  # of the line in the dump, in bytes
    chunk: int  # start of the line's Chunk, in bytes
    public: bool

    def pack(self) -> bytes:
        """Packs the state in 33 bytes, because there is one for each line of the dump."""
        return _PACKED.pack(*self)


def state_of(post: Post, offset: int, chunk: int) -> PostState:
    """Returns the state of a post.

    Args:
      post: the post.
      offset: of its line in the dump, in bytes.
      chunk: start of the Chunk with that line, in bytes.
    """
    return PostState(
        key=records.id_hash(post.id).to_bytes(8, "big"),
        when=dates.sortable(post.created_at),
        offset=offset,
        chunk=chunk,
        public=post.visibility == "public",
    )


def superseded(packed: Iterable[bytes]) -> Iterator[tuple[int, tuple[int, str]]]:
    """Finds the public lines that do not count.

    The latest state is the one with the latest date. Among equal dates it is the last in the dump.

    Args:
      packed: all states of some posts, as `PostState.pack` returns them.

    Yields:
      (chunk, (offset, "private" or "duplicate_id")).
    """
    states = sorted(PostState(*_PACKED.unpack(each)) for each in packed)
    for _, same in itertools.groupby(states, key=lambda state: state.key):
        *earlier, latest = same
        if all(state.public for state in (*earlier, latest)):
            lines, reason = earlier, "duplicate_id"
        else:
            lines, reason = [state for state in (*earlier, latest) if state.public], "private"
        yield from ((state.chunk, (state.offset, reason)) for state in lines)
