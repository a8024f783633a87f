"""What all types without a mount have in common: the folder that mkfs gets, what is refused, and shared blocks."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks import userns
from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import rootless
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.rootless import Type, shared_blocks
from fledge_tasks.filesystems.skeleton import ImageExtent
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind
from fledge_tasks.tree import Inode, Layer, merge
from tests.test_ext4_images import ACL, CAPABILITY
from tests.tools import need_root
from tests.trees import EPOCH_NS, PARAMETERS, Content


def tree(content: Content) -> Inode:
    return merge([Layer("layer", content.entries)], EPOCH_NS)


class Mkfs:
    """A type whose image is all that is in its regular files, in the order of their names; it looks at the folder."""

    def __init__(self) -> None:
        self.seen: dict[str, os.stat_result] = {}
        self.attributes: dict[str, set[str]] = {}

    def kind(self, *, has_times: bool = True, check: tuple[str, ...] = ("true",)) -> Type:
        def refusal(path: bytes, entry: Entry) -> str | None:
            return "is bad" if path.endswith(b"bad") or entry.link == b"bad" else None

        def is_taken(name: bytes, value: bytes) -> bool:
            return bool(value) and not name.startswith(b"trusted.")

        return Type("fake", refusal, is_taken, has_times, self._populate, check)

    def _populate(self, image: Path, root: Inode, parameters: Parameters, scratch: Path) -> tuple[int, int]:
        assert root.children is not None and parameters is PARAMETERS
        top = scratch / rootless.FOLDER
        assert stat.S_IMODE(top.parent.stat().st_mode) == 0o700, "set-uid programs of an image are in it"
        with image.open("r+b") as file:
            for path in [top, *sorted(top.rglob("*"))]:
                name = str(path.relative_to(top))
                self.seen[name] = path.lstat()
                self.attributes[name] = set(os.listxattr(path, follow_symlinks=False))
                if path.is_file() and not path.is_symlink():
                    data = path.read_bytes()
                    file.write(data + bytes(-len(data) % BLOCK_BYTES))
        return 17, 4


@pytest.fixture
def mkfs() -> Mkfs:
    return Mkfs()


def make(folder: Path, kind: Type, content: Content) -> Filled:
    (folder / "payload").write_bytes(content.payload)
    (folder / "scratch").mkdir()
    image = folder / "image"
    return rootless.make(kind, tree(content), PARAMETERS, {0: folder / "payload"}, image, folder / "scratch")


def test_the_folder_is_the_tree(tmp_path: Path, mkfs: Mkfs) -> None:
    need_root()
    content = Content()
    content.add(b"", Kind.DIRECTORY, mode=0o711, uid=4, gid=5, mtime_ns=10**18 + 1)
    content.file(b"a", b"a" * 5000, mode=0o4755, uid=7, gid=70_000, mtime_ns=10**18 + 123_456_789)
    content.add(b"b", Kind.HARDLINK, link=b"a")
    content.add(b"d", Kind.DIRECTORY, mode=0o2500, mtime_ns=5)
    content.add(b"d/null", Kind.CHAR_DEVICE, mode=0o622, rdev=(1, 3), uid=3)
    content.add(b"d/link", Kind.SYMLINK, link=b"../a", uid=9, mode=0o777)
    content.file(
        b"e", b"e", xattrs={b"user.a": b"1", b"user.none": b"", b"trusted.b": b"2", b"security.capability": CAPABILITY}
    )
    content.file(b"f", b"f", xattrs={b"system.posix_acl_access": ACL}, mode=0o775)
    filled = make(tmp_path, mkfs.kind(), content)
    assert (filled.free_bytes, filled.free_inodes) == (17, 4)
    assert set(mkfs.seen) == {".", "a", "b", "d", "d/null", "d/link", "e", "f"}
    assert mkfs.seen["a"].st_ino == mkfs.seen["b"].st_ino
    facts = {
        name: (oct(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns) for name, found in mkfs.seen.items()
    }
    assert facts["."] == (oct(stat.S_IFDIR | 0o711), 4, 5, 10**18 + 1)
    assert facts["a"] == (oct(stat.S_IFREG | 0o4755), 7, 70_000, 10**18 + 123_456_789)
    assert facts["d"] == (oct(stat.S_IFDIR | 0o2500), 0, 0, 5)
    assert facts["d/null"] == (oct(stat.S_IFIFO | 0o622), 3, 0, 0), "mkfs gets no devices"
    assert facts["d/link"] == (oct(stat.S_IFLNK | 0o777), 9, 0, 0)
    assert mkfs.attributes["e"] == {"user.a", "security.capability"}
    assert mkfs.attributes["f"] == {"system.posix_acl_access"}
    assert list((tmp_path / "scratch").iterdir()) == []
    # 'a' is there twice, since this mkfs makes a file of each name.
    assert filled.extents == [ImageExtent(0, 0, 0, 2), ImageExtent(2, 0, 0, 4)]


def test_lists_of_the_cache_are_not_inherited(tmp_path: Path, mkfs: Mkfs) -> None:
    need_root()
    content = Content()
    content.file(b"d/a", b"a")
    (tmp_path / "scratch").mkdir()
    os.setxattr(tmp_path / "scratch", "system.posix_acl_default", ACL)
    (tmp_path / "payload").write_bytes(content.payload)
    rootless.make(
        mkfs.kind(), tree(content), PARAMETERS, {0: tmp_path / "payload"}, tmp_path / "image", tmp_path / "scratch"
    )
    assert not any(mkfs.attributes.values())


@pytest.mark.parametrize("name", ["a/bad", "link"])
def test_what_a_type_cannot_hold_is_refused_before_it_is_written(tmp_path: Path, mkfs: Mkfs, name: str) -> None:
    content = Content()
    content.file(b"a/bad", b"")
    content.add(b"link", Kind.SYMLINK, link=b"bad")
    content.entries = [entry for entry in content.entries if entry.path == name.encode()]
    with pytest.raises(FilesystemError, match=f"/{name}: is bad") as caught:
        make(tmp_path, mkfs.kind(), content)
    assert caught.value.hint == "build it as root, or choose ext4"
    assert not mkfs.seen and not (tmp_path / "image").exists()


def test_owners_that_there_are_not(tmp_path: Path, mkfs: Mkfs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "ids", lambda: userns.Ids(((0, 1001),), ((0, 5), (100, 1))))
    for uid, gid in ((1001, 0), (0, 5), (0, 101)):
        content = Content()
        content.file(b"in", b"", uid=1000, gid=100)
        content.file(b"out", b"", uid=uid, gid=gid)
        with pytest.raises(FilesystemError, match=f"/out: belongs to {uid}:{gid}, and you have no such ids") as caught:
            make(Path(tempfile.mkdtemp(dir=tmp_path)), mkfs.kind(), content)
        assert caught.value.hint is not None and "/etc/subuid" in caught.value.hint


@pytest.mark.parametrize("path", [b"/".join([b"n" * 200] * 21), b"/".join([b"n"] * 502)])
def test_paths_that_mkfs_cannot_open(tmp_path: Path, mkfs: Mkfs, path: bytes) -> None:
    content = Content()
    content.file(path, b"")
    with pytest.raises(FilesystemError, match="its path is too long for mkfs"):
        make(tmp_path, mkfs.kind(), content)


def test_a_disk_that_does_not_keep_it_all(tmp_path: Path, mkfs: Mkfs, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    content = Content()
    content.file(b"a", b"", mtime_ns=10**18 + 1)
    real = os.utime
    monkeypatch.setattr(os, "utime", lambda *args, ns, **more: real(*args, ns=(ns[0], ns[1] // 10**9 * 10**9), **more))
    with pytest.raises(FilesystemError, match="/a: its time is not kept by the disk") as caught:
        make(tmp_path, mkfs.kind(), content)
    assert caught.value.hint is not None and "FLEDGE_CACHE_DIR" in caught.value.hint
    assert list((tmp_path / "scratch").iterdir()) == []
    os.unlink(tmp_path / "image")
    os.rmdir(tmp_path / "scratch")
    make(tmp_path, mkfs.kind(has_times=False), content)


def test_an_image_that_is_not_sound(tmp_path: Path, mkfs: Mkfs) -> None:
    need_root()
    content = Content()
    content.file(b"a", b"a")
    with pytest.raises(FilesystemError, match=r"the fake image is not sound: sh exited with 1[^$]*it is broken"):
        make(tmp_path, mkfs.kind(check=("sh", "-c", "echo it is broken >&2; exit 1")), content)
    assert list((tmp_path / "scratch").iterdir()) == []


# --- shared blocks ---------------------------------------------------------------------------


def opened(folder: Path, name: str, data: bytes) -> int:
    (folder / name).write_bytes(data)
    return os.open(folder / name, os.O_RDONLY)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def block(number: int) -> bytes:
    return bytes(BLOCK_BYTES) if number == 0 else number.to_bytes(2, "big") * (BLOCK_BYTES // 2)


@given(
    files=st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 9), max_size=6), st.integers(1, BLOCK_BYTES))),
    image=st.lists(st.integers(0, 12), max_size=30),
)
def test_every_block_of_the_image_that_a_payload_holds_is_found(
    place: Path, files: list[tuple[int, list[int], int]], image: list[int]
) -> None:
    contents = [Content(), Content()]
    for number, (source, blocks, tail) in enumerate(files):
        data = b"".join(map(block, blocks))
        contents[source].file(b"f%d" % number, data[: len(data) - BLOCK_BYTES + tail] if data else b"")
    root = merge([Layer(str(at), content.entries) for at, content in enumerate(contents)], EPOCH_NS)
    payloads = [bytes(content.payload) for content in contents]
    sources = {at: opened(place, f"payload{at}", payload) for at, payload in enumerate(payloads)}
    fd = opened(place, "image", b"".join(map(block, image)))
    try:
        found = shared_blocks(fd, root, sources)
    finally:
        for each in (fd, *sources.values()):
            os.close(each)
    told = {}
    for extent in found:
        for at in range(extent.count):
            start = (extent.payload_block + at) * BLOCK_BYTES
            told[extent.block + at] = payloads[extent.source][start : start + BLOCK_BYTES]
    held = {payload[at : at + BLOCK_BYTES] for payload in payloads for at in range(0, len(payload), BLOCK_BYTES)}
    assert told == {at: block(number) for at, number in enumerate(image) if number and block(number) in held}


def test_the_same_hash_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda _: 1)
    content = Content()
    content.file(b"a", block(1))
    sources = {0: opened(tmp_path, "payload", bytes(content.payload))}
    fd = opened(tmp_path, "image", block(2) + block(1))
    assert shared_blocks(fd, tree(content), sources) == [ImageExtent(1, 0, 0, 1)]


def test_what_no_file_of_the_tree_has_is_not_shared(tmp_path: Path) -> None:
    content = Content()
    content.file(b"gone", block(1))
    content.file(b"a", block(2))
    del content.entries[0]
    sources = {0: opened(tmp_path, "payload", bytes(content.payload))}
    fd = opened(tmp_path, "image", block(1) + block(2) + b"short")
    assert shared_blocks(fd, tree(content), sources) == [ImageExtent(1, 0, 1, 1)]
