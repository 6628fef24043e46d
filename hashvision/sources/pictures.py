"""Image files of any kind a platform takes to plain upright JPEGs; none that is cut short passes.

What decoding may cost is asked of the file before it is decoded: at the default short side a photo
takes some 600 MB of memory at most, whatever it claims to be.
"""

import io

from PIL import Image, TiffImagePlugin

from hashvision.sources import jpegs
from hashvision.sources.files import LARGEST_FILE
from hashvision.sources.reasons import Dropped

LARGEST_IMAGE = 2**26  # pixels
# Of WebP less: its decoder holds five copies of a picture at once.
LARGEST_WEBP = 25_000_000
LONGEST_SIDE = 65_500  # pixels; no JPEG is longer
# Reads of a file until its size is known, and until it is decoded. Files made to be slow to read
# consist of many small pieces: a comment, a page or a run of two pixels each.
_MOST_READS_TO_OPEN = 10_000
_MOST_READS = 50_000
_JPEG_QUALITY = 92
# What platforms accept. Pillow reads more, some by running programs.
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


def normalise_photo(encoded: bytes, short_side: int) -> bytes:
    """A photo as a plain JPEG whose short side is at most `short_side` pixels.

    Every pixel is decoded, so a truncated file does not pass; of an animation the first frame is
    taken. A JPEG that is small enough, upright and no more than one sequential scan keeps that
    scan, without metadata. All others are turned upright, converted to RGB over white and encoded
    anew. So no metadata (place, device, thumbnail) travels on.

    Raises:
      Dropped: "too_large", "unknown_format" or "undecodable".
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
        file = _Metered(jpeg.encoded if jpeg else encoded)
        with Image.open(file, formats=(kind,)) as image:
            _check_size(image)
            # Not asked of TIFF, which Pillow turns upright by itself.
            exif = jpeg.exif if jpeg else image.info.get("exif", b"")
            turn = _TURNS.get(jpegs.orientation(exif) if kind != "TIFF" else 1)
            width, height = image.size
            within = min(width, height) <= short_side
            plain = jpeg and jpeg.plain and within and turn is None and image.mode in ("RGB", "L")
            if not plain:
                # A JPEG far too large is decoded at a half, a quarter or an eighth of its size.
                scale = max(1.0, min(width, height) / (2 * short_side))
                image.draft(None, (round(width / scale), round(height / scale)))
            file.reads_left = _MOST_READS
            image.load()
            if jpeg and plain:
                return jpeg.encoded
            small = _resize(_resizable(image), short_side)
        return _encode(_over_white(small if turn is None else small.transpose(turn)))
    except Dropped:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Dropped("too_large") from None
    except Exception as error:
        # Decoders raise whatever they like on bytes made to break them, MemoryError included.
        raise Dropped("undecodable") from error


def _check_size(image: Image.Image) -> None:
    largest = LARGEST_WEBP if image.format == "WEBP" else LARGEST_IMAGE
    if image.width * image.height > largest or max(image.size) > LONGEST_SIDE:
        raise Dropped("too_large")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile is decoded whole, even where the picture is but a corner of it.
        width, length = (image.tag_v2.get(tag, 1) for tag in _TILE_SIDES)
        if width * length > largest:
            raise Dropped("too_large")


def _resizable(image: Image.Image) -> Image.Image:
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
