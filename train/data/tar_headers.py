"""The members of a tar, read by what the headers say and checked against what the file holds.

tarfile is not used: several releases of it loop for ever on headers with a negative size, and it reads a long name or a block of
attributes whole, whatever size a header claims. Here every header moves on by one block at least, and nothing is read on trust.
Formats: ustar, old V7, GNU (long names, sizes above 8 GB), pax. Sparse members are told, not read.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
MOST = 2**20  # bytes of one long name or block of attributes; the longest path of Linux has 4096


class TarError(ValueError):
    """A tar is not whole. The message is a part of a sentence."""


class Member(NamedTuple):
    """kind: "file", "hard link", "link", "folder", "sparse", "device", and GNU's "list", "part" and "label". link: the name that a
    link has. start, size: of the content."""

    name: str
    kind: str
    link: str
    start: int
    size: int


_KINDS = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hard link", b"2": "link", b"5": "folder", b"S": "sparse", b"D": "list",
    b"3": "device", b"4": "device", b"6": "device", b"M": "part", b"V": "label",
}  # fmt: skip
_WITHOUT_CONTENT = ("hard link", "link", "folder", "device")


def members(file: BinaryIO) -> Iterator[Member]:
    """The members in their order. file: at any place; its descriptor is read, its position stays. Raises TarError."""
    number = file.fileno()
    length = os.fstat(number).st_size
    at, extended, everywhere = 0, {}, {}
    while True:
        header = os.pread(number, BLOCK, at)
        if header == bytes(BLOCK):
            return _check_end(number, at, length)
        if len(header) < BLOCK or not _sum_fits(header):
            raise TarError(f"at byte {at} of {length}")
        kind, size = header[156:157], _number(header[124:136], at)
        start = at + BLOCK
        if kind in b"LKxgX":  # of what follows: a long name, a long link, attributes
            if not 0 <= size <= MOST:
                raise TarError(f"a header of {size:,} bytes at byte {at}, more than {MOST:,}")
            if start + size > length:
                raise TarError(f"at byte {at} of {length}")
            content = os.pread(number, size, start)
            if kind in b"LK":
                extended["path" if kind == b"L" else "linkpath"] = content.partition(b"\0")[0]
            else:
                (everywhere if kind == b"g" else extended).update(_attributes(content, at))
            at = start + -(-size // BLOCK) * BLOCK
            continue
        said = {**everywhere, **extended}
        if "size" in said:
            if not said["size"].isdigit() or len(said["size"]) > 19:
                raise TarError(f"a size of {said['size'][:30]!r} at byte {at}")
            size = int(said["size"])
        what = _KINDS.get(kind, "file")  # POSIX: an unknown type is a file
        name = said.get("path", _name(header))
        if what == "file" and kind == b"\0" and name.endswith(b"/"):
            what = "folder"
        if any(key.startswith("GNU.sparse.") for key in said):
            what = "sparse"
        held = 0 if what in _WITHOUT_CONTENT else size
        if held < 0 or start + held > length:
            raise TarError(f"a member of {held:,} bytes at byte {at} of {length}")
        link = said.get("linkpath", header[157:257].partition(b"\0")[0])
        if kind == b"S":
            start = _after_sparse_map(number, header, start, length)
            if start + size > length:
                raise TarError(f"a member of {size:,} bytes at byte {at} of {length}")
        yield Member(os.fsdecode(name), what, os.fsdecode(link), start, size)
        at, extended = start + -(-held // BLOCK) * BLOCK, {}


def _check_end(number: int, at: int, length: int) -> None:
    """Raises TarError where behind the block of zeros that ends a tar there is more than zeros."""
    while at < length:
        chunk = os.pread(number, 2**20, at)
        if chunk.count(0) != len(chunk):
            raise TarError(f"it ends at byte {at} and goes on behind that: several archives in one file?")
        at += len(chunk) or length


def _sum_fits(header: bytes) -> bool:
    try:
        said = int(header[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    return said in (sum(rest), sum(rest) - 256 * sum(byte > 127 for byte in rest))  # some writers add signed bytes


def _number(field: bytes, at: int) -> int:
    """Octal digits; or, for what those cannot say, a binary number behind a first byte of 0x80."""
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise TarError(f"a negative size at byte {at}")
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise TarError(f"a size of {field!r} at byte {at}") from None


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _attributes(content: bytes, at: int) -> dict[str, bytes]:
    """pax records "LENGTH KEY=VALUE\\n"."""
    found, place = {}, 0
    while place < len(content) and content[place]:
        digits = content[place : place + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[place + len(digits) + 1 : place + length].partition(b"=")
        if not equals or length > len(content) - place or not value.endswith(b"\n"):
            raise TarError(f"attributes that are none at byte {at}")
        found[key.decode("utf-8", "replace")] = value[:-1]
        place += length
    return found


def _after_sparse_map(number: int, header: bytes, start: int, length: int) -> int:
    """Where the content of an old GNU sparse member begins: behind the blocks that go on with its map."""
    more = header[482]
    while more:
        block = os.pread(number, BLOCK, start)
        if len(block) < BLOCK:
            raise TarError(f"at byte {start} of {length}")
        more, start = block[504], start + BLOCK
    return start
