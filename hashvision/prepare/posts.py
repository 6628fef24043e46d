"""A dump of posts: a reader that no line stops, and what is asked of a post before its photo."""

import base64
import binascii
import json
import typing
import unicodedata
from collections.abc import Iterator

from hashvision.prepare import hashtags
from hashvision.sources import archives, files
from hashvision.sources.reasons import Dropped

LONGEST_TEXT = 100_000  # characters; platforms allow some thousands
MOST_TAGS = 200  # of a post; Instagram allows 30
LONGEST_NAME = 1000  # characters of an id or an owner
LONGEST_LINE = 32 * 2**20  # bytes; a longer line is no post
MOST_PARTS = 1_000_000  # of a line: each value of a list takes far more memory than its bytes


class Post(typing.NamedTuple):
    """One line of a dump."""

    id: str
    image: str | bytes | None  # a path relative to the images' folder, or the file's bytes
    text: str  # its first LONGEST_TEXT + 1 characters
    owner: str
    visibility: str
    created_at: str


def _text(value: object, longest: int) -> str:
    """`value` as text that every encoder takes: lone surrogates, legal in JSON, are replaced."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return value[:longest].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _name(value: object) -> str:
    """An id or owner, as it stands: cut or mended, two of them could become one.

    Raises:
      ValueError: it is too long, or holds what no list of ids can: control characters, surrogates.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    if len(value) > LONGEST_NAME or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise ValueError("no name")
    return value.strip()


def _once(pairs: list[tuple[str, typing.Any]]) -> dict[str, typing.Any]:
    """An object of JSON; of a post that is both private and public no reader may choose one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key comes twice")
    return fields


def parse(line: bytes) -> Post:
    """The post in one line of JSON; a field of the wrong type counts as absent.

    Raises:
      Dropped: "broken_line" where the line is no JSON object in UTF-8, has a key twice, has no id,
        or an id or owner that is too long or holds control characters.
    """
    try:
        if sum(map(line.count, (b",", b"[", b"{"))) > MOST_PARTS:
            raise ValueError("too many parts")
        fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
        if not isinstance(fields, dict):
            raise ValueError("no object")
        post_id, owner = _name(fields.get("id")), _name(fields.get("owner"))
    except (ValueError, RecursionError):
        raise Dropped("broken_line") from None
    if not post_id:
        raise Dropped("broken_line")
    image: str | bytes | None = None
    if isinstance(fields.get("image_bytes"), str):
        try:
            image = base64.b64decode(fields["image_bytes"], validate=True)
        except (binascii.Error, ValueError):
            image = b""  # there is a photo, but nothing that decodes
    elif isinstance(fields.get("image"), str):
        image = _text(fields["image"], files.LONGEST_PATH + 1)
    return Post(
        id=post_id,
        image=image,
        text=_text(fields.get("text"), LONGEST_TEXT + 1),
        owner=owner,
        visibility=_text(fields.get("visibility"), LONGEST_NAME),
        created_at=_text(fields.get("created_at"), LONGEST_NAME),
    )


def read_lines(
    file: typing.BinaryIO, start: int, end: int, longest: int = LONGEST_LINE
) -> Iterator[tuple[int, bytes | None]]:
    """The non-blank lines that start in [start, end) of a JSONL file.

    Ranges that tile a file give every line exactly once, which is how workers share one dump.

    Yields:
      (byte offset of the line, the line), None for a line longer than `longest` bytes.
    """
    offset = start
    if start:
        # A line that starts before `start` belongs to the range before; it may also end there.
        offset = start - 1
        file.seek(offset)
        offset += _skip_line(file)
    while offset < end:
        line = file.readline(longest)
        if not line:
            return
        length = len(line)
        if length == longest and not line.endswith(b"\n"):
            length += _skip_line(file)
            yield offset, None
        elif line.strip():
            yield offset, line
        offset += length


def _skip_line(file: typing.BinaryIO) -> int:
    """Reads on to the end of the line; returns the bytes read."""
    skipped = 0
    while chunk := file.readline(2**20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def check(post: Post) -> None:
    """Asks all that can be asked before a photo is opened.

    A text that is no person's is not cut but dropped: its first tags say no more of the photo than
    its last, and the cut could make a tag that nobody wrote.

    Raises:
      Dropped: "private" or "overlong_text".
    """
    if post.visibility != "public":
        raise Dropped("private")
    signs = sum(map(post.text.count, hashtags.HASH_SIGNS))
    if len(post.text) > LONGEST_TEXT or (
        signs > MOST_TAGS and len(hashtags.extract(post.text)) > MOST_TAGS
    ):
        raise Dropped("overlong_text")


def read_photo(post: Post, images: str) -> bytes:
    """The bytes of a public post's image file.

    Args:
      post: the post.
      images: the folder that image paths are relative to; no path or link leads out of it, but one
        may lead into a tar that lies in it.

    Raises:
      Dropped: as `check` does, before any photo is opened; "path_outside", "missing_file",
        "broken_archive" or "too_large".
    """
    check(post)
    if isinstance(post.image, bytes):
        return post.image
    file, member = files.locate(images, post.image or "")
    return archives.read_member(file, member) if member else files.read(file)
