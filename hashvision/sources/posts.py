"""A dump of posts: a reader that no line stops, and what is asked of a post before its photo."""

import base64
import binascii
import json
import typing
from collections.abc import Iterator

from hashvision.sources import archives, files, names
from hashvision.sources.reasons import Dropped
from hashvision.tags import hashtags

LONGEST_TEXT = 100_000  # characters; platforms allow some thousands
MOST_TAGS = 200  # of a post; Instagram allows 30
LONGEST_WORD = 1000  # characters of a visibility or a date
LONGEST_LINE = 32 * 2**20  # bytes; a longer line is no post
MOST_PARTS = 1_000_000  # of a line: each value of a list takes far more memory than its bytes
_AMBIGUOUS = object()  # the value of a key that a line gives twice, with two values


class Post(typing.NamedTuple):
    """One line of a dump."""

    id: str  # canonical, as the owner is
    image: str | bytes | None  # a path relative to the images' folder, or the file's bytes
    text: str  # its first LONGEST_TEXT + 1 characters
    owner: str  # "" where the dump names none
    visibility: str
    created_at: str
    fault: str = ""  # the reason to drop it where some other field cannot be read


def _text(value: object, longest: int) -> str:
    """`value` as text that every encoder takes: lone surrogates, legal in JSON, are replaced."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return value[:longest].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fields(line: bytes) -> tuple[dict[str, typing.Any], bool]:
    """The fields of a line of JSON, and whether each key comes once, as deep as they go.

    No reader may choose between two values of one key: such a value is of no type.
    """
    whole = True

    def once(pairs: list[tuple[str, typing.Any]]) -> dict[str, typing.Any]:
        nonlocal whole
        fields = dict(pairs)
        if len(fields) < len(pairs):
            whole = False
            fields = {}
            for key, value in pairs:
                fields[key] = value if fields.get(key, value) == value else _AMBIGUOUS
        return fields

    if sum(map(line.count, (b",", b"[", b"{"))) > MOST_PARTS:
        raise ValueError("too many parts")
    fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=once)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    return fields, whole


def parse(line: bytes) -> Post:
    """The post in one line of JSON; a field of the wrong type counts as absent.

    Where the id can be read but the owner cannot, or a key comes twice, the post has a `fault`:
    what such a line says of the post's visibility still counts.

    Raises:
      Dropped: "broken_line" where the line is not a JSON object in UTF-8, or has no id that
        `names.canonical` reads.
    """
    try:
        fields, whole = _fields(line)
        post_id = names.canonical(fields.get("id"))
    except (ValueError, RecursionError):
        raise Dropped("broken_line") from None
    if not post_id:
        raise Dropped("broken_line")
    fault = "" if whole else "broken_line"
    try:
        owner = names.canonical(fields.get("owner"))
    except ValueError:
        owner, fault = "", fault or "broken_owner"
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
        visibility=_text(fields.get("visibility"), LONGEST_WORD),
        created_at=_text(fields.get("created_at"), LONGEST_WORD),
        fault=fault,
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
      Dropped: "private", the post's fault, or "overlong_text".
    """
    if post.visibility != "public":
        raise Dropped("private")
    if post.fault:
        raise Dropped(post.fault)
    signs = sum(map(post.text.count, hashtags.HASH_SIGNS))
    if len(post.text) > LONGEST_TEXT or (
        signs > MOST_TAGS and len(hashtags.extract(post.text)) > MOST_TAGS
    ):
        raise Dropped("overlong_text")


def read_photo(post: Post, images: str) -> bytes:
    """The bytes of a post's image file.

    Args:
      post: the post, which `check` has let through; or a removed one, to find its copies.
      images: the folder that image paths are relative to; no path or link leads out of it, but one
        may lead into a tar that lies in it.

    Raises:
      Dropped: "path_outside", "missing_file", "broken_archive" or "too_large".
    """
    if isinstance(post.image, bytes):
        return post.image
    file, member = files.locate(images, post.image or "")
    return archives.read_member(file, member) if member else files.read(file)
