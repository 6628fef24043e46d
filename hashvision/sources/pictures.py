"""The one decoder of foreign image files: for datasets, evaluation and contact sheets alike.

No file that is cut short passes. What decoding may cost is asked of the file before it is decoded:
at the default short side a photo takes some 600 MB of memory at most, whatever it claims to be, and
the threads of a process together no more than two such photos.
"""

import contextlib
import io
import threading
import typing
import warnings
from collections.abc import Callable, Iterator

from PIL import Image, TiffImagePlugin

from hashvision.sources import jpegs
from hashvision.sources.files import LARGEST_FILE
from hashvision.sources.reasons import Dropped

# Endings of files that may be photos; what they are is asked of their first bytes.
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
LARGEST_IMAGE = 2**26  # pixels
# Of WebP less: its decoder holds five copies of a picture at once.
LARGEST_WEBP = 25_000_000
LONGEST_SIDE = 65_500  # pixels; no JPEG is longer
# Reads of a file until its size is known, and until it is decoded. Files made to be slow to read
# consist of many small pieces: a comment, a page or a run of two pixels each.
_MOST_READS_TO_OPEN = 10_000
_MOST_READS = 50_000
_LARGEST_AT_ONCE = 2  # photos of LARGEST_IMAGE pixels that the threads of a process may hold
_JPEG_QUALITY = 92
_JPEG_END = b"\xff\xd9"
# In place of a JPEG's end: as many bits of 1, which are no code, as a decoder may read ahead.
_NO_END = b"\xff\0" * 8
_NO_DATA = range(120, 137)  # what JPEG decoders show where they have no data, smoothed
_OTHER_DATA = bytes(range(1, 64))  # no picture of one colour, whatever the codes
# What platforms and makers of test sets use. Pillow reads more, some by running programs.
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"RIFF": "WEBP",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"P5": "PPM",
    b"P6": "PPM",
}
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TILE_SIDES = (322, 323)  # TIFF tags


class _Metered(io.BytesIO):
    """A file of which only so much is read: Pillow reads some parts as often as the file says."""

    def __init__(self, encoded: bytes):
        super().__init__(encoded)
        self.reads_left = _MOST_READS_TO_OPEN
        self.bytes_left = 4 * len(encoded) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(chunk)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise Dropped("too_large")
        return chunk


class _Room:
    """Pixels that all threads of a process may hold at once; who asks for more waits."""

    def __init__(self, pixels: int):
        self._left, self._given_back = pixels, threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        with self._given_back:
            self._given_back.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._given_back:
                self._left += pixels
                self._given_back.notify_all()


_room = _Room(_LARGEST_AT_ONCE * LARGEST_IMAGE)
# Pillow only warns of files with 1.3 to 2.7 times as many pixels as are allowed here.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# What the variable PILLOW_BLOCK_SIZE sets. Blocks of the usual 16 MB would stay with the thread
# that gives them back: glibc keeps all up to 32 MB.
Image.core.set_block_size(2**26)


class _Photo(typing.NamedTuple):
    """A file whose cost is known, and whose pixels are not decoded yet."""

    image: Image.Image
    turn: Image.Transpose | None  # that makes it upright
    jpeg: jpegs.Jpeg | None
    file: _Metered

    def load(self) -> None:
        """Decodes every pixel.

        Raises:
          Dropped: "undecodable" for a JPEG that ends before its picture does.
        """
        self.file.reads_left = _MOST_READS
        self.image.load()
        if self.jpeg and not self.jpeg.sequential:
            width, height = self.image.size
            last = self.image.crop((width - 1, height - 1, width, height)).tobytes()
            if all(value in _NO_DATA for value in last) and not _has_first_scan(self.jpeg):
                raise Dropped("undecodable")


def normalise_photo(encoded: bytes, short_side: int) -> bytes:
    """A photo as a plain JPEG whose short side is at most `short_side` pixels.

    Every pixel is decoded, so a truncated file does not pass; of an animation the first frame is
    taken. A JPEG that is small enough, upright and no more than one sequential scan keeps that
    scan, without metadata. All others are turned upright, converted to RGB over white and encoded
    anew. So no metadata (place, device, thumbnail) travels on.

    Raises:
      Dropped: "too_large", "unknown_format" or "undecodable".
    """
    with _opened(encoded) as photo:
        image, jpeg = photo.image, photo.jpeg
        width, height = image.size
        within = min(width, height) <= short_side
        kept = jpeg and jpeg.plain and within and photo.turn is None and image.mode in ("RGB", "L")
        if not kept:
            # A JPEG far too large is decoded at a half, a quarter or an eighth of its size.
            scale = max(1.0, min(width, height) / (2 * short_side))
            image.draft(None, (round(width / scale), round(height / scale)))
        photo.load()
        if jpeg and kept:
            return jpeg.encoded
        small = _resize(_mixable(image), short_side)
        return _encode(_over_white(_turned(small, photo.turn)))


