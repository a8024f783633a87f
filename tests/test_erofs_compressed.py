"""EROFS images that mkfs.erofs compresses: what it cannot hold is refused, what it makes is what Linux 5.10 reads.

Versions before 1.8.4 need root; tests/real tries a newer one.
"""

from __future__ import annotations

import dataclasses
import functools
import lzma
import os
import shutil
import struct
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import decompressors, erofs_clusters, read_only
from fledge_tasks.filesystems.erofs_clusters import Cluster
from fledge_tasks.oci.layer_index import Kind
from fledge_tasks.verify import check_structure, read_all
from tests import trees
from tests.real.compare import compare_trees
from tests.test_ext4_images import ACL, odd
from tests.test_verify import contents, settable
from tests.tools import PATH, need, need_root, put_before
from tests.trees import EPOCH, MIB, PARAMETERS, Built, Content, build, mounted, tree_of


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("mkfs.erofs", "fsck.erofs")
    need_root()


def made(folder: Path, content: Content, compression: str = "lz4", level: int | None = None) -> Built:
    parameters = dataclasses.replace(PARAMETERS, compression=compression, compression_level=level, label="root")
    return build(folder, content, parameters=parameters, kind="erofs")


compared = functools.partial(trees.compared, kind="erofs")


def everything() -> Content:
    """One of everything that any mkfs.erofs can be told of."""
    content = odd()
    left_out = {b"files/sparse", b"dev/socket", b"names/" + b"n" * 255, b"links/4095"}
    content.entries = [entry for entry in content.entries if entry.path not in left_out]
    content.sparse(b"files/sparse", 10 * MIB, [(at * 3, b"%d" % at) for at in range(800)])
    content.entries[0].xattrs = {b"user.root": b"1"}
    content.entries[0].mtime_ns = -500_000_000
    for number in range(6):  # mkfs.erofs has inodes share what several have
        content.add(b"x/folder%d" % number, Kind.DIRECTORY, xattrs={b"system.posix_acl_default": ACL, b"user.n": b"n"})
        content.file(b"x/odd time %d" % number, b"t", mtime_ns=-1 - number * 10**8)
    content.file(b"x/none", b"", xattrs={b"user.empty": b"", b"trusted.x": b"\0\n="})
    content.add(b"dev/again", Kind.HARDLINK, link=b"dev/large")
    content.add(b"links/again", Kind.HARDLINK, link=b"links/60")
    for size in range(1, 60_000, 977):
        content.file(b"sizes/%d" % size, (b"%d " % size * size)[:size])
    content.file(b"random", os.urandom(30_000))
    return content


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, Built, Path]:
    need("mkfs.erofs")
    need_root()
    content, place = everything(), tmp_path_factory.mktemp("everything")
    return content, made(place, content), place


def test_everything_is_found_again(image: tuple[Content, Built, Path]) -> None:
    content, built, place = image
    assert compared(built.image, tree_of(content), place) == []
    assert list(read_all(built.image, "erofs")) == []
    assert list(check_structure(built.image, "erofs")) == []
    assert built.filled.extents == []
    assert built.assembled.size < len(content.payload) * 2 // 3


