"""Publishing whole or not at all, and copying ranges by every means there is."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks import fsutil
from fledge_tasks.fsutil import TEMP_PREFIX, RangeCopier
from tests.tools import need, need_root
from tests.trees import tool

KIB = 1024


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# Publishing.


def test_a_new_file_takes_nobodys_place(tmp_path: Path) -> None:
    target = tmp_path / "target"
    fsutil.write_new(target, b"mine")
    assert content(tmp_path) == {"target": b"mine"}
    for data in (b"mine", b"yours"):
        with pytest.raises(FileExistsError):
            fsutil.write_new(target, data)
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(FileExistsError):
        fsutil.write_new(tmp_path / "link", b"")
    with pytest.raises(FileNotFoundError):
        fsutil.write_new(tmp_path / "gone" / "target", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    assert target.read_bytes() == b"mine"


def test_replacing_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with fsutil.replacing(target, 0o600) as fd:
        os.write(fd, b"new")
        assert target.read_bytes() == b"old"
        [temp] = [path for path in tmp_path.iterdir() if path != target]
        assert temp.name.startswith(f"{TEMP_PREFIX}target.")
    assert content(tmp_path) == {"target": b"new"}
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
def test_replacing_leaves_the_old_file_on_any_exception(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    opened = []
    with pytest.raises(error), fsutil.replacing(target) as fd:  # noqa: PT012
        opened.append(fd)
        os.write(fd, b"new")
        raise error
    assert content(tmp_path) == {"target": b"old"}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_what_programs_write_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "build" / "target"
    with fsutil.replacing_by_programs(target) as folder:
        assert folder.parent == target.parent and list(folder.iterdir()) == []
        (folder / "target").write_bytes(b"new")
        (folder / "more").mkdir()
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    stale = fsutil.temp_sibling(target)
    stale.mkdir()
    (stale / "raw").write_bytes(b"of one that crashed")
    with fsutil.replacing_by_programs(target) as folder:
        assert not stale.exists()
        (folder / "target").write_bytes(b"newer")
        assert content(target.parent) == {"target": b"new"}
    assert content(target.parent) == {"target": b"newer"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
def test_programs_leave_the_old_file_on_any_exception(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(error), fsutil.replacing_by_programs(target) as folder:  # noqa: PT012
        (folder / "target").write_bytes(b"new")
        raise error
    with pytest.raises(FileNotFoundError), fsutil.replacing_by_programs(target):
        pass  # nothing was written
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and target.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_replacing_leaves_the_old_file_when_the_system_fails(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    target = tmp_path / "target"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="broken"), fsutil.replacing(target) as fd:
        os.write(fd, b"new")
    assert content(tmp_path) == {"target": b"old"}


def test_syncs_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name.partition(TEMP_PREFIX)[0])
        real_fsync(fd)

    def rename(source: str, target: str) -> None:
        calls.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    fsutil.write_atomic(tmp_path / "folder" / "file", b"data")
    assert calls == ["fsync ", "rename", "fsync folder"]
    calls.clear()
    fsutil.publish_folder(tmp_path / "folder", tmp_path / "place" / "final")
    assert calls == ["fsync folder", "rename", "fsync place"]
    assert (tmp_path / "place" / "final" / "file").read_bytes() == b"data"


def test_publish_folder_refuses_what_is_there(tmp_path: Path) -> None:
    for name in ("new", "old"):
        fsutil.write_atomic(tmp_path / name / "file", name.encode())
    with pytest.raises(OSError, match="not empty"):
        fsutil.publish_folder(tmp_path / "new", tmp_path / "old")
    assert content(tmp_path / "old") == {"file": b"old"}
    assert content(tmp_path / "new") == {"file": b"new"}


def test_remove_stale_knows_its_own(tmp_path: Path) -> None:
    target = tmp_path / "rootfs"
    stale = [fsutil.temp_sibling(target), fsutil.temp_sibling(target)]
    stale[0].write_bytes(b"")
    (stale[1] / "folder").mkdir(parents=True)
    others = [target, tmp_path / "rootfs.img", fsutil.temp_sibling(tmp_path / "rootfs.img"), tmp_path / "other"]
    others.append(fsutil.temp_sibling(tmp_path / "other"))
    for other in others:
        other.write_bytes(b"")
    fsutil.remove_stale(target)
    assert set(tmp_path.iterdir()) == set(others)
    fsutil.remove_stale(tmp_path / "none" / "rootfs")


def test_temp_folders(tmp_path: Path) -> None:
    folder = fsutil.temp_folder(tmp_path / "tmp", "key")
    other = fsutil.temp_folder(tmp_path / "tmp", "key2")
    (folder / "file").write_bytes(b"")
    assert fsutil.stale_below(tmp_path / "tmp", "key") == [folder]
    assert fsutil.stale_below(tmp_path / "tmp", "key2") == [other]
    assert fsutil.stale_below(tmp_path / "none", "key") == []


def test_set_aside_replaces_what_was_there(tmp_path: Path) -> None:
    for text in (b"first", b"second"):
        fsutil.write_atomic(tmp_path / "entry" / "file", text)
        fsutil.set_aside(tmp_path / "entry", tmp_path / "bad" / "entry")
    assert content(tmp_path / "bad" / "entry") == {"file": b"second"}
    assert not (tmp_path / "entry").exists()


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    fsutil.write_atomic(tmp_path / "kept" / "file", b"")
    (tmp_path / "link").symlink_to("kept")
    fsutil.remove_tree(tmp_path / "link")
    fsutil.remove_tree(tmp_path / "link")
    assert content(tmp_path / "kept") == {"file": b""}
    assert not (tmp_path / "link").is_symlink()


def test_writes_go_on_when_the_kernel_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_pwrite(fd, data[:3], offset))
    with fsutil.replacing(tmp_path / "file") as fd:
        fsutil.write_all(fd, b"0123456789")
        fsutil.pwrite_all(fd, b"abcdefgh", 2)
    assert (tmp_path / "file").read_bytes() == b"01abcdefgh"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_explained_errors_name_place_and_remedy(tmp_path: Path, number: int) -> None:
    error = fsutil.explained(OSError(number, "x"), tmp_path / "not" / "there", elsewhere="set HERE to a folder")
    assert str(tmp_path) in str(error)
    assert error.hint is not None and "set HERE to a folder" in error.hint
    assert ("no space left" in error.message) == (number != errno.EACCES)


# Holes.


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 15)), st.integers(0, 16))
def test_data_ranges_cover_all_data(tmp_path_factory: pytest.TempPathFactory, blocks: set[int], size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "holes"
    with path.open("w+b") as file:
        for block in blocks:
            os.pwrite(file.fileno(), b"x" * 65_536, block * 65_536)
        file.truncate(size * 65_536 + 100)
        ranges = list(fsutil.data_ranges(file.fileno(), size * 65_536 + 100))
    covered = {offset for start, length in ranges for offset in range(start, start + length, 4096)}
    assert {block * 65_536 for block in blocks if block < size} <= covered
    ends = [0, *(edge for start, length in ranges for edge in (start, start + length))]
    assert ends == sorted(ends) and ends[-1] <= size * 65_536 + 100


# Copying ranges.


class Kernel:
    """Stands between `RangeCopier` and the kernel: each means can be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clones = self.copies = 0
        self.clone_error: int | None = errno.EOPNOTSUPP
        self.copy_result: int | OSError | None = None
        self._copy = os.copy_file_range
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)
        monkeypatch.setattr(os, "copy_file_range", self.copy_file_range)

    def ioctl(self, target: int, request: int, argument: bytes) -> int:
        self.clones += 1
        assert request == 0x4020940D, "FICLONERANGE"
        if self.clone_error:
            raise OSError(self.clone_error, os.strerror(self.clone_error))
        source, offset, length, at = (int.from_bytes(argument[word : word + 8], "little") for word in range(0, 32, 8))
        os.pwrite(target, os.pread(source, length, offset), at)
        return 0

    def copy_file_range(self, source: int, target: int, count: int, offset: int, at: int) -> int:
        self.copies += 1
        if isinstance(self.copy_result, OSError):
            raise self.copy_result
        if self.copy_result is not None:
            count = min(count, self.copy_result)
        return self._copy(source, target, count, offset, at) if count else 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


