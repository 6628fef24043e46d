"""Makes photos of every kind that a dump may contain, for tests/sources/test_fuzz.py."""

import io
import random
import struct
import typing
import zlib

import numpy as np
from PIL import Image

# Red and green over blue and yellow, which shows any rotation or channel swap.
QUARTERS = np.array([[[255, 0, 0], [0, 160, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


def encode(image: Image.Image, kind: str, **options: typing.Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters(mode: str = "RGB", turn: Image.Transpose | None = None) -> Image.Image:
    image = Image.fromarray(QUARTERS.repeat(24, 0).repeat(32, 1))
    return (image if turn is None else image.transpose(turn)).convert(mode)


def noise(generator: random.Random, side: int = 24) -> Image.Image:
    return Image.frombytes("RGB", (side, side), generator.randbytes(side * side * 3))


def exif(**tags: int) -> Image.Exif:
    made = Image.Exif()
    for tag, value in tags.items():
        made[int(tag[1:])] = value
    made[0x010F] = "secret camera"
    return made


# The transposition that undoes each EXIF orientation.
UNDONE = (None, 0, 3, 1, 5, 2, 6, 4)


def turned(orientation: int, kind: str) -> bytes:
    turn = UNDONE[orientation - 1]
    image = quarters(turn=None if turn is None else Image.Transpose(turn))
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    return encode(image, kind, exif=exif(t274=orientation), **options)


def valid(generator: random.Random) -> dict[str, bytes]:
    """Encodes QUARTERS with real encoders in every format and variant."""
    palette = quarters().quantize(4)
    more = [noise(generator, 48).resize((64, 48)) for _ in range(2)]

    def later() -> dict[str, typing.Any]:  # copies, because the MPO encoder changes images
        return {"save_all": True, "append_images": [image.copy() for image in more]}

    text = {"comment": b"secret comment", "icc_profile": b"secret profile" * 20}
    made = {
        "jpeg": encode(quarters(), "JPEG", quality=95),
        "jpeg progressive": encode(quarters(), "JPEG", quality=95, progressive=True),
        "jpeg CMYK": encode(quarters("CMYK"), "JPEG", quality=95),
        "jpeg restarts": encode(quarters(), "JPEG", quality=95, restart_marker_blocks=1),
        "jpeg metadata": encode(quarters(), "JPEG", quality=95, exif=exif(), **text),
        "jpeg MPO": encode(quarters(), "MPO", quality=95, **later()),
        "png": encode(quarters(), "PNG"),
        "png alpha": encode(quarters("RGBA"), "PNG"),
        "png palette": encode(palette, "PNG", transparency=7),
        "png animated": encode(quarters(), "PNG", **later()),
        "gif": encode(palette, "GIF", comment=b"secret comment"),
        "gif animated": encode(palette, "GIF", **later()),
        "webp": encode(quarters(), "WEBP", quality=95),
        "webp lossless": encode(quarters("RGBA"), "WEBP", lossless=True, xmp=b"secret xmp"),
        "webp animated": encode(quarters(), "WEBP", lossless=True, **later()),
        "bmp": encode(quarters(), "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "tiff": encode(quarters(), "TIFF"),
        "tiff LZW": encode(quarters(), "TIFF", compression="tiff_lzw"),
        "tiff CMYK": encode(quarters("CMYK"), "TIFF"),
        "tiff pages": encode(quarters(), "TIFF", **later()),
    }
    bmp = made["bmp"]  # a negative height means rows from top to bottom
    rows = [bmp[54 + 192 * row : 54 + 192 * (row + 1)] for row in reversed(range(48))]
    made["bmp from above"] = bmp[:22] + struct.pack("<i", -48) + bmp[26:54] + b"".join(rows)
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            made[f"{kind.lower()} orientation {orientation}"] = turned(orientation, kind)
    made["jpeg and a zip behind"] = made["jpeg"] + b"PK\3\4secret" + bytes(200)
    made["jpeg and a film behind"] = made["jpeg metadata"] + b"ftypmp42secret" * 50
    made["gif and a script"] = made["gif"] + b"*/=1;alert('secret')"
    made["jpeg with markup"] = encode(quarters(), "JPEG", quality=95, comment=b"<script>secret")
    made["jpeg, EXIF in EXIF"] = segments(made["jpeg"], b"Exif\0\0" * 20_000)
    made["jpeg, EXIF a bomb"] = segments(made["jpeg"], overlapping(4000, 200_000))
    return made


def odd(generator: random.Random) -> dict[str, bytes]:
    """Encodes pictures with other colours than QUARTERS."""
    ramp = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    return {
        "png 16 bit": encode(Image.fromarray(ramp), "PNG"),
        "png 16 bit, one clear": encode(Image.fromarray(ramp), "PNG", transparency=9),
        "tiff 16 bit": encode(Image.fromarray(ramp), "TIFF"),
        "jpeg grey": encode(quarters("L"), "JPEG"),
        "png 1 bit": encode(quarters("1"), "PNG"),
        "png grey and alpha": encode(quarters("LA"), "PNG"),
        "tiff 1 bit, G4": encode(quarters("1"), "TIFF", compression="group4"),
        "one pixel": encode(Image.new("RGB", (1, 1)), "PNG"),
        "a strip": encode(Image.new("L", (5000, 1)), "PNG"),
        "noise": encode(noise(generator, 300), "JPEG", quality=70),
    }


def segments(jpeg: bytes, block: bytes) -> bytes:
    """Adds an EXIF block to a JPEG, in as many segments as needed."""
    body, made = block[6:], [jpeg[:2]]
    for start in range(0, len(body), 65_000):
        piece = b"Exif\0\0" + body[start : start + 65_000]
        made.append(b"\xff\xe1" + struct.pack(">H", len(piece) + 2) + piece)
    return b"".join([*made, jpeg[2:]])


def directory(entries: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF file with one directory, followed by data at byte 14 + 12 * entries."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + data


def tiff(extra: list[tuple[int, int, int, int]], size: tuple[int, int] = (8, 8)) -> bytes:
    needed = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, 1, 8), (259, 3, 1, 1)]
    needed += [(262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, size[1])]
    given = {entry[0]: entry for entry in [*needed, (279, 4, 1, 64), *extra]}
    return directory(sorted(given.values()), bytes(200_000))


def overlapping(entries: int, size: int) -> bytes:
    """An EXIF block whose entries all refer to the same `size` bytes."""
    start = 14 + 12 * entries
    return b"Exif\0\0" + directory(
        [(1000 + n, 1, size, start) for n in range(entries)], bytes(size)
    )


def png(width: int, height: int, *chunks: tuple[bytes, bytes], mode: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    made = [b"\x89PNG\r\n\x1a\n"]
    for name, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        checked = name + content
        made.append(struct.pack(">I", len(content)) + checked)
        made.append(struct.pack(">I", zlib.crc32(checked)))
    return b"".join(made)


def bombs() -> dict[str, bytes]:
    """Small files that would take gigabytes or hours to decode."""
    rows = (b"IDAT", zlib.compress(bytes(8 * 9)))
    million = zlib.compress(bytes(50_000_000), 1)
    gif = encode(quarters().quantize(4), "GIF")
    first = gif.index(b",\0\0\0\0")
    jpeg = encode(quarters("L"), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    tags = [(40_000 + n, 1, 100_000, 8) for n in range(3000)]
    rle = struct.pack("<IiiHHIIiiII", 40, 4000, 4000, 1, 8, 1, 0, 0, 0, 256, 0)
    return {
        "png of 12,000 by 12,000": png(12_000, 12_000, rows),
        "png of 2 billion squared": png(2**31 - 1, 2**31 - 1, rows),
        "png of 70,000 by 2": png(70_000, 2, rows),
        "png, text unpacks to 50 MB": png(8, 8, (b"zTXt", b"a\0\0" + million), rows),
        "png, profile unpacks to 50 MB": png(8, 8, (b"iCCP", b"a\0\0" + million), rows),
        "png, 20,000 chunks": png(8, 8, *[(b"tEXt", b"a\0b")] * 20_000, rows),
        "png, 60,000 pieces": png(300, 300, *[(b"IDAT", b"")] * 60_000, rows),
        "gif canvas": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "gif, comments without end": gif[:first]
        + b"!\xfe"
        + (b"\xff" + b"x" * 255) * 20_000
        + b"\0"
        + gif[first:],
        "jpeg of 2,000 scans": jpeg[:-2] + jpeg[last:-2] * 2000 + b"\xff\xd9",
        "jpeg of 20,000 comments": jpeg[:2] + b"\xff\xfe\0\3x" * 20_000 + jpeg[2:],
        "jpeg of 65,000 by 65,000": grown(encode(quarters(), "JPEG"), 65_000),
        "tiff, 3,000 tags of the same bytes": tiff(tags),
        "tiff, a tile of 40,000 by 40,000": tiff(
            [(322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, 64)]
        ),
        "tiff of 60,000 by 60,000": tiff([], (60_000, 60_000)),
        "webp of 16,383 by 16,383": bytes.fromhex(SOLID_WEBP)[:21]
        + struct.pack("<I", 16_382 | 16_382 << 14 | 1 << 28)
        + bytes.fromhex(SOLID_WEBP)[25:],
        "bmp of 4 million runs": b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + rle + bytes(1024)
        + b"\2\3" * 4_000_000,
        "bmp of 2 billion": b"BM"
        + struct.pack("<IHHI", 0, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, -(2**31) + 1, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(99),
    }  # fmt: skip


# 5,000 by 5,000 pixels of one colour, the largest WebP that is decoded:
# Image.new("RGBA", (5000, 5000), (9, 9, 9, 100)).save(..., lossless=True, method=0, quality=0)
SOLID_WEBP = "524946461e000000574542505650384c110000002f87d3e11407d0842634a1648188e87f0000"


def grown(jpeg: bytes, side: int) -> bytes:
    """Changes the size in the frame of a JPEG."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 5] + struct.pack(">HH", side, side) + jpeg[frame + 9 :]


FOREIGN = {
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n%%EOF",
    "eps binary": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 99) + bytes(200),
    "psd": b"8BPS\0\1" + bytes(200),
    "pdf": b"%PDF-1.4\n" + bytes(99),
    "zip": b"PK\3\4" + bytes(99),
    "gzip": b"\x1f\x8b\x08" + bytes(99),
    "elf": b"\x7fELF" + bytes(99),
    "film": b"\0\0\0\x20ftypmp42" + bytes(99),
    "heic": b"\0\0\0\x20ftypheic" + bytes(99),
    "json": b'{"error": "not found"}',
    "icns": b"icns\0\0\0\x20" + bytes(99),
    "mpeg": b"\0\0\1\xb3" + bytes(99),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(99),
    "fits": b"SIMPLE  =" + bytes(99),
    "text": b"photo",
    "newline and a jpeg": b"\n\xff\xd8\xff\xe0" + bytes(99),
    "nothing but zeros": bytes(5000),
}


def mutated(generator: random.Random, encoded: bytes) -> bytes:
    """Returns a copy of the file with one fault."""
    made, length = bytearray(encoded), len(encoded)
    place = generator.randrange(length)
    match generator.randrange(7):
        case 0:  # a bit, mostly in the header
            made[place if generator.random() < 0.3 else place % 64] ^= 1 << generator.randrange(8)
        case 1:
            for _ in range(generator.randrange(1, 40)):
                made[generator.randrange(length)] = generator.randrange(256)
        case 2:
            del made[place:]
        case 3:
            del made[place : place + generator.randrange(1, 100)]
        case 4:
            made[place:place] = generator.randbytes(generator.randrange(1, 100))
        case 5:  # an extreme number
            number = generator.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])
            width = generator.choice([2, 4])
            order = generator.choice(["little", "big"])
            piece = (number & (256**width - 1)).to_bytes(width, typing.cast("typing.Any", order))
            made[place % 128 : place % 128 + width] = piece
        case 6:
            other = generator.randrange(length)
            made[place:place] = made[other : other + generator.randrange(1, 400)]
    return bytes(made)
