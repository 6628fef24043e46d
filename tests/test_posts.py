"""Tests of the reader of dumps and of the check of photos."""

import base64
import io
import json
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hashvision.prepare import posts
from hashvision.prepare.posts import Dropped, Post


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


def test_parse_reads_every_field():
    fields = {
        "id": "p1",
        "image": "a/b.jpg",
        "text": "x #y",
        "owner": "u1",
        "visibility": "public",
        "created_at": "2020",
        "lang": "en",
    }
    line = json.dumps(fields).encode()
    assert posts.parse(line) == Post("p1", "a/b.jpg", "x #y", "u1", "public", "2020")
    assert posts.parse(b"\xef\xbb\xbf" + line).id == "p1"


def test_parse_takes_photo_bytes():
    encoded = base64.b64encode(b"photo").decode()
    assert posts.parse(json.dumps({"id": 7, "image_bytes": encoded}).encode()).image == b"photo"
    assert posts.parse(b'{"id": 7, "image_bytes": "*"}').image == b""


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "x", "image": ',
        b"\xff\xfe{}",
        b'{"id": "\xe9"}',
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"id": ""}',
        b'{"id": null}',
        b'{"id": ["x"]}',
        b'{"id": true}',
        b"[" * 100_000,
        b'{"id": ' + b"9" * 10_000 + b"}",
    ],
)
def test_broken_lines(line: bytes):
    assert reason_of(posts.parse, line) == "broken_line"


def test_fields_of_wrong_type_count_as_absent():
    post = posts.parse(b'{"id": 5, "image": 3, "text": {}, "owner": [1], "visibility": null}')
    assert post == Post("5", None, "", "", "", "")
    assert posts.parse(b'{"id": "\\ud800x"}').id.encode("utf-8")  # a lone surrogate is replaced


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_ranges_give_every_line_once(ending: bytes):
    lines = [b"a" * n for n in (1, 5, 0, 3, 12, 0, 0, 7)] + [b"  ", b"last"]
    content = ending.join(lines)
    whole = list(posts.read_lines(io.BytesIO(content), 0, len(content)))
    assert [line.strip() for _, line in whole if line] == [line for line in lines if line.strip()]
    for offset, line in whole:
        assert line and content[offset:].startswith(line)
    for size in range(1, len(content) + 1):
        tiled = []
        for start in range(0, len(content), size):
            end = min(start + size, len(content))
            tiled += posts.read_lines(io.BytesIO(content), start, end)
        assert tiled == whole


def test_overlong_lines_are_told_and_passed_over():
    content = b"short\n" + b"x" * 100 + b"\nnext\n" + b"y" * 20
    read = list(posts.read_lines(io.BytesIO(content), 0, len(content), longest=20))
    assert read == [(0, b"short\n"), (6, None), (107, b"next\n"), (112, None)]


def post(image, visibility: str = "public") -> Post:
    return Post("p", image, "", "u", visibility, "")


def test_private_photos_are_never_opened(tmp_path: pathlib.Path):
    # To open a pipe that nobody writes to would not return.
    os.mkfifo(tmp_path / "pipe")
    for visibility in ("private", "friends", "", "PUBLIC"):
        assert reason_of(posts.read_photo, post("pipe", visibility), str(tmp_path)) == "private"
        assert reason_of(posts.read_photo, post(b"x", visibility), str(tmp_path)) == "private"
    assert reason_of(posts.read_photo, post("pipe"), str(tmp_path)) == "missing_file"


def test_paths_stay_inside_the_folder(tmp_path: pathlib.Path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "in.jpg").write_bytes(b"in")
    (tmp_path / "out.jpg").write_bytes(b"out")
    assert posts.read_photo(post("in.jpg"), str(images)) == b"in"
    assert posts.read_photo(post("./in.jpg"), f"{images}/") == b"in"
    bad = ["../out.jpg", "x/../../out.jpg", "..\\out.jpg", str(tmp_path / "out.jpg"), "file:///x"]
    for path in [*bad, "", "absent.jpg", ".", "a\0b", "in.jpg/x", "x" * 5000, None]:
        assert reason_of(posts.read_photo, post(path), str(images)) == "missing_file"


def test_plain_jpegs_keep_their_bytes():
    for mode in ("RGB", "L"):
        encoded = encode(picture(mode=mode))
        assert posts.normalise_photo(encoded, 30) == encoded
        assert posts.normalise_photo(encoded, 256) == encoded


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
        normal = decode(posts.normalise_photo(encode(picture(*size), kind), short_side))
        assert (normal.format, normal.mode, normal.size) == ("JPEG", "RGB", expected)


def test_metadata_does_not_travel():
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
        normal = posts.normalise_photo(encoded, 256)
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
    normal = decode(posts.normalise_photo(encode(stored, exif=exif), 256))
    np.testing.assert_allclose(np.asarray(normal), np.asarray(upright), atol=30)


def test_other_formats_and_modes_come_out_as_rgb_over_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    for encoded in (encode(clear, "PNG"), encode(clear, "WEBP", lossless=True)):
        assert np.asarray(decode(posts.normalise_photo(encoded, 256))).min() > 250
    for mode, kind in [("P", "GIF"), ("CMYK", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("RGB", "BMP")]:
        normal = decode(posts.normalise_photo(encode(picture(mode=mode), kind), 256))
        assert (normal.mode, normal.size) == ("RGB", (40, 30))
    deep = Image.fromarray(np.full((20, 20), 128 * 256, np.uint16))
    normal = np.asarray(decode(posts.normalise_photo(encode(deep, "PNG"), 256)))
    np.testing.assert_allclose(normal, 128, atol=2)
    progressive = encode(picture(), progressive=True)
    assert posts.normalise_photo(progressive, 256) != progressive


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
        b"not an image",
        encode(picture())[:-200],
        encode(picture())[:30],
        encode(picture(), "PNG")[:-40],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        png_of_size(12_000, 12_000),
        png_of_size(2**31 - 1, 2**31 - 1),
        png_of_size(0, 5),
        png_of_size(5, 5),
        encode(Image.new("L", (66_000, 2)), "PNG"),  # wider than a JPEG can be
    ],
)
def test_undecodable(encoded: bytes):
    assert reason_of(posts.normalise_photo, encoded, 256) == "undecodable"
