"""EROFS images that we write: judged by fsck.erofs, by Linux, and by a reader that shares nothing with the writer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import erofs, erofs_read, erofs_write
from fledge_tasks.filesystems.parameters import Parameters
from fledge_tasks.filesystems.sizing import Wanted
from fledge_tasks.oci.layer_index import Entry, Kind, Run
from fledge_tasks.verify import check_structure, read_all
from tests import trees
from tests.real.compare import compare_trees
from tests.test_ext4_images import ACL, odd
from tests.test_verify import NAMES, contents, settable
from tests.tools import need, need_root
from tests.trees import EPOCH, MIB, PARAMETERS, Built, Content, build, mounted, tree_of

PLAIN = dataclasses.replace(PARAMETERS, compression="none")


def made(folder: Path, *contents: Content, parameters: Parameters = PLAIN) -> Built:
    return build(folder, *contents, parameters=parameters, kind="erofs")


compared = functools.partial(trees.compared, kind="erofs")


def everything() -> Content:
    """One of everything, and of what is EROFS's own: names before '.', links and folders on the edge of a block."""
    content = odd()
    # Of a file of 5 GiB, zeros would be what these tests mostly hash and compare.
    content.entries = [entry for entry in content.entries if entry.path != b"files/sparse"]
    content.sparse(b"files/sparse", 10 * MIB, [(at * 3, b"%d" % at) for at in range(800)])
    content.entries[0].xattrs = {b"user.root": b"1"}
    for size in (3967, 3968, 4031, 4032, 4033):
        content.add(b"links/%d" % size, Kind.SYMLINK, link=b"q" * size)
    content.add(b"links/x", Kind.SYMLINK, link=b"q" * 4000, xattrs={b"trusted.t": b"t" * 20})
    content.add(b"dev/again", Kind.HARDLINK, link=b"dev/large")
    content.file(b"x/none", b"", xattrs={b"user.empty": b"", b"security.a=b": b"\0"})
    content.file(b"x/large", b"", xattrs={b"user.large": b"l" * 65_535, b"user.small": b"s"})
    content.add(b"x/folder", Kind.DIRECTORY, xattrs={b"system.posix_acl_default": ACL, b"user.n": b"n" * 5000})
    content.file(b"x/folder/file", b"in a folder whose attributes take more than a block")
    for number in range(300):
        for form in (b"\x01%d", b"!%d", b".%d", b"..%d", b"z%d"):
            content.add(b"!before/" + form % number, Kind.FIFO)
    content.add(b"/".join(b"d%03d" % at for at in range(600)), Kind.DIRECTORY)
    return content


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, Built, Path]:
    content, place = everything(), tmp_path_factory.mktemp("everything")
    return content, made(place, content), place


def test_everything_is_found_again(image: tuple[Content, Built, Path]) -> None:
    content, built, place = image
    assert compared(built.image, tree_of(content), place) == []
    assert list(read_all(built.image, "erofs")) == []


def test_fsck_finds_nothing(image: tuple[Content, Built, Path]) -> None:
    need("fsck.erofs")
    assert list(check_structure(image[1].image, "erofs")) == []


