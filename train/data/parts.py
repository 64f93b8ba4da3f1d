"""Whether an image file has so many parts that a decoder would be held up, found out before one sees it.

Pillow goes through the segments of a JPEG, the chunks of a PNG and the blocks of a GIF one by one in Python, and unpacks every
colour profile. A file of MAX_BYTES that consists of empty ones takes it minutes (measured on one core: 160 s of JPEG segments,
190 s of PNG chunks; a PNG of 4 MB with a packed profile over and over, 25 s). Files of cameras and editors have some tens of parts,
a PNG one for each 8 KiB at most. Here they are counted, up to a limit, in some microseconds for a file of the usual kind.
"""

import struct

MOST_PARTS = 100_000  # a third of a second of Pillow's time
MOST_PROFILES = 8  # colour profiles of a PNG, of which one is allowed; each may unpack to 1 MB
MOST_METADATA = 2**24  # bytes of a JPEG before its first scan: Pillow puts EXIF together segment by segment, copying what it has
MOST_RUNS = 2**24  # pixels, and bytes, of a BMP with run lengths, which Pillow decodes in Python


def check_parts(data: bytes) -> None:
    """Raises ValueError for a file that would take too long, whatever its picture."""
    if data[:2] == b"\xff\xd8":
        _jpeg(data)
    elif data[:4] == b"\x89PNG":
        _png(data)
    elif data[:3] == b"GIF":
        _gif(data)
    elif data[:2] == b"BM":
        _bmp(data)


def _too_many(what: str) -> ValueError:
    return ValueError(f"its {what} would take too long")


def _jpeg(data: bytes) -> None:
    """Up to the first scan, as Pillow reads it: what lies between segments, and 0xFF that fills up, it reads byte by byte."""
    at, parts = 2, 0
    while at + 4 <= len(data):
        parts += 1
        if data[at] != 0xFF:
            marker = data.find(b"\xff", at)
            if marker < 0:
                marker = len(data)
            parts, at = parts + marker - at, marker
        elif data[at + 1] == 0xDA:
            break
        elif data[at + 1] in (0xFF, 0x00, 0x01) or 0xD0 <= data[at + 1] <= 0xD9:
            at += 1 if data[at + 1] == 0xFF else 2
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        if parts > MOST_PARTS:
            raise _too_many(f"more than {MOST_PARTS:,} segments")
    if min(at, len(data)) > MOST_METADATA:
        raise _too_many(f"{min(at, len(data)):,} bytes before the picture")


def _png(data: bytes) -> None:
    at, parts, profiles = 8, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        parts, profiles, at = parts + 1, profiles + (kind == b"iCCP"), at + 12 + length
        if parts > MOST_PARTS:
            raise _too_many(f"more than {MOST_PARTS:,} chunks")
        if profiles > MOST_PROFILES:
            raise _too_many(f"more than {MOST_PROFILES} colour profiles")


def _gif(data: bytes) -> None:
    """Up to the first picture."""
    if len(data) < 13:
        return
    at, parts = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0), 0
    while at < len(data) and data[at : at + 1] not in (b",", b";"):
        parts, extension, at = parts + 1, data[at] == 0x21, at + 1
        if extension:
            at += 1
            while at < len(data) and data[at] and parts <= MOST_PARTS:
                parts, at = parts + 1, at + 1 + data[at]
            at += 1
        if parts > MOST_PARTS:
            raise _too_many(f"more than {MOST_PARTS:,} blocks before the picture")


def _bmp(data: bytes) -> None:
    if len(data) < 34 or struct.unpack_from("<I", data, 14)[0] < 40:
        return
    width, height = struct.unpack_from("<ii", data, 18)
    if struct.unpack_from("<I", data, 30)[0] in (1, 2) and max(abs(width * height), len(data)) > MOST_RUNS:
        raise _too_many(f"run lengths of {abs(width * height):,} pixels in {len(data):,} bytes")