def decode(encoded: bytes, shrink: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A photo as `shrink` makes it of the whole: upright, RGB over white.

    Args:
      encoded: the file.
      shrink: takes the photo, upright and with all of its pixels, in the file's own colours, in
        which it may be transparent; makes it small, since only then it is laid over white.

    Raises:
      Dropped: as `normalise_photo` does.
    """
    with _opened(encoded) as photo:
        photo.load()
        image = _mixable(photo.image)
        if image is not photo.image:
            photo.image.close()
        upright = _turned(image, photo.turn)
        if upright is not image:
            image.close()
        return _over_white(shrink(upright))


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[_Photo]:
    """A photo to decode inside, when no other thread needs the memory that it takes.

    Raises:
      Dropped: the file is none that may be decoded, or what is done inside fails.
    """
    if not encoded:
        raise Dropped("undecodable")
    kind = next((kind for start, kind in _SIGNATURES.items() if encoded.startswith(start)), None)
    if kind is None or (kind == "WEBP" and encoded[8:12] != b"WEBP"):
        raise Dropped("unknown_format")
    if len(encoded) > LARGEST_FILE:
        raise Dropped("too_large")
    try:
        jpeg = jpegs.strip(encoded) if kind == "JPEG" else None
        file = _Metered(_to_decode(jpeg) if jpeg else encoded)
        with Image.open(file, formats=(kind,)) as image, _room.taken(_pixels(image)):
            # Not asked of TIFF, which Pillow turns upright by itself.
            exif = jpeg.exif if jpeg else image.info.get("exif", b"")
            turn = _TURNS.get(jpegs.orientation(exif) if kind != "TIFF" else 1)
            yield _Photo(image, turn, jpeg, file)
    except Dropped:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Dropped("too_large") from None
    except Exception as error:
        # Decoders raise whatever they like on bytes made to break them, MemoryError included.
        raise Dropped("undecodable") from error


def _to_decode(jpeg: jpegs.Jpeg) -> bytes:
    """What of a JPEG the decoder is given: of one that it shows as it reads, all but its end.

    Where data are missing before the end, the decoder shows grey in their place and says nothing.
    Without an end it asks for more data, and Pillow says that there are none.
    """
    return jpeg.encoded[: jpeg.data_end] + _NO_END if jpeg.sequential else jpeg.encoded


def _has_first_scan(jpeg: jpegs.Jpeg) -> bool:
    """Whether the first of several scans holds all rows.

    A decoder that has all rows passes over what stands behind a scan's data. One that lacks some
    takes it for their data, and shows another picture.
    """

    def shown(data: bytes) -> bytes:
        with Image.open(io.BytesIO(data + _JPEG_END), formats=("JPEG",)) as image:
            image.draft(None, (1, 1))  # an eighth
            return image.tobytes()

    data = jpeg.encoded[: jpeg.data_end]
    return shown(data) == shown(data + _OTHER_DATA)


def _pixels(image: Image.Image) -> int:
    """How many pixels a file is to decode; those of WebP, which take more memory, count for more.

    Raises:
      Dropped: "too_large".
    """
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile is decoded whole, even where the picture is but a corner of it.
        width, length = (image.tag_v2.get(tag, 1) for tag in _TILE_SIDES)
        pixels = max(pixels, width * length)
    if image.format == "WEBP":
        pixels = pixels * LARGEST_IMAGE // LARGEST_WEBP
    if pixels > LARGEST_IMAGE or max(image.size) > LONGEST_SIDE:
        raise Dropped("too_large")
    return pixels


def _mixable(image: Image.Image) -> Image.Image:
    """The image in a mode in which colours can be mixed, in as little memory as may be."""
    if image.mode.startswith("I;16"):  # of the two bytes of a pixel the upper one
        order = image.mode.removeprefix("I;16").removesuffix("N")
        return Image.frombytes("L", image.size, image.tobytes(), "raw", f"L;16{order}")
    if "transparency" in image.info or image.mode == "PA":
        return image.convert("RGBA")
    if image.mode in ("P", "1"):
        return image.convert("RGB" if image.mode == "P" else "L")
    if image.mode in ("I", "F"):  # nothing says how bright white is
        raise Dropped("undecodable")
    return image


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _resize(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # A fresh image: Pillow would write the source's comment and profile from `info`.
    fresh = Image.new("RGB", image.size)
    fresh.paste(image)
    fresh.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
