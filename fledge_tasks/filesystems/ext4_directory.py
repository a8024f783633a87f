"""ext4 folders as blocks of bytes: a single linear block, or a hash tree. Pure but for the hash.

Formats: Linux Documentation/filesystems/ext4, 'Directory Entries' ('Linear Directories', 'Hash
Tree Directories'), and fs/ext4/namei.c. Building whole blocks takes time linear in the number of
names; `ext2fs_link` searches the folder for each one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from fledge_tasks.errors import FilesystemError
from fledge_tasks.oci.layer_index import Kind

BLOCK_BYTES = 4096
_TAIL = struct.pack("<IHBBI", 0, 12, 0, 0xDE, 0)  # ext4_dir_entry_tail, checksum left open
_ROOM = BLOCK_BYTES - len(_TAIL)
_ENTRY = struct.Struct("<IHBB")
_PAIR = struct.Struct("<II")
_HASH_HALF_MD4 = 1
_ROOT_LIMIT = (BLOCK_BYTES - 12 - 12 - 8 - 8) // 8  # '.', '..', dx_root_info, dx_tail
_NODE_LIMIT = (BLOCK_BYTES - 8 - 8) // 8  # an unused entry, dx_tail
_TYPES = {
    Kind.FILE: 1,
    Kind.DIRECTORY: 2,
    Kind.CHAR_DEVICE: 3,
    Kind.BLOCK_DEVICE: 4,
    Kind.FIFO: 5,
    Kind.SOCKET: 6,
    Kind.SYMLINK: 7,
}

Name = tuple[bytes, int, Kind]
"""(name, inode number, what it is)"""


def pack(names: Iterable[Name], own: int, parent: int, name_hash: Callable[[bytes], tuple[int, int]]) -> list[bytes]:
    """Return the blocks of a folder, checksums left open; more than one block means a hash tree.

    `names` come in the order that a linear folder shall have, without '.' and '..'. Raises
    FilesystemError when the tree would need a third level (some ten million names).
    """
    names = list(names)
    dots: list[Name] = [(b".", own, Kind.DIRECTORY), (b"..", parent, Kind.DIRECTORY)]
    if sum(_length(name) for name, _, _ in names) + 24 <= _ROOM:
        return [_block([*dots, *names])]
    hashed = sorted((*name_hash(entry[0]), entry) for entry in names)
    leaves: list[bytes] = []
    starts: list[int] = []
    part: list[Name] = []
    used, last = 0, -1
    for major, _, entry in hashed:
        length = _length(entry[0])
        if used + length > _ROOM:
            leaves.append(_block(part))
            part, used = [], 0
        if not part:
            # A run of equal hashes that goes on from the block before is told by the lowest bit.
            starts.append(major | 1 if major == last else major)
        part.append(entry)
        used += length
        last = major
    leaves.append(_block(part))
    return _index(leaves, starts, own, parent)


def _index(leaves: list[bytes], starts: list[int], own: int, parent: int) -> list[bytes]:
    nodes: list[bytes] = []
    if len(leaves) <= _ROOT_LIMIT:
        levels = 0
        tops = [(start, 1 + number) for number, start in enumerate(starts)]
    else:
        count = -(-len(leaves) // _NODE_LIMIT)
        if count > _ROOT_LIMIT:
            raise FilesystemError(f"a folder needs {len(leaves)} blocks, ext4 can index {_ROOT_LIMIT * _NODE_LIMIT}")
        levels, tops = 1, []
        for number in range(count):
            first = number * _NODE_LIMIT
            below = [(start, 1 + count + first + at) for at, start in enumerate(starts[first : first + _NODE_LIMIT])]
            nodes.append((_ENTRY.pack(0, BLOCK_BYTES, 0, 0) + _entries(below, _NODE_LIMIT)).ljust(BLOCK_BYTES, b"\0"))
            tops.append((below[0][0], 1 + number))
    root = (
        _ENTRY.pack(own, 12, 1, 2) + b".\0\0\0"
        + _ENTRY.pack(parent, BLOCK_BYTES - 12, 2, 2) + b"..\0\0"
        + struct.pack("<IBBBB", 0, _HASH_HALF_MD4, 8, levels, 0)
        + _entries(tops, _ROOT_LIMIT)
    )  # fmt: skip
    return [root.ljust(BLOCK_BYTES, b"\0"), *nodes, *leaves]


def _entries(entries: list[tuple[int, int]], limit: int) -> bytes:
    # The place of the first entry's hash holds limit and count (struct dx_countlimit).
    first = struct.pack("<HHI", limit, len(entries), entries[0][1])
    return first + b"".join(_PAIR.pack(start, block) for start, block in entries[1:])


def _length(name: bytes) -> int:
    return (8 + len(name) + 3) & ~3


def _block(names: list[Name]) -> bytes:
    parts = []
    used = 0
    for name, number, kind in names[:-1]:
        length = (8 + len(name) + 3) & ~3
        parts.append(_ENTRY.pack(number, length, len(name), _TYPES[kind]))
        parts.append(name.ljust(length - 8, b"\0"))
        used += length
    name, number, kind = names[-1]
    parts.append(_ENTRY.pack(number, _ROOM - used, len(name), _TYPES[kind]))
    parts.append(name.ljust(_ROOM - used - 8, b"\0"))
    parts.append(_TAIL)
    return b"".join(parts)
