"""What a squashfs image holds, read here: names, inodes, attributes and data. No root, no program.

The format is that of Linux Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h, version
4.0, all numbers little-endian:

    image     = superblock, blocks of files and fragments, tables
    tables    = inodes, folders, fragments, owners, attributes: metadata blocks of 8192 bytes, compressed,
                each after its length in 16 bits, of which the highest says 'not compressed'
    reference = place of a metadata block in its table, shifted by 16, and the byte in what it holds
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.decompressors import DECOMPRESSORS
from fledge_tasks.filesystems.ext4_read import Found
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind

_MAGIC = 0x73717368
_SUPERBLOCK = struct.Struct("<IIIIIHHHHHHQQQQQQQQ")
_COMPRESSIONS = {1: "gzip", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
_BLOCK_LOGS = range(12, 21)  # 4 KiB to 1 MiB
_METADATA_BYTES = 8192
_METADATA_PLAIN, _DATA_PLAIN = 1 << 15, 1 << 24
_NONE, _NOWHERE = 0xFFFFFFFF, (1 << 64) - 1
_INODE = struct.Struct("<HHHHII")
_TYPES = {1: Kind.DIRECTORY, 2: Kind.FILE, 3: Kind.SYMLINK, 4: Kind.BLOCK_DEVICE, 5: Kind.CHAR_DEVICE, 6: Kind.FIFO,
          7: Kind.SOCKET}  # fmt: skip
_EXTENDED = 7  # added to a type
_PREFIXES = {0: b"user.", 1: b"trusted.", 2: b"security."}
_VALUE_ELSEWHERE = 0x100
_CACHED_BLOCKS = 1 << 12


class _File:
    """Where the data of a file lie: the place of each of its blocks, and the sizes as they stand in the inode."""

    __slots__ = ("fragment", "offset", "places", "size", "sizes")

    def __init__(self, start: int, size: int, fragment: int, offset: int, sizes: tuple[int, ...]) -> None:
        self.size, self.fragment, self.offset, self.sizes = size, fragment, offset, sizes
        self.places = list(itertools.accumulate((each & ~_DATA_PLAIN for each in sizes), initial=start))


class SquashfsImage:
    """An image that is open for reading, with the face of `ext4_read.Ext4Image`. Made by `opened`.

    Inodes go by their references. Everything raises FilesystemError for what is damaged.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        head = os.pread(fd, _SUPERBLOCK.size, 0)
        if len(head) < _SUPERBLOCK.size or head[:4] != struct.pack("<I", _MAGIC):
            raise FilesystemError("no squashfs superblock")
        (_, inodes, _, self._block_bytes, fragments, compression, block_log, _, ids, major, minor, self.root, used,
         id_table, xattr_table, self._inode_table, self._folder_table, fragment_table, lookup_table) = (
            _SUPERBLOCK.unpack(head)
        )  # fmt: skip
        if (major, minor) != (4, 0) or compression not in _COMPRESSIONS or self._block_bytes != 1 << block_log:
            raise FilesystemError(f"squashfs {major}.{minor} with compression {compression}, which is unknown here")
        if block_log not in _BLOCK_LOGS:
            raise FilesystemError(f"blocks of 2^{block_log} bytes, which Linux does not read")
        if used > os.fstat(fd).st_size:
            raise FilesystemError(f"cut short: the superblock tells of {used} bytes")
        self._decompress = DECOMPRESSORS[_COMPRESSIONS[compression]]
        self._metadata = functools.lru_cache(_CACHED_BLOCKS)(self._read_metadata)
        self._data = functools.lru_cache(8)(self._read_data)
        self._files: dict[int, _File] = {}
        # From the last table to the first: Linux wants each to end where the next one begins (fs/squashfs/super.c).
        self._used = self._next_table = used
        self._xattr_table, self._xattr_ids = 0, list[tuple[int, int, int]]()
        if xattr_table != _NOWHERE:
            self._xattr_table, count = struct.unpack("<QI4x", self._exactly(xattr_table, 16))
            self._xattr_ids = list(struct.iter_unpack("<QII", self._table(xattr_table + 16, count * 16)))
            self._next_table = self._xattr_table
        self._ids = struct.unpack(f"<{ids}I", self._table(id_table, ids * 4))
        if lookup_table != _NOWHERE:  # of inodes by number, for NFS
            self._table(lookup_table, inodes * 8)
        self._fragments = list(struct.iter_unpack("<QI4x", self._table(fragment_table, fragments * 16)))
        if not self._inode_table < self._folder_table <= self._next_table:
            raise FilesystemError("its tables do not follow each other")

    def inode(self, number: int) -> Found:
        """Return an inode."""
        try:
            return self._inode(number)
        except (struct.error, LookupError, FilesystemError) as error:
            raise FilesystemError(f"damaged: {error}", where=f"inode {number:#x}") from None

    def _inode(self, number: int) -> Found:
        reader = self._reader(self._inode_table, number)
        base, mode, uid, gid, mtime, _ = reader.take(_INODE)
        is_extended = base > _EXTENDED
        kind = _TYPES[base - _EXTENDED * is_extended]
        links, size, xattrs, link, rdev = 1, 0, _NONE, b"", (0, 0)
        extents: tuple[Extent, ...] = ()
        if kind is Kind.DIRECTORY:
            links, xattrs = self._folder(reader, is_extended)[3:]
        elif kind is Kind.FILE:
            file, links, xattrs = self._file(reader, is_extended)
            self._files[number] = file
            size, extents = file.size, tuple(self._extents(file))
        elif kind is Kind.SYMLINK:
            links, length = reader.unpack("<II")
            link = reader.read(length)
            xattrs = reader.unpack("<I")[0] if is_extended else _NONE
        else:
            (links,) = reader.unpack("<I")
            if kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
                (device,) = reader.unpack("<I")
                rdev = device >> 8 & 0xFFF, device & 0xFF | device >> 12 & ~0xFF  # new_decode_dev
            xattrs = reader.unpack("<I")[0] if is_extended else _NONE
        return Found(
            number, kind, stat.S_IMODE(mode), self._ids[uid], self._ids[gid], mtime * 1_000_000_000, size, links, link,
            rdev, self._xattrs(xattrs), extents,
        )  # fmt: skip

    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        """Return inode number and kind of each name in a folder."""
        try:
            return self._names(number)
        except (struct.error, LookupError, FilesystemError) as error:
            raise FilesystemError(f"damaged: {error}", where=f"inode {number:#x}") from None

    def _names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        reader = self._reader(self._inode_table, number)
        base = reader.take(_INODE)[0]
        block, offset, left, *_ = self._folder(reader, base > _EXTENDED)
        left -= 3  # the size counts '.' and '..'
        listing = self._reader(self._folder_table, block << 16 | offset)
        found: dict[bytes, tuple[int, Kind]] = {}
        last = b""
        while left > 0:
            count, inode_block, _ = listing.unpack("<III")
            left -= 12
            for _ in range(count + 1):
                inode_offset, _, kind, length = listing.unpack("<HhHH")
                name = listing.read(length + 1)
                left -= 8 + length + 1
                if name <= last:
                    raise FilesystemError(f"the name {name!r} is out of order")
                found[name] = inode_block << 16 | inode_offset, _TYPES[kind]
                last = name
        if left:
            raise FilesystemError("its names do not end where its size says")
        return found

    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes:
        """Return `count` blocks of 4096 bytes of a file from its block `start` on, filled up with zeros."""
        del extent
        file = self._files[found.number]
        offset, end = start * BLOCK_BYTES, (start + count) * BLOCK_BYTES
        parts = []
        while offset < min(end, file.size):
            number, inside = divmod(offset, self._block_bytes)
            part = self._block(file, number)[inside : inside + end - offset]
            if not part:
                raise FilesystemError("its data end too early", where=f"inode {found.number:#x}")
            parts.append(part)
            offset += len(part)
        return b"".join(parts).ljust(count * BLOCK_BYTES, b"\0")

    def _folder(self, reader: _Reader, is_extended: bool) -> tuple[int, int, int, int, int]:
        """Return (block, offset, size, links, attributes) of a folder."""
        if is_extended:
            links, size, block, _, _, offset, xattrs = reader.unpack("<IIIIHHI")
            return block, offset, size, links, xattrs
        block, links, size, offset, _ = reader.unpack("<IIHHI")
        return block, offset, size, links, _NONE

    def _file(self, reader: _Reader, is_extended: bool) -> tuple[_File, int, int]:
        """Return (data, links, attributes) of a file."""
        links, xattrs = 1, _NONE
        if is_extended:
            start, size, _, links, fragment, offset, xattrs = reader.unpack("<QQQIIII")
        else:
            start, fragment, offset, size = reader.unpack("<IIII")
        count = size // self._block_bytes if fragment != _NONE else -(-size // self._block_bytes)
        return _File(start, size, fragment, offset, reader.unpack(f"<{count}I")), links, xattrs

    def _extents(self, file: _File) -> Iterator[Extent]:
        """Yield the parts of a file that are not holes: a block of the size 0 is one."""
        per = self._block_bytes // BLOCK_BYTES
        start = None
        for number in range(len(file.sizes) + 1):
            has_data = number < len(file.sizes) and file.sizes[number] != 0
            if has_data and start is None:
                start = number
            elif not has_data and start is not None:
                end = min(number * per, -(-file.size // BLOCK_BYTES))
                yield Extent(start * per, start * per, end - start * per, is_unwritten=False)
                start = None
        if file.fragment != _NONE:
            first, end = len(file.sizes) * per, -(-file.size // BLOCK_BYTES)
            yield Extent(first, first, end - first, is_unwritten=False)

    def _block(self, file: _File, number: int) -> bytes:
        """Return one block of a file, its last one as long as the file has it."""
        length = min(self._block_bytes, file.size - number * self._block_bytes)
        if number >= len(file.sizes):
            if file.fragment >= len(self._fragments):
                raise FilesystemError(f"there is no fragment {file.fragment}")
            start, size = self._fragments[file.fragment]
            return self._data(start, size)[file.offset : file.offset + length]
        size = file.sizes[number]
        return self._data(file.places[number], size)[:length] if size else bytes(length)

    def _read_data(self, start: int, size: int) -> bytes:
        data = self._exactly(start, size & ~_DATA_PLAIN)
        return data if size & _DATA_PLAIN else self._decompress(data, self._block_bytes)

    def _xattrs(self, index: int) -> dict[bytes, bytes]:
        if index == _NONE:
            return {}
        reference, count, _ = self._xattr_ids[index]
        reader = self._reader(self._xattr_table, reference)
        found = {}
        for _ in range(count):
            prefix, length = reader.unpack("<HH")
            name = _PREFIXES[prefix & 0xFF] + reader.read(length)
            (length,) = reader.unpack("<I")
            if prefix & _VALUE_ELSEWHERE:
                value = self._reader(self._xattr_table, *reader.unpack("<Q"))
                found[name] = value.read(*value.unpack("<I"))
            else:
                found[name] = reader.read(length)
        return found

    def _table(self, at: int, length: int) -> bytes:
        """Return a table that is found by a list of the places of its metadata blocks, and stands before it."""
        count = -(-length // _METADATA_BYTES)
        if not count:
            return b""
        if at + count * 8 != self._next_table:
            raise FilesystemError("its tables do not follow each other")
        places = struct.unpack(f"<{count}Q", self._exactly(at, count * 8))
        self._next_table = places[0]
        return b"".join(self._metadata(place)[0] for place in places)[:length]

    def _reader(self, table: int, reference: int) -> _Reader:
        return _Reader(self, table + (reference >> 16), reference & 0xFFFF)

    def _read_metadata(self, at: int) -> tuple[bytes, int]:
        """Return what a metadata block holds, and where the next one begins."""
        (header,) = struct.unpack("<H", self._exactly(at, 2))
        size = header & ~_METADATA_PLAIN
        data = self._exactly(at + 2, size)
        return data if header & _METADATA_PLAIN else self._decompress(data, _METADATA_BYTES), at + 2 + size

    def metadata(self, at: int) -> tuple[bytes, int]:
        """Return `_read_metadata`, remembered."""
        return self._metadata(at)

    def _exactly(self, at: int, length: int) -> bytes:
        data = os.pread(self._fd, length, at) if at + length <= self._used else b""
        if len(data) < length:
            raise FilesystemError(f"{length} bytes at {at} lie outside of the image")
        return data


class _Reader:
    """Reads on in metadata blocks, from one into the next."""

    def __init__(self, image: SquashfsImage, at: int, offset: int) -> None:
        self._image = image
        self._block, self._next = image.metadata(at)
        self._offset = offset

    def read(self, length: int) -> bytes:
        """Return the next bytes."""
        parts = []
        while length:
            part = self._block[self._offset : self._offset + length]
            if not part:
                self._block, self._next = self._image.metadata(self._next)
                self._offset = 0
                if not self._block:
                    raise FilesystemError("an empty metadata block")
                continue
            parts.append(part)
            self._offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        """Return the next record."""
        return form.unpack(self.read(form.size))

    def unpack(self, form: str) -> tuple[int, ...]:
        """Return the next record, its form given as text."""
        return struct.unpack(form, self.read(struct.calcsize(form)))


@contextlib.contextmanager
def opened(image: Path) -> Iterator[SquashfsImage]:
    """Open an image for reading. Raises FilesystemError, OSError."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield SquashfsImage(fd)
    except struct.error as error:
        raise FilesystemError(f"damaged: {error}") from None
    finally:
        os.close(fd)
