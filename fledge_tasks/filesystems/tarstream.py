"""A merged tree as an archive, for programs that make filesystems from one: no tree on the host's disk.

The format is pax (POSIX.1-2001, 'pax Interchange Format'), with what star, libarchive and GNU tar added
to it: `SCHILY.xattr.*`, `LIBARCHIVE.xattr.*` for names that hold '=', and `GNU.sparse.*` of version 1.0
for holes (GNU tar manual, 'Storing Sparse Files'). Folders come before what is in them, the first
name of an inode before its others, which are hard links. Data go from the payloads into the pipe
inside the kernel.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import itertools
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fledge_tasks.errors import FilesystemError
from fledge_tasks.fsutil import write_all
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind, Run, file_runs
from fledge_tasks.tree import Inode, show, walk

_TAR_BYTES = 512
_NAME_BYTES = 100
_TYPES = {
    Kind.FILE: b"0", Kind.HARDLINK: b"1", Kind.SYMLINK: b"2", Kind.CHAR_DEVICE: b"3", Kind.BLOCK_DEVICE: b"4",
    Kind.DIRECTORY: b"5", Kind.FIFO: b"6",
}  # fmt: skip
_MAX_ID, _MAX_NUMBER = 0o7777777, 0o77777777777  # what the octal fields hold
_MAX_HOLES = 60_000
_PENDING_BYTES = 1 << 16
_ZERO = bytes(1 << 20)
_HOLE = -1


@dataclass(frozen=True)
class Reader:
    """What the program at the other end can take.

    program           its name, for messages
    time_ns           nanoseconds of an entry to those that the filesystem can hold
    max_header_bytes  what the extended header of a member may come to
    has_root          whether it takes owner, mode and time of the root from a member './'
    has_holes         whether it knows sparse members; else holes are written as zeros
    has_any_name      whether it knows LIBARCHIVE.xattr as libarchive writes it
    """

    program: str
    time_ns: Callable[[int], int]
    max_header_bytes: int
    has_root: bool
    has_holes: bool
    has_any_name: bool


def write(fd: int, root: Inode, sources: Mapping[int, int], reader: Reader) -> None:
    """Write the tree to the pipe `fd`; `sources` are descriptors of payloads.

    Raises FilesystemError, naming the path, for what an archive or the reader cannot hold; OSError.
    """
    _widen(fd)
    first: dict[int, bytes] = {}
    pending = bytearray()
    for path, inode in walk(root):
        entry = inode.entry
        if not path and not reader.has_root:
            continue
        if id(inode) in first:
            pending += _member(path, Kind.HARDLINK, entry, reader, link=first[id(inode)])
            continue
        first[id(inode)] = path
        runs: Sequence[Run] = file_runs(entry) if entry.kind is Kind.FILE else ()
        pieces: list[tuple[int, int]] = []
        if entry.runs is not None:
            runs = _told_runs(entry) if reader.has_holes and entry.size else list(_with_holes(entry, runs))
            pieces = _pieces(entry, runs)
        if len(pieces) > 1:
            pending += _sparse_member(path, entry, reader, pieces)
        else:
            pending += _member(path, entry.kind, entry, reader, size=entry.size)
        if runs or len(pending) >= _PENDING_BYTES:
            write_all(fd, pending)
            pending.clear()
        for run in runs:
            length = _padded(_length(entry, run))
            if run.payload == _HOLE:
                _write_zeros(fd, length)
            else:
                # The rest of a payload's last block is zeros, as is what fills an archive's.
                _send(fd, sources[inode.source], run.payload * BLOCK_BYTES, length)
    write_all(fd, pending + bytes(2 * _TAR_BYTES))


def _member(
    path: bytes,
    kind: Kind,
    entry: Entry,
    reader: Reader,
    *,
    link: bytes | None = None,
    size: int = 0,
    more: Mapping[bytes, bytes] | None = None,
) -> bytes:
    """Return the headers of a member."""
    if kind not in _TYPES:
        raise FilesystemError(
            f"is a socket, which {reader.program} cannot be told of", where=show(path), hint="choose ext4 or erofs"
        )
    name = (path or b".") + b"/" * (kind is Kind.DIRECTORY)
    link = entry.link if link is None else link
    seconds, fraction = divmod(reader.time_ns(entry.mtime_ns), 1_000_000_000)
    records = dict(more or {})
    if len(name) > _NAME_BYTES:
        records[b"path"] = name
    if len(link) > _NAME_BYTES:
        records[b"linkpath"] = link
    for key, number, most in ((b"uid", entry.uid, _MAX_ID), (b"gid", entry.gid, _MAX_ID), (b"size", size, _MAX_NUMBER)):
        if number > most:
            records[key] = b"%d" % number
    if fraction or not 0 <= seconds <= _MAX_NUMBER:
        records[b"mtime"] = _decimal(reader.time_ns(entry.mtime_ns))
    if kind is not Kind.HARDLINK:
        for attribute in sorted(entry.xattrs):
            if b"=" in attribute and not reader.has_any_name:
                message = (
                    f"its extended attribute {show(attribute)[1:]} cannot be told to {reader.program}: it has a '='"
                )
                raise FilesystemError(message, where=show(path), hint="choose ext4, or erofs without compression")
            key, value = _attribute(attribute, entry.xattrs[attribute])
            records[key] = value
    header = _header(
        name, 0o777 if kind is Kind.SYMLINK else entry.mode, min(entry.uid, _MAX_ID), min(entry.gid, _MAX_ID),
        min(size, _MAX_NUMBER), min(max(seconds, 0), _MAX_NUMBER), _TYPES[kind], link, entry.rdev,
    )  # fmt: skip
    if not records:
        return header
    body = b"".join(_record(key, value) for key, value in records.items())
    if len(body) > reader.max_header_bytes:
        raise FilesystemError(
            f"name and extended attributes take {len(body)} bytes, {reader.program} reads {reader.max_header_bytes}",
            where=show(path),
            hint="choose xfs, btrfs, or erofs without compression",
        )
    extended = _header(b"pax", 0o644, 0, 0, len(body), 0, b"x", b"", (0, 0))
    return extended + body + bytes(_padded(len(body)) - len(body)) + header


def _sparse_member(path: bytes, entry: Entry, reader: Reader, pieces: Sequence[tuple[int, int]]) -> bytes:
    """Return headers and map of a member with holes: offset and length of each piece, as lines."""
    numbers = [len(pieces), *itertools.chain.from_iterable(pieces)]
    text = b"".join(b"%d\n" % number for number in numbers)
    table = text.ljust(_padded(len(text)), b"\0")
    records = {
        b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": path,
        b"GNU.sparse.realsize": b"%d" % entry.size,
    }  # fmt: skip
    size = len(table) + sum(length for _, length in pieces)
    return _member(path, Kind.FILE, entry, reader, size=size, more=records) + table


def _header(
    name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes, link: bytes, rdev: tuple[int, int]
) -> bytes:
    """Return a header block ('ustar Interchange Format'); names that are too long are cut, and stand in records."""
    header = bytearray(
        b"%b%07o\0%07o\0%07o\0%011o\0%011o\0        %b%bustar\00000%64b%07o\0%07o\0%167b" % (
            name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"), mode, uid, gid, size, mtime, kind,
            link[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0"), bytes(64), *rdev, bytes(167),
        )
    )  # fmt: skip
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _record(key: bytes, value: bytes) -> bytes:
    """Return one record; its length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _attribute(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    if b"=" not in name:
        return b"SCHILY.xattr." + name, value
    encoded = base64.b64encode(value).rstrip(b"=")  # libarchive writes no padding either
    return b"LIBARCHIVE.xattr." + urllib.parse.quote_from_bytes(name, safe="").encode(), encoded


def _decimal(nanoseconds: int) -> bytes:
    """Return a time as pax has it, sign and magnitude, with all nine digits: mkfs.erofs takes '.5' for 5 ns."""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    return b"%b%d.%09d" % (b"-" * (nanoseconds < 0), seconds, fraction)


def _told_runs(entry: Entry) -> list[Run]:
    """Return the runs that a sparse member tells of, among them holes that are written as zeros.

    First and last block are told: sqfstar 4.6 misreads a member that ends in a hole, or that has one
    piece alone. Readers take so many pieces at most (squashfs-tools-ng 65,536), so small holes may be zeros.
    """
    end = -(-entry.size // BLOCK_BYTES)
    parts: list[Run] = []
    for part in _with_holes(entry, file_runs(entry)):
        start, stop = part.logical, part.logical + part.count
        if part.payload == _HOLE:
            edges = sorted({start, stop} | {edge for edge in (1, end - 1) if start < edge < stop})
            parts += [Run(edge, _HOLE, following - edge) for edge, following in itertools.pairwise(edges)]
        else:
            parts.append(part)
    holes = [at for at, part in enumerate(parts) if part.payload == _HOLE and 0 < at < len(parts) - 1]
    left_out = set(sorted(holes, key=lambda at: -parts[at].count)[:_MAX_HOLES])
    return [part for at, part in enumerate(parts) if at not in left_out]


def _pieces(entry: Entry, runs: Sequence[Run]) -> list[tuple[int, int]]:
    """Return (offset, length) in bytes of what runs cover, neighbours joined."""
    pieces: list[tuple[int, int]] = []
    for run in runs:
        offset, length = run.logical * BLOCK_BYTES, _length(entry, run)
        if pieces and sum(pieces[-1]) == offset:
            offset, before = pieces.pop()
            length += before
        pieces.append((offset, length))
    return pieces


def _with_holes(entry: Entry, runs: Sequence[Run]) -> Iterator[Run]:
    """Yield the runs of a file and, with the payload block -1, the holes between and behind them."""
    done, end = 0, -(-entry.size // BLOCK_BYTES)
    for run in runs:
        if run.logical > done:
            yield Run(done, _HOLE, run.logical - done)
        yield run
        done = run.logical + run.count
    if done < end:
        yield Run(done, _HOLE, end - done)


def _length(entry: Entry, run: Run) -> int:
    """Return the bytes of a file that are in a run: its last block may be cut short."""
    return min(run.count * BLOCK_BYTES, entry.size - run.logical * BLOCK_BYTES)


def _padded(length: int) -> int:
    return length + -length % _TAR_BYTES


def _send(fd: int, source: int, offset: int, length: int) -> None:
    while length:
        count = os.sendfile(fd, source, offset, length)
        if not count:
            raise OSError(errno.EIO, "a payload ends before the data of a file")
        offset, length = offset + count, length - count


def _write_zeros(fd: int, length: int) -> None:
    while length:
        count = min(length, len(_ZERO))
        write_all(fd, memoryview(_ZERO)[:count])
        length -= count


def _widen(fd: int) -> None:
    """Have the pipe hold more at once, if this user may (fcntl(2), F_SETPIPE_SZ)."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, len(_ZERO))
