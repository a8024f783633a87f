"""How large an image has to be: what a tree takes, what must be free, and which size to try next. Pure.

What a filesystem takes for itself differs from one version of its tools to the next, so it is not
modelled: a size is tried, and what is free in it then tells the next one.

    tree ──measure──► Content ──estimate──► first size ──► made, filled ──► lacking ──► Search
                                               ▲                                          │ too small, too large
                                               └──────────────────────────────────────────┘
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol

from fledge_tasks.errors import FilesystemError
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind, file_runs
from fledge_tasks.tree import Inode, show, walk

MIB = 1 << 20
MIN_FREE_INODES = 10_000
_ATTEMPTS = 12
SPARE_BYTES, SPARE_SHARE = 16 * MIB, 20
"""At most 16 MiB, or this part of the image, is free beyond the buffer."""

MAX_HOLE_BYTES = 64 << 30
"""What all holes of a tree may come to where they are zeros: in erofs images, and for programs that read archives."""

_BYTES_PER_FREE_INODE = 16_384
_NAME_BYTES = 16  # what folders and lists of attributes hold beside a name

# xfs
XFS_INODE_BYTES = 512
_XFS_INODES_PER_CHUNK = 64

# btrfs
_BTRFS_CHECKSUM_BYTES = 4  # of each block of data
_BTRFS_ITEM_BYTES = 25 + 2 * 25 + 16  # struct btrfs_item, and the keys of a name, which is there twice

# ext4
_EXT4_BLOCKS_PER_GROUP = 32_768
_EXT4_MAX_INODES_PER_GROUP = 32_768 - 256  # leaves room for rounding up
_EXT4_MIN_BLOCKS_PER_GROUP = 4_096
_EXT4_INODES_PER_BLOCK = 16
_EXT4_RESERVED_INODES = 10
EXT4_MIN_JOURNAL_BLOCKS = 2_048  # below that, mke2fs makes none (ext2fs_default_journal_size in mkjournal.c)
_EXT4_MIN_JOURNAL_MIB = 4
_MIB_BLOCKS = MIB // BLOCK_BYTES


@dataclass(frozen=True)
class Wanted:
    """What an image shall have.

    buffer_bytes  free in the finished filesystem, as statfs says it (f_bavail)
    size_bytes    size of the image, None: what is needed
    shrink        no more than a MiB is free beyond the buffer, and nothing is larger than it must be
    inode_ratio   bytes of the image for each inode, where their number is fixed; None: what is needed
    """

    buffer_bytes: int
    size_bytes: int | None = None
    shrink: bool = False
    inode_ratio: int | None = None


@dataclass(frozen=True)
class Content:
    """What a tree comes to: blocks of file data, in how many runs, inodes, bytes of names, attributes and targets."""

    blocks: int
    inodes: int
    name_bytes: int
    xattr_bytes: int
    runs: int


def measure(root: Inode) -> Content:
    """Return what a tree comes to. Each inode counts once, each name as often as it is there."""
    blocks = inodes = name_bytes = xattr_bytes = runs = 0
    seen: set[int] = set()
    for path, inode in walk(root):
        name_bytes += len(path.rpartition(b"/")[2]) + _NAME_BYTES
        if id(inode) in seen:
            continue
        seen.add(id(inode))
        inodes += 1
        entry = inode.entry
        xattr_bytes += sum(len(name) + len(value) + _NAME_BYTES for name, value in entry.xattrs.items())
        if entry.kind is Kind.FILE:
            found = file_runs(entry)
            blocks += sum(run.count for run in found)
            runs += len(found)
        elif entry.kind is Kind.SYMLINK:
            xattr_bytes += len(entry.link)
    return Content(blocks, inodes, name_bytes, xattr_bytes, runs)


def check_holes(root: Inode, kind: str) -> None:
    """Raise FilesystemError when the holes of a tree come to more than MAX_HOLE_BYTES."""
    holes = 0
    seen: set[int] = set()
    for path, inode in walk(root):
        if inode.entry.runs is None or id(inode) in seen:
            continue
        seen.add(id(inode))
        blocks = -(-inode.entry.size // BLOCK_BYTES) - sum(run.count for run in inode.entry.runs)
        holes += blocks * BLOCK_BYTES
        if holes > MAX_HOLE_BYTES:
            raise FilesystemError(
                f"with its {inode.entry.size} bytes, holes come to more than the {MAX_HOLE_BYTES >> 30} GiB "
                f"that {kind} images may have, since they are written out as zeros",
                where=show(path),
                hint="choose ext4, xfs or btrfs, which have holes, or make the file smaller",
            )


def xfs_bytes(content: Content) -> int:
    """Return what a tree takes in xfs: data, inodes by chunks of 64, names and attributes in blocks half full."""
    chunks = -(-content.inodes // _XFS_INODES_PER_CHUNK)
    trees = (content.runs + chunks) * 32
    inodes = chunks * _XFS_INODES_PER_CHUNK * XFS_INODE_BYTES
    return content.blocks * BLOCK_BYTES + inodes + 2 * (content.name_bytes + content.xattr_bytes) + trees


def btrfs_bytes(content: Content) -> int:
    """Return what a tree takes in btrfs: data with its checksums, and items in nodes that are half full."""
    data = content.blocks * (BLOCK_BYTES + 2 * _BTRFS_CHECKSUM_BYTES)
    items = content.inodes * (160 + _BTRFS_ITEM_BYTES) + content.runs * (2 * 53 + 2 * _BTRFS_ITEM_BYTES)
    names = 3 * content.name_bytes + 2 * content.xattr_bytes + content.inodes * 2 * _BTRFS_ITEM_BYTES
    return data + 2 * (items + names)


def spare_inodes(used: int) -> int:
    """Return how many inodes stay free at least for the running guest."""
    return max(MIN_FREE_INODES, used // 5)


def whole_mib(size: int) -> int:
    """Return a size, rounded up to whole MiB."""
    return -(-size // MIB) * MIB


class Search:
    """Looks for the size of an image, in whole MiB.

    `lacking` is by how many bytes a filesystem of that size is too small or, negative, too large.
    """

    def __init__(self, wanted: Wanted, min_bytes: int) -> None:
        self._wanted = wanted
        self._min_bytes = min_bytes
        self._too_small = 0

    def first(self, estimate: int) -> int:
        """Return the size to try first for a tree and a buffer of so many bytes."""
        return self._wanted.size_bytes or max(self._min_bytes, whole_mib(estimate))

    def fits(self, size: int, lacking: int) -> bool:
        """Tell whether a size will do."""
        if lacking > 0:
            self._too_small = max(self._too_small, size)
            return False
        if self._wanted.size_bytes is not None:
            return size == self._wanted.size_bytes
        return size <= self._min_bytes or -lacking <= self.slack(size)

    def is_least(self, size: int) -> bool:
        """Tell whether nothing smaller than a size that is large enough is to be had."""
        return self._wanted.size_bytes is None and size - MIB <= self._too_small

    def slack(self, size: int) -> int:
        """Return how many bytes beyond the buffer may be free in an image."""
        return MIB if self._wanted.shrink else max(SPARE_BYTES, size // SPARE_SHARE)

    def next(self, size: int, lacking: int) -> int:
        """Return the size to try after one that does not fit."""
        if self._wanted.size_bytes is not None:
            return self._wanted.size_bytes
        return max(self._min_bytes, self._too_small + MIB, whole_mib(size + lacking))


def lacking_when_full(size: int) -> int:
    """Return a guess at what an image of a size lacks whose tree did not fit."""
    return max(size // 32, SPARE_BYTES // 2)


class Maker(Protocol):
    """Makes images of one tree, each in place of the one before."""

    def empty(self, size: int) -> int:
        """Make an empty image, and return the bytes that are free in it."""

    def fill(self, search: Search, wanted: Wanted) -> tuple[int, int]:
        """Fill the image that was made last, and return its size then, and what it lacks.

        That is `lacking_when_full` if the tree did not fit.
        """


def fit(maker: Maker, kind: str, wanted: Wanted, min_bytes: int, estimate: int, *, has_room: bool = False) -> None:
    """Have an image made that has what is wanted: the one that was made last.

    `estimate` is what the tree takes; with `has_room` an image is filled with twice the room that it needs.
    Raises FilesystemError when there is none, for a fixed size with one that was made and found to do.
    """

    def made(wanted: Wanted) -> int | None:
        return _made(maker, wanted, min_bytes, estimate + wanted.buffer_bytes, has_room=has_room)

    if made(wanted) is not None:
        return
    if wanted.size_bytes is None or (least := made(replace(wanted, size_bytes=None, shrink=True))) is None:
        raise FilesystemError(f"no {kind} filesystem has the size that is wanted: please report this")
    size = max(least, wanted.size_bytes + MIB)
    while made(replace(wanted, size_bytes=size)) is None:
        size = whole_mib(size + size // 64)
    raise too_small(wanted, size)


def _made(maker: Maker, wanted: Wanted, min_bytes: int, needed: int, *, has_room: bool) -> int | None:
    """Return the size of an image that was made, None if there is none of a fixed size, or no size was found."""
    search = Search(wanted, min_bytes)
    needed *= 2 if has_room else 1
    size = max(search.first(needed), whole_mib(needed) if has_room else 0)
    for _ in range(_ATTEMPTS):
        size = _made_empty(maker, wanted, copy.copy(search), needed, size)
        filled, lacking = maker.fill(search, wanted)
        if search.fits(filled, lacking) or (lacking <= 0 and search.is_least(filled)):
            return filled
        if wanted.size_bytes == size:
            return None
        # One that cannot be made small enough is made again without more room than it is to have.
        needed += lacking
        size = search.next(filled, lacking)
    return None


def _made_empty(maker: Maker, wanted: Wanted, rough: Search, needed: int, size: int) -> int:
    """Make an empty image in which so much is free as the tree and the buffer are known to need; return its size.

    It is quick to make, so what the filesystem needs for itself is found out with it. `rough` knows what is
    known of filled images; what it learns here is nothing that holds for those.
    """
    for _ in range(_ATTEMPTS):
        lacking = needed - maker.empty(size)
        if wanted.size_bytes is not None or rough.fits(size, lacking) or (lacking <= 0 and rough.is_least(size)):
            break
        size = rough.next(size, lacking)
    else:
        maker.empty(size)
    return size


def too_small(wanted: Wanted, needed_bytes: int) -> FilesystemError:
    """Return what is raised for a fixed size that will not do; an image of `needed_bytes` would."""
    assert wanted.size_bytes is not None
    needed, buffer = needed_bytes // MIB, wanted.buffer_bytes // MIB
    what = f"found {wanted.size_bytes // MIB}, and this image needs {needed} MiB, {buffer} of them free"
    return FilesystemError(what, where="filesystem.size_mb", hint=f"set size_mb = {needed} or more, or leave it out")


@dataclass(frozen=True)
class Ext4Layout:
    """What mke2fs is told. `wanted_blocks` shall be free, which takes `least_blocks` and the filesystem's own."""

    wanted_blocks: int
    least_blocks: int
    inodes: int
    blocks_per_group: int
    journal_mib: int


