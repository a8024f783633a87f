"""Assembling: every byte from where the map says, all of it or nothing."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks import fsutil
from fledge_tasks.assemble import Assembled, assemble, segments
from fledge_tasks.digest import CHUNK_BYTES
from fledge_tasks.errors import StoreError
from fledge_tasks.filesystems.skeleton import BLOCK_BYTES, ImageExtent, ImageMap

Range = tuple[int, int]


def fill_of(seed: int, blocks: int) -> bytes:
    """Return blocks of which no two are alike."""
    return b"".join(f"{seed}/{at:08};".encode().ljust(16) * (BLOCK_BYTES // 16) for at in range(blocks))


@dataclasses.dataclass
class Parts:
    """A map and its files in a folder, and what must come out."""

    folder: Path
    map: ImageMap
    payloads: dict[int, Path]
    expected: bytes

    @property
    def target(self) -> Path:
        return self.folder / "out" / "rootfs.img"

    def assemble(self, *, preallocate: bool = False, advance: Callable[[int], None] = lambda _: None) -> Assembled:
        return assemble(
            self.map, self.folder / "skeleton", self.payloads, self.target, preallocate=preallocate, advance=advance
        )

    def found(self) -> dict[str, bytes]:
        """Return what is in the target's folder."""
        return {path.name: path.read_bytes() for path in self.target.parent.iterdir()}


def parts(folder: Path, blocks: int, ranges: list[Range], extents: list[ImageExtent]) -> Parts:
    expected = bytearray(blocks * BLOCK_BYTES)
    data = fill_of(9, sum(count for _, count in ranges))
    done = 0
    for block, count in ranges:
        expected[block * BLOCK_BYTES : (block + count) * BLOCK_BYTES] = data[done : done + count * BLOCK_BYTES]
        done += count * BLOCK_BYTES
    (folder / "skeleton").write_bytes(zstandard.compress(data))
    payloads = {}
    for source in {extent.source for extent in extents}:
        of_source = [extent for extent in extents if extent.source == source]
        payload = fill_of(source, max(extent.payload_block + extent.count for extent in of_source))
        payloads[source] = folder / f"payload{source}"
        payloads[source].write_bytes(payload)
        for extent in of_source:
            start, count = extent.block * BLOCK_BYTES, extent.count * BLOCK_BYTES
            expected[start : start + count] = payload[extent.payload_block * BLOCK_BYTES :][:count]
    return Parts(folder, ImageMap("fledge-skeleton", 1, blocks, ranges, sorted(extents)), payloads, bytes(expected))


@pytest.fixture
def some(tmp_path: Path) -> Parts:
    """An image of three MiB with skeleton, two payloads and holes, among them the end."""
    extents = [
        ImageExtent(2, 0, 1, 300),
        ImageExtent(310, 1, 0, 5),
        ImageExtent(315, 0, 0, 1),
        ImageExtent(500, 0, 0, 1),
    ]
    return parts(tmp_path, 768, [(0, 2), (302, 3), (600, 1)], extents)


@pytest.mark.parametrize("preallocate", [False, True])
def test_every_byte_comes_from_its_place(some: Parts, preallocate: bool) -> None:
    told: list[int] = []
    made = some.assemble(preallocate=preallocate, advance=told.append)
    assert some.found() == {"rootfs.img": some.expected}
    assert made.sha256 == "sha256:" + hashlib.sha256(some.expected).hexdigest()
    assert made.size == len(some.expected)
    assert sum(told) == made.shared_bytes + made.copied_bytes == 307 * BLOCK_BYTES
    assert some.target.stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_holes_stay_holes_or_are_allocated(some: Parts) -> None:
    some.assemble()
    assert some.target.stat().st_blocks * 512 < 400 * BLOCK_BYTES
    some.assemble(preallocate=True)
    assert some.target.stat().st_blocks * 512 >= 768 * BLOCK_BYTES


@pytest.mark.parametrize("number", ["EOPNOTSUPP", "EINVAL"])
def test_preallocation_where_the_filesystem_cannot(some: Parts, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(getattr(errno, number), number)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    some.assemble(preallocate=True)
    assert some.found() == {"rootfs.img": some.expected}
    assert some.target.stat().st_blocks * 512 >= 768 * BLOCK_BYTES


def test_no_room_for_preallocation(some: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left"):
        some.assemble(preallocate=True)
    assert some.found() == {}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(-1, 2)), max_size=12), st.integers(0, 3))
