"""What an EROFS image holds, read here: names, inodes, attributes and data, compressed or not. No root, no program.

Nothing of the writer is used. The format is that of Linux Documentation/filesystems/erofs.rst and
fs/erofs/erofs_fs.h: what Linux 5.10 reads, no more. An inode is found by its place, see `erofs_write`;
attributes stand behind it, or in a table that inodes share; behind them the end of a folder or link,
or of a compressed file what tells where its data lie, see `erofs_clusters`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import erofs_clusters
from fledge_tasks.filesystems.erofs_clusters import Cluster
from fledge_tasks.filesystems.ext4_read import KINDS, Found
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.fsutil import data_ranges
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind

_SUPERBLOCK_AT = 1024
_MAGIC = 0xE0F5E1E2
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI")
_COMPAT_CHECKSUM = 1
_INCOMPAT_ZERO_PADDING = 1  # LZ4_0PADDING: compressed data stand at the end of their block
_COMPACT, _EXTENDED = struct.Struct("<HHHHIIIIHHI"), struct.Struct("<HHHHQIIIIQII16x")
_PLAIN, _INLINE, _COMPRESSED = 0, 2, 3
_NAME = struct.Struct("<QHBx")
_NAME_TYPES = {1: Kind.FILE, 2: Kind.DIRECTORY, 3: Kind.CHAR_DEVICE, 4: Kind.BLOCK_DEVICE, 5: Kind.FIFO,
               6: Kind.SOCKET, 7: Kind.SYMLINK}  # fmt: skip
_XATTR_PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.",
                   6: b"security."}  # fmt: skip
_MAX_LINK_BYTES = 4096
_CASTAGNOLI = 0x82F63B78


@dataclass(frozen=True)
class _Node:
    """An inode as it stands there. `end` is where its attributes end; `place` is a block, or a device's number."""

    mode: int
    size: int
    layout: int
    place: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    xattrs_at: int
    end: int


