"""The B-trees of an unmounted btrfs image: read, changed in place, written back with new checksums.

An image is one device, and its checksums are CRC-32C. Structures and numbers are those of
`linux/btrfs_tree.h` and of 'On-disk Format' in the documentation of btrfs. Addresses are logical; chunks
say where in the image they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.libext2fs import crc32c

ROOT_TREE, EXTENT_TREE, CHUNK_TREE, DEVICE_TREE, FILE_TREE, FREE_SPACE_TREE, GROUP_TREE = 1, 2, 3, 4, 5, 10, 11
INODE_ITEM, DIR_ITEM, DIR_INDEX, ROOT_ITEM, GROUP_ITEM = 1, 84, 96, 132, 192
FREE_SPACE_INFO, DEVICE_EXTENT, DEVICE_ITEM, CHUNK_ITEM = 198, 204, 216, 228
DATA, METADATA = 1, 4  # BTRFS_BLOCK_GROUP_DATA, _METADATA

_SUPERBLOCKS = (1 << 16, 1 << 26, 1 << 38)
_SUPERBLOCK_BYTES = 4096
_MAGIC = b"_BHRfS_M"
# In the superblock: bytenr, magic, root and chunk_root, total_bytes, num_devices, nodesize, csum_type, dev_item.
_AT_ADDRESS, _AT_MAGIC, _AT_ROOTS, _AT_TOTAL, _AT_DEVICES, _AT_NODE, _AT_CHECKSUM = 48, 64, 80, 112, 136, 148, 196
_AT_DEVICE, _AT_CHUNKS_BYTES, _AT_CHUNKS = 201, 160, 811
_HEADER_BYTES = 101  # struct btrfs_header, whose nritems are at 96 and level at 100
_KEY = struct.Struct("<QBQ")
_ITEM = struct.Struct("<QBQII")  # a key, and offset and size of the value
_POINTER = struct.Struct("<QBQQQ")  # a key, blockptr, generation
_CHUNK, _STRIPE = struct.Struct("<Q16xQ12xHxx"), struct.Struct("<QQ16x")  # length, type, num_stripes; devid, offset
_GROUP = struct.Struct("<QQQ")  # used, chunk_objectid, flags
_CHUNK_PLACE, _EXTENT_CHUNK = 56, 16  # offset of the first stripe, chunk_offset of struct btrfs_dev_extent
_ROOT_ADDRESS = 176  # bytenr of struct btrfs_root_item
_DEVICE_TOTAL, _DEVICE_USED = 8, 16  # struct btrfs_dev_item
_DEVICE_ITEMS, _FIRST_CHUNK_TREE = 1, 256  # BTRFS_DEV_ITEMS_OBJECTID, BTRFS_FIRST_CHUNK_TREE_OBJECTID
_COPY_BYTES = 1 << 20
_STRIPE_BYTES = 1 << 16
_RESERVED_BYTES = 1 << 20  # BTRFS_DEVICE_RANGE_RESERVED


class Key(NamedTuple):
    """What items are sorted by."""

    objectid: int
    type: int
    offset: int


class Group(NamedTuple):
    """A block group: its address and size, how much of it is used, and by what (BTRFS_BLOCK_GROUP_*)."""

    start: int
    length: int
    used: int
    flags: int


class _Chunk(NamedTuple):
    start: int
    length: int
    flags: int
    stripes: tuple[int, ...]


class Node:
    """A node of a tree, as bytes that may be changed."""

    __slots__ = ("address", "data")

    def __init__(self, address: int, data: bytearray) -> None:
        self.address = address
        self.data = data

    @property
    def is_leaf(self) -> bool:
        """Tell whether it holds items, and not pointers to nodes."""
        return self.data[100] == 0

    def items(self) -> list[tuple[Key, int, int]]:
        """Return key, and start and size of the value in `data`, of each item of a leaf."""
        table = memoryview(self.data)[_HEADER_BYTES : _HEADER_BYTES + self._count * _ITEM.size]
        found = _ITEM.iter_unpack(table)
        return [(Key(number, kind, offset), _HEADER_BYTES + at, size) for number, kind, offset, at, size in found]

    def pointers(self) -> list[tuple[Key, int]]:
        """Return the first key and the address of each node below one that is not a leaf."""
        table = memoryview(self.data)[_HEADER_BYTES : _HEADER_BYTES + self._count * _POINTER.size]
        return [(Key(number, kind, offset), below) for number, kind, offset, below, _ in _POINTER.iter_unpack(table)]

    def set_key(self, slot: int, key: Key) -> None:
        """Change the key of a pointer."""
        _KEY.pack_into(self.data, _HEADER_BYTES + slot * _POINTER.size, *key)

    def keep(self, items: list[tuple[Key, int, int]]) -> None:
        """Remove all items from a leaf but these. Values are packed at its end, in reverse."""
        values = [bytes(self.data[start : start + size]) for _, start, size in items]
        end = len(self.data)
        self.data[_HEADER_BYTES:] = bytes(end - _HEADER_BYTES)
        self.data[96:100] = len(items).to_bytes(4, "little")
        for slot, ((key, _, size), value) in enumerate(zip(items, values, strict=True)):
            end -= size
            self.data[end : end + size] = value
            _ITEM.pack_into(self.data, _HEADER_BYTES + slot * _ITEM.size, *key, end - _HEADER_BYTES, size)

    @property
    def _count(self) -> int:
        return int.from_bytes(self.data[96:100], "little")


class Trees:
    """The trees of the image of a descriptor. Raises FilesystemError for an image that is not known here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._super = bytearray(os.pread(fd, _SUPERBLOCK_BYTES, _SUPERBLOCKS[0]))
        devices, checksum = (
            self._number(_AT_DEVICES),
            int.from_bytes(self._super[_AT_CHECKSUM : _AT_CHECKSUM + 2], "little"),
        )
        if self._super[_AT_MAGIC : _AT_MAGIC + 8] != _MAGIC or devices != 1 or checksum:
            raise FilesystemError("not a btrfs image of one device with CRC-32C")
        self._node_bytes = int.from_bytes(self._super[_AT_NODE : _AT_NODE + 4], "little")
        self._chunks = list(self._first_chunks())
        chunks = [(key, bytes(node.data[at : at + size])) for node, key, at, size in self.items(CHUNK_TREE)]
        self._chunks = [_chunk(key, value) for key, value in chunks if key.type == CHUNK_ITEM]

    def items(self, tree: int) -> Iterator[tuple[Node, Key, int, int]]:
        """Yield leaf, key, and start and size of the value in the leaf, of each item of a tree."""
        for leaf in self.leaves(tree):
            for key, start, size in leaf.items():
                yield leaf, key, start, size

    def leaves(self, tree: int) -> Iterator[Node]:
        """Yield the leaves of a tree in order."""
        return self._leaves(tree, Node.pointers)

    def _leaves(self, tree: int, pointers: Callable[[Node], list[tuple[Key, int]]]) -> Iterator[Node]:
        """Yield the leaves that the chosen pointers of nodes lead to, in order."""
        pending = [self._root(tree)]
        while pending:
            node = self._node(pending.pop())
            if node.is_leaf:
                yield node
            else:
                pending.extend(below for _, below in reversed(pointers(node)))

    def write(self, node: Node) -> None:
        """Write a changed node with its checksum."""
        node.data[:4] = crc32c(memoryview(node.data)[32:]).to_bytes(4, "little")
        for offset in self._offsets(node.address):
            os.pwrite(self._fd, node.data, offset)

    def groups(self) -> list[Group]:
        """Return all block groups, in the order of their addresses."""
        found = []
        for node, key, start, _ in self.items(self._group_tree()):
            if key.type == GROUP_ITEM:
                used, _, flags = _GROUP.unpack_from(node.data, start)
                found.append(Group(key.objectid, key.offset, used, flags))
        return found

    def drop(self, unused: list[Group]) -> None:
        """Give the room of unused block groups back to the device, from its end: what is behind them moves up."""
        chunks = {chunk.start: chunk for chunk in self._chunks}
        gone = [chunks.pop(group.start) for group in unused]
        places = sorted(filter(_is_movable, gone), key=_place)
        for chunk in sorted(filter(_is_movable, chunks.values()), key=_place, reverse=True):
            spare = next(
                (each for each in places if each.length == chunk.length and _place(each) < _place(chunk)), None
            )
            if spare is not None:
                places.remove(spare)
                self._exchange(chunk, spare)
        starts = {group.start for group in unused}
        for chunk in [chunk for chunk in self._chunks if chunk.start in starts]:
            self._drop(chunk)

    def _exchange(self, chunk: _Chunk, spare: _Chunk) -> None:
        """Let a chunk and an unused one change places in the image."""
        moved = chunk._replace(stripes=spare.stripes), spare._replace(stripes=chunk.stripes)
        for offset in range(0, chunk.length, _COPY_BYTES):
            data = os.pread(self._fd, _COPY_BYTES, _place(chunk) + offset)
            os.pwrite(self._fd, data, _place(spare) + offset)
        for new in moved:
            self._change(CHUNK_TREE, Key(_FIRST_CHUNK_TREE, CHUNK_ITEM, new.start), _CHUNK_PLACE, _place(new))
            self._change(DEVICE_TREE, Key(1, DEVICE_EXTENT, _place(new)), _EXTENT_CHUNK, new.start)
        self._chunks = [each for each in self._chunks if each not in {chunk, spare}] + list(moved)

    def _drop(self, chunk: _Chunk) -> None:
        """Remove an unused chunk with its block group, unless a leaf would be empty then."""
        start, end = chunk.start, chunk.start + chunk.length
        place = Key(1, DEVICE_EXTENT, _place(chunk))
        ranges = [
            (CHUNK_TREE, Key(_FIRST_CHUNK_TREE, CHUNK_ITEM, start), Key(_FIRST_CHUNK_TREE, CHUNK_ITEM, start + 1)),
            (self._group_tree(), Key(start, GROUP_ITEM, 0), Key(start, GROUP_ITEM + 1, 0)),
            # Its free space, too: there is more than one item where a superblock lies in it.
            (FREE_SPACE_TREE, Key(start, FREE_SPACE_INFO, 0), Key(end, 0, 0)),
            (DEVICE_TREE, place, place._replace(offset=place.offset + 1)),
        ]
        if all(self._can_remove(*each) for each in ranges):
            for tree, first, last in ranges:
                self._remove(self._node(self._root(tree)), first, last)
            self._chunks.remove(chunk)
            self._set_device(_DEVICE_USED, self.device_used - chunk.length)

    @property
    def device_used(self) -> int:
        """The bytes of the device that are in chunks."""
        return self._number(_AT_DEVICE + _DEVICE_USED)

    @property
    def end(self) -> int:
        """The byte behind the last chunk."""
        return max(at + chunk.length for chunk in self._chunks for at in chunk.stripes)

    def free_bytes(self, size: int) -> int:
        """Return what a mount for writing would tell as available (f_bavail) if the image had this size.

        It is what is free in block groups for data, and what is in no chunk, in whole stripes, without
        the first MiB (btrfs_statfs and btrfs_calc_avail_data_space of Linux, for one device).
        """
        data = sum(group.length - group.used for group in self.groups() if group.flags & DATA)
        rest = size - self.device_used
        if rest <= _RESERVED_BYTES + _STRIPE_BYTES:
            return data
        return data + (rest - _RESERVED_BYTES) // _STRIPE_BYTES * _STRIPE_BYTES

    def resize(self, size: int) -> None:
        """Make image and filesystem end at a byte, which is not below `end`, and write all superblocks."""
        self._super[_AT_TOTAL : _AT_TOTAL + 8] = size.to_bytes(8, "little")
        self._set_device(_DEVICE_TOTAL, size)
        os.ftruncate(self._fd, size)
        for offset in _SUPERBLOCKS:
            if offset + _SUPERBLOCK_BYTES <= size:
                self._super[_AT_ADDRESS : _AT_ADDRESS + 8] = offset.to_bytes(8, "little")
                self._super[:4] = crc32c(memoryview(self._super)[32:]).to_bytes(4, "little")
                os.pwrite(self._fd, self._super, offset)

    def _set_device(self, field: int, value: int) -> None:
        """Change a number of the device's item, which is in the superblock as well."""
        data = value.to_bytes(8, "little")
        self._super[_AT_DEVICE + field : _AT_DEVICE + field + 8] = data
        self._change(CHUNK_TREE, Key(_DEVICE_ITEMS, DEVICE_ITEM, 1), field, value)

    def _change(self, tree: int, key: Key, field: int, value: int) -> None:
        """Change a number of an item."""
        for node in self._leaves_between(tree, key, key._replace(offset=key.offset + 1)):
            for found, start, _ in node.items():
                if found == key:
                    node.data[start + field : start + field + 8] = value.to_bytes(8, "little")
                    self.write(node)

    def _can_remove(self, tree: int, first: Key, end: Key) -> bool:
        for leaf in self._leaves_between(tree, first, end):
            keys = [key for key, _, _ in leaf.items()]
            if all(first <= key < end for key in keys):
                return False
        return True

    def _leaves_between(self, tree: int, first: Key, end: Key) -> Iterator[Node]:
        return self._leaves(tree, lambda node: list(_between(node, first, end).values()))

    def _remove(self, node: Node, first: Key, end: Key) -> Key:
        """Remove a range of items below a node, and return the node's first key."""
        if node.is_leaf:
            items = [item for item in node.items() if not first <= item[0] < end]
            node.keep(items)
            self.write(node)
            return items[0][0]
        for slot, (key, below) in _between(node, first, end).items():
            new = self._remove(self._node(below), first, end)
            if new != key:  # each pointer has the first key of its node
                node.set_key(slot, new)
                self.write(node)
        return node.pointers()[0][0]

    def _root(self, tree: int) -> int:
        if tree in {ROOT_TREE, CHUNK_TREE}:
            return self._number(_AT_ROOTS + 8 * (tree == CHUNK_TREE))
        address = self._find_root(tree)
        if address is None:
            raise FilesystemError(f"the btrfs image has no tree {tree}")
        return address

    def _find_root(self, tree: int) -> int | None:
        for node, key, start, _ in self.items(ROOT_TREE):
            if key.objectid == tree and key.type == ROOT_ITEM:
                return int.from_bytes(node.data[start + _ROOT_ADDRESS : start + _ROOT_ADDRESS + 8], "little")
        return None

    def _group_tree(self) -> int:
        return EXTENT_TREE if self._find_root(GROUP_TREE) is None else GROUP_TREE

    def _node(self, address: int) -> Node:
        data = bytearray(os.pread(self._fd, self._node_bytes, self._offsets(address)[0]))
        return Node(address, data)

    def _offsets(self, address: int) -> list[int]:
        for chunk in self._chunks:
            if chunk.start <= address < chunk.start + chunk.length:
                return [at + address - chunk.start for at in chunk.stripes]
        raise FilesystemError(f"the btrfs image has no chunk for address {address}")

    def _first_chunks(self) -> Iterator[_Chunk]:
        """Yield the chunks that the superblock tells: those of the chunk tree."""
        at = _AT_CHUNKS
        end = at + int.from_bytes(self._super[_AT_CHUNKS_BYTES : _AT_CHUNKS_BYTES + 4], "little")
        while at < end:
            key = Key(*_KEY.unpack_from(self._super, at))
            chunk = _chunk(key, self._super[at + _KEY.size :])
            at += _KEY.size + _CHUNK.size + len(chunk.stripes) * _STRIPE.size
            yield chunk

    def _number(self, at: int) -> int:
        return int.from_bytes(self._super[at : at + 8], "little")


def _chunk(key: Key, value: bytes | bytearray) -> _Chunk:
    length, flags, count = _CHUNK.unpack_from(value)
    stripes = tuple(_STRIPE.unpack_from(value, _CHUNK.size + number * _STRIPE.size)[1] for number in range(count))
    return _Chunk(key.offset, length, flags, stripes)


def _place(chunk: _Chunk) -> int:
    return chunk.stripes[0]


def _is_movable(chunk: _Chunk) -> bool:
    """Tell whether a chunk holds data or metadata once, in a place where no superblock is."""
    place = _place(chunk)
    is_free = not any(place <= offset < place + chunk.length for offset in _SUPERBLOCKS)
    return is_free and chunk.flags in {DATA, METADATA} and len(chunk.stripes) == 1


def _between(node: Node, first: Key, end: Key) -> dict[int, tuple[Key, int]]:
    """Return the pointers of a node, by slot, below which there may be keys of a range."""
    pointers = node.pointers()
    following = [key for key, _ in pointers[1:]]
    return {
        slot: (key, below)
        for slot, (key, below) in enumerate(pointers)
        if key < end and (slot == len(following) or following[slot] > first)
    }
