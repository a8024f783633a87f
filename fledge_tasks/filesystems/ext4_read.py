"""What an ext4 image holds, as libext2fs finds it: names, inodes and where file data lies.

Nothing of the writer is used: inodes are taken apart here, folders, extent trees and extended
attributes by the library, which checks their checksums on the way.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.libext2fs import Ext2Reader, Extent, opened_for_reading
from fledge_tasks.oci.layer_index import BLOCK_BYTES, FILE_TYPES, Kind

ROOT = 2
_FLAG_EXTENTS = 0x80000
_POSIX_ACL = b"system.posix_acl_"
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_WITH_ID = {0x02, 0x08}  # ACL_USER, ACL_GROUP
_ACL_NO_ID = 0xFFFFFFFF
KINDS = {file_type: kind for kind, file_type in FILE_TYPES.items()}
# struct ext2_dir_entry's file type, 'Linear (Classic) Directories' in the ext4 documentation.
_TYPES = {1: Kind.FILE, 2: Kind.DIRECTORY, 3: Kind.CHAR_DEVICE, 4: Kind.BLOCK_DEVICE, 5: Kind.FIFO, 6: Kind.SOCKET,
          7: Kind.SYMLINK}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """An inode of the image; the fields are those of `layer_index.Entry`. `extents` are in order."""

    number: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    links: int
    link: bytes
    rdev: tuple[int, int]
    xattrs: dict[bytes, bytes]
    extents: tuple[Extent, ...]


class Ext4Image:
    """An image that is open for reading. Made by `opened`.

    `inode` and `names` raise FilesystemError for whatever the library finds damaged.
    """

    root = ROOT

    def __init__(self, reader: Ext2Reader, fd: int) -> None:
        self._reader = reader
        self._fd = fd

    def inode(self, number: int) -> Found:
        """Return an inode ('Index Nodes' in the ext4 documentation)."""
        data = self._reader.inode(number)
        mode, uid, size, _, _, mtime, _, gid, links, _, flags = struct.unpack_from("<HHIIIIIHHII", data)
        size_high, = struct.unpack_from("<I", data, 108)  # fmt: skip
        uid_high, gid_high = struct.unpack_from("<HH", data, 120)
        mtime_extra, = struct.unpack_from("<I", data, 136)  # fmt: skip
        kind = KINDS.get(stat.S_IFMT(mode))
        if kind is None:
            raise FilesystemError(f"the unknown file type {stat.S_IFMT(mode):#o}", where=f"inode {number}")
        extents = tuple(self._reader.extents(number)) if flags & _FLAG_EXTENTS else ()
        size |= size_high << 32
        link, rdev = b"", (0, 0)
        if kind is Kind.SYMLINK:
            link = (self._read(extents[0].physical, 1) if extents else data[40:100])[:size]
        elif kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
            rdev = _device(*struct.unpack_from("<II", data, 40))
        return Found(
            number, kind, stat.S_IMODE(mode), uid_high << 16 | uid, gid_high << 16 | gid, _time_ns(mtime, mtime_extra),
            size, links, link, rdev, self._xattrs(number), extents,
        )  # fmt: skip

    def _xattrs(self, number: int) -> dict[bytes, bytes]:
        return {
            name: _posix_acl(value, number) if name.startswith(_POSIX_ACL) else value
            for name, value in self._reader.xattrs(number).items()
        }

    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        """Return inode number and kind of each name in a folder, without '.' and '..'."""
        found: dict[bytes, tuple[int, Kind]] = {}
        for name, inode, file_type in self._reader.names(number):
            if name in {b".", b".."}:
                continue
            if name in found:
                raise FilesystemError(f"the name {name!r} twice", where=f"inode {number}")
            kind = _TYPES.get(file_type)
            if kind is None:
                raise FilesystemError(f"the unknown file type {file_type} for {name!r}", where=f"inode {number}")
            found[name] = inode, kind
        return found

    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes:
        """Return `count` blocks of a file, all in one extent, from its block `start` on; fewer at the image's end."""
        del found
        return self._read(extent.physical + start - extent.logical, count)

    def _read(self, block: int, count: int) -> bytes:
        return os.pread(self._fd, count * BLOCK_BYTES, block * BLOCK_BYTES)


@contextlib.contextmanager
def opened(image: Path) -> Iterator[Ext4Image]:
    """Open an image for reading. Raises FilesystemError, OSError."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with opened_for_reading(image) as reader:
            yield Ext4Image(reader, fd)
    finally:
        os.close(fd)


def _time_ns(seconds: int, extra: int) -> int:
    """Return nanoseconds since the epoch ('Inode Timestamps' in the ext4 documentation)."""
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return (signed + ((extra & 3) << 32)) * 1_000_000_000 + (extra >> 2)


def _device(old: int, new: int) -> tuple[int, int]:
    """Return (major, minor) of i_block's first two words (fs/ext4/inode.c, old_decode_dev, new_decode_dev)."""
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & ~0xFF


def _posix_acl(value: bytes, number: int) -> bytes:
    """Return an ACL in the form of setxattr(2) (linux/posix_acl_xattr.h).

    ext4 leaves out the ids of entries that have none (fs/ext4/acl.h). The library has a conversion, too, but gives
    them the id 0, not that of 'undefined'.
    """
    converted = bytearray(struct.pack("<I", 2))
    at = 4
    while at < len(value):
        tag, permissions, identity = _ACL_ENTRY.unpack(value[at : at + 8].ljust(8, b"\0"))
        has_id = tag in _ACL_WITH_ID
        converted += _ACL_ENTRY.pack(tag, permissions, identity if has_id else _ACL_NO_ID)
        at += 8 if has_id else 4
    if value[:4] != struct.pack("<I", 1) or at != len(value):
        raise FilesystemError(f"a malformed ACL: 0x{value.hex()}", where=f"inode {number}")
    return bytes(converted)
