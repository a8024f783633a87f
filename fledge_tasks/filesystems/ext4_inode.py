"""ext4 inodes and extent trees as bytes. Pure: nothing is read or written here.

Formats: Linux Documentation/filesystems/ext4, 'Index Nodes' and 'Block Map', and fs/ext4/ext4.h.
Numbers are little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from fledge_tasks.oci.layer_index import FILE_TYPES, Entry, Kind

BLOCK_BYTES = 4096
FLAG_EXTENTS, FLAG_INDEX = 0x80000, 0x1000
MAX_EXTENT_BLOCKS = 32768
_MAGIC = 0xF30A
_ROOT_ENTRIES = 4
NODE_ENTRIES = (BLOCK_BYTES - 12 - 4) // 12  # header at the start, checksum at the end

Extent = tuple[int, int, int]
"""(first block inside the file, first block on the disk, number of blocks <= 32768)"""

_FIRST = struct.Struct("<HHIIIIIHHIII")
_REST = struct.Struct("<60sIIIIHHHHHHHHIIIIIII")
_HEADER = struct.Struct("<HHHHI")
_LEAF = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHH")
_MIN_SECONDS, _MAX_SECONDS = -(1 << 31), (1 << 34) - (1 << 31) - 1


def clamped(nanoseconds: int) -> int:
    """Return the nearest time that an inode can hold: 1901 to 2446, whole seconds at the ends, as Linux has it."""
    if nanoseconds < _MIN_SECONDS * 1_000_000_000:
        return _MIN_SECONDS * 1_000_000_000
    if nanoseconds >= (_MAX_SECONDS + 1) * 1_000_000_000:
        return _MAX_SECONDS * 1_000_000_000
    return nanoseconds


def timestamp(nanoseconds: int) -> tuple[int, int]:
    """Return the two words of a time, `clamped` ('Inode Timestamps')."""
    seconds, fraction = divmod(clamped(nanoseconds), 1_000_000_000)
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low & 0x80000000 else low
    return low, fraction << 2 | (seconds - signed) >> 32 & 3


def inode(
    entry: Entry, *, size: int, links: int, blocks: int, block_field: bytes, flags: int, changed: tuple[int, int]
) -> bytes:
    """Return the 256 bytes of an inode without checksum and without extended attributes.

    `blocks` is the number of filesystem blocks that belong to it; `changed` (as `timestamp`
    gives it) becomes ctime and crtime. atime is mtime, so that nothing depends on who read what.
    """
    mtime, mtime_extra = timestamp(entry.mtime_ns)
    sectors = blocks * (BLOCK_BYTES // 512)
    mode = FILE_TYPES[entry.kind] | (0o777 if entry.kind is Kind.SYMLINK else entry.mode)
    first = _FIRST.pack(
        mode, entry.uid & 0xFFFF, size & 0xFFFFFFFF, mtime, changed[0], mtime, 0,
        entry.gid & 0xFFFF, links, sectors & 0xFFFFFFFF, flags, 0,
    )  # fmt: skip
    rest = _REST.pack(
        block_field, 0, 0, size >> 32, 0,
        sectors >> 32, 0, entry.uid >> 16, entry.gid >> 16, 0, 0,
        32, 0, changed[1], mtime_extra, mtime_extra, changed[0], changed[1], 0, 0,
    )  # fmt: skip
    return (first + rest).ljust(256, b"\0")


def device_field(major: int, minor: int) -> bytes:
    """Return i_block of a device: the old form where it fits, else the new one (fs/ext4/inode.c)."""
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


def tree_blocks(extents: int) -> int:
    """Return how many blocks beside the inode the extent tree of that many extents takes."""
    total = 0
    while extents > _ROOT_ENTRIES:
        extents = -(-extents // NODE_ENTRIES)
        total += extents
    return total


def extent_field(extents: Sequence[Extent], allocate: Callable[[], int]) -> tuple[bytes, list[tuple[int, bytes]]]:
    """Return i_block of a file with these extents, and the (block, bytes) of the tree's other nodes.

    `allocate` gives a block for each node; it is called `tree_blocks(len(extents))` times. The
    nodes' checksums are left open.
    """
    if len(extents) <= _ROOT_ENTRIES:  # nearly all files
        leaves = [
            _LEAF.pack(logical, count, physical >> 32, physical & 0xFFFFFFFF) for logical, physical, count in extents
        ]
        return (_HEADER.pack(_MAGIC, len(leaves), _ROOT_ENTRIES, 0, 0) + b"".join(leaves)).ljust(60, b"\0"), []
    records = [
        (logical, _LEAF.pack(logical, count, physical >> 32, physical & 0xFFFFFFFF))
        for logical, physical, count in extents
    ]
    nodes: list[tuple[int, bytes]] = []
    depth = 0
    while len(records) > _ROOT_ENTRIES:
        parents = []
        for start in range(0, len(records), NODE_ENTRIES):
            part = records[start : start + NODE_ENTRIES]
            node = _HEADER.pack(_MAGIC, len(part), NODE_ENTRIES, depth, 0) + b"".join(data for _, data in part)
            block = allocate()
            nodes.append((block, node.ljust(BLOCK_BYTES, b"\0")))
            parents.append((part[0][0], _INDEX.pack(part[0][0], block & 0xFFFFFFFF, block >> 32, 0)))
        records = parents
        depth += 1
    root = _HEADER.pack(_MAGIC, len(records), _ROOT_ENTRIES, depth, 0) + b"".join(data for _, data in records)
    return root.ljust(60, b"\0"), nodes
