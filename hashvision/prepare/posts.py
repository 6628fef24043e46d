"""A dump of posts: a reader that no line stops, and a check that no broken photo passes."""

import base64
import binascii
import io
import json
import os
import typing
from collections.abc import Iterator

from PIL import Image, ImageOps

# The reasons for which a post does not come through, in the order in which they are asked.
REASONS = ("broken_line", "private", "missing_file", "undecodable", "no_tag")

LONGEST_TEXT = 100_000  # characters; platforms allow some thousands
LONGEST_LINE = 64 * 2**20  # bytes; a longer line is no post
LARGEST_FILE = 256 * 2**20  # bytes; a larger image file is not decoded
# Pillow's own limit on decompression bombs, in pixels.
LARGEST_IMAGE = 89_478_485
# What platforms accept (JPEG stands for MPO too). Pillow reads more, some by running programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_JPEG_QUALITY = 92
_ORIENTATION = 0x0112  # EXIF tag


class Post(typing.NamedTuple):
    """One line of a dump."""

    id: str
    image: str | bytes | None  # a path relative to the images' folder, or the file's bytes
    text: str
    owner: str
    visibility: str
    created_at: str


class Dropped(Exception):
    """A post does not come through; `reason` is one of REASONS."""

    def __init__(self, reason: str):
        """Takes the reason."""
        super().__init__(reason)
        self.reason = reason


def _text(value: object) -> str:
    """`value` as text that every encoder takes: lone surrogates, legal in JSON, are replaced."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return ""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse(line: bytes) -> Post:
    """The post in one line of JSON; a field of the wrong type counts as absent.

    Raises:
      Dropped: "broken_line" where the line is no JSON object in UTF-8 or has no id.
    """
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Dropped("broken_line") from None
    post_id = _text(fields.get("id")) if isinstance(fields, dict) else ""
    if not post_id:
        raise Dropped("broken_line")
    image: str | bytes | None = None
    if isinstance(fields.get("image_bytes"), str):
        try:
            image = base64.b64decode(fields["image_bytes"], validate=True)
        except (binascii.Error, ValueError):
            image = b""  # there is a photo, but nothing that decodes
    elif isinstance(fields.get("image"), str):
        image = _text(fields["image"])
    return Post(
        id=post_id,
        image=image,
        text=_text(fields.get("text"))[:LONGEST_TEXT],
        owner=_text(fields.get("owner")),
        visibility=_text(fields.get("visibility")),
        created_at=_text(fields.get("created_at")),
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


def open_file(path: str) -> typing.BinaryIO:
    """Opens a local file, or one on any storage Beam knows (gs://...), to read its bytes."""
    if "://" not in path:
        return open(path, "rb")
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


def read_photo(post: Post, images: str) -> bytes:
    """The bytes of a public post's image file.

    Args:
      post: the post.
      images: the folder that image paths are relative to; no path leads out of it.

    Raises:
      Dropped: "private" before any photo is opened, "missing_file" where there is none to open.
    """
    if post.visibility != "public":
        raise Dropped("private")
    if isinstance(post.image, bytes):
        return post.image
    path = post.image or ""
    parts = path.replace("\\", "/").split("/")
    if not path or "\0" in path or ".." in parts or "://" in path or os.path.isabs(path):
        raise Dropped("missing_file")
    full = f"{images.rstrip('/')}/{path}"
    try:
        # A pipe would be waited for and a device read without end.
        if "://" not in full and not os.path.isfile(full):
            raise Dropped("missing_file")
        with open_file(full) as file:
            encoded = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError):  # Beam's own error is an OSError too
        raise Dropped("missing_file") from None
    if len(encoded) > LARGEST_FILE:
        raise Dropped("undecodable")
    return encoded


def normalise_photo(encoded: bytes, short_side: int) -> bytes:
    """A photo as a plain JPEG whose short side is at most `short_side` pixels.

    Every pixel is decoded, so a truncated file does not pass. A file that is such a JPEG already,
    and holds nothing but the picture, keeps its bytes; all others are turned upright, converted to
    RGB over white and encoded anew, so that no metadata (place, device, thumbnail) travels on.

    Raises:
      Dropped: "undecodable".
    """
    try:
        Image.init()  # registers all formats, the first time
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > LARGEST_IMAGE:
                raise Dropped("undecodable")
            within = min(width, height) <= short_side
            plain = within and image.mode in ("RGB", "L") and _is_plain_jpeg(image, encoded)
            if not plain:
                # A JPEG far too large is decoded at a half, a quarter or an eighth of its size.
                scale = max(1.0, min(width, height) / (2 * short_side))
                image.draft(None, (round(width / scale), round(height / scale)))
            image.load()
            return encoded if plain else _encode(_resize(_upright_rgb(image), short_side))
    except Exception as error:
        # Decoders raise whatever they like on bytes made to break them, MemoryError included.
        raise Dropped("undecodable") from error


def _is_plain_jpeg(image: Image.Image, encoded: bytes) -> bool:
    """Whether the file is a baseline JPEG that holds the picture and nothing else."""
    if image.format != "JPEG" or "progressive" in image.info:
        return False
    # JFIF without thumbnail and Adobe's colour transform are all that may accompany the picture.
    for name, content in getattr(image, "applist", ()):
        jfif = name == "APP0" and content.startswith(b"JFIF\0") and len(content) == 14
        adobe = name == "APP14" and content.startswith(b"Adobe") and len(content) == 12
        if not (jfif or adobe):
            return False
    # Nothing behind the picture either: phones hang films there, with places of their own. Within
    # the scan 0xff is escaped, so the first end marker behind its start is the picture's end.
    scan = encoded.find(b"\xff\xda")
    return encoded.find(b"\xff\xd9", scan) == len(encoded) - 2


def _upright_rgb(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        upright = ImageOps.exif_transpose(image) if turned else image
    except Exception:  # broken EXIF; the picture itself did decode
        upright = image
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    elif upright.mode.startswith("I;16"):
        upright = upright.convert("I").point(lambda value: value / 256)  # 16 bits a pixel to 8
        upright = upright.convert("L")
    return upright.convert("RGB")


def _resize(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # A fresh image: Pillow would write the source's comment and profile from `info`.
    fresh = Image.new("RGB", image.size)
    fresh.paste(image)
    fresh.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