def test_linux_finds_the_same_as_in_ext4(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    content, built, _ = image
    other = build(tmp_path, content)
    with mounted(other.image) as expected, mounted(built.image, "erofs") as found:
        assert compare_trees(expected, found) == ["'lost+found': missing"]


def test_the_superblock_is_ours_and_one_that_linux_5_10_knows(image: tuple[Content, Built, Path]) -> None:
    with image[1].image.open("rb") as file:
        block = file.read(4096)[1024:]
    assert struct.unpack_from("<QI", block, 24) == (EPOCH, 0)
    assert block[48:64] == PARAMETERS.uuid and block[64:80] == b"root".ljust(16, b"\0")
    assert struct.unpack_from("<I", block, 80) == (1,), "LZ4_0PADDING alone: Linux 5.3"


def test_a_level_is_told(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    least, most = (made(tmp_path, image[0], "lz4hc", level).assembled for level in (1, 12))
    assert most.size <= least.size <= image[1].assembled.size
    assert len({most.sha256, least.sha256, image[1].assembled.sha256}) == 3


def test_the_same_bytes_at_another_time(
    image: tuple[Content, Built, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("faketime")
    real = shutil.which("mkfs.erofs", path=PATH)
    put_before(monkeypatch, tmp_path, "mkfs.erofs", f"exec faketime '2001-02-03 04:05:06' {real} \"$@\"")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "77")
    assert made(tmp_path, image[0]).assembled.sha256 == image[1].assembled.sha256


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_random_trees_are_found_again(tmp_path: Path, content: Content) -> None:
    content.entries = [entry for entry in content.entries if len(entry.path) < 250 and b"lost+found" not in entry.path]
    content.entries = [
        entry
        for entry in content.entries
        if entry.kind is not Kind.HARDLINK or any(other.path == entry.link for other in content.entries)
    ]
    built = made(tmp_path, settable(content))
    assert compared(built.image, tree_of(content), tmp_path) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (b"d/" + b"n" * 255, "has a name or path that is too long for this mkfs.erofs"),
        (b"d/lost+found", "has a name that this mkfs.erofs leaves out"),
    ],
)
def test_what_the_folder_of_an_old_mkfs_cannot_tell(tmp_path: Path, path: bytes, reason: str) -> None:
    content = Content()
    content.file(path, b"x")
    if read_only.reads_tar():
        assert compared(made(tmp_path, content).image, tree_of(content), tmp_path) == []
        return
    with pytest.raises(FilesystemError) as caught:
        made(tmp_path, content)
    assert (caught.value.message, caught.value.where) == (reason, "/" + path.decode())
    assert "install erofs-utils 1.8.4 or later, or choose compression none" in str(caught.value)


# --- the index of pieces --------------------------------------------------------------------------------------


def test_a_piece_of_another_length_is_damage() -> None:
    plain = Cluster(0, 10, 1, True)
    assert erofs_clusters.data(plain, b"0123456789abc") == b"0123456789"
    with pytest.raises(FilesystemError, match="a piece of 4 bytes, 10 were told of"):
        erofs_clusters.data(plain, b"0123")


def test_lz4() -> None:
    literals = bytes([0x50]) + b"hello"
    assert decompressors.DECOMPRESSORS["lz4"](literals, 5) == b"hello"
    with pytest.raises(FilesystemError, match="malformed LZ4"):
        decompressors.DECOMPRESSORS["lz4"](literals, 4)


@pytest.mark.parametrize(
    ("name", "block", "reason"),
    [
        ("zstd", zstandard.ZstdCompressor().compress(bytes(5000)), "5000 bytes, at most 4096 belong there"),
        ("zstd", b"\x28\xb5\x2f\xfd\xc0\0" + struct.pack("<Q", 1 << 60) + b"damage", f"{1 << 60} bytes, at most 4096"),
        ("xz", lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]), "Memory usage limit"),
    ],
)
def test_a_block_that_wants_more_memory_than_it_may(name: str, block: bytes, reason: str) -> None:
    with pytest.raises(FilesystemError, match=reason):
        decompressors.DECOMPRESSORS[name](block, 4096)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_told_and_never_raised(
    image: tuple[Content, Built, Path], tmp_path: Path, data: st.DataObject
) -> None:
    content, built, place = image
    whole = built.image.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = tmp_path / "changed"
    changed.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at + 8 :])
    changed.write_bytes(changed.read_bytes()[: len(whole)].ljust(len(whole), b"\0"))
    compared(changed, tree_of(content), place)
    list(read_all(changed, "erofs"))


def test_damaged_data_is_told(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    content, built, place = image
    whole = bytearray(built.image.read_bytes())
    [entry] = [entry for entry in content.entries if entry.path == b"random"]
    data = bytes(content.payload[entry.block * 4096 :][: entry.size])
    at = whole.find(data[:200])  # what cannot be compressed stands there as it is
    changed = tmp_path / "changed"
    whole[at + 100] ^= 1
    changed.write_bytes(whole)
    assert compared(changed, tree_of(content), place) == ["/random: content differs at byte 100"]
