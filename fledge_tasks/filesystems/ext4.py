"""ext4 images on libext2fs: no root, no mount, no file data copied.

`mke2fs` makes the empty filesystem at the exact size, then everything is filled in through the
library: all inode numbers, folder blocks and extents are worked out first, in memory, so that each
block and inode is written once. Files are laid out in the order of their payloads, so that what
lies together in a payload lies together in the image, and assembling copies long ranges.

The result depends on the tree and `Parameters` alone. Features are a fixed set that Linux 5.10 and
e2fsprogs 1.46 understand; the host's mke2fs.conf is not read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import ext4_directory, ext4_inode, ext4_size, libext2fs
from fledge_tasks.filesystems.ext4_inode import BLOCK_BYTES, Extent
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.skeleton import ImageExtent
from fledge_tasks.oci.layer_index import Entry, Kind, file_runs
from fledge_tasks.tree import Inode

FORMAT = 1
MAX_LINKS = 65_000  # EXT4_LINK_MAX
MAX_FILE_BYTES = ((1 << 32) - 1) * BLOCK_BYTES  # fs/ext4/super.c, ext4_max_size
_ROOT, _LOST_FOUND, _FIRST = 2, 11, 12
_LOST_FOUND_NAME = b"lost+found"
_FAST_SYMLINK_BYTES = 60
_XATTR_INODE_BYTES = libext2fs.INODE_BYTES - 128 - 32 - 4 - 4  # old inode, extra size, magic, end mark
_XATTR_PREFIXES = (  # e_name_index, fs/ext4/xattr.h
    (b"user.", 1), (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"trusted.", 4),
    (b"security.", 6), (b"system.", 7),
)  # fmt: skip


@dataclass(slots=True)
class _Item:
    """An inode to be written. `names`, in order, and `blocks` are those of a folder."""

    inode: Inode
    number: int
    path: bytes
    parent: int
    links: int = 0
    names: list[tuple[bytes, _Item]] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)


load = libext2fs.load  # what takes its time when the first filesystem is made


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make the filesystem as `parameters.Make` says. File data is left as holes; payloads are not looked at.

    Deterministic. Adds /lost+found to the tree.
    """
    del payloads
    items = _number(root, parameters.epoch)
    needed = _prepare(items, parameters.hash_seed)
    blocks = ext4_size.create(image, scratch, parameters, needed_blocks=needed, inodes=len(items))
    with libext2fs.opened(image, parameters.own_time) as filesystem:
        extents = _Filler(filesystem, blocks, parameters.epoch).fill(items)
    counts = ext4_size.read_counts(image)
    return Filled(extents, counts.free_blocks * BLOCK_BYTES, counts.free_inodes)


def add_lost_found(root: Inode, epoch: int) -> None:
    """Add the folder that e2fsck in the guest puts into what it finds, unless the image brings one. Idempotent.

    Raises FilesystemError when it is something else in the image.
    """
    assert root.children is not None
    lost_found = root.children.get(_LOST_FOUND_NAME)
    if lost_found is None:
        entry = Entry(_LOST_FOUND_NAME, Kind.DIRECTORY, 0o700, mtime_ns=epoch * 1_000_000_000)
        root.children[_LOST_FOUND_NAME] = Inode(entry, 0)
    elif lost_found.children is None:
        raise FilesystemError("is a file in the image, and ext4 needs it as a folder", where="/lost+found")


def _number(root: Inode, epoch: int) -> list[_Item]:
    """Give every inode its number, in the order of a sorted walk, and count its links."""
    add_lost_found(root, epoch)
    top = _Item(root, _ROOT, b"", _ROOT)
    items = [top]
    seen: dict[int, _Item] = {}
    stack = [top]
    number = _FIRST
    while stack:
        folder = stack.pop()
        folder.links += 2
        assert folder.inode.children is not None
        below = []
        for name, inode in sorted(folder.inode.children.items()):
            item = seen.get(id(inode))
            if item is None:
                is_lost_found = folder is top and name == _LOST_FOUND_NAME
                own = _LOST_FOUND if is_lost_found else number
                number += not is_lost_found
                item = seen[id(inode)] = _Item(inode, own, folder.path + b"/" + name, folder.number)
                items.append(item)
            folder.names.append((name, item))
            if inode.children is None:
                item.links += 1
            else:
                folder.links += 1
                below.append(item)
        stack.extend(reversed(below))
    return items


