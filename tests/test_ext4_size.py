"""The size of ext4 filesystems: what was asked for is free, to within 256 KiB, and no more."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import ext4_size
from fledge_tasks.filesystems.ext4_size import Counts, create, read_counts
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from tests.tools import need
from tests.trees import MIB, PARAMETERS, tool

SLACK_BYTES = 256 * 1024


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("mke2fs", "dumpe2fs")


def sized(folder: Path, buffer_mib: int, needed: int, inodes: int) -> tuple[int, Counts]:
    """Make an empty filesystem; return by how much its space exceeds the buffer, and its counters."""
    image = folder / "image"
    parameters = dataclasses.replace(PARAMETERS, buffer_bytes=buffer_mib * MIB)
    blocks = create(image, folder, parameters, needed_blocks=needed, inodes=inodes)
    counts = read_counts(image)
    assert blocks == counts.blocks
    assert image.stat().st_size == blocks * BLOCK_BYTES
    kept = min(counts.blocks // 50, 4096)
    return (counts.free_blocks - needed - kept) * BLOCK_BYTES - buffer_mib * MIB, counts


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([0, 1, 37, 100, 1000, 2983, 5000]),
    st.one_of(
        st.integers(1, 200_000),
        st.builds(lambda groups, more: groups * 32_768 + more, st.integers(1, 20), st.integers(-3000, 3000)),
    ),
    st.integers(12, 150_000),
)
# Where a block more is not a block more free: mke2fs drops a last group that is too small.
@example(1000, 151_778, 10_693)
@example(1000, 84_993, 34_018)
@example(2790, 63_588, 121_489)
@example(100, 189_187, 296_674)
@example(37, 943_714, 72_605)
# Groups made smaller to hold the inodes.
@example(0, 65_105, 241_868)
@example(37, 4485, 188_550)
# More blocks than the tree needs, so that inodes and journal find room.
@example(0, 1, 22_759)
@example(0, 10_000, 1_000_000)
@example(100, 60_000, 5_000_000)
# Around the sizes at which the journal grows.
@example(0, 32_000, 12)
@example(1000, 6_000, 12)
def test_the_buffer_is_free(tmp_path: Path, buffer_mib: int, needed: int, inodes: int) -> None:
    over, counts = sized(tmp_path, buffer_mib, needed, inodes)
    assert 0 <= over <= SLACK_BYTES
    free_inodes = counts.free_inodes + 11 - inodes
    assert free_inodes >= max(10_000, inodes // 5, buffer_mib * MIB // 16_384)


def test_a_size_that_is_not_to_be_had_exactly(tmp_path: Path) -> None:
    over, _ = sized(tmp_path, 0, 13_424, 2_237_451)
    assert SLACK_BYTES < over <= MIB


@pytest.mark.parametrize("needed", range(28_000, 36_000, 500))
def test_around_the_end_of_the_first_group(tmp_path: Path, needed: int) -> None:
    over, _ = sized(tmp_path, 0, needed, 5000)
    assert 0 <= over <= SLACK_BYTES


def test_the_smallest_image_has_a_journal(tmp_path: Path) -> None:
    _, counts = sized(tmp_path, 0, 2, 2)
    assert counts.blocks < 12 * MIB // BLOCK_BYTES
    listed = tool("dumpe2fs", "-h", tmp_path / "image")
    assert re.search(r"^Total journal blocks: +1024$", listed, re.MULTILINE)


def test_counters_are_those_of_dumpe2fs(tmp_path: Path) -> None:
    _, counts = sized(tmp_path, 10, 1000, 12)
    listed = tool("dumpe2fs", "-h", tmp_path / "image")
    found = [re.search(rf"^{name}: +(\d+)$", listed, re.MULTILINE) for name in
             ("Block count", "Free blocks", "Inode count", "Free inodes")]  # fmt: skip
    assert [int(match[1]) for match in found if match] == list(dataclasses.astuple(counts))


def test_same_answer_every_time(tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sized(tmp_path / name, 1000, 151_778, 10_693)
        with (tmp_path / name / "image").open("rb") as file:
            results.append(file.read(4 * MIB))
    assert results[0] == results[1]


def test_too_large_for_ext4(tmp_path: Path) -> None:
    parameters = dataclasses.replace(PARAMETERS, buffer_bytes=16 << 40)
    with pytest.raises(FilesystemError, match=r"the image would be \d+ TiB, the limit is 16 TiB"):
        create(tmp_path / "image", tmp_path, parameters, needed_blocks=1, inodes=12)


def test_a_size_that_cannot_be_had_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4_size, "_ATTEMPTS", 1)
    with pytest.raises(FilesystemError, match="please report this"):
        create(tmp_path / "image", tmp_path, PARAMETERS, needed_blocks=100_000, inodes=12)
