"""ext4 images as others read them: e2fsck, debugfs, dumpe2fs, and Linux itself through a read-only loop mount."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import ext4
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.sizing import Wanted
from fledge_tasks.oci.layer_index import Entry, Kind, Run
from tests.tools import need, need_root
from tests.trees import MIB, PARAMETERS, Built, Content, available_bytes, build, check, debugfs, fill, mounted, tool

ACL = bytes.fromhex("02000000 01000700ffffffff 02000600e8030000 04000500ffffffff 10000700ffffffff 20000500ffffffff")
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("e2fsck", "dumpe2fs", "mke2fs")


def odd() -> Content:
    """One of everything."""
    content = Content()
    content.add(b"", Kind.DIRECTORY, mode=0o750, uid=7, gid=8, mtime_ns=5 * 10**9)
    for size in (1, 4095, 4096, 4097, 3 * MIB):
        content.file(b"files/%d" % size, (b"%d " % size * size)[:size])
    content.file(b"files/empty", mode=0o4755, uid=100_000, gid=4_000_000_000)
    content.file(b"files/old", b"x", mtime_ns=-1_500_000_000 * 10**9 + 7)
    content.file(b"files/late", b"x", mtime_ns=(1 << 33) * 10**9 + 999_999_999)
    content.sparse(b"files/sparse", 5 << 30, [(at * 3, b"%d" % at) for at in range(2000)])
    content.sparse(b"files/hole", 10_000_000, [])
    content.add(b"files/link", Kind.HARDLINK, link=b"files/4097")
    for size in (1, 59, 60, 4095):
        content.add(b"links/%d" % size, Kind.SYMLINK, link=b"t" * size)
    content.add(b"dev/null", Kind.CHAR_DEVICE, mode=0o666, rdev=(1, 3))
    content.add(b"dev/large", Kind.BLOCK_DEVICE, mode=0o660, rdev=(259, 70_000))
    content.add(b"dev/fifo", Kind.FIFO, mode=0o600)
    content.add(b"dev/socket", Kind.SOCKET, mode=0o600)
    content.file(b"x/capability", b"ping", xattrs={b"security.capability": CAPABILITY})
    content.file(b"x/acl", b"", xattrs={b"system.posix_acl_access": ACL})
    content.file(b"x/many", b"", xattrs={b"user.%d" % at: b"v" * at for at in range(40)})
    content.add(b"tmp", Kind.DIRECTORY, mode=0o1777)
    content.file(b"names/" + b"n" * 255, b"long")
    content.file(b"names/\xff\n'", b"bytes")
    return content


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, Built]:
    content = odd()
    return content, build(tmp_path_factory.mktemp("odd"), content)


def test_e2fsck_finds_nothing(image: tuple[Content, Built]) -> None:
    check(image[1].image)


def test_linux_reads_what_went_in(image: tuple[Content, Built]) -> None:
    need_root()
    content, built = image
    entries = {entry.path: entry for entry in content.entries}
    kinds = {Kind.FILE: stat.S_IFREG, Kind.DIRECTORY: stat.S_IFDIR, Kind.SYMLINK: stat.S_IFLNK, Kind.FIFO: stat.S_IFIFO}
    kinds |= {Kind.CHAR_DEVICE: stat.S_IFCHR, Kind.BLOCK_DEVICE: stat.S_IFBLK, Kind.SOCKET: stat.S_IFSOCK}
    with mounted(built.image) as root:
        for path, entry in entries.items():
            if entry.kind is Kind.HARDLINK:
                assert os.path.samefile(os.fsencode(root) + b"/" + path, os.fsencode(root) + b"/" + entry.link)
                continue
            name = os.fsencode(root) + b"/" + path
            status = os.lstat(name)
            mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode
            assert status.st_mode == kinds[entry.kind] | mode, path
            assert (status.st_uid, status.st_gid, status.st_mtime_ns) == (entry.uid, entry.gid, entry.mtime_ns), path
            if entry.kind is Kind.SYMLINK:
                assert os.readlink(name) == entry.link
            if entry.kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
                assert status.st_rdev == os.makedev(*entry.rdev)
            found = {
                os.fsencode(key): os.getxattr(name, key, follow_symlinks=False)
                for key in os.listxattr(name, follow_symlinks=False)
            }
            assert found == entry.xattrs, path
            if entry.kind is Kind.FILE and entry.runs is None:
                data = bytes(content.payload[entry.block * 4096 :][: entry.size])
                assert Path(os.fsdecode(name)).read_bytes() == data, path
        sparse = entries[b"files/sparse"]
        with (root / "files/sparse").open("rb") as file:
            assert sparse.runs is not None
            for run in sparse.runs:
                file.seek(run.logical * 4096)
                assert file.read(4096) == content.payload[run.payload * 4096 :][:4096]
                assert file.read(4096) == bytes(4096)
        assert (root / "files/sparse").stat().st_blocks < 2100 * 8
        assert (root / "files/hole").read_bytes() == bytes(10_000_000)
        assert (root / "lost+found").is_dir()


def test_the_checksum_is_that_of_the_file(image: tuple[Content, Built]) -> None:
    assert image[1].assembled.sha256 == "sha256:" + hashlib.sha256(image[1].image.read_bytes()).hexdigest()


def test_features_and_identity_are_ours(image: tuple[Content, Built]) -> None:
    listed = tool("dumpe2fs", "-h", image[1].image)
    facts = dict(line.split(":", 1) for line in listed.splitlines() if ":" in line)
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["Filesystem features"].split() == [
        "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg",
        "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
    ]  # fmt: skip
    assert facts["Filesystem UUID"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert facts["Directory Hash Seed"] == "10111213-1415-1617-1819-1a1b1c1d1e1f"
    assert facts["Filesystem flags"] == "signed_directory_hash"
    assert (
        facts["Filesystem created"] == facts["Last write time"] == facts["Last checked"] == "Tue Nov 14 22:13:20 2023"
    )
    assert "Lifetime writes" not in facts
    assert facts["Reserved block count"] == "0"


def test_same_bytes_whatever_surrounds_it(
    image: tuple[Content, Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "mke2fs.conf"
    configuration.write_text("[defaults]\n\tbase_features = sparse_super\n\tblocksize = 1024\n\tinode_size = 128\n")
    monkeypatch.setenv("MKE2FS_CONFIG", str(configuration))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("E2FSPROGS_FAKE_TIME", "1")
    old = os.umask(0o077)
    try:
        again = build(tmp_path / "again", image[0])
    finally:
        os.umask(old)
    assert again.assembled.sha256 == image[1].assembled.sha256


@pytest.mark.parametrize(("epoch", "expected"), [(0, 1), (5, 5), (2**31, 2**31 - 1), (2**32 - 1, 2**31 - 1)])
def test_times_of_its_own_are_those_that_all_e2fsprogs_agree_about(tmp_path: Path, epoch: int, expected: int) -> None:
    fill(tmp_path, [], dataclasses.replace(PARAMETERS, epoch=epoch))
    superblock = (tmp_path / "bare.img").read_bytes()[1024:2048]
    # s_wtime, s_lastcheck, s_mkfs_time
    assert [struct.unpack_from("<I", superblock, at)[0] for at in (0x30, 0x40, 0x108)] == [expected] * 3
    for number in (7, 8):  # resize inode and journal
        listed = debugfs(tmp_path / "bare.img", [b"stat <%d>" % number])[0]
        assert re.findall(r"time: (\w+)", listed) == [f"0x{expected:08x}"] * 4
    listed = debugfs(tmp_path / "bare.img", [b"stat /"])[0]
    assert f"ctime: 0x{epoch:08x}" in listed, "the tree has the time itself"


def test_bitmaps_of_groups_in_use_are_written(tmp_path: Path) -> None:
    fill(tmp_path, [], dataclasses.replace(PARAMETERS, wanted=Wanted(900 * MIB)))
    groups = re.split(r"^Group \d+: ", tool("dumpe2fs", tmp_path / "bare.img"), flags=re.MULTILINE)[1:-1]
    free = ["32768 free blocks" in group for group in groups]  # the last, left out, is shorter
    left = ["BLOCK_UNINIT" in group for group in groups]
    assert free == left
    assert True in left and not left[1] and not left[3], "groups 1 and 3 have copies of the superblock"
    check(tmp_path / "bare.img")


def names_of(count: int, length: int) -> Content:
    content = Content()
    for number in range(count):
        content.add(b"big/" + (b"%d-" % number).ljust(length, b"x"), Kind.FILE)
    return content


@pytest.mark.parametrize(
    ("count", "length"), [(300, 3), (30_000, 12), (9_000, 250)], ids=["1 block", "1 level", "2 levels"]
)
def test_large_folders(tmp_path: Path, count: int, length: int) -> None:
    content = names_of(count, length)
    built = build(tmp_path, content)
    check(built.image)
    need_root()
    with mounted(built.image) as root:
        wanted = {entry.path.split(b"/")[1] for entry in content.entries}
        assert set(os.listdir(os.fsencode(root / "big"))) == wanted
        for name in sorted(wanted)[:: max(1, count // 200)]:  # found through the index, one by one
            assert os.path.exists(os.fsencode(root / "big") + b"/" + name)
        assert not (root / "big" / "none").exists()


def test_more_subfolders_than_links_can_count(tmp_path: Path) -> None:
    content = Content()
    for number in range(65_000):
        content.add(b"big/%d" % number, Kind.DIRECTORY)
    built = build(tmp_path, content)
    check(built.image)
    need_root()
    with mounted(built.image) as root:
        assert (root / "big").stat().st_nlink == 1


def test_many_empty_files_get_groups_enough(tmp_path: Path) -> None:
    content = Content()
    for number in range(120_000):
        content.add(b"%d/%d" % (number // 1000, number), Kind.SYMLINK, link=b"x")
    built = build(tmp_path, content)
    check(built.image)
    assert built.filled.free_inodes >= 24_000
    assert built.image.stat().st_size < 400 * MIB


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([Entry(b"lost+found", Kind.FILE)], "needs it as a folder"),
        ([Entry(b"a", Kind.FILE, xattrs={b"user.a": bytes(5000)})], "user.a"),
        ([Entry(b"a", Kind.FILE, size=1 << 44, runs=())], "17592186044416 bytes, ext4 allows 17592186040320"),
        ([Entry(b"a", Kind.FILE, size=(1 << 63) - 1, runs=(Run((1 << 51) - 1, 0, 1),))], "9223372036854775807 bytes"),
        ([Entry(b"a", Kind.FILE), *(Entry(b"%d" % at, Kind.HARDLINK, link=b"a") for at in range(65_000))], "65001"),
    ],
)  # fmt: skip
def test_what_ext4_cannot_hold(tmp_path: Path, entries: list[Entry], message: str) -> None:
    with pytest.raises(FilesystemError, match=message):
        fill(tmp_path, entries)


def test_the_largest_file_that_ext4_can_hold(tmp_path: Path) -> None:
    image = tmp_path / "bare.img"
    fill(tmp_path, [Entry(b"a", Kind.FILE, size=ext4.MAX_FILE_BYTES, runs=(Run((1 << 32) - 2, 0, 1),))])
    check(image)
    assert f"Size: {ext4.MAX_FILE_BYTES}" in tool("debugfs", "-R", "stat /a", image)


def test_lost_and_found_of_the_image_stays(tmp_path: Path) -> None:
    content = Content()
    content.add(b"lost+found", Kind.DIRECTORY, mode=0o711, uid=5)
    content.file(b"lost+found/found", b"kept")
    built = build(tmp_path, content)
    check(built.image)
    shown = tool("debugfs", "-R", "stat /lost+found", built.image)
    assert "Inode: 11 " in shown
    assert "Mode:  0711" in shown
    assert tool("debugfs", "-R", "cat /lost+found/found", built.image) == "kept"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    buffer_mib=st.sampled_from([0, 1, 2, 37, 100, 126, 127, 128, 255, 640, 1000, 5000]), blocks=st.integers(0, 40_000)
)
def test_the_buffer_is_a_promise(tmp_path: Path, buffer_mib: int, blocks: int) -> None:
    parameters = dataclasses.replace(PARAMETERS, wanted=Wanted(buffer_mib * MIB))
    entries = [Entry(b"data", Kind.FILE, size=blocks * 4096)] if blocks else []
    fill(tmp_path, entries, parameters)
    assert 0 <= available_bytes(tmp_path / "bare.img") - buffer_mib * MIB <= MIB


@pytest.mark.parametrize("word", OPTIONS["ext4"].feature_words())
def test_features(tmp_path: Path, word: str) -> None:
    features = tuple(OPTIONS["ext4"].features([word]))
    built = build(tmp_path, odd(), parameters=dataclasses.replace(PARAMETERS, features=features, label="größe"))
    check(built.image)
    listed = tool("dumpe2fs", "-h", built.image)
    found = re.search(r"^Filesystem features: +(.*)$", listed, re.MULTILINE)
    assert found is not None
    assert (word in found[1].split()) == (not word.startswith("^"))
    assert word.removeprefix("^") not in found[1].split() or not word.startswith("^")
    assert re.search(r"^Filesystem volume name: +größe$", listed, re.MULTILINE)
    if os.geteuid() == 0:
        with mounted(built.image) as root:
            assert sorted(os.listdir(root))


def test_linux_agrees_about_the_buffer(tmp_path: Path) -> None:
    need_root()
    parameters = dataclasses.replace(PARAMETERS, wanted=Wanted(100 * MIB))
    built = build(tmp_path, odd(), parameters=parameters)
    with mounted(built.image) as root:
        status = os.statvfs(root)
        assert 0 <= status.f_bavail * status.f_frsize - 100 * MIB <= MIB
        assert status.f_favail >= 10_000
