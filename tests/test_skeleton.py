"""Skeletons: which blocks are kept, and the map's format."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import StoreError
from fledge_tasks.filesystems.skeleton import BLOCK_BYTES, ImageExtent, ImageMap, merge_extents, read_map, save

FULL = b"\x01" * BLOCK_BYTES
LAST_BYTE = bytes(BLOCK_BYTES - 1) + b"\x01"


def image_of(path: Path, blocks: dict[int, bytes], count: int) -> Path:
    """Make an image with some blocks written and holes elsewhere."""
    with path.open("wb") as file:
        file.truncate(count * BLOCK_BYTES)
        for at, data in blocks.items():
            os.pwrite(file.fileno(), data, at * BLOCK_BYTES)
    return path


def saved(folder: Path, image: Path, extents: list[ImageExtent] | None = None) -> tuple[ImageMap, bytes]:
    """Save, check that the map comes back from its file, and return it and the skeleton's content."""
    image_map = save(image, extents or [], folder / "skeleton", folder / "map")
    assert read_map(folder / "map") == image_map
    with (folder / "skeleton").open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        return image_map, reader.read()


def test_ranges_are_the_blocks_that_are_not_zero(tmp_path: Path) -> None:
    zero = bytes(BLOCK_BYTES)
    blocks = {0: FULL, 1: LAST_BYTE, 2: zero, 3: FULL, 255: FULL, 256: FULL, 257: zero, 1000: LAST_BYTE, 1001: zero}
    image_map, data = saved(tmp_path, image_of(tmp_path / "image", blocks, 1100))
    assert image_map.blocks == 1100 and image_map.image_bytes == 1100 * BLOCK_BYTES
    assert image_map.ranges == [(0, 2), (3, 1), (255, 2), (1000, 1)]
    assert data == FULL + LAST_BYTE + FULL + FULL + FULL + LAST_BYTE
    assert image_map.extents == [] and image_map.sources() == set()


def test_written_zeros_and_holes_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "dense").write_bytes(bytes(5 * BLOCK_BYTES) + FULL + bytes(600 * BLOCK_BYTES))
    sparse = image_of(tmp_path / "sparse", {5: FULL}, 606)
    files = []
    for name in ("dense", "sparse"):
        (tmp_path / f"of-{name}").mkdir()
        saved(tmp_path / f"of-{name}", tmp_path / name)
        files.append([(tmp_path / f"of-{name}" / part).read_bytes() for part in ("skeleton", "map")])
    assert files[0] == files[1]
    assert sparse.stat().st_blocks < 606


@pytest.mark.parametrize("count", [0, 1, 300])
def test_image_without_data(tmp_path: Path, count: int) -> None:
    image_map, data = saved(tmp_path, image_of(tmp_path / "image", {}, count))
    assert (image_map.blocks, image_map.ranges, data) == (count, [], b"")


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 600)))
def test_any_blocks(tmp_path_factory: pytest.TempPathFactory, blocks: set[int]) -> None:
    folder = tmp_path_factory.getbasetemp()
    image = image_of(folder / "image", {at: b"%4d" % at * 1024 for at in blocks}, 601)
    image_map, data = saved(folder, image)
    assert [at for start, count in image_map.ranges for at in range(start, start + count)] == sorted(blocks)
    assert data == b"".join(b"%4d" % at * 1024 for at in sorted(blocks))
    assert all(sum(one) < two[0] for one, two in zip(image_map.ranges, image_map.ranges[1:], strict=False))
    image.unlink()


def test_extents_are_sorted_and_joined() -> None:
    def extent(block: int, source: int, payload_block: int, count: int) -> ImageExtent:
        return ImageExtent(block, source, payload_block, count)

    found = merge_extents(
        [extent(30, 1, 0, 5), extent(10, 0, 0, 5), extent(15, 0, 5, 5), extent(20, 0, 10, 1), extent(21, 0, 12, 1),
         extent(22, 1, 13, 1), extent(40, 1, 5, 5), extent(35, 1, 5, 5)]
    )  # fmt: skip
    assert found == [
        extent(10, 0, 0, 11),
        extent(21, 0, 12, 1),  # not the next block of the payload
        extent(22, 1, 13, 1),  # another payload
        extent(30, 1, 0, 10),
        extent(40, 1, 5, 5),
    ]
    assert merge_extents([]) == []


def test_save_joins_extents(tmp_path: Path) -> None:
    extents = [ImageExtent(6, 2, 1, 1), ImageExtent(5, 2, 0, 1)]
    image_map, _ = saved(tmp_path, image_of(tmp_path / "image", {}, 10), extents)
    assert image_map.extents == [ImageExtent(5, 2, 0, 2)]
    assert image_map.sources() == {2}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        msgspec.msgpack.encode(["fledge-skeleton", 2, 1, [], []]),
        msgspec.msgpack.encode(["fledge-layer", 1, 1, [], []]),
        msgspec.msgpack.encode(["fledge-skeleton", 1, 1, []]),
        msgspec.msgpack.encode(["fledge-skeleton", 1, 1, [], []]) + b"\0",
        b"\x96" + msgspec.msgpack.encode(["fledge-skeleton", 1, 1, [], []])[1:] + b"\x91" * 100_000 + b"\0",
    ],
    ids=["empty", "text", "other version", "other magic", "too short", "too long", "too deep"],
)
def test_anything_else_is_not_a_map(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map").write_bytes(content)
    with pytest.raises(StoreError, match="not an image map") as caught:
        read_map(tmp_path / "map")
    assert caught.value.where == str(tmp_path / "map")


def test_missing_map(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        read_map(tmp_path / "map")