def ext4_layout(wanted: Wanted, *, needed_blocks: int, inodes: int, has_journal: bool = True) -> Ext4Layout:
    """Return the layout for a tree that takes so many blocks and inodes.

    At least 10,000 inodes, a fifth of those used and, unless it is to be small, one per 16 KiB of
    free space stay free. With a fixed size the tree's needs are the same; all else is for the caller to find out.
    """
    wanted_blocks = needed_blocks + -(-wanted.buffer_bytes // BLOCK_BYTES)
    free_inodes = spare_inodes(inodes)
    fixed_blocks = (wanted.size_bytes or 0) // BLOCK_BYTES
    if not wanted.shrink:
        room = max(wanted.buffer_bytes, (fixed_blocks - needed_blocks) * BLOCK_BYTES)
        free_inodes = max(free_inodes, room // _BYTES_PER_FREE_INODE)
    total = _EXT4_RESERVED_INODES + inodes + free_inodes
    # What follows from the size by steps is settled first: then a block more is a block more free.
    journal_mib = _ext4_journal_mib(max(wanted_blocks, fixed_blocks), wanted) if has_journal else 0
    if has_journal and not fixed_blocks:
        # Inodes fill a filesystem up that would be too small to have a journal.
        short = EXT4_MIN_JOURNAL_BLOCKS - wanted_blocks - journal_mib * _MIB_BLOCKS
        total = max(total, short * _EXT4_INODES_PER_BLOCK)
    least = wanted_blocks + total // _EXT4_INODES_PER_BLOCK + journal_mib * _MIB_BLOCKS
    if wanted.inode_ratio is not None:
        total = max(total, max(least, fixed_blocks) * BLOCK_BYTES // wanted.inode_ratio)
        least = wanted_blocks + total // _EXT4_INODES_PER_BLOCK + journal_mib * _MIB_BLOCKS
    blocks_per_group = _ext4_blocks_per_group(max(least, fixed_blocks), total)
    return Ext4Layout(wanted_blocks, least, total, blocks_per_group, journal_mib)


def ext4_free_blocks(blocks: int, free_blocks: int) -> int:
    """Return what statfs says is available: Linux keeps 2 %, at most 4096 blocks, back.

    Source: fs/ext4/super.c, ext4_set_resv_clusters.
    """
    return free_blocks - min(blocks // 50, 4096)


def _ext4_blocks_per_group(blocks: int, inodes: int) -> int:
    """Return the size of groups: a tree of many empty files needs more than its blocks would make."""
    size = _EXT4_BLOCKS_PER_GROUP
    while max(blocks // size, 1) * _EXT4_MAX_INODES_PER_GROUP < inodes and size > _EXT4_MIN_BLOCKS_PER_GROUP:
        size //= 2
    return size


def _ext4_journal_mib(blocks: int, wanted: Wanted) -> int:
    """Return the journal's size: what mke2fs would choose, up to 64 MiB, by a table of our own."""
    if wanted.shrink:
        return _EXT4_MIN_JOURNAL_MIB
    for limit_blocks, size in ((32_768, 4), (262_144, 16), (524_288, 32)):
        if blocks < limit_blocks:
            return size
    return 64
