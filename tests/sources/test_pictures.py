"""Tests that photos of any format become plain upright JPEGs, and that broken ones are dropped."""

import ast
import io
import pathlib
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

import hashvision
from hashvision.sources import jpegs, pictures
from hashvision.sources.reasons import Dropped


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height)).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    image.load()
    return image


def reason_of(call, *arguments) -> str:
    with pytest.raises(Dropped) as caught:
        call(*arguments)
    return caught.value.reason


def test_plain_jpegs_keep_their_bytes():
    for mode in ("RGB", "L"):
        encoded = encode(picture(mode=mode))
        assert pictures.normalize_photo(encoded, 30) == encoded
        assert pictures.normalize_photo(encoded, 256) == encoded


@pytest.mark.parametrize(
    "size, short_side, expected",
    [
        ((400, 300), 60, (80, 60)),
        ((300, 400), 60, (60, 80)),
        ((61, 60), 60, (61, 60)),
        ((50, 50), 60, (50, 50)),
        ((2000, 61), 60, (1967, 60)),
    ],
)
def test_short_side_is_reduced_and_never_enlarged(size, short_side, expected):
    for kind in ("JPEG", "PNG"):
        normal = decode(pictures.normalize_photo(encode(picture(*size), kind), short_side))
        assert (normal.format, normal.mode, normal.size) == ("JPEG", "RGB", expected)


def test_metadata_is_removed():
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    plain = encode(picture())
    film = plain + b"secret film" + plain
    comment = encode(picture(), comment=b"secret comment")
    xmp = encode(picture(), xmp=b"secret xmp")
    profile = encode(picture(), icc_profile=b"secret profile" * 20)
    text = encode(picture(), "PNG", exif=exif)
    pair = encode(picture(), "MPO", save_all=True, append_images=[picture()], exif=exif)
    for encoded in (encode(picture(), exif=exif), film, comment, xmp, profile, text, pair):
        normal = pictures.normalize_photo(encoded, 256)
        assert b"secret" not in normal
        assert not decode(normal).getexif()
        np.testing.assert_allclose(np.asarray(decode(normal)), np.asarray(decode(plain)), atol=40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (64, 48))
    upright.paste((255, 255, 255), (0, 0, 32, 24))  # white in the upper left
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    normal = decode(pictures.normalize_photo(encode(stored, exif=exif), 256))
    np.testing.assert_allclose(np.asarray(normal), np.asarray(upright), atol=30)


