"""Reads tar archives, member by member, without ever going back.

Understood are v7, ustar (POSIX.1-1988), pax (POSIX.1-2001, 'pax Interchange Format'), star and the
GNU format (tar(5) of libarchive, 'GNU Tar Archives'): long names, numbers in base 256, sparse
members in the old GNU format and in the PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, appendix
'Storing Sparse Files'). Where the formats leave room, what Go's archive/tar does is followed, since
the tools that make and run images are written in Go. Names are bytes, whatever they mean.

A parser of its own, since the tarfile of the standard library takes several times as long, and
knows neither attributes nor limits.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence

import msgspec

from fledge_tasks.errors import LayerError
from fledge_tasks.oci.decompress import Cursor
from fledge_tasks.oci.layer_index import Kind
from fledge_tasks.oci.pax import parse_decimal, parse_records, parse_time, parse_xattrs

MAX_EXTENSION_BYTES = 1 << 20
MAX_SEGMENTS = 1 << 18

_BLOCK = 512
_FILE = Kind.FILE  # looking it up takes longer than all else in a line
_ZERO_BLOCK = bytes(_BLOCK)
_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
    b"7": Kind.FILE,  # 'contiguous'
    b"S": Kind.FILE,  # old GNU sparse
    b"V": Kind.FILE,  # GNU volume header, skipped
}
# Mode, uid, gid, size and mtime as nearly all archives have them; others take the longer way.
_NUMBERS = re.compile(rb"([0-7]{6}[0-7 ])[ \0]" * 3 + rb"([0-7]{11})[ \0]" * 2)
_MAX_INT64 = (1 << 63) - 1
_MAX_ID = (1 << 32) - 2  # the one above stands for none (chown(2))
_GNU_MAGIC = b"ustar  \0"


class Member(msgspec.Struct, gc=False, eq=False):
    """One file of an archive, all extensions applied.

    path, link  as they stand in the archive, without NUL
    kind        one of the kinds that are inodes, or HARDLINK
    mode        as it stands, file type bits may be set
    size        bytes of a FILE, holes included, 0 for all others
    rdev        (major, minor) of a device
    segments    (offset, length) of the parts of a sparse FILE that the archive holds, in order,
                none of them empty; None when it holds the whole file
    """

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    rdev: tuple[int, int]
    xattrs: dict[bytes, bytes]
    segments: list[tuple[int, int]] | None


def shown(path: bytes) -> str:
    """Return a name from an archive as it may be printed: quoted, short, no control characters."""
    text = repr(path[:200].decode(errors="surrogateescape"))
    return f"{text}..." if len(path) > 200 else text


class Archive:
    """A tar archive that is read from a stream of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._source = Cursor(chunks)
        self._left = 0  # data bytes of the current member that were not read yet
        self._padding = 0
        self._path = b""

    def members(self) -> Iterator[Member]:
        """Yield all members in order; data that was not read until the next one is skipped.

        The archive ends with two blocks of zeros or with the stream. Raises LayerError.
        """
        records: dict[bytes, bytes] | None = None
        name = link = b""
        while block := self._next_header():
            kind = block[156:157]
            if kind in b"xgLK":
                data = self._extension(block)
                if kind == b"x":
                    records = self._parse_records(data)
                elif kind == b"L":
                    name = data.partition(b"\0")[0]
                elif kind == b"K":
                    link = data.partition(b"\0")[0]
                # What 'g' says of all members that follow, Go's archive/tar leaves to its callers, and
                # none that unpacks layers does anything with it.
                continue
            member = self._member(block, records or {}, name, link)
            if kind != b"V":
                yield member
            records = None
            name = link = b""
        if records is not None or name or link:
            raise LayerError(f"truncated archive: ends after an extended header, at byte {self._source.offset}")

    def data(self) -> Iterator[memoryview]:
        """Yield the data of the current member that was not read yet, without its holes. Raises LayerError."""
        for piece in self._source.pieces(self._left):
            self._left -= len(piece)
            yield piece
        if self._left:
            raise self._cut()

    def segment(self, length: int) -> Iterator[memoryview]:
        """Yield the next `length` bytes of the current member's data, which has as many. Raises LayerError."""
        for piece in self._source.pieces(length):
            self._left -= len(piece)
            length -= len(piece)
            yield piece
        if length:
            raise self._cut()

    def _next_header(self) -> bytes:
        """Return the next header block, b'' at the end of the archive."""
        source = self._source
        if self._left and source.skip(self._left) < self._left:
            raise self._cut()
        # An archive whose last padding is missing is accepted by all.
        if self._padding:
            source.skip(self._padding)
        self._left = self._padding = 0
        block = source.take(_BLOCK)
        if block == _ZERO_BLOCK:
            block = source.take(_BLOCK)
            if block.strip(b"\0"):
                raise LayerError(f"corrupt archive: data after a single block of zeros, at byte {source.offset}")
            return b""
        if not block:
            return b""
        if len(block) < _BLOCK:
            raise LayerError(f"truncated archive: ends inside a header, at byte {source.offset}")
        if not _is_header(block):
            what = "corrupt archive" if source.offset > _BLOCK else "not a tar archive"
            raise LayerError(f"{what}: bad header checksum at byte {source.offset - _BLOCK}")
        return block

    def _extension(self, block: bytes) -> bytes:
        """Return the data of an extended header or long name."""
        size = _number(block[124:136])
        if not 0 <= size <= MAX_EXTENSION_BYTES:
            raise LayerError(f"an extended header has {size} bytes, the limit is {MAX_EXTENSION_BYTES}")
        data = self._source.take(size)
        if len(data) < size:
            raise LayerError(f"truncated archive: ends inside an extended header, at byte {self._source.offset}")
        self._padding = -size % _BLOCK
        return data

    def _parse_records(self, data: bytes) -> dict[bytes, bytes]:
        try:
            return parse_records(data)
        except LayerError as error:
            raise LayerError(f"{error.message}, before byte {self._source.offset}") from None

    def _member(self, block: bytes, records: dict[bytes, bytes], long_name: bytes, long_link: bytes) -> Member:
        path = block[:100].partition(b"\0")[0]
        magic = block[257:265]
        if magic[:6] == b"ustar\0" and block[345]:
            # star has access and change times behind a shorter prefix.
            prefix = block[345 : 476 if block[508:512] == b"tar\0" else 500].partition(b"\0")[0]
            path = prefix + b"/" + path
        elif magic == _GNU_MAGIC and block[345] and (prefix := _prefix_of_old_go(block)):
            path = prefix + b"/" + path
        # An empty value takes a record back (POSIX, pax, 'pax Extended Header').
        path = long_name or records.get(b"path") or path
        link = long_link or records.get(b"linkpath") or block[157:257].partition(b"\0")[0]
        self._path = path
        try:
            kind = _KINDS.get(block[156:157])
            if kind is None:
                raise LayerError(f"it is of the unknown type {shown(block[156:157])}")
            if block[156] == 0 and path.endswith(b"/"):  # how v7 tells folders
                kind = Kind.DIRECTORY
            mode, uid, gid, size, mtime_ns = _numbers(block, records)
            # Keys of vendors are in capitals, and rare (POSIX, pax, 'pax Extended Header').
            vendor = bool(records) and min(records) < b"a"
            xattrs = parse_xattrs(records) if vendor else {}
            segments = None
            rdev = (0, 0)
            if kind is _FILE:
                self._left = size
                self._padding = -size % _BLOCK
                if block[156] == 0x53:  # S
                    if magic != _GNU_MAGIC:
                        raise LayerError("it is sparse as only GNU tar writes it, but not in the GNU format")
                    size = _number(block[483:495])
                    segments = _segments(self._old_gnu_map(block), size)
                elif vendor:
                    path, size, segments = self._pax_sparse(records, path, size)
                if segments is not None and sum(length for _, length in segments) != self._left:
                    raise LayerError(f"its sparse map does not fit the {self._left} bytes of its data")
            else:
                # Only files have data; a size elsewhere is what the link's target or the folder has.
                size = 0
                if block[156] in b"34" and magic[:5] == b"ustar":
                    rdev = _number(block[329:337]), _number(block[337:345])
            if b"\0" in path or b"\0" in link:
                raise LayerError("a name holds a NUL byte")
        except LayerError as error:
            raise LayerError(f"{shown(path)}: {error.message}") from None
        return Member(path, kind, mode, uid, gid, mtime_ns, size, link, rdev, xattrs, segments)

    def _old_gnu_map(self, block: bytes) -> list[int]:
        numbers: list[int] = []
        start, entries, more = 386, 4, block[482]
        while True:
            for at in range(start, start + 24 * entries, 24):
                if not block[at]:
                    break
                numbers += _number(block[at : at + 12]), _number(block[at + 12 : at + 24])
            if not more:
                return numbers
            block = self._source.take(_BLOCK)
            if len(block) < _BLOCK:
                raise self._cut()
            start, entries, more = 0, 21, block[504]
            if len(numbers) > 2 * MAX_SEGMENTS:
                raise _too_many_segments()

    def _pax_sparse(
        self, records: dict[bytes, bytes], path: bytes, size: int
    ) -> tuple[bytes, int, list[tuple[int, int]] | None]:
        """Return path, size and segments of a member with GNU.sparse.* records."""
        version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
        pairs = records.get(b"GNU.sparse.map", b"")
        if version == (b"", b"") and not pairs:
            return path, size, None
        path = records.get(b"GNU.sparse.name") or path
        if text := records.get(b"GNU.sparse.size") or records.get(b"GNU.sparse.realsize"):
            size = parse_decimal(text)
        if version == (b"1", b"0"):
            numbers = self._pax_1_0_map()
        elif version in ((b"", b""), (b"0", b"0"), (b"0", b"1")):
            # `parse_records` turned 0.0 into 0.1. Its length is bounded by that of the header.
            numbers = [parse_decimal(number) for number in pairs.split(b",")] if pairs else []
            if len(numbers) != 2 * parse_decimal(records.get(b"GNU.sparse.numblocks", b"")):
                raise LayerError("its sparse map is not as long as GNU.sparse.numblocks says")
        else:
            raise LayerError(f"its sparse format {shown(b'.'.join(version))} is not known")
        return path, size, _segments(numbers, size)

    def _pax_1_0_map(self) -> list[int]:
        """Read the map at the start of the data: decimal numbers, one a line, filled up to a block."""
        text = bytearray()
        wanted, lines = 1, 0
        while lines < wanted:
            if self._left < _BLOCK:
                raise LayerError("its sparse map is longer than its data")
            block = b"".join(self.segment(_BLOCK))
            text += block
            if lines == 0 and b"\n" in text:
                segments = parse_decimal(bytes(text).partition(b"\n")[0])
                if segments > MAX_SEGMENTS:
                    raise _too_many_segments()
                wanted += 2 * segments
            elif lines == 0:
                raise LayerError("its sparse map does not start with a number")
            lines += block.count(b"\n")
        return [parse_decimal(line) for line in bytes(text).split(b"\n")[1:wanted]]

    def _cut(self) -> LayerError:
        return LayerError(f"truncated archive: ends inside {shown(self._path)}, at byte {self._source.offset}")