SOURCE = bytes(range(256)) * 40
RANGES = [(0, 4096, 4096), (100, 0, 10), (4096, 9000, 5000), (0, 0, 0)]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., RangeCopier]:
    """Return a function that copies RANGES and checks what is there afterwards."""

    def run(**options: Any) -> RangeCopier:
        done: list[int] = []
        with (tmp_path / "source").open("w+b") as source, (tmp_path / "target").open("w+b") as target:
            source.write(SOURCE)
            source.flush()
            copier = RangeCopier(target.fileno(), done.append, **options)
            expected = bytearray(14_000)
            for offset, at, length in RANGES:
                copier.copy(source.fileno(), offset, at, length)
                expected[at : at + length] = SOURCE[offset : offset + length]
            assert (tmp_path / "target").read_bytes() == expected
        assert sum(done) == copier.shared_bytes + copier.copied_bytes == 4096 + 10 + 5000
        return copier

    return run


def test_clones_first(kernel: Kernel, copy: Callable[..., RangeCopier]) -> None:
    kernel.clone_error = None
    assert copy().copied_bytes == 0
    assert (kernel.clones, kernel.copies) == (3, 0)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM])
def test_copies_in_the_kernel_where_it_cannot_clone(
    kernel: Kernel, copy: Callable[..., RangeCopier], number: int
) -> None:
    kernel.clone_error = number
    assert copy().shared_bytes == 0
    assert kernel.clones == 1, "a means that failed once is not tried again"
    assert kernel.copies == 3


