"""squashfs images: read back by a reader of our own and by Linux, and what is refused rather than left out."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems import squashfs, squashfs_read
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.oci.layer_index import Entry, Kind
from fledge_tasks.verify import check_structure, read_all
from tests import trees
from tests.test_ext4_images import ACL, odd
from tests.test_verify import contents
from tests.tools import PATH, need, need_root
from tests.trees import EPOCH, PARAMETERS, Built, Content, build, mounted, tree_of

LEVELS = {"zstd": 3, "gzip": 6, "lzo": 3, "xz": None, "lz4": None}


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("tar2sqfs")


def made(folder: Path, content: Content, compression: str = "zstd", block_bytes: int | None = None) -> Built:
    parameters = dataclasses.replace(
        PARAMETERS, compression=compression, compression_level=LEVELS[compression], block_bytes=block_bytes
    )
    return build(folder, content, parameters=parameters, kind="squashfs")


compared = functools.partial(trees.compared, kind="squashfs")


def everything() -> Content:
    """One of everything that squashfs can hold."""
    content = odd()
    content.entries = [
        entry
        for entry in content.entries
        if entry.kind is not Kind.SOCKET and not any(name.startswith(b"system.") for name in entry.xattrs)
    ]
    content.entries[0].xattrs = {b"user.root": b"1"}
    content.file(b"x/none", b"", xattrs={b"user.empty": b"", b"security.a=b": b"\0\n="})
    content.file(b"x/large", b"x", xattrs={b"trusted.large": b"l" * 60_000})
    content.add(b"dev/again", Kind.HARDLINK, link=b"dev/large")
    content.add(b"links/again", Kind.HARDLINK, link=b"links/60")
    content.add(b"/".join(b"d%03d" % at for at in range(600)), Kind.DIRECTORY)
    for number in range(3000):
        content.file(b"many/%d" % number, b"%d" % number * (number % 50))
    return content


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, Built, Path]:
    need("tar2sqfs")
    content, place = everything(), tmp_path_factory.mktemp("everything")
    return content, made(place, content), place


def test_everything_is_found_again(image: tuple[Content, Built, Path]) -> None:
    content, built, place = image
    assert compared(built.image, tree_of(content), place) == []
    assert list(check_structure(built.image, "squashfs")) == []
    assert list(read_all(built.image, "squashfs")) == []
    assert (built.filled.extents, built.filled.free_bytes, built.assembled.size % 4096) == ([], 0, 0)


@pytest.mark.parametrize("compression", LEVELS)
def test_every_compression(tmp_path: Path, compression: str) -> None:
    assert {*LEVELS, "none"} == set(OPTIONS["squashfs"].compressions)
    content = odd()
    content.entries = [entry for entry in content.entries if entry.path.startswith(b"files/") and entry.size < 1 << 30]
    data = os.urandom(300_000)
    content.file(b"random", data)
    built = made(tmp_path, content, compression)
    assert compared(built.image, tree_of(content), tmp_path) == []
    need_root()
    with mounted(built.image, "squashfs") as root:
        assert (root / "random").read_bytes() == data


@pytest.mark.parametrize("block_bytes", [4096, 1 << 20])
def test_block_sizes(tmp_path: Path, block_bytes: int) -> None:
    content = Content()
    content.file(b"a", os.urandom(5_000_000))
    content.sparse(b"b", 3_000_000, [(1, b"one"), (600, b"x" * 50_000)])
    built = made(tmp_path, content, block_bytes=block_bytes)
    assert compared(built.image, tree_of(content), tmp_path) == []
    assert int.from_bytes(built.image.read_bytes()[12:16], "little") == block_bytes


def test_linux_reads_the_same(image: tuple[Content, Built, Path]) -> None:
    need_root()
    content, built, _ = image
    entries = {entry.path: entry for entry in content.entries}
    with mounted(built.image, "squashfs") as root:
        for path in (b"", b"files/empty", b"x/capability", b"x/many", b"x/none", b"x/large", b"dev/large", b"tmp"):
            name, entry = os.fsencode(root) + b"/" + path, entries[path]
            status = os.lstat(name)
            assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (entry.mode, entry.uid, entry.gid)
            assert status.st_mtime_ns == squashfs.clamped(entry.mtime_ns)
            assert {os.fsencode(key): os.getxattr(name, key) for key in os.listxattr(name)} == entry.xattrs
        assert os.path.samefile(root / "dev/again", root / "dev/large")
        assert (root / "files/sparse").stat().st_size == 5 << 30
        assert (root / "names" / ("n" * 255)).read_bytes() == b"long"
        assert (root / "files/old").stat().st_mtime == 0 and (root / "files/late").stat().st_mtime == 2**32 - 1


@pytest.mark.parametrize(
    ("nanoseconds", "seconds"),
    [(-1, 0), (0, 0), (999_999_999, 0), (10**9, 1), ((1 << 32) * 10**9 - 1, (1 << 32) - 1), (1 << 70, (1 << 32) - 1)],
)
def test_times_that_an_inode_holds(nanoseconds: int, seconds: int) -> None:
    assert squashfs.clamped(nanoseconds) == seconds * 10**9


def test_the_same_bytes_whatever_the_number_of_processors(
    image: tuple[Content, Built, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "77")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    for number in (1, 3, 8):
        monkeypatch.setattr(squashfs, "_processors", lambda number=number: number)
        assert made(tmp_path, image[0]).assembled.sha256 == image[1].assembled.sha256


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_random_trees_are_found_again(tmp_path: Path, content: Content) -> None:
    built = made(tmp_path, content, "lz4")
    assert compared(built.image, tree_of(content), tmp_path) == []


# --- what is refused ------------------------------------------------------------------------------------------


def refused(folder: Path, content: Content) -> str:
    with pytest.raises(FilesystemError) as caught:
        made(folder, content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            Entry(b"d/f", Kind.FILE, xattrs={b"system.posix_acl_access": ACL}),
            "/d/f: has the access control list system.posix_acl_access, which squashfs cannot hold\n"
            "  hint: choose ext4 or erofs, which can, or remove it in the image, for example with `setfacl -b`",
        ),
        (Entry(b"run/s", Kind.SOCKET), "/run/s: is a socket, which tar2sqfs cannot be told of"),
        (Entry(b"f", Kind.FILE, xattrs={b"user." + b"n" * 251: b""}), "/f: has the extended attribute user.nnn"),
        (Entry(b"f", Kind.FILE, xattrs={b"user.a": bytes(65_536)}), "/f: name and extended attributes take 65563 b"),
        (
            Entry(b"d/f", Kind.FILE, size=1 << 62, runs=()),
            "/d/f: with its 4611686018427387904 bytes, holes come to more",
        ),
    ],
)
def test_what_squashfs_or_its_program_cannot_hold(tmp_path: Path, entry: Entry, message: str) -> None:
    assert message in refused(tmp_path, Content([entry]))


def test_more_owners_than_it_can_count(tmp_path: Path) -> None:
    content = Content()
    for number in range(65_535):
        content.add(b"%d/%d" % (number // 1000, number), Kind.FIFO, uid=number)
    built = made(tmp_path, content)
    with squashfs_read.opened(built.image) as found:
        last = found.names(found.names(found.root)[b"65"][0])[b"65534"]
        assert found.inode(last[0]).uid == 65_534
    content.add(b"z", Kind.FIFO, uid=1_000_000)
    assert "/z: with it there are more than 65535 different owners and groups" in refused(tmp_path, content)


def wrapped(folder: Path, script: str) -> str:
    """Return a PATH on which tar2sqfs is a script; the real one is in $REAL."""
    (folder / "bin").mkdir()
    path = folder / "bin" / "tar2sqfs"
    path.write_text(f"#!/bin/sh\nREAL={shutil.which('tar2sqfs', path=PATH)}\n{script}\n")
    path.chmod(0o755)
    return f"{folder / 'bin'}:{PATH}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--no-xattr", "/x/capability: tar2sqfs made something else of it: extended attribute security.capability is "
         "not there, and should be 0x01"),
        ("--no-keep-time", "/: tar2sqfs made something else of it: mtime is 1700000000.000000000, and should be 5.0"),
    ],
)  # fmt: skip
def test_what_a_program_leaves_out_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    content = everything()
    content.entries[0].xattrs = {}
    content.entries = [entry for entry in content.entries if not entry.path.startswith(b"x/") or b"cap" in entry.path]
    monkeypatch.setenv("PATH", wrapped(tmp_path, f'exec $REAL {options} "$@"'))
    assert message in refused(tmp_path, content)


def test_how_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'echo "$SOURCE_DATE_EPOCH $*" > ' + str(tmp_path / "called") + '; exec $REAL "$@"'
    monkeypatch.setenv("PATH", wrapped(tmp_path, script))
    monkeypatch.setattr(squashfs, "_processors", lambda: 7)
    made(tmp_path, Content())
    assert (tmp_path / "called").read_text() == (
        f"{EPOCH} --quiet --no-skip --compressor zstd --comp-extra level=3 --block-size 131072 --num-jobs 7 "
        f"{tmp_path / 'bare.img'}\n"
    )


def test_a_program_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", wrapped(tmp_path, "echo no room >&2; exit 3"))
    with pytest.raises(CommandError, match="tar2sqfs exited with 3"):
        made(tmp_path, everything())


# --- damage ---------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_is_told_and_never_raised(
    image: tuple[Content, Built, Path], tmp_path: Path, data: st.DataObject
) -> None:
    content, built, place = image
    whole = built.image.read_bytes()
    used = int.from_bytes(whole[40:48], "little")
    at = data.draw(st.integers(0, used - 1))
    changed = tmp_path / "changed"
    changed.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=8)) + whole[at + 8 :])
    compared(changed, tree_of(content), place)
    list(read_all(changed, "squashfs"))


def test_damaged_data_is_told(tmp_path: Path) -> None:
    content = Content()
    content.file(b"f", os.urandom(500_000))
    built = made(tmp_path, content)
    whole = built.image.read_bytes()
    changed = tmp_path / "changed"
    changed.write_bytes(whole[:250_000] + bytes(100) + whole[250_100:])
    assert [said.partition(" at ")[0] for said in compared(changed, tree_of(content), tmp_path)] == [
        "/f: content differs"
    ]
    changed.write_bytes(whole[:-4096])
    assert any("cut short" in said for said in compared(changed, tree_of(content), tmp_path))


@pytest.mark.parametrize("at", [*range(40, 43), *range(48, 96)])
def test_tables_that_linux_would_not_find(image: tuple[Content, Built, Path], tmp_path: Path, at: int) -> None:
    """Each has to end where the next one begins: what is changed are the used bytes, and places of tables."""
    content, built, place = image
    whole = bytearray(built.image.read_bytes())
    whole[at] ^= 0x10
    (tmp_path / "changed").write_bytes(whole)
    assert compared(tmp_path / "changed", tree_of(content), place) != []


def test_a_fragment_that_is_not_there(tmp_path: Path) -> None:
    content = Content()
    content.file(b"f", b"fragment")
    built = made(tmp_path, content)
    whole = bytearray(built.image.read_bytes())
    whole[16:20] = bytes(4)  # the superblock's count of them
    (tmp_path / "changed").write_bytes(whole)
    assert compared(tmp_path / "changed", tree_of(content), tmp_path) == [
        "/f: content cannot be read: there is no fragment 0"
    ]


@pytest.mark.parametrize("compression", ["gzip", "xz"])
def test_streams_are_read_to_their_end(tmp_path: Path, compression: str) -> None:
    """Linux gives no byte of a block whose checksum is wrong."""
    content = Content()
    content.file(b"f", b"".join(b"%d" % number for number in range(30_000))[: 1 << 17])
    built = made(tmp_path, content, compression)
    whole = bytearray(built.image.read_bytes())
    with squashfs_read.opened(built.image) as image:
        file = image.inode(image.names(image.root)[b"f"][0])
        data = image._files[file.number]
    end = data.places[0] + data.sizes[0]
    # What tells that the data end stands before a checksum (RFC 1950, 1951), or before that, an index and a footer.
    whole[end - (5 if compression == "gzip" else 4 + 8 + 12)] ^= 0x55
    (tmp_path / "changed").write_bytes(whole)
    for found in (
        compared(tmp_path / "changed", tree_of(content), tmp_path),
        read_all(tmp_path / "changed", "squashfs"),
    ):
        assert [str(each).partition(": a block")[0] for each in found] in (
            ["/f: content cannot be read"], ["/f: cannot be read"]
        )  # fmt: skip


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [(0, b"\0", "no squashfs superblock"), (28, b"\3", "squashfs 3.0 with compression 6, which is unknown here"),
     (20, b"\2", "squashfs 4.0 with compression 2, which is unknown here"),
     (12, b"\0\0\0\x80" + bytes(4) + b"\6\0\x1f", "blocks of 2^31 bytes, which Linux does not read")],
)  # fmt: skip
def test_superblocks_that_are_not_ours(
    image: tuple[Content, Built, Path], tmp_path: Path, at: int, data: bytes, message: str
) -> None:
    whole = image[1].image.read_bytes()
    changed = tmp_path / "changed"
    changed.write_bytes(whole[:at] + data + whole[at + len(data) :])
    assert [str(found) for found in read_all(changed, "squashfs")] == [message]