class ErofsImage:
    """An image that is open for reading, with the face of `ext4_read.Ext4Image`. Made by `opened`.

    Everything raises FilesystemError for what is damaged, or more than Linux 5.10 knows.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.fstat(fd).st_size
        block = os.pread(fd, BLOCK_BYTES - _SUPERBLOCK_AT, _SUPERBLOCK_AT)
        if len(block) < _SUPERBLOCK.size or block[:4] != struct.pack("<I", _MAGIC):
            raise FilesystemError("no EROFS superblock")
        (_, checksum, compatible, block_bits, _, root, _, self._time, self._time_ns, blocks, meta_block,
         xattr_block, _, _, features) = _SUPERBLOCK.unpack_from(block)  # fmt: skip
        if compatible & _COMPAT_CHECKSUM and _checksum(block[:4] + bytes(4) + block[8:]) != checksum:
            raise FilesystemError("the checksum of the superblock is wrong")
        if block_bits != BLOCK_BYTES.bit_length() - 1 or features & ~_INCOMPAT_ZERO_PADDING:
            message = f"blocks of 2^{block_bits} bytes, features {features:#x}: more than Linux 5.10 reads"
            raise FilesystemError(message)
        if blocks * BLOCK_BYTES > self._size:
            raise FilesystemError(f"cut short: the superblock tells of {blocks} blocks")
        self.root: int = root
        self._meta: int = meta_block * BLOCK_BYTES
        self._xattrs: int = xattr_block * BLOCK_BYTES
        self._is_compressed = bool(features & _INCOMPAT_ZERO_PADDING)
        # What is not among these is a hole of the image's file: zeros, without looking.
        ranges = [(start, start + length) for start, length in data_ranges(fd, self._size)]
        self._starts, self._ends = [start for start, _ in ranges], [end for _, end in ranges]
        self._clusters: dict[int, erofs_clusters.Clusters] = {}

    def place(self, number: int) -> int:
        """Return where in the image an inode begins."""
        return self._meta + number * 32

    def inode(self, number: int) -> Found:
        """Return an inode."""
        try:
            return self._found(number, self._node(number))
        except (struct.error, LookupError, FilesystemError) as error:
            raise FilesystemError(f"damaged: {error}", where=f"inode {number}") from None

    def _found(self, number: int, node: _Node) -> Found:
        kind = KINDS[stat.S_IFMT(node.mode)]
        link, rdev = b"", (0, 0)
        extents: tuple[Extent, ...] = ()
        if kind is Kind.SYMLINK:
            begin = self.place(number) % BLOCK_BYTES
            if node.layout == _INLINE and begin + node.end - self.place(number) + node.size > BLOCK_BYTES:
                # fs/erofs/inode.c, erofs_fill_symlink; later versions look at the end of the attributes alone.
                raise FilesystemError(f"Linux 5.10 cannot read its {node.size} bytes, not in one block with the inode")
            if node.size > _MAX_LINK_BYTES:
                raise FilesystemError(f"a link of {node.size} bytes")
            link = self._read(number, node, 0, node.size)
        elif kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
            rdev = node.place >> 8 & 0xFFF, node.place & 0xFF | node.place >> 12 & ~0xFF  # new_decode_dev
        elif kind is Kind.FILE:
            extents = tuple(self._extents(node))
        return Found(
            number, kind, stat.S_IMODE(node.mode), node.uid, node.gid, node.mtime_ns,
            node.size if kind is Kind.FILE else 0, node.links, link, rdev, self._attributes(node), extents,
        )  # fmt: skip

    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        """Return inode number and kind of each name in a folder, without '.' and '..'."""
        try:
            node = self._node(number)
            if not stat.S_ISDIR(node.mode):
                raise FilesystemError("not a folder")
            return self._names(number, node)
        except (struct.error, LookupError, FilesystemError) as error:
            raise FilesystemError(f"damaged: {error}", where=f"inode {number}") from None

    def _names(self, number: int, node: _Node) -> dict[bytes, tuple[int, Kind]]:
        found: dict[bytes, tuple[int, Kind]] = {}
        last = b""
        for start in range(0, node.size, BLOCK_BYTES):
            block = self._read(number, node, start, min(BLOCK_BYTES, node.size - start))
            (first,) = struct.unpack_from("<H", block, 8)
            if first % _NAME.size or not _NAME.size <= first <= len(block):
                raise FilesystemError("a block of names does not say how many they are")
            entries = list(_NAME.iter_unpack(block[:first]))
            ends = [at for _, at, _ in entries[1:]] + [len(block)]
            for (below, at, kind), end in zip(entries, ends, strict=True):
                name = block[at:end]
                if end == len(block):
                    name = name.partition(b"\0")[0]  # only the last one of a block is followed by zeros
                if name <= last:
                    raise FilesystemError(f"the name {name!r} is out of order")
                last = name
                found[name] = below, _NAME_TYPES[kind]
        for name in (b".", b".."):
            if found.pop(name, (0, None))[1] is not Kind.DIRECTORY:
                raise FilesystemError(f"the name {name!r} is missing")
        return found

    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes:
        """Return `count` blocks of a file from its block `start` on, filled up with zeros."""
        del extent
        node = self._node(found.number)
        length = min(count * BLOCK_BYTES, node.size - start * BLOCK_BYTES)
        return self._read(found.number, node, start * BLOCK_BYTES, length).ljust(count * BLOCK_BYTES, b"\0")

    def _node(self, number: int) -> _Node:
        at = self.place(number)
        (form,) = struct.unpack("<H", self._exactly(at, 2))
        if form >> 4:
            raise FilesystemError(f"an inode of the unknown form {form:#x}")
        if form & 1:
            (_, count, mode, _, size, place, _, uid, gid, seconds, nanoseconds, links) = _EXTENDED.unpack(
                self._exactly(at, _EXTENDED.size)
            )
            seconds -= (seconds & 1 << 63) << 1  # a signed number
            at += _EXTENDED.size
        else:
            (_, count, mode, links, size, _, place, _, uid, gid, _) = _COMPACT.unpack(self._exactly(at, _COMPACT.size))
            seconds, nanoseconds = self._time, self._time_ns
            at += _COMPACT.size
        xattr_bytes = 12 + (count - 1) * 4 if count else 0
        return _Node(
            mode, size, form >> 1, place, uid, gid, seconds * 1_000_000_000 + nanoseconds, links, at, at + xattr_bytes
        )  # fmt: skip

    def _attributes(self, node: _Node) -> dict[bytes, bytes]:
        """Return the attributes behind an inode, and those that it shares with others (struct erofs_xattr_entry)."""
        if node.end == node.xattrs_at:
            return {}
        data = self._exactly(node.xattrs_at, node.end - node.xattrs_at)
        shared = data[4]
        found = {}
        for index in struct.unpack_from(f"<{shared}I", data, 12):
            name_length, _, length = struct.unpack("<BBH", self._exactly(self._xattrs + index * 4, 4))
            name, value, _ = _attribute(self._exactly(self._xattrs + index * 4, 4 + name_length + length), 0)
            found[name] = value
        at = 12 + shared * 4
        while at + 4 <= len(data):
            name, value, at = _attribute(data, at)
            found[name] = value
        return found

    def _extents(self, node: _Node) -> Iterator[Extent]:
        """Yield the parts of a file that are not holes of the image's file."""
        count = -(-node.size // BLOCK_BYTES)
        if node.layout != _PLAIN:
            yield from [Extent(0, 0, count, is_unwritten=False)] * (count > 0)
            return
        first, end = node.place * BLOCK_BYTES, (node.place + count) * BLOCK_BYTES
        at = max(0, bisect_right(self._starts, first) - 1)
        while at < len(self._starts) and self._starts[at] < end:
            start = max(self._starts[at], first) // BLOCK_BYTES - node.place
            stop = -(-min(self._ends[at], end) // BLOCK_BYTES) - node.place
            if start < stop:
                yield Extent(start, node.place + start, stop - start, is_unwritten=False)
            at += 1

    def _read(self, number: int, node: _Node, offset: int, length: int) -> bytes:
        """Return bytes of a file, folder or link."""
        if node.layout == _COMPRESSED and self._is_compressed:
            return self._decompressed(number, node, offset, length)
        if node.layout not in {_PLAIN, _INLINE}:
            raise FilesystemError(f"data in the unknown layout {node.layout}")
        whole = node.size - node.size % BLOCK_BYTES if node.layout == _INLINE else node.size
        outside = min(length, max(0, whole - offset))
        data = self._exactly(node.place * BLOCK_BYTES + offset, outside) if outside else b""
        if outside < length:
            inside = offset + outside - whole
            if node.end % BLOCK_BYTES + node.size - whole > BLOCK_BYTES:
                raise FilesystemError("its data behind the inode are not in one block")
            data += self._exactly(node.end + inside, length - outside)
        return data

    def _decompressed(self, number: int, node: _Node, offset: int, length: int) -> bytes:
        clusters = self._clusters.get(number)
        if clusters is None:
            clusters = erofs_clusters.read(self._exactly, node.end, node.size)
            self._clusters = {number: clusters}  # the others were of files that were read
        parts = []
        end = offset + length
        for cluster in clusters.covering(offset, end):
            data = self._cluster(cluster)
            parts.append(data[max(0, offset - cluster.start) : end - cluster.start])
        return b"".join(parts)

    def _cluster(self, cluster: Cluster) -> bytes:
        return erofs_clusters.data(cluster, self._exactly(cluster.block * BLOCK_BYTES, BLOCK_BYTES))

    def _exactly(self, at: int, length: int) -> bytes:
        data = os.pread(self._fd, length, at) if at + length <= self._size else b""
        if len(data) < length:
            raise FilesystemError(f"{length} bytes at {at} lie outside of the image")
        return data


@contextlib.contextmanager
def opened(image: Path) -> Iterator[ErofsImage]:
    """Open an image for reading. Raises FilesystemError, OSError."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield ErofsImage(fd)
    finally:
        os.close(fd)


def _attribute(data: bytes, at: int) -> tuple[bytes, bytes, int]:
    """Return name and value of the attribute at a place, and where the next one begins."""
    name_length, prefix, length = struct.unpack_from("<BBH", data, at)
    name, end = at + 4 + name_length, at + 4 + name_length + length
    if end > len(data):
        raise FilesystemError("an extended attribute goes beyond its end")
    return _XATTR_PREFIXES[prefix] + data[at + 4 : name], data[name:end], end + -end % 4


def _checksum(data: bytes) -> int:
    """Return the CRC-32C bit by bit, as Linux has it: not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ _CASTAGNOLI * (crc & 1)
    return crc
