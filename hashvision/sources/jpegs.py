"""Strips JPEG files to the picture itself, before `pictures` gives them to a decoder."""

import re
import struct
import typing

from hashvision.sources.reasons import Dropped

# A progressive photo has ten. Each scan costs a pass over the whole picture, however short it is.
MOST_SCANS = 100
_MOST_SEGMENTS = 10_000
_PLAIN_FRAMES = (0xC0, 0xC1)  # baseline and extended sequential, which every decoder supports
_FRAMES_AND_TABLES = range(0xC0, 0xD0)
_END, _SCAN, _QUANTIZATION, _RESTARTS = 0xD9, 0xDA, 0xDB, 0xDD
_JFIF, _EXIF, _ADOBE = 0xE0, 0xE1, 0xEE
# A marker that a segment follows, or the end marker. Within a scan, 0x00 escapes 0xff, and restart
# markers belong to the scan.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


class Jpeg(typing.NamedTuple):
    """A JPEG file stripped to its picture."""

    encoded: bytes
    exif: bytes  # the first EXIF block, or b""
    plain: bool  # whether `encoded` is one sequential scan and nothing else
    sequential: bool  # whether it has one scan, which decoders decode row by row as they read
    data_end: int  # offset in `encoded` where the data of its first scan end


def strip(encoded: bytes) -> Jpeg:
    """Extracts the picture and the EXIF block from a JPEG file.

    It removes comments, profiles, thumbnails, further pictures (MPO) and appended films. It also
    separates the EXIF block, which can be a bomb: Pillow copies each value of the EXIF directory,
    and if all values refer to the same bytes, a megabyte becomes gigabytes.

    Raises:
      Dropped: "undecodable" if there is no picture; "too_large" if there are more scans or segments
        than a photo has.
    """
    kept, exif, frame, position = [b"\xff\xd8"], b"", 0, 2
    for _ in range(_MOST_SEGMENTS):
        marker, content, position = _read_segment(encoded, position)
        if marker == _EXIF and content.startswith(b"Exif\0\0") and not exif:
            exif = content
        # These two segments define the colour space.
        elif marker == _JFIF and content.startswith(b"JFIF\0") and len(content) >= 14:
            kept.append(_encode_segment(marker, content[:12] + b"\0\0"))  # without the thumbnail
        elif marker == _ADOBE and content.startswith(b"Adobe") and len(content) >= 12:
            kept.append(_encode_segment(marker, content[:12]))
        elif marker in _FRAMES_AND_TABLES or marker in (_SCAN, _QUANTIZATION, _RESTARTS):
            kept.append(_encode_segment(marker, content))
            if marker in _PLAIN_FRAMES:
                frame = marker
        if marker == _SCAN:
            data_end, end, scans = _find_ends(encoded, position)
            before = sum(map(len, kept))
            kept.append(encoded[position:end])
            sequential = scans == 1 and frame in _PLAIN_FRAMES
            return Jpeg(
                encoded=b"".join(kept),
                exif=exif,
                plain=sequential and encoded[end - 2 : end] == b"\xff\xd9",
                sequential=sequential,
                data_end=before + data_end - position,
            )
    raise Dropped("too_large")


def orientation(exif: bytes) -> int:
    """The orientation tag, 1 to 8, from the first directory of an EXIF block; 1 if absent."""
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2], "")
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (entries,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), block, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # the block is truncated, but the picture does not depend on it
    return 1


def _read_segment(encoded: bytes, position: int) -> tuple[int, bytes, int]:
    """Returns marker and content of the next segment, and the position after it."""
    found = _MARKER.search(encoded, position)
    if found is None or len(encoded) < found.end() + 2:
        raise Dropped("undecodable")
    (length,) = struct.unpack_from(">H", encoded, found.end())
    end = found.end() + length
    if length < 2 or end > len(encoded) or found[1][0] == _END:
        raise Dropped("undecodable")
    return found[1][0], encoded[found.end() + 2 : end], end


def _encode_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _find_ends(encoded: bytes, position: int) -> tuple[int, int, int]:
    """Finds the ends of the first scan and of the picture, and counts the scans.

    Segments between scans count as scans too, so a count of 1 means one scan and nothing else.

    Args:
      encoded: the file.
      position: where the data of the first scan begin.

    Returns:
      Offset of the end of the first scan's data, offset of the end of the picture, number of scans.
    """
    first = 0
    for scans in range(1, 4 * MOST_SCANS):  # each scan may bring a few tables
        found = _MARKER.search(encoded, position)
        end = len(encoded) if found is None else found.start()
        first = first or end
        if found is None:
            return first, end, scans
        if found[1][0] == _END:
            return first, found.end(), scans
        if len(encoded) < found.end() + 2:
            break
        (length,) = struct.unpack_from(">H", encoded, found.end())
        position = found.end() + max(2, length)
    raise Dropped("too_large")
