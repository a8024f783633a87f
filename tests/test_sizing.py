"""The sizing model: what a tree takes, and a search that ends at a size that keeps the promise."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import sizing
from fledge_tasks.filesystems.sizing import MIB, Content, Search, Wanted, ext4_layout, fit
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind, Run
from fledge_tasks.tree import Layer, merge

STEPS = 20
"""Of a search; each is a filesystem that is made and filled."""


def test_what_a_tree_comes_to() -> None:
    entries = [
        Entry(b"usr", Kind.DIRECTORY, 0o755),
        Entry(b"usr/one", Kind.FILE, 0o644, size=5000, xattrs={b"user.a": b"123"}),
        Entry(b"usr/two", Kind.HARDLINK, 0o644, link=b"usr/one"),
        Entry(b"usr/link", Kind.SYMLINK, 0o777, link=b"one"),
        Entry(b"sparse", Kind.FILE, 0o644, size=100 * BLOCK_BYTES, runs=(Run(0, 2, 3), Run(50, 5, 1))),
        Entry(b"empty", Kind.FILE, 0o644),
    ]
    content = sizing.measure(merge([Layer("layer", entries)], 0))
    names = ["", "usr", "one", "two", "link", "sparse", "empty"]
    assert content == Content(
        blocks=2 + 4,
        inodes=6,  # the root as well, and one for both names of usr/one
        name_bytes=sum(len(name) + 16 for name in names),
        xattr_bytes=len("user.a") + 3 + 16 + len("one"),
        runs=1 + 2,
    )


CONTENTS = st.builds(
    Content,
    blocks=st.integers(0, 3_000_000),
    inodes=st.integers(1, 1_000_000),
    name_bytes=st.integers(0, 50_000_000),
    xattr_bytes=st.integers(0, 10_000_000),
    runs=st.integers(0, 1_000_000),
)


@given(CONTENTS, CONTENTS)
def test_more_content_never_takes_less(one: Content, two: Content) -> None:
    both = Content(*(getattr(one, name) + getattr(two, name) for name in Content.__dataclass_fields__))
    for estimate in (sizing.xfs_bytes, sizing.btrfs_bytes):
        assert estimate(both) >= max(estimate(one), estimate(two)) >= BLOCK_BYTES * max(one.blocks, two.blocks)


@pytest.mark.parametrize(("used", "free"), [(0, 10_000), (50_000, 10_000), (50_005, 10_001), (1_000_000, 200_000)])
def test_a_fifth_of_the_inodes_or_ten_thousand_stay_free(used: int, free: int) -> None:
    assert sizing.spare_inodes(used) == free


@given(
    st.integers(0, 3000).map(lambda mib: mib * MIB), st.integers(0, 8000 * MIB), st.booleans(),
    st.integers(0, 40), st.integers(1, 64), st.integers(0, 300),
)  # fmt: skip
def test_a_search_ends_with_the_promise_kept(
    buffer: int, used: int, is_small: bool, percent: int, step_mib: int, min_mib: int
) -> None:
    """The filesystem keeps a part of its size for itself, in steps, so that not every free space is to be had."""
    assume(not is_small or step_mib < 32)

    def lacking(size: int) -> int:
        own = size * percent // 100 // (step_mib * MIB) * step_mib * MIB + 10 * MIB
        return buffer - (size - own - used)

    search = Search(Wanted(buffer, shrink=is_small), min_mib * MIB)
    size = search.first(used + buffer)
    for _ in range(STEPS):
        short = lacking(size)
        if search.fits(size, short) or (short <= 0 and search.is_least(size)):
            break
        size = search.next(size, short)
    else:
        pytest.fail(f"no size after {STEPS} steps")
    assert size % MIB == 0 and size >= min_mib * MIB
    assert lacking(size) <= 0, "the buffer is a promise"
    if size > min_mib * MIB and lacking(size - MIB) <= 0:
        assert -lacking(size) <= (MIB if is_small else max(16 * MIB, size // 20))


def test_a_fixed_size_is_the_only_one() -> None:
    search = Search(Wanted(5 * MIB, size_bytes=50 * MIB), 10 * MIB)
    assert search.first(999 * MIB) == 50 * MIB
    assert search.fits(50 * MIB, -40 * MIB)
    assert not search.fits(60 * MIB, -1)
    assert search.next(60 * MIB, -1) == 50 * MIB
    assert not search.fits(50 * MIB, 1)
    assert not search.is_least(50 * MIB)


@given(
    st.integers(0, 4000).map(lambda mib: mib * MIB), st.integers(1, 3_000_000), st.integers(12, 2_000_000),
    st.booleans(), st.booleans(), st.none() | st.integers(1024, 1 << 20),
)  # fmt: skip
def test_the_layout_of_ext4(
    buffer: int, needed: int, inodes: int, is_small: bool, has_journal: bool, ratio: int | None
) -> None:
    wanted = Wanted(buffer, shrink=is_small, inode_ratio=ratio)
    layout = ext4_layout(wanted, needed_blocks=needed, inodes=inodes, has_journal=has_journal)
    assert layout.wanted_blocks * BLOCK_BYTES - buffer == needed * BLOCK_BYTES
    assert layout.inodes - 10 - inodes >= max(10_000, inodes // 5)
    assert layout.least_blocks >= layout.wanted_blocks + layout.inodes // 16
    assert layout.journal_mib == 0 if not has_journal else layout.journal_mib >= 4
    groups = max(layout.least_blocks // layout.blocks_per_group, 1)
    assert layout.blocks_per_group == 4096 or groups * (32_768 - 256) >= layout.inodes
    if ratio is None:
        small = ext4_layout(Wanted(buffer, shrink=True), needed_blocks=needed, inodes=inodes, has_journal=has_journal)
        assert small.least_blocks <= layout.least_blocks
    else:
        assert layout.inodes >= (layout.wanted_blocks * BLOCK_BYTES) // ratio


class Model:
    """A filesystem that keeps a tenth for itself, holds a tree of so many bytes, and may be resized."""

    def __init__(self, used: int, *, can_resize: bool) -> None:
        self._used = used
        self._can_resize = can_resize
        self.size = 0
        self.fills = 0

    def free(self) -> int:
        return self.size - self.size // 10 - self._used

    def empty(self, size: int) -> int:
        self.size = size
        return size - size // 10

    def fill(self, search: Search, wanted: Wanted) -> tuple[int, int]:
        self.fills += 1
        if self.free() < 0:
            return self.size, sizing.lacking_when_full(self.size)
        lacking = wanted.buffer_bytes - self.free()
        while self._can_resize and not search.fits(self.size, lacking):
            size = search.next(self.size, lacking)
            if size == self.size:
                break
            self.size = size
            lacking = wanted.buffer_bytes - self.free()
        return self.size, lacking


@given(
    st.integers(0, 2000).map(lambda mib: mib * MIB), st.integers(0, 4000 * MIB), st.integers(90, 200),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_an_image_is_made_that_fits(
    buffer: int, used: int, percent: int, is_small: bool, can_resize: bool, has_room: bool
) -> None:
    model = Model(used, can_resize=can_resize)
    estimate = max(used * percent // 100, used - 50 * MIB)
    fit(model, "model", Wanted(buffer, shrink=is_small), 20 * MIB, estimate, has_room=has_room)
    assert model.free() >= buffer
    slack = MIB if is_small else max(16 * MIB, model.size // 20)
    assert model.size == 20 * MIB or model.free() - buffer <= slack
    assert model.fills <= 10


@given(st.integers(0, 300), st.integers(1, 500 * MIB), st.booleans(), st.booleans())
def test_the_figure_for_a_fixed_size_is_that_of_an_image_that_was_made(
    buffer_mib: int, used: int, can_resize: bool, has_room: bool
) -> None:
    model = Model(used, can_resize=can_resize)
    wanted = Wanted(buffer_mib * MIB, size_bytes=(buffer_mib + 1) * MIB)
    assume((buffer_mib + 1) * MIB * 9 // 10 - used < buffer_mib * MIB)
    with pytest.raises(FilesystemError, match=r"found \d+, and this image needs \d+ MiB") as caught:
        fit(model, "model", wanted, MIB, used, has_room=has_room)
    [figure] = re.findall(r"needs (\d+) MiB", caught.value.message)
    assert model.size == int(figure) * MIB and model.free() >= buffer_mib * MIB
    fit(Model(used, can_resize=can_resize), "model", Wanted(buffer_mib * MIB, size_bytes=model.size), MIB, used)
