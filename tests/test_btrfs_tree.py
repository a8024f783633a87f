"""B-trees of btrfs images, changed in place: `btrfs check` is the judge, and reads all data."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fledge_tasks.digest import xxh3_file
from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.btrfs_tree import (
    CHUNK_TREE,
    DATA,
    DEVICE_TREE,
    DIR_INDEX,
    FILE_TREE,
    INODE_ITEM,
    METADATA,
    Key,
    Trees,
)
from fledge_tasks.filesystems.libext2fs import crc32c
from tests.tools import PATH, need

MIB = 1 << 20


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image whose trees have two levels, with 8 MiB chunks that mkfs made to spare."""
    need("mkfs.btrfs", "btrfs")
    folder = tmp_path_factory.mktemp("btrfs")
    (folder / "tree").mkdir()
    for number in range(1500):
        (folder / "tree" / f"file{number:04d}").write_bytes(b"%04d" % number * 300)
    for number in range(8):  # what is zero in them takes no room on the disk of this machine
        (folder / "tree" / f"large{number}").write_bytes((os.urandom(4096) + bytes(MIB - 4096)) * 10)
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    command = ["mkfs.btrfs", "-q", "-f", "-m", "single", "-d", "single", "-R", "free-space-tree"]
    command += ["--rootdir", str(folder / "tree"), str(image)]
    subprocess.run(command, env={"PATH": PATH}, check=True, capture_output=True)
    return image


@pytest.fixture
def image(original: Path, tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["cp", "--sparse=always", original, tmp_path / "image"], check=True)
    yield tmp_path / "image"
    (tmp_path / "image").unlink()


@pytest.fixture
def trees(image: Path) -> Iterator[Trees]:
    fd = os.open(image, os.O_RDWR)
    yield Trees(fd)
    os.close(fd)


def checked(image: Path) -> str:
    command = ["btrfs", "check", "--readonly", "--check-data-csum", str(image)]
    done = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bytes_of(text: str) -> list[str]:
    """Return what a check counted."""
    return [line for line in text.splitlines() if "bytes" in line and "waste" not in line]


def test_the_checksum_is_the_one_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


def test_items_are_found_in_order(trees: Trees) -> None:
    keys = [key for _, key, _, _ in trees.items(FILE_TREE)]
    assert keys == sorted(keys)
    assert len([key for key in keys if key.type == INODE_ITEM]) == 1 + 1500 + 8
    assert len([key for key in keys if key.type == DIR_INDEX]) == 1500 + 8
    assert len(list(trees.leaves(FILE_TREE))) > 100


def test_groups(trees: Trees) -> None:
    groups = trees.groups()
    assert [group.start for group in groups] == sorted(group.start for group in groups)
    assert {group.flags for group in groups} >= {DATA, METADATA}
    assert sum(group.used for group in groups if group.flags == DATA) == 80 * MIB
    assert trees.device_used == sum(group.length for group in groups)
    assert trees.end <= 400 * MIB


def test_a_leaf_that_is_written_again_is_the_same(image: Path, trees: Trees) -> None:
    before = xxh3_file(image)
    for leaf in trees.leaves(FILE_TREE):
        trees.write(leaf)
    assert xxh3_file(image) == before


def test_a_leaf_that_is_changed_is_sound(image: Path, trees: Trees) -> None:
    for leaf in trees.leaves(FILE_TREE):
        for key, start, _ in leaf.items():
            if key.type == INODE_ITEM and key.objectid > 256:
                leaf.data[start + 44 : start + 52] = (5).to_bytes(4, "little") + (6).to_bytes(4, "little")
        trees.write(leaf)
    checked(image)


def test_unused_groups_are_dropped_and_the_others_move_up(image: Path, trees: Trees) -> None:
    before = checked(image)
    groups = trees.groups()
    unused = [group for group in groups if group.flags == DATA and not group.used]
    assert len(unused) >= 3, "mkfs makes more than it fills"
    # As larger images have it: one that is used lies behind those that are not.
    chunks = {chunk.start: chunk for chunk in trees._chunks}
    last = max(unused)
    moved = next(group for group in groups if group.flags == DATA and group.used and group.length == last.length)
    trees._exchange(chunks[moved.start], chunks[last.start])
    assert bytes_of(checked(image)) == bytes_of(before)
    used, end = trees.device_used, trees.end
    trees.drop(unused)
    assert trees.groups() == [group for group in groups if group not in unused]
    assert trees.device_used == used - sum(group.length for group in unused)
    assert trees.end < end
    size = -(-trees.end // MIB) * MIB
    trees.resize(size)
    assert image.stat().st_size == size
    assert bytes_of(checked(image)) == bytes_of(before)


def test_a_chunk_with_a_superblock_in_it_stays_where_it_is(image: Path, trees: Trees) -> None:
    [over] = [group for group in trees.groups() if group.start <= 64 * MIB < group.start + group.length]
    place = [at for node, key, at, _ in trees.items(CHUNK_TREE) if key == Key(256, 228, over.start)]
    assert len(place) == 1
    trees.drop([group for group in trees.groups()[3:] if not group.used])
    trees.resize(400 * MIB)
    with image.open("rb") as file:
        file.seek(64 * MIB + 64)
        assert file.read(8) == b"_BHRfS_M"
    checked(image)


def test_a_leaf_is_not_left_empty(image: Path, trees: Trees) -> None:
    keys = [key for _, key, _, _ in trees.items(DEVICE_TREE)]
    end = keys[-1]._replace(offset=keys[-1].offset + 1)
    assert not trees._can_remove(DEVICE_TREE, keys[0], end)
    assert trees._can_remove(DEVICE_TREE, keys[1], end)
    for group in trees.groups():
        if not group.used:
            trees.drop([group])
    trees.resize(400 * MIB)
    checked(image)


@pytest.mark.parametrize("size_mib", [300, 400, 1000])
def test_sizes(image: Path, trees: Trees, size_mib: int) -> None:
    size = size_mib * MIB
    free = trees.free_bytes(size)
    data = sum(group.length - group.used for group in trees.groups() if group.flags == DATA)
    assert free == data + size - trees.device_used - MIB
    trees.resize(size)
    assert image.stat().st_size == size
    checked(image)
    assert Trees(os.open(image, os.O_RDONLY)).free_bytes(size) == free


@pytest.mark.parametrize("offset", [65536 + 64, 65536 + 196, 65536 + 136])
def test_what_is_not_known_is_refused(image: Path, offset: int) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x07")
        file.flush()
        with pytest.raises(FilesystemError, match="not a btrfs image of one device"):
            Trees(file.fileno())