def _prepare(items: list[_Item], hash_seed: bytes) -> int:
    """Build the blocks of the folders, check ext4's limits, and return the blocks that all of it takes."""
    name_hash = libext2fs.NameHash(hash_seed)
    needed = 0
    for item in items:
        entry = item.inode.entry
        if item.inode.children is not None:
            names = [(name, child.number, child.inode.entry.kind) for name, child in item.names]
            item.blocks = ext4_directory.pack(names, item.number, item.parent, name_hash)
            item.names = []
            needed += len(item.blocks)
        elif item.links > MAX_LINKS:
            raise FilesystemError(f"{item.links} hard links, ext4 allows {MAX_LINKS}", where=_show(item.path))
        elif entry.kind is Kind.SYMLINK:
            needed += len(entry.link) >= _FAST_SYMLINK_BYTES
        elif entry.kind is Kind.FILE:
            if entry.size > MAX_FILE_BYTES:  # sparse, or the layer would have met its limits
                message = f"a file of {entry.size} bytes, ext4 allows {MAX_FILE_BYTES}"
                raise FilesystemError(message, where=_show(item.path))
            most = 0
            for run in file_runs(entry):
                needed += run.count
                most += 2 + run.count // 16_384  # it is also split where the filesystem's own blocks lie
            needed += ext4_inode.tree_blocks(most)
        if entry.xattrs:
            needed += _xattr_bytes(entry.xattrs) > _XATTR_INODE_BYTES
    return needed


def _split_name(name: bytes) -> tuple[int, bytes]:
    for prefix, index in _XATTR_PREFIXES:
        if name.startswith(prefix):
            return index, name[len(prefix) :]
    return 0, name


def _xattr_bytes(xattrs: dict[bytes, bytes]) -> int:
    """Return what the attributes take: struct ext4_xattr_entry, name and value, padded to 4 each."""
    return sum(16 + ((len(_split_name(name)[1]) + 3) & ~3) + ((len(value) + 3) & ~3) for name, value in xattrs.items())


def _show(path: bytes) -> str:
    return path.decode(errors="backslashreplace") or "/"


