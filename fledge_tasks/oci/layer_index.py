"""The index of an unpacked layer: what a tar archive holds, without the file data.

An unpacked layer is two files. `payload` holds the data of all regular files in the order of the
archive, each file starting on a block of 4096 bytes and its last block filled up with zeros.
`index` is one msgpack value:

    index   = [magic, version, entries]      the array of entries always with a 32-bit count
    magic   = "fledge-layer"
    version = 1
    entry   = the fields of `Entry`, in order, as an array

Entries stand in archive order, since that order decides what a layer means (OCI image spec,
'layer.md', 'Applying Changesets'). Paths are already cleaned, not resolved.

Version history: 1 first version.
"""

from __future__ import annotations

import stat
import struct
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import msgspec

from fledge_tasks.errors import NOT_DECODED, StoreError

FORMAT = 1
BLOCK_BYTES = 4096


class Kind(IntEnum):
    """What an entry is. The first seven values are the types of inodes."""

    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2
    CHAR_DEVICE = 3
    BLOCK_DEVICE = 4
    FIFO = 5
    SOCKET = 6
    HARDLINK = 7
    WHITEOUT = 8
    OPAQUE = 9


FILE_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
}
"""The file type bits of st_mode (inode(7))."""


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Payload blocks `payload .. payload+count` are the file's blocks from `logical` on."""

    logical: int
    payload: int
    count: int


class Entry(msgspec.Struct, array_like=True, gc=False, eq=False):
    """One archive member.

    path      cleaned, relative to the root, no leading or trailing '/', b'' for the root itself;
              for WHITEOUT the path that is hidden, for OPAQUE the folder
    mode      permission bits with setuid, setgid and sticky (0o7777)
    mtime_ns  nanoseconds since the epoch, may be negative
    size      bytes of a FILE, holes included
    block     first payload block of a FILE that has no `runs`
    link      target of a SYMLINK as it stands, or the cleaned path of a HARDLINK's target
    rdev      (major, minor) of a device
    xattrs    full names ('security.capability') to values
    runs      the data of a sparse FILE; None: ceil(size / 4096) blocks from `block` on
    keep      customization only: a folder that is there already stays as it is
    """

    path: bytes
    kind: Kind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    block: int = 0
    link: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = {}
    runs: tuple[Run, ...] | None = None
    keep: bool = False


def file_runs(entry: Entry) -> tuple[Run, ...]:
    """Return the runs of payload blocks that a file's data is in."""
    if entry.runs is not None:
        return entry.runs
    count = -(-entry.size // BLOCK_BYTES)
    return (Run(0, entry.block, count),) if count else ()


class IndexWriter:
    """Writes an index entry by entry, in constant memory. `file` must be seekable and empty.

    `entries` counts what was added, `written_bytes` what the file has of them by now.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self.entries = 0
        self.written_bytes = 0
        head = b"\x93" + self._encoder.encode(_MAGIC) + self._encoder.encode(FORMAT)
        file.write(head + b"\xdd\0\0\0\0")
        self._count_at = len(head) + 1

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self._encoder.encode_into(entry, self._buffer, -1)
        self.entries += 1
        if len(self._buffer) > 1 << 20:
            self._file.write(self._buffer)
            self.written_bytes += len(self._buffer)
            self._buffer.clear()

    def close(self) -> None:
        """Write what is buffered and the count. Does not close the file."""
        self._file.write(self._buffer)
        self._buffer.clear()
        self._file.seek(self._count_at)
        self._file.write(struct.pack(">I", self.entries))
        self._file.flush()


class _Index(msgspec.Struct, array_like=True):
    magic: str
    version: int
    entries: list[Entry]


_MAGIC = "fledge-layer"
_decoder = msgspec.msgpack.Decoder(_Index)


def read_index(path: Path) -> list[Entry]:
    """Return all entries in archive order. Raises StoreError for anything but an index."""
    try:
        index = _decoder.decode(path.read_bytes())
    except (OSError, *NOT_DECODED) as error:
        raise StoreError(f"not a layer index: {error}", where=str(path)) from None
    if index.magic != _MAGIC or index.version != FORMAT:
        raise StoreError(f"not a layer index of format {FORMAT}", where=str(path))
    return index.entries
