"""Tar archives header by header, with nothing checked: v7, ustar, star, GNU and pax, and what nobody would write.

A member is bytes, extended headers and data included; an archive is some of them and `END`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = tuple[bytes, bytes]
Parts = Sequence[tuple[int, bytes]]
"""What a sparse file holds: (offset, data) each."""

TIME = 1_600_000_000
V7, USTAR, GNU = bytes(8), b"ustar\x0000", b"ustar  \0"
END = bytes(1024)


def header(
    name: bytes = b"name",
    type: bytes = b"0",  # noqa: A002
    *,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    size: int | bytes = 0,
    mtime: int | bytes = 0,
    link: bytes = b"",
    magic: bytes = USTAR,
    devices: bytes = b"0000000\0" * 2,
    tail: bytes = b"",
    signed: bool = False,
) -> bytes:
    """Return a header block with its checksum; numbers are written in octal, bytes as they are."""
    fields = [_octal(value, 8) for value in (mode, uid, gid)] + [_octal(value, 12) for value in (size, mtime)]
    block = name.ljust(100, b"\0") + b"".join(fields) + b" " * 8 + type + link.ljust(100, b"\0")
    block = (block + magic + bytes(64) + devices + tail).ljust(512, b"\0")
    assert len(block) == 512
    return checksummed(block, signed=signed)


def _octal(value: int | bytes, width: int) -> bytes:
    return value if isinstance(value, bytes) else b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    """Return a number as GNU tar writes it when it has too many octal digits, or is negative."""
    number = value.to_bytes(width, "big", signed=True)
    return bytes([number[0] | 0x80]) + number[1:]


def checksummed(block: bytes, *, signed: bool = False) -> bytes:
    """Return a header block with its checksum filled in."""
    block = block[:148] + b" " * 8 + block[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    return block[:148] + b"%06o\0 " % total + block[156:]


def padded(data: bytes) -> bytes:
    """Return data filled up to a whole block."""
    return data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """Return a record of an extended header (POSIX.1-2001, pax)."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(b"%d" % length) + len(body) != length:
        length += 1
    return b"%d" % length + body


def pax(*records: tuple[bytes, bytes], type: bytes = b"x") -> bytes:  # noqa: A002
    """Return an extended header for the next member, or a global one ('g')."""
    data = b"".join(record(key, value) for key, value in records)
    return header(b"pax", type, size=len(data)) + padded(data)


def long_name(text: bytes, type: bytes = b"L") -> bytes:  # noqa: A002
    """Return a name for the next member, or its link's target ('K'), as GNU tar writes long ones."""
    return header(b"././@LongLink", type, size=len(text) + 1, magic=GNU) + padded(text + b"\0")


def _member(name: bytes, type_: bytes, records: Sequence[Record], **fields: Any) -> bytes:
    """Return a member; what does not fit its header goes to an extended one."""
    link: bytes = fields.pop("link", b"")
    if len(name) > 100:
        records = [*records, (b"path", name)]
    if len(link) > 100:
        records = [*records, (b"linkpath", link)]
    extended = pax(*records) if records else b""
    return extended + header(name[:100], type_, link=link[:100], **{"mtime": TIME, **fields})


def file(name: bytes, data: bytes = b"", *records: Record, type_: bytes = b"0", **fields: Any) -> bytes:
    """A file."""
    return _member(name, type_, records, size=len(data), **fields) + padded(data)


def folder(name: bytes, *records: Record, mode: int = 0o755, **fields: Any) -> bytes:
    """A folder."""
    return _member(name, b"5", records, mode=mode, **fields)


def symlink(name: bytes, target: bytes, *records: Record, **fields: Any) -> bytes:
    """A symbolic link."""
    return _member(name, b"2", records, link=target, mode=0o777, **fields)


def hardlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    """A hard link."""
    return _member(name, b"1", (), link=target, **fields)


def special(name: bytes, type_: bytes, *records: Record, rdev: tuple[int, int] = (0, 0), **fields: Any) -> bytes:
    """A device ('3', '4') or a FIFO ('6')."""
    return _member(name, type_, records, devices=b"%07o\0%07o\0" % rdev, **fields)


def xattr(name: bytes, value: bytes) -> Record:
    """The record of an extended attribute as Go and GNU tar write it."""
    return b"SCHILY.xattr." + name, value


def gnu_sparse(name: bytes, size: int, parts: Parts) -> bytes:
    """An old GNU sparse member: four entries in the header, 21 in each block after it."""
    entries = [b"%011o\0%011o\0" % (offset, len(data)) for offset, data in parts]
    first, rest = entries[:4], entries[4:]
    # atime, ctime, offset, longnames, an unused byte, then sparse[4], isextended and realsize (tar.h of GNU tar).
    tail = bytes(41) + b"".join(first).ljust(96, b"\0") + bytes([bool(rest)]) + b"%011o\0" % size
    stored = b"".join(data for _, data in parts)
    blocks = header(name, b"S", size=len(stored), mtime=TIME, magic=GNU, tail=tail)
    while rest:
        now, rest = rest[:21], rest[21:]
        blocks += (b"".join(now).ljust(504, b"\0") + bytes([bool(rest)])).ljust(512, b"\0")
    return blocks + padded(stored)


def pax_sparse(version: str, name: bytes, size: int, parts: Parts) -> bytes:
    """A sparse member in one of the three forms of pax (GNU tar manual, 'Storing Sparse Files')."""
    stored = b"".join(data for _, data in parts)
    pairs = [(b"%d" % offset, b"%d" % len(data)) for offset, data in parts]
    count, length = b"%d" % len(parts), b"%d" % size
    if version == "0.0":
        records = [(b"GNU.sparse.size", length), (b"GNU.sparse.numblocks", count)]
        for offset, numbytes in pairs:
            records += [(b"GNU.sparse.offset", offset), (b"GNU.sparse.numbytes", numbytes)]
        return file(name, stored, *records)
    if version == "0.1":
        text = b",".join(number for pair in pairs for number in pair)
        records = [(b"GNU.sparse.size", length), (b"GNU.sparse.numblocks", count), (b"GNU.sparse.map", text)]
        return file(b"GNUSparseFile.0/x", stored, *records, (b"GNU.sparse.name", name))
    text = padded(b"".join(b"%s\n" % number for number in (count, *(number for pair in pairs for number in pair))))
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", length)]
    return file(b"GNUSparseFile.0/x", text + stored, *records, (b"GNU.sparse.name", name))
