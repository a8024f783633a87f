"""Inodes and extent trees as bytes, decoded here as the kernel's headers say."""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fledge_tasks.filesystems.ext4_inode import (
    BLOCK_BYTES,
    FLAG_EXTENTS,
    NODE_ENTRIES,
    Extent,
    device_field,
    extent_field,
    inode,
    timestamp,
    tree_blocks,
)
from fledge_tasks.oci.layer_index import Entry, Kind

NS = 1_000_000_000
FIRST_SECOND, LAST_SECOND = -(1 << 31), (1 << 34) - (1 << 31) - 1


def decode_time(low: int, extra: int) -> int:
    """ext4_decode_extra_time of fs/ext4/ext4.h, in nanoseconds."""
    seconds = low - (1 << 32) if low >> 31 else low
    return (seconds + ((extra & 3) << 32)) * NS + (extra >> 2)


@given(st.integers(FIRST_SECOND * NS, LAST_SECOND * NS + NS - 1))
@example(-1)
@example(FIRST_SECOND * NS)
@example((1 << 31) * NS - 1)
@example((1 << 31) * NS)
@example((1 << 32) * NS)
@example(LAST_SECOND * NS + NS - 1)
def test_times_come_back(nanoseconds: int) -> None:
    low, extra = timestamp(nanoseconds)
    assert 0 <= low < 1 << 32 and 0 <= extra < 1 << 32
    assert decode_time(low, extra) == nanoseconds


@pytest.mark.parametrize(
    ("nanoseconds", "seconds"),
    [
        (FIRST_SECOND * NS - 1, FIRST_SECOND),
        (-(10**30), FIRST_SECOND),
        ((LAST_SECOND + 1) * NS, LAST_SECOND),
        (10**30, LAST_SECOND),
    ],
)
def test_times_out_of_range_are_clamped_to_whole_seconds(nanoseconds: int, seconds: int) -> None:
    assert decode_time(*timestamp(nanoseconds)) == seconds * NS


def test_known_times() -> None:
    assert timestamp(0) == (0, 0)
    assert timestamp(1_700_000_000 * NS + 5) == (1_700_000_000, 5 << 2)
    assert timestamp(-1) == (0xFFFFFFFF, 999_999_999 << 2)
    assert timestamp((1 << 31) * NS) == (0x80000000, 1)


def old_decode(device: int) -> tuple[int, int]:
    """old_decode_dev of include/linux/kdev_t.h."""
    return device >> 8 & 0xFF, device & 0xFF


def new_decode(device: int) -> tuple[int, int]:
    """new_decode_dev of include/linux/kdev_t.h."""
    return (device & 0xFFF00) >> 8, device & 0xFF | device >> 12 & 0xFFF00


@given(st.integers(0, 4095), st.integers(0, (1 << 20) - 1))
@example(255, 255)
@example(256, 0)
@example(0, 256)
@example(0, 0)
@example(4095, (1 << 20) - 1)
def test_devices_come_back(major: int, minor: int) -> None:
    old, new = struct.unpack("<II", device_field(major, minor))
    # ext4_iget: the first word if it is set, else the second.
    assert (old_decode(old) if old else new_decode(new)) == (major, minor)
    assert bool(new) == (major > 255 or minor > 255)


def test_inode_fields() -> None:
    entry = Entry(b"f", Kind.FILE, 0o6755, 70_001, 70_002, -NS + 7)
    changed = timestamp(1_700_000_000 * NS + 3)
    data = inode(
        entry, size=5 << 32 | 9, links=3, blocks=1 << 30, block_field=b"\x11" * 60, flags=FLAG_EXTENTS, changed=changed
    )
    assert len(data) == 256

    def u16(at: int) -> int:
        return int.from_bytes(data[at : at + 2], "little")

    def u32(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "little")

    # Offsets: Linux Documentation/filesystems/ext4, 'Index Nodes'.
    assert u16(0x0) == stat.S_IFREG | 0o6755
    assert u16(0x2) | u16(0x78) << 16 == 70_001
    assert u16(0x18) | u16(0x7A) << 16 == 70_002
    assert u32(0x4) | u32(0x6C) << 32 == 5 << 32 | 9
    assert u32(0x1C) | u16(0x74) << 32 == (1 << 30) * 8
    assert u16(0x1A) == 3
    assert u32(0x20) == FLAG_EXTENTS
    assert data[0x28:0x64] == b"\x11" * 60
    assert u32(0x14) == 0, "dtime"
    assert u16(0x80) == 32, "extra size"
    mtime, atime = decode_time(u32(0x10), u32(0x88)), decode_time(u32(0x8), u32(0x8C))
    ctime, crtime = decode_time(u32(0xC), u32(0x84)), decode_time(u32(0x90), u32(0x94))
    assert mtime == atime == -NS + 7
    assert ctime == crtime == 1_700_000_000 * NS + 3
    assert data[0xA0:] == bytes(96), "no extended attributes yet"


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (Kind.DIRECTORY, stat.S_IFDIR | 0o1777),
        (Kind.SYMLINK, stat.S_IFLNK | 0o777),
        (Kind.CHAR_DEVICE, stat.S_IFCHR | 0o1777),
        (Kind.BLOCK_DEVICE, stat.S_IFBLK | 0o1777),
        (Kind.FIFO, stat.S_IFIFO | 0o1777),
        (Kind.SOCKET, stat.S_IFSOCK | 0o1777),
    ],
)
def test_inode_types(kind: Kind, mode: int) -> None:
    data = inode(Entry(b"x", kind, 0o1777), size=0, links=1, blocks=0, block_field=b"", flags=0, changed=(0, 0))
    assert int.from_bytes(data[:2], "little") == mode


def decode_tree(node: bytes, blocks: Mapping[int, bytes], depth: int) -> list[Extent]:
    """Read an extent tree ('Block Map', 'Extent Tree'), checking each node's header."""
    magic, entries, limit, found_depth, generation = struct.unpack_from("<HHHHI", node)
    assert (magic, found_depth, generation) == (0xF30A, depth, 0)
    assert limit == (4 if len(node) == 60 else NODE_ENTRIES)
    assert entries <= limit
    assert node[12 + 12 * entries :] == bytes(len(node) - 12 - 12 * entries)
    extents: list[Extent] = []
    for at in range(entries):
        if depth:
            first, low, high, _ = struct.unpack_from("<IIHH", node, 12 + 12 * at)
            below = decode_tree(blocks[high << 32 | low], blocks, depth - 1)
            assert below[0][0] == first
            extents += below
        else:
            logical, length, high, low = struct.unpack_from("<IHHI", node, 12 + 12 * at)
            extents.append((logical, high << 32 | low, length))
    return extents


@pytest.mark.parametrize(
    ("count", "depth", "nodes"),
    [
        (0, 0, 0),
        (1, 0, 0),
        (4, 0, 0),
        (5, 1, 1),
        (340, 1, 1),
        (341, 1, 2),
        (1360, 1, 4),
        (1361, 2, 6),
        (340 * 340 + 1, 2, 343),
    ],
)
def test_extent_trees(count: int, depth: int, nodes: int) -> None:
    extents = [(3 * at, (1 << 33) + 7 * at, 1 + at % 32_768) for at in range(count)]
    free = iter(range(1 << 34, 1 << 35))
    field, written = extent_field(extents, lambda: next(free))
    assert len(field) == 60
    assert all(len(data) == BLOCK_BYTES for _, data in written)
    assert decode_tree(field, dict(written), depth) == extents
    assert len(written) == len(dict(written)) == nodes == tree_blocks(count)