def _is_header(block: bytes) -> bool:
    """Tell whether the checksum of a header block is right."""
    # Adler-32 holds the sum of all bytes modulo 65521, which half a block cannot reach (RFC 1950,
    # 8.2); this takes a seventh of the time of sum(). The field counts as eight spaces.
    field = block[148:156]
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2 - sum(field) + 8 * 32
    try:
        stored = int(field.strip(b" \0"), 8)
    except ValueError:
        return False
    # Some old programs summed signed bytes.
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _prefix_of_old_go(block: bytes) -> bytes:
    """Return the prefix in a GNU header, which has access and change times in its place, b'' when those are there.

    Docker before 1.13 wrote it, compiled by a Go before 1.8; archive/tar looks for it to this day.
    """
    try:
        for at in (345, 357):
            _number(block[at : at + 12])
    except LayerError:
        prefix = block[345:500].partition(b"\0")[0]
        return prefix if prefix.isascii() else b""
    return b""


def _numbers(block: bytes, records: dict[bytes, bytes]) -> tuple[int, int, int, int, int]:
    """Return mode, uid, gid, size and time in nanoseconds."""
    if plain := _NUMBERS.match(block, 100):
        mode, uid, gid, size, mtime = [int(field, 8) for field in plain.groups()]
        if not records:  # all of them are small
            return mode, uid, gid, size, mtime * 1_000_000_000
    else:
        mode = _number(block[100:108])
        uid = _number(block[108:116])
        gid = _number(block[116:124])
        size = _number(block[124:136])
        mtime = _number(block[136:148])
    mtime_ns = mtime * 1_000_000_000
    if text := records.get(b"uid"):
        uid = parse_decimal(text)
    if text := records.get(b"gid"):
        gid = parse_decimal(text)
    if text := records.get(b"size"):
        size = parse_decimal(text)
    if text := records.get(b"mtime"):
        mtime_ns = parse_time(text)
    if not 0 <= uid <= _MAX_ID or not 0 <= gid <= _MAX_ID:
        raise LayerError(f"its owner {uid}:{gid} is not within 0 and {_MAX_ID}")
    if not 0 <= size <= _MAX_INT64:
        raise LayerError(f"it has the impossible size {size}")
    if abs(mtime_ns) > _MAX_INT64:
        raise LayerError(f"its time, {mtime_ns // 1_000_000_000} s, does not fit nanoseconds in 64 bits")
    return mode, uid, gid, size, mtime_ns


def _number(field: bytes) -> int:
    """Return the value of a header field: octal digits, or big-endian with the first bit set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        value -= 1 << (bits if field[0] & 0x40 else bits - 1)
        if abs(value) > _MAX_INT64:
            raise LayerError("corrupt archive: a number in a header does not fit 64 bits")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    # int() also takes signs, underscores and spaces.
    if digits.translate(None, b"01234567"):
        raise LayerError(f"corrupt archive: {shown(digits)} in a header is not an octal number")
    return int(digits, 8)


def _segments(numbers: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return offsets and lengths in pairs, without empty ones, after checking that they are in order."""
    end = 0
    segments = []
    for offset, length in zip(numbers[::2], numbers[1::2], strict=True):
        if offset < end or length < 0 or offset + length > size:
            raise LayerError("its sparse map is not in order, or goes past its end")
        end = offset + length
        if length:
            segments.append((offset, length))
    if size > _MAX_INT64:
        raise LayerError(f"it has the impossible size {size}")
    return segments


def _too_many_segments() -> LayerError:
    return LayerError(f"it is sparse with more than {MAX_SEGMENTS} parts")
