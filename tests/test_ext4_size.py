"""The size of ext4 filesystems: what was asked for is free, to within 256 KiB, and no more."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import ext4_size
from fledge_tasks.filesystems.ext4_size import Counts, create, read_counts
from fledge_tasks.filesystems.sizing import Wanted
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from tests.tools import need, put_before
from tests.trees import MIB, PARAMETERS, tool

SLACK_BYTES = 256 * 1024


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("mke2fs", "dumpe2fs")


def sized(folder: Path, buffer_mib: int, needed: int, inodes: int) -> tuple[int, Counts]:
    """Make an empty filesystem; return by how much its space exceeds the buffer, and its counters."""
    image = folder / "image"
    parameters = dataclasses.replace(PARAMETERS, wanted=Wanted(buffer_mib * MIB))
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


def fixed(folder: Path, size_mib: int, needed: int, inodes: int, **wanted: Any) -> Counts:
    """Make an empty filesystem of a fixed size."""
    image = folder / "image"
    parameters = dataclasses.replace(
        PARAMETERS, wanted=Wanted(**{"buffer_bytes": 0, **wanted}, size_bytes=size_mib * MIB)
    )
    blocks = create(image, folder, parameters, needed_blocks=needed, inodes=inodes)
    assert image.stat().st_size == size_mib * MIB
    assert 0 <= size_mib * MIB // BLOCK_BYTES - blocks < 1024
    return read_counts(image)


@pytest.mark.parametrize(("size", "needed", "inodes"), [(10, 100, 12), (129, 30_000, 5000), (900, 60_000, 4000)])
def test_a_fixed_size(tmp_path: Path, size: int, needed: int, inodes: int) -> None:
    counts = fixed(tmp_path, size, needed, inodes)
    free_inodes = counts.free_inodes + 11 - inodes
    assert free_inodes >= max(10_000, inodes // 5)
    if size == 900:
        assert free_inodes >= (size * MIB - needed * BLOCK_BYTES) // 16_384, "a guest with room has inodes for it"


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 150_000), st.integers(12, 100_000), st.sampled_from([0, 10, 500]))
@example(60_000, 4_094, 0)
@example(31_000, 12, 0)
@example(4_781, 99_726, 10)  # with small groups, whose last one mke2fs leaves out: 65 to 70 MiB are as 64
def test_the_figure_for_a_fixed_size_that_is_too_small_is_right(
    tmp_path: Path, needed: int, inodes: int, buffer_mib: int
) -> None:
    with pytest.raises(FilesystemError, match=r"found \d+, and this image needs (\d+) MiB") as caught:
        fixed(tmp_path, buffer_mib + 1, needed, inodes, buffer_bytes=buffer_mib * MIB)
    assert caught.value.where == "filesystem.size_mb"
    [figure] = re.findall(r"needs (\d+) MiB", caught.value.message)
    counts = fixed(tmp_path, int(figure), needed, inodes, buffer_bytes=buffer_mib * MIB)
    assert (counts.free_blocks - needed - min(counts.blocks // 50, 4096)) * BLOCK_BYTES >= buffer_mib * MIB
    spared = inodes + max(10_000, inodes // 5)
    least = (needed + spared // 16) * BLOCK_BYTES // MIB + buffer_mib + 4
    assert int(figure) <= least * 103 // 100 + 12, "and not a wild guess"


@pytest.mark.parametrize(("buffer_mib", "needed", "inodes"), [(0, 60_000, 4000), (100, 200_000, 90_000), (2000, 5, 12)])
def test_shrunk(tmp_path: Path, buffer_mib: int, needed: int, inodes: int) -> None:
    over, plain = sized(tmp_path, buffer_mib, needed, inodes)
    parameters = dataclasses.replace(PARAMETERS, wanted=Wanted(buffer_mib * MIB, shrink=True))
    create(tmp_path / "image", tmp_path, parameters, needed_blocks=needed, inodes=inodes)
    counts = read_counts(tmp_path / "image")
    free = (counts.free_blocks - needed - min(counts.blocks // 50, 4096)) * BLOCK_BYTES
    assert 0 <= free - buffer_mib * MIB <= max(over, 32 * BLOCK_BYTES)
    assert counts.blocks < plain.blocks
    assert counts.free_inodes + 11 - inodes >= max(10_000, inodes // 5)


def test_an_inode_for_each_so_many_bytes(tmp_path: Path) -> None:
    parameters = dataclasses.replace(PARAMETERS, wanted=Wanted(200 * MIB, inode_ratio=4096))
    create(tmp_path / "image", tmp_path, parameters, needed_blocks=1000, inodes=12)
    counts = read_counts(tmp_path / "image")
    assert counts.inodes >= 200 * MIB // 4096
    assert (counts.free_blocks - 1000 - min(counts.blocks // 50, 4096)) * BLOCK_BYTES >= 200 * MIB


def test_too_large_for_ext4(tmp_path: Path) -> None:
    parameters = dataclasses.replace(PARAMETERS, wanted=Wanted(16 << 40))
    with pytest.raises(FilesystemError, match=r"the image would be \d+ TiB, the limit is 16 TiB"):
        create(tmp_path / "image", tmp_path, parameters, needed_blocks=1, inodes=12)


def test_a_size_that_cannot_be_had_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4_size, "_ATTEMPTS", 1)
    with pytest.raises(FilesystemError, match="please report this"):
        create(tmp_path / "image", tmp_path, PARAMETERS, needed_blocks=100_000, inodes=12)


@pytest.mark.parametrize("script", ["exit 0", 'for word; do case "$word" in */image) : > "$word";; esac; done'])
def test_a_mke2fs_that_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    put_before(monkeypatch, tmp_path, "mke2fs", script)
    with pytest.raises(FilesystemError, match="mke2fs says that it made a filesystem, but there is none"):
        sized(tmp_path, 1, 10, 10)
    assert (tmp_path / "image").exists() == (script != "exit 0")
