"""A JPEG file without all that is not the picture, before any decoder sees it."""

import re
import struct
import typing

from hashvision.sources.reasons import Dropped

# Of a progressive photo there are ten; each goes over the whole picture, however few its bytes.
MOST_SCANS = 100
_MOST_SEGMENTS = 10_000
_PLAIN_FRAMES = (0xC0, 0xC1)  # baseline and extended sequential, which every decoder takes
_FRAMES_AND_TABLES = range(0xC0, 0xD0)
_END, _SCAN, _QUANTISATION, _RESTARTS = 0xD9, 0xDA, 0xDB, 0xDD
_JFIF, _EXIF, _ADOBE = 0xE0, 0xE1, 0xEE
# A marker with a segment behind it, or the end's. Within a scan 0xff is escaped by 0x00, and
# restart markers are part of the scan.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


class Jpeg(typing.NamedTuple):
    """A JPEG file reduced to its picture."""

    encoded: bytes
    exif: bytes  # the first EXIF block, or b""
    plain: bool  # whether `encoded` is one sequential scan and holds nothing else
    sequential: bool  # whether it has one scan, which decoders show row by row as they read it
    data_end: int  # where the data of its first scan end in `encoded`


def strip(encoded: bytes) -> Jpeg:
    """Takes the picture and the EXIF block out of a JPEG file.

    Comments, profiles, thumbnails, further pictures (MPO) and films hung on behind are left out.
    EXIF is left out above all: Pillow copies each value of its directory, though all of them may
    lie in the same bytes, and a megabyte becomes gigabytes.

    Raises:
      Dropped: "undecodable" where there is no picture, "too_large" for more scans than one takes.
    """
    kept, exif, frame, position = [b"\xff\xd8"], b"", 0, 2
    for _ in range(_MOST_SEGMENTS):
        marker, content, position = _segment(encoded, position)
        if marker == _EXIF and content.startswith(b"Exif\0\0") and not exif:
            exif = content
        # These two tell what the colours are.
        elif marker == _JFIF and content.startswith(b"JFIF\0") and len(content) >= 14:
            kept.append(_written(marker, content[:12] + b"\0\0"))  # without the thumbnail
        elif marker == _ADOBE and content.startswith(b"Adobe") and len(content) >= 12:
            kept.append(_written(marker, content[:12]))
        elif marker in _FRAMES_AND_TABLES or marker in (_SCAN, _QUANTISATION, _RESTARTS):
            kept.append(_written(marker, content))
            if marker in _PLAIN_FRAMES:
                frame = marker
        if marker == _SCAN:
            data_end, end, scans = _ends(encoded, position)
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
    """The tag of that name, 1 to 8, in the first directory of an EXIF block; 1 without one."""
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
        pass  # the block ends too soon; the picture does not depend on it
    return 1


def _segment(encoded: bytes, position: int) -> tuple[int, bytes, int]:
    """Marker and content of the next segment, and the position behind it."""
    found = _MARKER.search(encoded, position)
    if found is None or len(encoded) < found.end() + 2:
        raise Dropped("undecodable")
    (length,) = struct.unpack_from(">H", encoded, found.end())
    end = found.end() + length
    if length < 2 or end > len(encoded) or found[1][0] == _END:
        raise Dropped("undecodable")
    return found[1][0], encoded[found.end() + 2 : end], end


def _written(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _ends(encoded: bytes, position: int) -> tuple[int, int, int]:
    """Where the first scan's data end, where the picture ends, and how many scans it has.

    What stands between scans counts as one too, which is why only a picture of one is plain.

    Args:
      encoded: the file.
      position: where the data of the first scan begin.
    """
    first = 0
    for scans in range(1, 4 * MOST_SCANS):  # some tables come with each
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