def test_other_formats_and_modes_come_out_as_rgb_over_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    for encoded in (encode(clear, "PNG"), encode(clear, "WEBP", lossless=True)):
        assert np.asarray(decode(pictures.normalize_photo(encoded, 256))).min() > 250
    for mode, kind in [("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("RGB", "BMP")]:
        normal = decode(pictures.normalize_photo(encode(picture(mode=mode), kind), 256))
        assert (normal.mode, normal.size) == ("RGB", (40, 30))
    deep = Image.fromarray(np.full((20, 20), 128 * 256, np.uint16))
    normal = np.asarray(decode(pictures.normalize_photo(encode(deep, "PNG"), 256)))
    np.testing.assert_allclose(normal, 128, atol=2)
    progressive = encode(picture(), progressive=True)
    assert pictures.normalize_photo(progressive, 256) != progressive


QUARTERS = np.array([[[255, 0, 0], [0, 160, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


def quarters(mode: str = "RGB") -> Image.Image:
    """Red and green over blue and yellow, 64 by 48, which shows any rotation or channel swap."""
    return Image.fromarray(QUARTERS.repeat(24, 0).repeat(32, 1)).convert(mode)


def middles(encoded: bytes) -> np.ndarray:
    """Normalizes a file and returns the colours in the middle of the four quarters."""
    normal = decode(pictures.normalize_photo(encoded, 256))
    assert (normal.format, normal.mode, normal.size) == ("JPEG", "RGB", (64, 48))
    return np.asarray(normal)[12:48:24, 16:64:32].astype(int)


def clear_at_yellow() -> Image.Image:
    image = quarters("RGBA")
    image.paste((1, 2, 3, 0), (32, 24, 64, 48))
    return image


def turned(kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return encode(quarters().transpose(Image.Transpose.ROTATE_90), kind, exif=exif, **options)


def palette() -> Image.Image:
    return quarters().quantize(4)


UNUSUAL = {
    "CMYK": lambda: encode(quarters("CMYK"), "JPEG"),
    "CMYK TIFF": lambda: encode(quarters("CMYK"), "TIFF"),
    "progressive": lambda: encode(quarters(), progressive=True),
    "full chroma": lambda: encode(quarters(), subsampling=0),
    "MPO": lambda: encode(quarters(), "MPO", save_all=True, append_images=[picture(64, 48)]),
    "palette": lambda: encode(palette(), "PNG"),
    "palette BMP": lambda: encode(palette(), "BMP"),
    "lossless WebP": lambda: encode(quarters(), "WEBP", lossless=True),
    "WebP": lambda: encode(quarters(), "WEBP", quality=95),
    "animated GIF": lambda: encode(
        palette(), "GIF", save_all=True, append_images=[picture(64, 48), picture(64, 48, "L")]
    ),
    "animated WebP": lambda: encode(
        quarters(), "WEBP", save_all=True, append_images=[picture(64, 48)], lossless=True
    ),
    "animated PNG": lambda: encode(
        quarters(), "PNG", save_all=True, append_images=[picture(64, 48)]
    ),
    "pages": lambda: encode(quarters(), "TIFF", save_all=True, append_images=[picture()]),
    "LZW": lambda: encode(quarters(), "TIFF", compression="tiff_lzw"),
    "JPEG in TIFF": lambda: encode(quarters(), "TIFF", compression="jpeg", quality=95),
    "PPM": lambda: encode(quarters(), "PPM"),
    "turned JPEG": lambda: turned("JPEG", quality=95),
    "turned PNG": lambda: turned("PNG"),
    "turned WebP": lambda: turned("WEBP", lossless=True),
    "turned TIFF": lambda: turned("TIFF"),
    "turned LZW": lambda: turned("TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_colours_and_positions_are_kept(kind: str):
    np.testing.assert_allclose(middles(UNUSUAL[kind]()), QUARTERS.astype(int), atol=12)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF", "key"])
def test_transparent_parts_become_white(kind: str):
    white = QUARTERS.astype(int).copy()
    white[1, 1] = 255
    if kind == "GIF":
        encoded = encode(clear_at_yellow(), "GIF")
    elif kind == "key":  # a PNG with one transparent colour
        encoded = encode(quarters(), "PNG", transparency=(255, 255, 0))
    else:
        encoded = encode(clear_at_yellow(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_allclose(middles(encoded), white, atol=12)


@pytest.mark.parametrize("options", [{}, {"transparency": 5}])
def test_16_bit_images_keep_the_upper_8_bits(options: dict):
    ramp = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    encoded = encode(Image.fromarray(ramp), "PNG", **options)
    normal = np.asarray(decode(pictures.normalize_photo(encoded, 256)))
    np.testing.assert_allclose(normal[..., 0], ramp >> 8, atol=3)
    for order in ("<", ">"):
        tiff = io.BytesIO()
        Image.fromarray(ramp.astype(f"{order}u2")).save(tiff, "TIFF")
        normal = np.asarray(decode(pictures.normalize_photo(tiff.getvalue(), 256)))
        np.testing.assert_allclose(normal[..., 0], ramp >> 8, atol=3)


def test_a_plain_scan_loses_only_its_metadata():
    plain = encode(picture())
    cover = b"".join(
        b"\xff" + marker + struct.pack(">H", len(content) + 2) + content
        for marker, content in (
            (b"\xe0", b"JFXX\0\x10secret thumbnail"),
            (b"\xe1", b"Exif\0\0secret"),
            (b"\xe2", b"ICC_PROFILE\0secret"),
            (b"\xed", b"Photoshop 3.0\0secret"),
            (b"\xfe", b"secret comment"),
        )
    )
    assert pictures.normalize_photo(plain[:20] + cover + plain[20:] + b"secret film", 256) == plain
    # Metadata may also be between two scans, where decoders ignore it.
    first = plain.index(b"\xff\xda")
    two = plain[:-2] + cover + plain[first:]
    assert not jpegs.strip(two).plain
    progressive = encode(picture(), progressive=True)
    last = progressive.rindex(b"\xff\xda")
    covered = progressive[:last] + cover + progressive[last:]
    normal = pictures.normalize_photo(covered, 256)
    assert normal == pictures.normalize_photo(progressive, 256) and b"secret" not in normal


def test_orientation_is_read_from_any_block():
    little = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x08\0\0\0"
    big = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x08"
    for block in (little, big):
        assert jpegs.orientation(b"Exif\0\0" + block) == jpegs.orientation(block) == 8
        for length in range(len(block)):
            assert jpegs.orientation(block[:length]) in (1, 8)
    for block in (b"", b"Exif\0\0", little[:-4] + b"\x09\0\0\0", b"II*\0" + b"\xff" * 50):
        assert jpegs.orientation(block) == 1


def png_of_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        encode(picture())[:-200],
        encode(picture())[:30],
        encode(picture(), "PNG")[:-40],
        encode(picture(), "WEBP")[:-40],
        encode(picture(), "TIFF")[:-40],
        png_of_size(0, 5),
        png_of_size(5, 5),
        encode(Image.new("F", (9, 9)), "TIFF"),  # the value of white is unknown
    ],
)
def test_undecodable_photos_are_dropped(encoded: bytes):
    assert reason_of(pictures.normalize_photo, encoded, 256) == "undecodable"


KINDS = {
    "plain": {},
    "full chroma": {"subsampling": 0},
    "restarts": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_truncated_jpeg_with_a_new_end_is_undecodable(kind: str, mode: str):
    """Pillow silently fills in grey for missing data."""
    encoded = encode(noisy(mode), **KINDS[kind])
    jpeg = jpegs.strip(encoded)
    data = jpeg.encoded.index(b"\xff\xda") + 14
    for share in (0.05, 0.3, 0.6, 0.9):
        cut = jpeg.encoded[: data + round(share * (jpeg.data_end - data))] + b"\xff\xd9"
        for short_side in (256, 20):
            assert reason_of(pictures.normalize_photo, cut, short_side) == "undecodable"
        assert reason_of(pictures.decode, cut, lambda image: image) == "undecodable"
    assert pictures.normalize_photo(encoded, 256) and pictures.normalize_photo(encoded, 20)


def noisy(mode: str) -> Image.Image:
    """240 by 160 pixels that no encoder makes small."""
    small = np.random.default_rng(1).integers(0, 256, (80, 120, 3), np.uint8)
    return Image.fromarray(small).resize((240, 160), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_jpegs_that_end_in_grey_are_kept(kind: str):
    """The grey equals what a decoder fills in for missing data."""
    for mode, grey in (("RGB", (128, 128, 128)), ("L", 128)):
        for top in (0, 50, 150):
            image = noisy(mode)
            image.paste(grey, (0, top, 240, 160))
            assert pictures.normalize_photo(encode(image, **KINDS[kind]), 256)


def test_a_progressive_jpeg_needs_all_rows_but_not_all_scans():
    jpeg = jpegs.strip(encode(noisy("RGB"), progressive=True)).encoded
    assert pictures.normalize_photo(jpeg[: len(jpeg) * 3 // 4] + b"\xff\xd9", 256)


@pytest.mark.realdata
@pytest.mark.slow
def test_no_complete_photo_counts_as_truncated(shared_data):
    """Checks each photo unchanged and as progressive; skips those that plain Pillow cannot read."""
    paths = sorted((shared_data / "posts" / "images").glob("*.jpg"))[::4]
    paths += sorted((shared_data / "transfer").glob("*/**/*.jpg"))[::8]
    photos = 0
    for path in paths:
        encoded = path.read_bytes()
        try:
            image = decode(encoded).convert("RGB")
        except OSError:
            continue
        photos += 1
        assert pictures.normalize_photo(encoded, 256), path
        assert pictures.normalize_photo(encode(image, progressive=True), 256), path
    assert photos > 1500


def test_decode_shrinks_the_upright_photo_and_puts_white_behind_it():
    seen = []

    def shrink(image: Image.Image) -> Image.Image:
        seen.append((image.size, image.mode))
        return image.resize((32, 24), Image.Resampling.BOX)

    for encoded in (turned("JPEG", quality=95), turned("PNG"), encode(quarters(), "PPM")):
        image = pictures.decode(encoded, shrink)
        assert (image.mode, image.size) == ("RGB", (32, 24))
        np.testing.assert_allclose(np.asarray(image)[6::12, 8::16], QUARTERS, atol=12)
    clear = pictures.decode(encode(clear_at_yellow(), "PNG"), shrink)
    np.testing.assert_array_equal(np.asarray(clear)[18, 24], 255)
    assert seen == [((64, 48), "RGB")] * 3 + [((64, 48), "RGBA")]


def test_an_error_in_shrink_makes_the_photo_undecodable():
    """Pillow decodes some images only when they are used."""

    def shrink(image: Image.Image) -> Image.Image:
        raise OSError("broken data stream")

    assert reason_of(pictures.decode, encode(picture()), shrink) == "undecodable"


def test_threads_together_stay_within_the_pixel_budget(monkeypatch):
    """The budget fits three photos of 40 by 30 pixels at a time."""
    monkeypatch.setattr(pictures, "_budget", pictures._PixelBudget(3 * 40 * 30))
    inside, most, lock = [], [], threading.Lock()
    three = threading.Barrier(3, timeout=10)

    def shrink(image: Image.Image) -> Image.Image:
        with lock:
            inside.append(image)
            most.append(len(inside))
        three.wait()
        with lock:
            inside.remove(image)
        return image

    encoded = encode(picture(40, 30))
    threads = [threading.Thread(target=pictures.decode, args=(encoded, shrink)) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 9 and max(most) == 3


MEMORY = """
import concurrent.futures, io, resource
from PIL import Image
from hashvision.sources import pictures

exif = Image.Exif()
exif[0x0112] = 6  # to be turned, which takes a second copy
pictures._budget = pictures._PixelBudget(2 * 3200**2)
file = io.BytesIO()
Image.new("RGBA", (3200, 3200)).save(file, "PNG", compress_level=1, exif=exif)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    small = lambda encoded: pictures.decode(encoded, lambda image: image.resize((9, 9)))
    list(pool.map(small, [file.getvalue()] * 8))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_of_large_photos_on_eight_threads():
    """Each photo needs two copies of 40 MB, and the budget fits two photos."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert int(done.stdout) < 100, done  # MB above the peak of making the file


def test_every_image_is_opened_with_an_expected_format():
    """Without `formats`, Pillow runs Ghostscript on files that look like PostScript."""
    for path in pathlib.Path(hashvision.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in {keyword.arg for keyword in node.keywords}, path


@pytest.mark.parametrize(
    "encoded",
    [
        png_of_size(12_000, 12_000),
        png_of_size(2**31 - 1, 2**31 - 1),
        png_of_size(70_000, 2),  # wider than a JPEG can be
        encode(Image.new("L", (5001, 5000)), "WEBP", lossless=True, method=0, quality=0),
    ],
)
def test_too_large_photos_are_dropped(encoded: bytes):
    assert reason_of(pictures.normalize_photo, encoded, 256) == "too_large"


def test_a_too_large_file_is_not_opened(monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_FILE", 1000)
    assert pictures.normalize_photo(encode(picture()) + bytes(100), 256)
    assert reason_of(pictures.normalize_photo, encode(picture()) + bytes(1000), 256) == "too_large"
    assert reason_of(pictures.normalize_photo, bytes(2000), 256) == "unknown_format"


@pytest.mark.parametrize(
    "encoded",
    [
        b"not an image",
        b"<!DOCTYPE html><html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"RIFF\0\0\0\0AVI LIST",
        encode(picture(), "ICO"),
        b"P3 1 1 255 1 2 3\n",  # numbers as text, which Pillow decodes slowly, in Python
        encode(picture(), "AVIF"),
        b"\n" + encode(picture()),
    ],
)
def test_unknown_formats_are_dropped(encoded: bytes):
    assert reason_of(pictures.normalize_photo, encoded, 256) == "unknown_format"
