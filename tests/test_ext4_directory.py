"""Folders as blocks: parsed back here, and searched the way the kernel searches them."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import ext4_directory
from fledge_tasks.filesystems.ext4_directory import Name, pack
from fledge_tasks.filesystems.libext2fs import NameHash
from fledge_tasks.oci.layer_index import Kind

BLOCK_BYTES = 4096
OWN, PARENT = 100, 200
SEED = bytes(range(16))
Hash = Callable[[bytes], tuple[int, int]]
Record = tuple[int, int, int, bytes]
"""(inode number, length of the record, type, name)"""


def files(names: Sequence[bytes]) -> list[Name]:
    return [(name, 1000 + at, Kind.FILE) for at, name in enumerate(names)]


def records(block: bytes) -> list[Record]:
    """Read a linear block to its end, checking that the records fill it up to the checksum's tail."""
    assert len(block) == BLOCK_BYTES
    found, at = [], 0
    while at < BLOCK_BYTES - 12:
        number, length, name_length, kind = struct.unpack_from("<IHBB", block, at)
        assert length % 4 == 0 and length >= 8 + name_length
        found.append((number, length, kind, block[at + 8 : at + 8 + name_length]))
        at += length
    assert at == BLOCK_BYTES - 12
    assert struct.unpack_from("<IHBBI", block, at) == (0, 12, 0, 0xDE, 0)
    return found


def index_entries(node: bytes, start: int, limit: int) -> list[tuple[int, int]]:
    """Read the (hash, block) pairs of an index node; the first pair's hash is left open, so 0."""
    found_limit, count, first = struct.unpack_from("<HHI", node, start)
    assert found_limit == limit and 0 < count <= limit
    pairs = [struct.unpack_from("<II", node, start + 8 * at) for at in range(1, count)]
    assert [start for start, _ in pairs] == sorted(start for start, _ in pairs)
    assert node[start + 8 * count :] == bytes(BLOCK_BYTES - start - 8 * count)
    return [(0, first), *pairs]


def leaves(blocks: list[bytes]) -> list[tuple[int, bytes]]:
    """Read the index of a hash tree; return (lowest hash, block) of all leaves, in order."""
    root = blocks[0]
    assert struct.unpack_from("<IHBB", root) == (OWN, 12, 1, 2) and root[8:12] == b".\0\0\0"
    assert struct.unpack_from("<IHBB", root, 12) == (PARENT, BLOCK_BYTES - 12, 2, 2) and root[20:24] == b"..\0\0"
    zero, version, info_length, levels, flags = struct.unpack_from("<IBBBB", root, 24)
    assert (zero, version, info_length, flags) == (0, 1, 8, 0) and levels in {0, 1}
    found: list[tuple[int, int]] = []
    for start, block in index_entries(root, 32, 507):
        if levels:
            assert struct.unpack_from("<IHBB", blocks[block]) == (0, BLOCK_BYTES, 0, 0)
            below = index_entries(blocks[block], 8, 510)
            found += [(start, below[0][1]), *below[1:]]
        else:
            found.append((start, block))
    used = 1 + (len(index_entries(root, 32, 507)) if levels else 0)
    assert sorted(block for _, block in found) == list(range(used, len(blocks))), "each leaf is reached once"
    return [(start, blocks[block]) for start, block in found]


def look_up(tree: list[tuple[int, dict[bytes, int]]], name: bytes, name_hash: Hash) -> int | None:
    """dx_probe and ext4_htree_next_block of fs/ext4/namei.c."""
    wanted = name_hash(name)[0]
    at = bisect.bisect_right(tree, wanted, key=lambda leaf: leaf[0]) - 1
    while True:
        if name in tree[at][1]:
            return tree[at][1][name]
        at += 1
        if at == len(tree) or not tree[at][0] & 1 or tree[at][0] & ~1 != wanted:
            return None


