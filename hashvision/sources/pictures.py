"""Decodes untrusted image files for datasets, evaluation and contact sheets.

It rejects truncated files, and it checks what decoding would cost before decoding. At the default
short side a photo takes at most about 600 MB of memory, whatever its file claims. All threads of a
process together take at most as much as two such photos.
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

# Suffixes of files that may be photos; the first bytes decide the format.
SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
LARGEST_IMAGE = 2**26  # pixels
# Lower for WebP, because its decoder holds five copies of a picture at once.
LARGEST_WEBP = 25_000_000
LONGEST_SIDE = 65_500  # pixels; the longest side of a JPEG
# Limits on read calls until the size is known, and until the photo is decoded. Malicious files are
# slow to read because they consist of many small pieces: comments, pages or runs of two pixels.
_MOST_READS_TO_OPEN = 10_000
_MOST_READS = 50_000
_LARGEST_AT_ONCE = 2  # photos of LARGEST_IMAGE pixels that all threads of a process may hold
_JPEG_QUALITY = 92
_JPEG_END = b"\xff\xd9"
# Replaces a JPEG's end marker: 1 bits, which are no valid code, as many as a decoder reads ahead.
_PADDING = b"\xff\0" * 8
_FILL_VALUES = range(120, 137)  # grey that JPEG decoders show where data are missing, smoothed
_OTHER_DATA = bytes(range(1, 64))  # decodes to more than one colour with any code table
# The formats of platforms and test sets. Pillow reads more, some by running external programs.
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
_TRANSPOSES = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TILE_SIDES = (322, 323)  # TIFF tags


class _LimitedFile(io.BytesIO):
    """A file with limited reads, since a file can make Pillow read the same part many times."""

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


class _PixelBudget:
    """Limits the pixels that all threads of a process hold at once; a thread waits its turn."""

    def __init__(self, pixels: int):
        self._left, self._released = pixels, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        with self._released:
            self._released.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._released:
                self._left += pixels
                self._released.notify_all()


_budget = _PixelBudget(_LARGEST_AT_ONCE * LARGEST_IMAGE)
# For files with 1.3 to 2.7 times the pixels allowed here, Pillow only warns.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Same as the variable PILLOW_BLOCK_SIZE. With the default of 16 MB, freed blocks would stay with
# their thread, because glibc keeps blocks of up to 32 MB.
Image.core.set_block_size(2**26)


class _Photo(typing.NamedTuple):
    """A file of known cost whose pixels are not decoded yet."""

    image: Image.Image
    transpose: Image.Transpose | None  # makes it upright
    jpeg: jpegs.Jpeg | None
    file: _LimitedFile

    def load(self) -> None:
        """Decodes every pixel.

        Raises:
          Dropped: "undecodable" for a truncated JPEG.
        """
        self.file.reads_left = _MOST_READS
        self.image.load()
        if self.jpeg and not self.jpeg.sequential:
            width, height = self.image.size
            last = self.image.crop((width - 1, height - 1, width, height)).tobytes()
            if all(value in _FILL_VALUES for value in last) and not _first_scan_is_whole(self.jpeg):
                raise Dropped("undecodable")


def normalize_photo(encoded: bytes, short_side: int) -> bytes:
    """Converts a photo to a plain JPEG without metadata.

    It decodes every pixel, so it rejects truncated files. It uses the first frame of an animation.
    A JPEG that is small enough, upright and one sequential scan keeps that scan unchanged. Other
    photos are turned upright, converted to RGB over white and encoded again. The result never has
    the metadata of the file (location, device, thumbnail).

    Args:
      encoded: the file.
      short_side: of the result, at most, in pixels; a smaller photo is not enlarged.

    Raises:
      Dropped: "too_large", "unknown_format" or "undecodable".
    """
    with _opened(encoded) as photo:
        image, jpeg = photo.image, photo.jpeg
        width, height = image.size
        within = min(width, height) <= short_side
        kept = (
            jpeg
            and jpeg.plain
            and within
            and photo.transpose is None
            and image.mode in ("RGB", "L")
        )
        if not kept:
            # The decoder can shrink a large JPEG to a half, a quarter or an eighth of its size.
            scale = max(1.0, min(width, height) / (2 * short_side))
            image.draft(None, (round(width / scale), round(height / scale)))
        photo.load()
        if jpeg and kept:
            return jpeg.encoded
        small = _resize(_to_blendable(image), short_side)
        return _encode(_over_white(_transpose(small, photo.transpose)))


def decode(encoded: bytes, shrink: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decodes a photo and shrinks it with `shrink`; the result is upright and RGB over white.

    Args:
      encoded: the file.
      shrink: gets the upright photo at full size in the file's own mode, perhaps with transparency,
        and returns a smaller one. To save memory, white is put behind the smaller one.

    Raises:
      Dropped: as `normalize_photo` does.
    """
    with _opened(encoded) as photo:
        photo.load()
        image = _to_blendable(photo.image)
        if image is not photo.image:
            photo.image.close()
        upright = _transpose(image, photo.transpose)
        if upright is not image:
            image.close()
        return _over_white(shrink(upright))


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator[_Photo]:
    """Opens a photo for decoding, once other threads leave enough memory for it.

    Raises:
      Dropped: the file may not be decoded, or the body of the `with` statement fails.
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
        file = _LimitedFile(_decoder_input(jpeg) if jpeg else encoded)
        with Image.open(file, formats=(kind,)) as image, _budget.reserve(_count_pixels(image)):
            # Pillow itself turns a TIFF upright.
            exif = jpeg.exif if jpeg else image.info.get("exif", b"")
            orientation = jpegs.orientation(exif) if kind != "TIFF" else 1
            transpose = _TRANSPOSES.get(orientation)
            yield _Photo(image=image, transpose=transpose, jpeg=jpeg, file=file)
    except Dropped:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Dropped("too_large") from None
    except Exception as error:
        # On malicious input decoders can raise any exception, even MemoryError.
        raise Dropped("undecodable") from error


def _decoder_input(jpeg: jpegs.Jpeg) -> bytes:
    """The bytes for the decoder: a sequential JPEG without its end marker, others unchanged.

    If data are missing before the end marker, the decoder silently fills in grey. Without the end
    marker it requests more data, and Pillow raises an error because there are none.
    """
    return jpeg.encoded[: jpeg.data_end] + _PADDING if jpeg.sequential else jpeg.encoded


def _first_scan_is_whole(jpeg: jpegs.Jpeg) -> bool:
    """Whether the first of several scans contains all rows.

    A decoder that has all rows ignores bytes after the scan's data. A decoder that lacks rows
    decodes those bytes as their data, so the picture changes.
    """

    def decoded(data: bytes) -> bytes:
        with Image.open(io.BytesIO(data + _JPEG_END), formats=("JPEG",)) as image:
            image.draft(None, (1, 1))  # at an eighth of the size
            return image.tobytes()

    data = jpeg.encoded[: jpeg.data_end]
    return decoded(data) == decoded(data + _OTHER_DATA)


def _count_pixels(image: Image.Image) -> int:
    """Counts the pixels to decode; WebP pixels count for more because they take more memory.

    Raises:
      Dropped: "too_large".
    """
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Tiles are decoded whole, even if the picture covers only a corner.
        width, length = (image.tag_v2.get(tag, 1) for tag in _TILE_SIDES)
        pixels = max(pixels, width * length)
    if image.format == "WEBP":
        pixels = pixels * LARGEST_IMAGE // LARGEST_WEBP
    if pixels > LARGEST_IMAGE or max(image.size) > LONGEST_SIDE:
        raise Dropped("too_large")
    return pixels


def _to_blendable(image: Image.Image) -> Image.Image:
    """Converts an image to a mode whose colours can be blended, in as little memory as possible."""
    if image.mode.startswith("I;16"):  # keep the upper byte of each pixel
        order = image.mode.removeprefix("I;16").removesuffix("N")
        return Image.frombytes("L", image.size, image.tobytes(), "raw", f"L;16{order}")
    if "transparency" in image.info or image.mode == "PA":
        return image.convert("RGBA")
    if image.mode in ("P", "1"):
        return image.convert("RGB" if image.mode == "P" else "L")
    if image.mode in ("I", "F"):  # the value of white is unknown
        raise Dropped("undecodable")
    return image


def _transpose(image: Image.Image, method: Image.Transpose | None) -> Image.Image:
    return image if method is None else image.transpose(method)


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
    # A new image, because Pillow would write the comment and profile in the old one's `info`.
    fresh = Image.new("RGB", image.size)
    fresh.paste(image)
    fresh.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