@pytest.mark.parametrize(
    "result", [OSError(errno.EXDEV, ""), OSError(errno.EOPNOTSUPP, ""), OSError(errno.ENOSYS, ""), 0]
)
def test_reads_and_writes_where_the_kernel_does_not_copy(
    kernel: Kernel, copy: Callable[..., RangeCopier], result: int | OSError
) -> None:
    kernel.copy_result = result
    assert copy().shared_bytes == 0
    assert kernel.copies == 1


def test_goes_on_when_the_kernel_copies_less(kernel: Kernel, copy: Callable[..., RangeCopier]) -> None:
    kernel.copy_result = 1000
    copy()
    assert kernel.copies == 5 + 1 + 5


def test_shares_nothing_when_told_so(kernel: Kernel, copy: Callable[..., RangeCopier]) -> None:
    kernel.clone_error = None
    assert copy(may_share=False).shared_bytes == 0
    # On btrfs and xfs copy_file_range(2) shares blocks too.
    assert (kernel.clones, kernel.copies) == (0, 0)


@pytest.mark.parametrize("means", ["clone", "copy"])
def test_other_errors_are_raised(kernel: Kernel, copy: Callable[..., RangeCopier], means: str) -> None:
    if means == "clone":
        kernel.clone_error = errno.ENOSPC
    else:
        kernel.copy_result = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        copy()


@pytest.mark.parametrize("may_share", [True, False])
def test_a_source_that_is_too_short_is_an_error(tmp_path: Path, may_share: bool) -> None:
    with (tmp_path / "source").open("w+b") as source, (tmp_path / "target").open("w+b") as target:
        source.write(bytes(5000))
        source.flush()
        with pytest.raises(OSError, match="source ends before"):
            RangeCopier(target.fileno(), lambda _: None, may_share=may_share).copy(source.fileno(), 0, 0, 8192)


def test_real_reflinks(tmp_path: Path) -> None:
    need("mkfs.xfs")
    need_root()
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    tool("mkfs.xfs", "-q", "-m", "reflink=1", image)
    tool("mount", "-o", "loop", image, place)
    try:
        assert fsutil.can_reflink(place)
        assert list(place.iterdir()) == []
        (place / "source").write_bytes(b"x" * (256 * KIB))
        shared: dict[bool, bool] = {}
        for may_share in (True, False):
            target = place / f"target-{may_share}"
            with (place / "source").open("rb") as source, target.open("w+b") as file:
                copier = RangeCopier(file.fileno(), lambda _: None, may_share=may_share)
                copier.copy(source.fileno(), 0, 4096, 256 * KIB)
                os.fsync(file.fileno())
            assert target.read_bytes() == bytes(4096) + b"x" * (256 * KIB)
            assert (copier.shared_bytes > 0) == may_share
            shared[may_share] = "shared" in tool("filefrag", "-v", target)
        assert shared == {True: True, False: False}
    finally:
        tool("umount", place)