class _Allocator:
    """Hands out the free blocks in ascending order."""

    def __init__(self, runs: Iterator[tuple[int, int]]) -> None:
        self._runs = runs
        self._start, self._left = 0, 0
        self.used: list[tuple[int, int]] = []

    def take(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (start, length) of as few runs as possible, none longer than an extent may be."""
        while count:
            if not self._left:
                self._start, self._left = next(self._runs, (0, 0))
                if not self._left:
                    raise FilesystemError("the computed size of the image is too small: please report this")
                self.used.append((self._start, 0))
            length = min(count, self._left, ext4_inode.MAX_EXTENT_BLOCKS)
            yield self._start, length
            start, used = self.used[-1]
            self.used[-1] = (start, used + length)
            self._start += length
            self._left -= length
            count -= length

    def take_one(self) -> int:
        """Return one block."""
        return next(iter(list(self.take(1))))[0]


class _Filler:
    """Writes prepared items into an empty filesystem."""

    def __init__(self, filesystem: libext2fs.Ext2Filesystem, blocks: int, epoch: int) -> None:
        self._filesystem = filesystem
        self._changed = ext4_inode.timestamp(epoch * 1_000_000_000)
        for number in (_ROOT, _LOST_FOUND):
            self._release(number)
        # All of them now: marking blocks while asking for free ones would ask again.
        self._allocator = _Allocator(iter(list(filesystem.free_runs(blocks))))
        self._extents: list[ImageExtent] = []

    def fill(self, items: list[_Item]) -> list[ImageExtent]:
        fields: dict[int, tuple[bytes, int]] = {}
        for item in items:
            if item.blocks:
                fields[item.number] = self._place_folder(item)
            elif item.inode.entry.kind is Kind.SYMLINK and len(item.inode.entry.link) >= _FAST_SYMLINK_BYTES:
                fields[item.number] = self._place_symlink(item)
        files = [item for item in items if item.inode.entry.kind is Kind.FILE and item.inode.entry.size]
        files.sort(key=_payload_order)
        for item in files:
            fields[item.number] = self._place_file(item)
        for start, count in self._allocator.used:
            self._filesystem.mark_blocks(start, count, used=True)
        for item in items:
            self._write_inode(item, *fields.get(item.number, (b"", 0)))
        # Last, since the library takes the blocks for attributes wherever it finds one free.
        for item in items:
            if item.inode.entry.xattrs:
                self._write_xattrs(item)
        return self._extents

    def _release(self, number: int) -> None:
        """Give back the blocks that mke2fs gave a folder, as zeros: a file of ours may get them, and must be a hole.

        The extents are all in the inode.
        """
        field = self._filesystem.read_inode(number)[40:100]
        _, count = struct.unpack_from("<HH", field)
        for at in range(count):
            _, length, high, low = struct.unpack_from("<IHHI", field, 12 + 12 * at)
            start = high << 32 | low
            for block in range(start, start + length):
                self._filesystem.write_block(block, bytes(BLOCK_BYTES))
            self._filesystem.mark_blocks(start, length, used=False)

    def _place_folder(self, item: _Item) -> tuple[bytes, int]:
        extents: list[Extent] = []
        done = 0
        for start, length in self._allocator.take(len(item.blocks)):
            extents.append((done, start, length))
            for at in range(length):
                self._filesystem.write_directory_block(start + at, item.blocks[done + at], item.number)
            done += length
        return self._tree(item, extents, done)

    def _place_symlink(self, item: _Item) -> tuple[bytes, int]:
        block = self._allocator.take_one()
        self._filesystem.write_block(block, item.inode.entry.link.ljust(BLOCK_BYTES, b"\0"))
        return self._tree(item, [(0, block, 1)], 1)

    def _place_file(self, item: _Item) -> tuple[bytes, int]:
        extents: list[Extent] = []
        blocks = 0
        for run in file_runs(item.inode.entry):
            done = 0
            for start, length in self._allocator.take(run.count):
                extents.append((run.logical + done, start, length))
                self._extents.append(ImageExtent(start, item.inode.source, run.payload + done, length))
                done += length
            blocks += done
        return self._tree(item, extents, blocks)

    def _tree(self, item: _Item, extents: list[Extent], blocks: int) -> tuple[bytes, int]:
        block_field, nodes = ext4_inode.extent_field(extents, self._allocator.take_one)
        for block, data in nodes:
            self._filesystem.write_extent_block(block, data, item.number)
        return block_field, blocks + len(nodes)

    def _write_inode(self, item: _Item, block_field: bytes, blocks: int) -> None:
        entry = item.inode.entry
        size, links = entry.size if entry.kind is Kind.FILE else 0, item.links
        flags = 0
        if entry.kind is Kind.DIRECTORY:
            size = len(item.blocks) * BLOCK_BYTES
            flags = ext4_inode.FLAG_EXTENTS | (ext4_inode.FLAG_INDEX if len(item.blocks) > 1 else 0)
            links = links if links < MAX_LINKS else 1  # dir_nlink: 1 means 'not counted'
        elif entry.kind is Kind.FILE:
            flags = ext4_inode.FLAG_EXTENTS
            block_field = block_field or ext4_inode.extent_field([], self._allocator.take_one)[0]
        elif entry.kind is Kind.SYMLINK:
            size = len(entry.link)
            flags = ext4_inode.FLAG_EXTENTS if block_field else 0
            block_field = block_field or entry.link
        elif entry.kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
            block_field = ext4_inode.device_field(*entry.rdev)
        data = ext4_inode.inode(
            entry, size=size, links=links, blocks=blocks, block_field=block_field, flags=flags, changed=self._changed
        )
        self._filesystem.write_inode(item.number, data)
        if item.number >= _FIRST:
            self._filesystem.take_inode(item.number, is_directory=entry.kind is Kind.DIRECTORY)

    def _write_xattrs(self, item: _Item) -> None:
        xattrs = item.inode.entry.xattrs
        # The kernel searches a block's attributes in this order (fs/ext4/xattr.c, xattr_find_entry).
        order = sorted(xattrs, key=lambda name: (_split_name(name)[0], len(_split_name(name)[1]), name))
        self._filesystem.set_xattrs(item.number, [(name, xattrs[name]) for name in order], _show(item.path))


def _payload_order(item: _Item) -> tuple[int, int]:
    runs = file_runs(item.inode.entry)
    return item.inode.source, runs[0].payload if runs else 0
