"""Reads dumps of posts line by line, and checks each post before its photo is opened."""

import base64
import binascii
import json
import typing
from collections.abc import Iterator

from hashvision.sources import archives, files, names
from hashvision.sources.reasons import Dropped
from hashvision.tags import hashtags

LONGEST_TEXT = 100_000  # characters; platforms allow a few thousand
MOST_TAGS = 200  # per post; Instagram allows 30
LONGEST_WORD = 1000  # characters in a visibility or a date
LONGEST_LINE = 32 * 2**20  # bytes; a longer line is not a post
MOST_PARTS = 1_000_000  # JSON values in a line; each takes far more memory than its text
_AMBIGUOUS = object()  # value of a key that occurs twice with different values


class Post(typing.NamedTuple):
    """One post, as parsed from a line of a dump."""

    id: str  # canonical, like the owner
    image: str | bytes | None  # path relative to the image folder, or the file's bytes
    text: str  # the first LONGEST_TEXT + 1 characters
    owner: str  # "" if the dump names none
    visibility: str
    created_at: str
    fault: str = ""  # reason to drop it because another field is unreadable; "" if none


def _text(value: object, longest: int) -> str:
    """Converts a value to text that can be encoded; replaces lone surrogates, which JSON allows."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return value[:longest].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fields(line: bytes) -> tuple[dict[str, typing.Any], bool]:
    """Parses a line of JSON and checks at every level that each key occurs once.

    A key with two different values gets _AMBIGUOUS, because choosing either could be wrong.

    Returns:
      The fields, and whether every key occurs once.
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
    """Parses a post from one line of JSON; a field of the wrong type counts as absent.

    If the id is readable but the owner is not, or a key occurs twice, the post has a `fault` but
    its visibility still counts.

    Raises:
      Dropped: "broken_line" if the line is not a JSON object in UTF-8, or its id is not one that
        `names.canonical` accepts.
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
            image = b""  # the post has a photo, but it cannot be decoded
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
    """Reads the non-blank lines of a JSONL file that start in [start, end).

    Ranges that tile a file give every line exactly once, so workers can share one dump.

    Yields:
      The byte offset of the line, and the line or None if it is longer than `longest` bytes.
    """
    offset = start
    if start:
        # A line that starts before `start` belongs to the previous range.
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
    """Reads to the end of the line; returns the number of bytes read."""
    skipped = 0
    while chunk := file.readline(2**20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def check(post: Post) -> None:
    """Checks everything about a post that does not need its photo.

    An overlong text is not truncated, because the first tags describe the photo no better than the
    last, and truncation could create a tag that nobody wrote.

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
    """Reads the bytes of a post's image file.

    Args:
      post: a post that `check` accepts, or a removed post, to find its copies.
      images: folder that image paths are relative to. Paths and links that leave it are rejected;
        a path may lead into a tar inside it.

    Raises:
      Dropped: "path_outside", "missing_file", "broken_archive" or "too_large".
    """
    if isinstance(post.image, bytes):
        return post.image
    file, member = files.locate(images, post.image or "")
    return archives.read_member(file, member) if member else files.read(file)