def test_any_map(tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, int, int]], tail: int) -> None:
    ranges: list[Range] = []
    extents: list[ImageExtent] = []
    block = 0
    for number, (gap, count, source) in enumerate(pieces):
        block += gap
        if source >= 0:
            extents.append(ImageExtent(block, source, number * 7 % 11, count))
        elif ranges and sum(ranges[-1]) == block:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + count)
        else:
            ranges.append((block, count))
        block += count
    folder = tmp_path_factory.mktemp("map")
    any_parts = parts(folder, block + tail, ranges, extents)
    made = any_parts.assemble()
    assert any_parts.target.read_bytes() == any_parts.expected
    assert made.sha256 == "sha256:" + hashlib.sha256(any_parts.expected).hexdigest()
    assert sum(count for _, _, _, count in segments(any_parts.map)) == block + tail


def test_pieces_longer_than_the_buffer(tmp_path: Path) -> None:
    blocks = 3 * CHUNK_BYTES // BLOCK_BYTES + 1
    large = parts(tmp_path, 3 * blocks, [(0, blocks)], [ImageExtent(blocks, 0, 0, blocks)])
    made = large.assemble()
    assert large.target.read_bytes() == large.expected
    assert made.sha256 == "sha256:" + hashlib.sha256(large.expected).hexdigest()


def test_a_second_assembly_replaces_the_first(some: Parts) -> None:
    first = some.assemble()
    with some.target.open("rb") as old:
        assert some.assemble().sha256 == first.sha256
        assert os.fstat(old.fileno()).st_nlink == 0, "a reader of the old file keeps it"
        assert old.read() == some.expected


# Failures: the old target stays, and nothing else.


@pytest.fixture
def old(some: Parts) -> Parts:
    some.target.parent.mkdir()
    some.target.write_bytes(b"old")
    return some


OLD = {"rootfs.img": b"old"}


@pytest.mark.parametrize(
    ("ranges", "extents"),
    [
        ([(0, 2)], [ImageExtent(1, 0, 0, 1)]),
        ([(0, 1)], [ImageExtent(4, 0, 0, 2), ImageExtent(5, 0, 3, 2)]),
        ([(0, 1), (0, 1)], []),
        ([(767, 2)], []),
        ([], [ImageExtent(768, 0, 0, 1)]),
    ],
    ids=["range and extent", "extents", "ranges", "range past the end", "extent past the end"],
)
def test_parts_that_lie_over_each_other(old: Parts, ranges: list[Range], extents: list[ImageExtent]) -> None:
    old.map = ImageMap("fledge-skeleton", 1, 768, ranges, extents)
    with pytest.raises(StoreError, match=r"block \d+ is used twice or lies outside"):
        old.assemble()
    assert old.found() == OLD


def test_payload_that_is_too_short(old: Parts) -> None:
    os.truncate(old.payloads[0], 300 * BLOCK_BYTES)
    with pytest.raises(StoreError, match="payload 0 ends before"):
        old.assemble()
    assert old.found() == OLD


def test_payload_that_is_not_there(old: Parts) -> None:
    old.payloads[1].unlink()
    with pytest.raises(FileNotFoundError, match="payload1"):
        old.assemble()
    assert old.found() == OLD


@pytest.mark.parametrize("content", [b"", b"not zstd", zstandard.compress(bytes(BLOCK_BYTES))])
def test_skeleton_that_is_none_or_too_short(old: Parts, content: bytes) -> None:
    (old.folder / "skeleton").write_bytes(content)
    with pytest.raises(StoreError, match=r"ends before the data|not a skeleton"):
        old.assemble()
    assert old.found() == OLD


def test_skeleton_that_is_not_there(old: Parts) -> None:
    (old.folder / "skeleton").unlink()
    with pytest.raises(FileNotFoundError, match="skeleton"):
        old.assemble()
    assert old.found() == OLD


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_interruption(old: Parts, error: type[BaseException]) -> None:
    def interrupt(_: int) -> None:
        raise error

    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        old.assemble(advance=interrupt)
    assert old.found() == OLD
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert old.assemble().size == len(old.expected)


def test_what_a_crash_left_is_removed(old: Parts) -> None:
    fsutil.temp_sibling(old.target).write_bytes(b"torn")
    other = fsutil.temp_sibling(old.target.parent / "other.img")
    other.write_bytes(b"of another")
    old.assemble()
    assert old.found() == {"rootfs.img": old.expected, other.name: b"of another"}


def test_means_of_copying_do_not_matter(some: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EXDEV, "")

    first = some.assemble()
    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(fcntl, "ioctl", fail)
    second = some.assemble()
    assert some.target.read_bytes() == some.expected
    assert (second.sha256, second.shared_bytes) == (first.sha256, 0)
