"""EROFS images without compression, written here: no root, no tool, no file data copied.

An image is laid out in blocks of 4096 bytes, all numbers little-endian (Linux
Documentation/filesystems/erofs.rst; fs/erofs/erofs_fs.h):

    image    = block of the superblock, inodes*, blocks of folders and links, blocks of files
    inode    = extended inode, extended attributes, end of a folder or target of a link
    folder   = blocks of (entry*, name*), sorted by name over all of them, '.' and '..' among them
    files    = whole blocks in the order of the payloads, one file's one after the other

An inode is found by its place: its number counts slots of 32 bytes from the image's beginning.
What of it fits into one block does not cross into the next, as Linux asks of data inside inodes.

Everything that is used was in Linux 5.4, no feature has to be known to mount it. So a file has no
holes (those need chunks, Linux 5.15): they are zeros in the image, and holes in the image's file.
The result depends on the tree and `Parameters` alone; another one for the same is another version of the
writer in `read_only`, which is in keys.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.parameters import Parameters
from fledge_tasks.filesystems.sizing import check_holes
from fledge_tasks.filesystems.skeleton import ImageExtent
from fledge_tasks.oci.layer_index import BLOCK_BYTES, FILE_TYPES, Entry, Kind, file_runs
from fledge_tasks.tree import Inode, show

SUPERBLOCK_AT = 1024
MAX_BLOCKS = (1 << 32) - 1  # addresses have 32 bits, and one stands for none
_MAGIC = 0xE0F5E1E2
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
_CHECKSUM_AT = 4
_COMPAT_CHECKSUM, _COMPAT_MTIME = 1, 2  # the time in inodes is that of the last change of data
_SLOT_BYTES = 32
_INODE = struct.Struct("<HHHHQIIIIQII16x")
_EXTENDED, _PLAIN, _INLINE = 1, 0 << 1, 2 << 1  # i_format: the version, and where data lies
_NOWHERE = 0xFFFFFFFF
_NAME = struct.Struct("<QHBx")
_NAME_TYPES = {
    Kind.FILE: 1, Kind.DIRECTORY: 2, Kind.CHAR_DEVICE: 3, Kind.BLOCK_DEVICE: 4, Kind.FIFO: 5, Kind.SOCKET: 6,
    Kind.SYMLINK: 7,
}  # fmt: skip
_XATTRS_BYTES = 12  # struct erofs_xattr_ibody_header
_XATTR = struct.Struct("<BBH")
_XATTR_PREFIXES = (
    (b"user.", 1), (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"trusted.", 4),
    (b"security.", 6),
)  # fmt: skip
_MAX_XATTR_NAME, _MAX_XATTR_VALUE, _MAX_XATTRS = 0xFF, 0xFFFF, 12 + 4 * 0xFFFE
_CASTAGNOLI = 0x82F63B78  # CRC-32C, reflected
_WRITTEN_BYTES = 1 << 20


@dataclass(slots=True)
class _Item:
    """An inode to be written.

    `parts` are the names of a folder by block, `data` is what it has beside the blocks of files,
    of which `inline_bytes` at its end stand in the inode.
    """

    inode: Inode
    number: int
    path: bytes
    parent: _Item | None
    links: int = 0
    xattrs: bytes = b""
    parts: list[list[tuple[bytes, _Item]]] = field(default_factory=list)
    size: int = 0
    inline_bytes: int = 0
    slot: int = 0
    block: int = _NOWHERE

    @property
    def record_bytes(self) -> int:
        """What it takes among the inodes."""
        return _INODE.size + len(self.xattrs) + self.inline_bytes

    @property
    def own_blocks(self) -> int:
        """How many blocks it has, inline data aside."""
        return -(-(self.size - self.inline_bytes) // BLOCK_BYTES)


def write(root: Inode, parameters: Parameters, image: Path) -> list[ImageExtent]:
    """Make the filesystem in the new file `image`, holes where file data belongs, and return where that comes from.

    Deterministic, atomic in nothing. Raises FilesystemError for what EROFS cannot hold, OSError.
    """
    check_holes(root, "erofs")
    items = _number(root)
    for item in items:
        _measure(item)
    end = _place_inodes(items)
    blocks, extents = _place_data(items, -(-end // BLOCK_BYTES))
    with image.open("xb") as file:
        file.truncate(blocks * BLOCK_BYTES)
        file.write(_head(parameters, items, blocks))
        for item in items:
            file.seek(item.slot * _SLOT_BYTES)
            data = _data(item)
            own = len(data) - item.inline_bytes
            file.write(_record(item) + data[own:])
            if own:
                file.seek(item.block * BLOCK_BYTES)
                file.write(data[:own])
    return extents


def checksummed(block: bytes) -> bytes:
    """Return the first block from byte 1024 on with its checksum (fs/erofs/super.c, erofs_superblock_csum_verify)."""
    plain = block[:_CHECKSUM_AT] + bytes(4) + block[_CHECKSUM_AT + 4 :]
    return block[:_CHECKSUM_AT] + struct.pack("<I", crc32c(plain)) + block[_CHECKSUM_AT + 4 :]


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data` as Linux's crc32c(~0, ...) has it: not inverted at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def _table() -> Iterator[int]:
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ _CASTAGNOLI * (crc & 1)
        yield crc


_TABLE = tuple(_table())


def _number(root: Inode) -> list[_Item]:
    """Return all inodes in the order of a sorted walk, their links counted, the names of folders laid out in blocks."""
    top = _Item(root, 1, b"", None)
    items = [top]
    seen: dict[int, _Item] = {}
    stack = [top]
    while stack:
        folder = stack.pop()
        folder.links += 2
        assert folder.inode.children is not None
        below, names = [], [(b".", folder), (b"..", folder.parent or folder)]
        for name, inode in sorted(folder.inode.children.items()):
            item = seen.get(id(inode))
            if item is None:
                item = seen[id(inode)] = _Item(inode, len(items) + 1, folder.path + b"/" + name, folder)
                items.append(item)
            names.append((name, item))
            if inode.children is None:
                item.links += 1
            else:
                folder.links += 1
                below.append(item)
        folder.parts, folder.size = _in_blocks(sorted(names, key=lambda pair: pair[0]))
        stack.extend(reversed(below))
    return items


def _in_blocks(names: list[tuple[bytes, _Item]]) -> tuple[list[list[tuple[bytes, _Item]]], int]:
    """Return the names by block, and the size of the folder: all blocks but the last are whole."""
    parts: list[list[tuple[bytes, _Item]]] = [[]]
    used = 0
    for name in names:
        length = _NAME.size + len(name[0])
        if used + length > BLOCK_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += length
    return parts, (len(parts) - 1) * BLOCK_BYTES + used


def _measure(item: _Item) -> None:
    """Work out size, attributes, and what of the data stands in the inode. Raises FilesystemError."""
    entry = item.inode.entry
    item.xattrs = _xattrs(entry, item.path)
    if entry.kind is Kind.FILE:
        item.size = entry.size
        return
    if entry.kind is Kind.SYMLINK:
        item.size = len(entry.link)
    tail = item.size % BLOCK_BYTES
    if _INODE.size + len(item.xattrs) + tail <= BLOCK_BYTES:
        item.inline_bytes = tail


def _xattrs(entry: Entry, path: bytes) -> bytes:
    """Return the attributes as they stand behind the inode: a header, and each padded to 4 bytes."""
    if not entry.xattrs:
        return b""
    parts = [bytes(_XATTRS_BYTES)]
    for name, value in sorted(entry.xattrs.items()):
        index, short = next(
            ((index, name[len(prefix) :]) for prefix, index in _XATTR_PREFIXES if name.startswith(prefix)), (0, name)
        )
        if not index or len(short) > _MAX_XATTR_NAME or len(value) > _MAX_XATTR_VALUE:
            raise FilesystemError(
                f"its extended attribute {show(name)[1:]} of {len(value)} bytes cannot be held by erofs, which has "
                f"names of {_MAX_XATTR_NAME} and values of {_MAX_XATTR_VALUE} bytes",
                where=show(path),
                hint="choose ext4",
            )
        data = _XATTR.pack(len(short), index, len(value)) + short + value
        parts.append(data + bytes(-len(data) % 4))
    whole = b"".join(parts)
    if len(whole) > _MAX_XATTRS:
        message = f"{len(whole)} bytes of extended attributes, erofs has room for {_MAX_XATTRS}"
        raise FilesystemError(message, where=show(path))
    return whole


def _place_inodes(items: list[_Item]) -> int:
    """Give each inode its slot, and return where the last one ends."""
    at = BLOCK_BYTES
    for item in items:
        length = item.record_bytes
        if at % BLOCK_BYTES + length > BLOCK_BYTES:
            at += -at % BLOCK_BYTES
        item.slot = at // _SLOT_BYTES
        at += length + -length % _SLOT_BYTES
    return at


def _place_data(items: list[_Item], block: int) -> tuple[int, list[ImageExtent]]:
    """Give folders, links and files their blocks from `block` on; return where they end, and what payloads hold."""
    for item in items:
        if item.inode.entry.kind is not Kind.FILE and item.own_blocks:
            item.block = block
            block += item.own_blocks
    extents: list[ImageExtent] = []
    files = [item for item in items if item.inode.entry.kind is Kind.FILE and item.size]
    for item in sorted(files, key=_payload_order):
        count = item.own_blocks
        runs = file_runs(item.inode.entry)
        if block + count > MAX_BLOCKS:
            message = f"with its {item.size} bytes, the image has more blocks than erofs can count"
            raise FilesystemError(message, where=show(item.path), hint="choose xfs or btrfs")
        item.block = block
        extents += [ImageExtent(block + run.logical, item.inode.source, run.payload, run.count) for run in runs]
        block += count
    return block, extents


def _payload_order(item: _Item) -> tuple[int, int, int]:
    runs = file_runs(item.inode.entry)
    return item.inode.source, runs[0].payload if runs else 0, item.number


def _head(parameters: Parameters, items: list[_Item], blocks: int) -> bytes:
    """Return the first block: the superblock (struct erofs_super_block) and zeros."""
    superblock = _SUPERBLOCK.pack(
        _MAGIC, 0, _COMPAT_CHECKSUM | _COMPAT_MTIME, BLOCK_BYTES.bit_length() - 1, 0, items[0].slot, len(items),
        parameters.epoch, 0, blocks, 0, 0, parameters.uuid, parameters.label.encode(), 0,
    )  # fmt: skip
    return bytes(SUPERBLOCK_AT) + checksummed(superblock.ljust(BLOCK_BYTES - SUPERBLOCK_AT, b"\0"))


def _record(item: _Item) -> bytes:
    """Return inode and attributes (struct erofs_inode_extended)."""
    entry = item.inode.entry
    layout = _INLINE if item.inline_bytes else _PLAIN
    mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode
    place = _device(*entry.rdev) if entry.kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE} else item.block
    seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    count = (len(item.xattrs) - _XATTRS_BYTES) // 4 + 1 if item.xattrs else 0
    return _INODE.pack(
        _EXTENDED | layout, count, FILE_TYPES[entry.kind] | mode, 0, item.size, place, item.number,
        entry.uid, entry.gid, seconds & (1 << 64) - 1, nanoseconds, item.links,
    ) + item.xattrs  # fmt: skip


def _data(item: _Item) -> bytes:
    """Return what a folder or link holds (struct erofs_dirent)."""
    if item.inode.entry.kind is Kind.SYMLINK:
        return item.inode.entry.link
    blocks = []
    for part in item.parts:
        at = len(part) * _NAME.size
        heads = []
        for name, child in part:
            heads.append(_NAME.pack(child.slot, at, _NAME_TYPES[child.inode.entry.kind]))
            at += len(name)
        blocks.append(b"".join(heads) + b"".join(name for name, _ in part))
    return b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in blocks[:-1]) + b"".join(blocks[-1:])


def _device(major: int, minor: int) -> int:
    """Return a device's number (new_encode_dev, linux/kdev_t.h)."""
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