def test_linux_finds_the_same_as_in_ext4(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    need_root()
    content, built, _ = image
    # ext4 cannot hold such attributes; what is left is compared in everything that Linux tells.
    large = {b"x/large", b"x/folder", b"x/folder/file"}
    other = build(tmp_path, Content([entry for entry in content.entries if entry.path not in large], content.payload))
    with mounted(other.image) as expected, mounted(built.image, "erofs") as found:
        added = [os.fsdecode(path) for path in (b"x/large", b"x/folder")]
        differences = compare_trees(expected, found, added=added)
        assert differences == ["'lost+found': missing"]
        assert os.getxattr(found / "x/large", "user.large") == b"l" * 65_535
        assert os.getxattr(found / "x/folder", "system.posix_acl_default") == ACL
        assert (found / "x/folder/file").read_bytes().startswith(b"in a folder")
        assert (found / "files/sparse").stat().st_blocks > 0
        status = os.statvfs(found)
        assert status.f_bavail == 0
        with pytest.raises(OSError, match="Read-only"):
            (found / "new").write_bytes(b"")


def test_the_superblock_is_one_that_linux_5_4_knows(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    built = made(tmp_path, image[0], parameters=dataclasses.replace(PLAIN, label="root-1"))
    with built.image.open("rb") as file:
        block = file.read(4096)[1024:]
    magic, _, compatible, bits, extra, _ = struct.unpack_from("<IIIBBH", block)
    assert (magic, compatible, bits, extra) == (0xE0F5E1E2, 3, 12, 0)
    assert struct.unpack_from("<QI", block, 24) == (EPOCH, 0)
    assert block[48:64] == PLAIN.uuid and block[64:80] == b"root-1".ljust(16, b"\0")
    assert block[80:] == bytes(len(block) - 80), "no feature that must be known"


def test_crc32c() -> None:
    """The check value of CRC-32C (RFC 3720, B.4): of 32 zeros, inverted at the end."""
    assert erofs_write.crc32c(bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA
    assert erofs_write.crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


def test_the_same_bytes_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is needed, and the bytes are these."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    content = odd()
    content.entries = [entry for entry in content.entries if entry.path != b"files/sparse"]
    assert made(tmp_path / "a", content).assembled.sha256 == GOLDEN
    changed = dataclasses.replace(PLAIN, epoch=EPOCH + 1)
    assert made(tmp_path / "b", content, parameters=changed).assembled.sha256 != GOLDEN


GOLDEN = "sha256:f845db6db95c19528aecbe8cc9f81daca18de76343f8641b91ed77ce941a6ab7"


def test_file_data_are_those_of_payloads(tmp_path: Path) -> None:
    """Two images on one base: what they have for themselves is small, whatever the base weighs."""
    base, more = Content(), Content()
    for number in range(200):
        base.file(b"base/%d" % number, os.urandom(50_000))
    more.file(b"more", b"m" * 5000)
    for name, contents_ in (("one", (base,)), ("two", (base, more))):
        built = made(tmp_path / name, *contents_)
        extents = built.filled.extents
        assert sum(extent.count for extent in extents) == 200 * 13 + (2 if more in contents_ else 0)
        assert built.skeleton.stat().st_size < 16_000
        assert len({extent.source for extent in extents}) == len(contents_)
        assert built.assembled.size < 200 * 13 * 4096 + MIB


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_random_trees_are_found_again(tmp_path: Path, content: Content) -> None:
    built = made(tmp_path, content)
    assert compared(built.image, tree_of(content), tmp_path) == []


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_linux_agrees_about_random_trees(tmp_path: Path, content: Content) -> None:
    need_root()
    need("fsck.erofs")
    built = made(tmp_path / "a", settable(content))
    assert list(check_structure(built.image, "erofs")) == []
    other = build(tmp_path / "b", content)
    with mounted(other.image) as expected, mounted(built.image, "erofs") as found:
        assert compare_trees(expected, found) == ["'lost+found': missing"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(NAMES, max_size=150))
def test_random_names_are_found_one_by_one(tmp_path: Path, names: set[bytes]) -> None:
    content = Content()
    for name in names:
        content.add(b"d/" + name, Kind.FIFO)
    built = made(tmp_path, content)
    with erofs_read.opened(built.image) as found:
        top = found.names(found.root)
        assert set(found.names(top[b"d"][0])) == names if names else b"d" not in top


def test_many_files_in_one_folder(tmp_path: Path) -> None:
    """Each is written once and looked at once: so many take about two seconds, where a square of them takes minutes."""
    content = Content()
    for number in range(120_000):
        content.add(b"many/%06d.txt" % number, Kind.FILE)
    built = made(tmp_path, content)
    with erofs_read.opened(built.image) as found:
        many = found.names(found.names(found.root)[b"many"][0])
    assert len(many) == 120_000 and len({number for number, _ in many.values()}) == 120_000
    need("fsck.erofs")
    assert list(check_structure(built.image, "erofs")) == []
    need_root()
    with mounted(built.image, "erofs") as root:
        assert len(os.listdir(root / "many")) == 120_000
        assert (root / "many/077777.txt").exists() and not (root / "many/077777.tx").exists()


def test_links_are_counted_beyond_16_bits(tmp_path: Path) -> None:
    need_root()
    content = Content()
    content.file(b"f", b"1")
    for number in range(66_000):
        content.add(b"hard/%d" % number, Kind.HARDLINK, link=b"f")
        content.add(b"folders/%d" % number, Kind.DIRECTORY)
    built = made(tmp_path, content)
    with mounted(built.image, "erofs") as root:
        assert (root / "f").stat().st_nlink == 66_001
        assert (root / "folders").stat().st_nlink == 66_002


def test_a_file_of_more_than_4_gib(tmp_path: Path) -> None:
    content = Content()
    content.sparse(b"large", (4 << 30) + 5, [(7, b"seven"), (1_000_000, b"beyond"), ((4 << 30) // 4096, b"end..")])
    built = made(tmp_path, content)
    assert built.assembled.size > 4 << 30
    assert built.image.stat().st_blocks * 512 < MIB, "holes of the image's file"
    assert compared(built.image, tree_of(content), tmp_path) == []
    need_root()
    with mounted(built.image, "erofs") as root, (root / "large").open("rb") as file:
        for block, data in ((7, b"seven"), (1_000_000, b"beyond"), ((4 << 30) // 4096, b"end..")):
            file.seek(block * 4096)
            assert file.read(len(data)) == data
        assert os.fstat(file.fileno()).st_size == (4 << 30) + 5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(b"d/f", Kind.FILE, xattrs={b"user.a": bytes(65_536)}), "/d/f: its extended attribute user.a of 65536 b"),
        (Entry(b"f", Kind.FILE, xattrs={b"user." + b"n" * 256: b""}), "names of 255 and values of 65535 bytes"),
        (Entry(b"f", Kind.FILE, xattrs={b"system.other": b""}), "extended attribute system.other of 0 bytes"),
        (Entry(b"f", Kind.FILE, xattrs={b"user.%d" % at: bytes(60_000) for at in range(5)}), "room for 262148"),
        (Entry(b"d/f", Kind.FILE, size=(64 << 30) + 4096, runs=()), "/d/f: with its 68719480832 bytes, "),
        (Entry(b"f", Kind.FILE, size=1 << 44, runs=(Run(0, 0, 1 << 32),)), "more blocks than erofs can count"),
    ],
)  # fmt: skip
def test_what_erofs_cannot_hold(tmp_path: Path, entry: Entry, message: str) -> None:
    with pytest.raises(FilesystemError) as caught:
        erofs.make(tree_of(Content([entry])), PLAIN, {}, tmp_path / "image", tmp_path)
    assert message in str(caught.value)


def test_as_many_holes_as_may_be(tmp_path: Path) -> None:
    entry = Entry(b"f", Kind.FILE, size=64 << 30, runs=())
    filled = erofs.make(tree_of(Content([entry])), PLAIN, {}, tmp_path / "image", tmp_path)
    assert filled.extents == [] and filled.free_bytes == 0
    assert (tmp_path / "image").stat().st_blocks < 100


# --- damage ---------------------------------------------------------------------------------------------------


def test_every_byte_of_an_inode_counts(tmp_path: Path) -> None:
    content = Content()
    content.file(b"f", b"data" * 2000, mode=0o640, uid=3, gid=4, mtime_ns=5, xattrs={b"user.a": b"value"})
    built = made(tmp_path, content)
    with erofs_read.opened(built.image) as found:
        [(number, _)] = found.names(found.root).values()
        start = found.place(number)
    reserved = {2 * at + side for at in (3,) for side in (0, 1)} | set(range(20, 24)) | set(range(44, 64))
    reserved |= set(range(64, 68)) | set(range(69, 76)) | set(range(86, 88))
    for at in range(start, start + 88):
        changed = Path(shutil.copy(built.image, tmp_path / "changed"))
        with changed.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x81]))
        said = compared(changed, tree_of(content), tmp_path)
        assert (said != []) == (at - start not in reserved), at - start


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_told_and_never_raised(
    image: tuple[Content, Built, Path], tmp_path: Path, data: st.DataObject
) -> None:
    content, built, place = image
    with built.image.open("rb") as file:
        head = file.read(400_000)
    at = data.draw(st.integers(0, len(head) - 1))
    changed = tmp_path / "changed"
    changed.write_bytes(head[:at] + data.draw(st.binary(min_size=1, max_size=8)) + head[at + 8 :])
    os.truncate(changed, built.image.stat().st_size)  # what is beyond is zeros, which is damage, too
    assert compared(changed, tree_of(content), place) != []
    list(read_all(changed, "erofs"))


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [(1024, b"\0", "no EROFS superblock"), (1024 + 30, b"\1", "the checksum of the superblock is wrong"),
     (1024 + 12, b"\x0d", "the checksum of the superblock is wrong")],
)  # fmt: skip
def test_superblocks_that_are_not_ours(
    image: tuple[Content, Built, Path], tmp_path: Path, at: int, data: bytes, message: str
) -> None:
    changed = tmp_path / "changed"
    with image[1].image.open("rb") as file:
        block = bytearray(file.read(4096))
    block[at : at + 1] = data
    changed.write_bytes(block)
    assert [str(found) for found in read_all(changed, "erofs")] == [message]
    changed.write_bytes(b"")
    assert [str(found) for found in read_all(changed, "erofs")] == ["no EROFS superblock"]


def test_features_of_later_versions_are_refused(tmp_path: Path) -> None:
    built = made(tmp_path, Content())
    block = bytearray(built.image.read_bytes()[1024:4096])
    struct.pack_into("<I", block, 80, 4)  # chunks, Linux 5.15
    with built.image.open("r+b") as file:
        file.seek(1024)
        file.write(erofs_write.checksummed(bytes(block)))
    [said] = read_all(built.image, "erofs")
    assert "features 0x4: more than Linux 5.10 reads" in str(said)


def test_no_buffer_is_kept(tmp_path: Path) -> None:
    built = made(tmp_path, Content(), parameters=dataclasses.replace(PLAIN, wanted=Wanted(0)))
    assert built.assembled.size == 2 * 4096
    assert hashlib.sha256(built.image.read_bytes()).hexdigest() == built.assembled.sha256.removeprefix("sha256:")


def test_a_link_that_linux_5_10_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its target in the block behind that of its inode, as mkfs.erofs 1.5 puts some that fill nearly a block."""
    place = erofs_write._place_inodes

    def crossing(items: list[erofs_write._Item]) -> int:
        end = place(items)
        items[-1].slot = (end + -end % 4096 + 4096 - 64) // 32
        return items[-1].slot * 32 + 64 + len(items[-1].inode.entry.link)

    monkeypatch.setattr(erofs_write, "_place_inodes", crossing)
    content = Content()
    content.add(b"link", Kind.SYMLINK, link=b"t" * 50)
    built = made(tmp_path, content)
    [said] = compared(built.image, tree_of(content), tmp_path)
    assert said.startswith("/link: cannot be read: ") and "Linux 5.10 cannot read its 50 bytes" in said