def check(names: Sequence[bytes], name_hash: Hash, sample: int = 1) -> list[bytes]:
    """Pack names; check that nothing else is there, and that every `sample`-th one is found."""
    blocks = pack(files(names), OWN, PARENT, name_hash)
    expected = [(name, number) for name, number, _ in files(names)]
    if len(blocks) == 1:
        there = [(name, number) for number, _, _, name in records(blocks[0])]
        assert there == [(b".", OWN), (b"..", PARENT), *expected], "in the order given"
    else:
        tree = [(start, {name: number for number, _, _, name in records(leaf)}) for start, leaf in leaves(blocks)]
        assert sorted(item for _, leaf in tree for item in leaf.items()) == sorted(expected)
        assert all(look_up(tree, name, name_hash) == number for name, number in expected[::sample])
        assert look_up(tree, b"nowhere", name_hash) is None
    return blocks


NAMES = st.lists(st.binary(min_size=1, max_size=255), unique=True, max_size=200)


@given(NAMES)
@example([])
@example([b"x" * 255])
def test_names_are_found(names: list[bytes]) -> None:
    check(names, NameHash(SEED))


@settings(max_examples=30, deadline=None)
@given(st.integers(338, 2000), st.sampled_from([1, 2, 5]))
def test_names_of_equal_hash_are_found(count: int, hashes: int) -> None:
    check([b"name%06d" % at for at in range(count)], lambda name: (2 * (len(name.rstrip(b"0123")) % hashes), 0))


def test_types() -> None:
    kinds = [Kind.FILE, Kind.DIRECTORY, Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE, Kind.FIFO, Kind.SOCKET, Kind.SYMLINK]
    [block] = pack([(b"%d" % kind, 12, kind) for kind in kinds], OWN, PARENT, NameHash(SEED))
    # EXT4_FT_REG_FILE and so on, fs/ext4/ext4.h.
    assert [kind for _, _, kind, _ in records(block)] == [2, 2, 1, 2, 3, 4, 5, 6, 7]


def test_largest_linear_folder() -> None:
    names = [b"%04d" % at for at in range(338)]  # 12 bytes each; with '.' and '..' that fills 4080 of 4084
    assert len(check(names, NameHash(SEED))) == 1
    # One more name, and the tree has a root and one leaf: it would still fit without the dots.
    assert len(check([*names, b"more"], NameHash(SEED))) == 2
    assert len(check([*names, b"more", b"much", b"too"], NameHash(SEED))) == 3


@pytest.mark.parametrize(
    ("count", "blocks"), [(507 * 15, 1 + 507), (507 * 15 + 1, 1 + 1 + 508), (511 * 15, 1 + 2 + 511)]
)
def test_second_level(count: int, blocks: int) -> None:
    # 15 names of 255 bytes fill a leaf; the root indexes 507 leaves, a node 510.
    assert len(check([b"%06d" % at + b"n" * 249 for at in range(count)], NameHash(SEED))) == blocks


def test_names_of_equal_hash_go_on_in_the_next_node() -> None:
    names = [b"%06d" % at + b"n" * 249 for at in range(513 * 15)]
    assert len(check(names, lambda _: (6, 0))) == 1 + 2 + 513


def test_third_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4_directory, "_ROOT_LIMIT", 2)
    monkeypatch.setattr(ext4_directory, "_NODE_LIMIT", 3)
    names = files([b"%06d" % at + b"n" * 249 for at in range(7 * 15)])
    with pytest.raises(FilesystemError, match="needs 7 blocks, ext4 can index 6"):
        pack(names, OWN, PARENT, NameHash(SEED))


def test_hash_is_half_md4_of_signed_characters() -> None:
    # What `debugfs -R "dx_hash -h half_md4 -s 00010203-0405-0607-0809-0a0b0c0d0e0f NAME"` prints.
    assert NameHash(SEED)(b"etc") == (0x3A3483C8, 0xFB2236EC)
    assert NameHash(SEED)("é".encode()) == (0x943D572A, 0x3B1859B2)
    assert NameHash(bytes(range(1, 17)))(b"etc") != NameHash(SEED)(b"etc")
