"""xfs and btrfs images: made by mkfs, mounted where nobody sees it, and filled by Linux itself. For root.

There is no library that could fill them. What is kept of them is the same as of ext4: file data that
lies in the image as whole blocks of a payload is told as extents, so that a hundred images on one
base hold that base once. Each such block is compared before it is left out.

    first estimate of the size ─► mkfs, mount, how much is free? ─► fill ─► how much is free now?
        ▲                             │ too little or too much        │ too little or too much
        └─────────────────────────────┴───────────────────────────────┘
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import fill, loopmount, sizing
from fledge_tasks.filesystems.fill import Place
from fledge_tasks.filesystems.loopmount import Mount
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import Content, Search, Wanted
from fledge_tasks.filesystems.skeleton import ImageExtent
from fledge_tasks.fsutil import opened
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from fledge_tasks.tree import Inode

_ATTEMPTS = 12
_COMPARE_BLOCKS = 256


@dataclass(frozen=True)
class Type:
    """One type of filesystem that Linux fills.

    make         puts an empty filesystem into a file that has the image's size
    options      of mount(2)
    min_bytes    what an image has at least
    room         whether it has twice the room while it is being filled, and is made smaller afterwards
    estimate     bytes that a tree takes, without what an empty filesystem takes
    inode_bytes  what an inode takes out of free space, 0 where the number of inodes has no limit
    translate    returns what turns an address that FIEMAP tells into a byte of the image
    resize       brings the mounted filesystem from one size to another, or returns False if it cannot
    finish       does what is left to do once the image is not mounted any more
    """

    name: str
    make: Callable[[Path, Parameters], None]
    options: str
    min_bytes: int
    room: bool
    estimate: Callable[[Content], int]
    inode_bytes: int
    translate: Callable[[Path], Callable[[int], int | None]]
    resize: Callable[[Mount, int, int], bool]
    finish: Callable[[Path, Parameters], None]


def make(
    kind: Type, root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path
) -> Filled:
    """Make an image as `parameters.Make` says.

    This process gets a mount namespace of its own. What is free is at least the buffer, and at most
    `Search.slack` more, but for the type's own least size and a fixed one.
    """
    loopmount.unshare_mounts()
    (scratch / "mnt").mkdir()
    with opened(payloads) as sources:
        maker = _Maker(kind, root, parameters, sources, image, scratch / "mnt")
        wanted = parameters.wanted
        filled = maker.make(wanted)
        if filled is None and wanted.size_bytes is not None:
            raise sizing.too_small(wanted, maker.least(wanted))
    if filled is None:
        raise FilesystemError(f"no {kind.name} filesystem has the size that is wanted: please report this")
    return filled


class _Maker:
    """Makes images of one tree, each in place of the one before."""

    def __init__(
        self, kind: Type, root: Inode, parameters: Parameters, sources: Mapping[int, int], image: Path, at: Path
    ) -> None:
        self._kind = kind
        self._root = root
        self._parameters = parameters
        self._sources = sources
        self._image = image
        self._at = at
        self._content = sizing.measure(root)
        self._needed = kind.estimate(self._content)

    def make(self, wanted: Wanted) -> Filled | None:
        """Make an image, or return None if there is none of a fixed size, or no size was found."""
        kind = self._kind
        needed = (self._needed + wanted.buffer_bytes) * (2 if kind.room else 1)
        # What is known of filled images is one thing, what the estimate promises another.
        search, rough = (Search(wanted, kind.min_bytes) for _ in range(2))
        size = search.first(needed)
        if kind.room:
            size = max(size, sizing.whole_mib(needed))
        for _ in range(_ATTEMPTS):
            self._image.unlink(missing_ok=True)
            fd = os.open(self._image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
                kind.make(self._image, self._parameters)
                attempt = _Attempt(kind, fd, self._at, size, self._content.inodes)
                # An empty filesystem is quick to make, so its own needs are found out with those.
                lacking = needed - attempt.free_bytes()
                if wanted.size_bytes is None and not rough.fits(size, lacking):
                    size = rough.next(size, lacking)
                    continue
                if attempt.fill(self._root, self._sources) and attempt.settle(search, wanted):
                    return self._finished(fd, attempt)
            finally:
                os.close(fd)
            if wanted.size_bytes == size:
                return None
            # One that cannot be made small enough is made again without more room than it is to have.
            needed += attempt.lacking
            size = search.next(attempt.size, attempt.lacking)
        return None

    def least(self, wanted: Wanted) -> int:
        """Return the size of the smallest image, which was made, for one of a fixed size that would not do."""
        assert wanted.size_bytes is not None
        if self.make(replace(wanted, size_bytes=None, shrink=True)) is None:
            raise FilesystemError(f"no {self._kind.name} filesystem holds the tree: please report this")
        size = max(self._image.stat().st_size, wanted.size_bytes + sizing.MIB)
        while self.make(replace(wanted, size_bytes=size)) is None:
            size = sizing.whole_mib(size + size // 64)
        return size

    def _finished(self, fd: int, attempt: _Attempt) -> Filled:
        places, free_bytes, free_inodes = attempt.places(self._root)
        self._kind.finish(self._image, self._parameters)
        extents = list(_extents(fd, places, self._sources, self._kind.translate(self._image)))
        return Filled(extents, free_bytes, free_inodes)


class _Attempt:
    """One image. `lacking` is by how many bytes it is too small or, negative, too large."""

    def __init__(self, kind: Type, fd: int, at: Path, size: int, inodes: int) -> None:
        self._kind = kind
        self._fd = fd
        self._at = at
        self._spare_inodes = sizing.spare_inodes(inodes)
        self.size = size
        self.lacking = 0

    def free_bytes(self) -> int:
        """Return what is free in it."""
        with self._mounted() as mount:
            return mount.free_bytes()

    def fill(self, root: Inode, sources: Mapping[int, int]) -> bool:
        """Fill the image, or return False with a guess at what it lacks."""
        with self._mounted() as mount:
            try:
                fill.fill(mount.root, root, sources)
                mount.sync()
            except fill.FullError:
                self.lacking = max(self.size // 32, sizing.SPARE_BYTES // 2)
                return False
        return True

    def settle(self, search: Search, wanted: Wanted) -> bool:
        """Bring the size of the filled filesystem in line, as far as the type can be resized."""
        for _ in range(_ATTEMPTS):
            self.lacking = self._lacking(wanted)
            if search.fits(self.size, self.lacking):
                return True
            size = search.next(self.size, self.lacking)
            with self._mounted() as mount:
                if size == self.size or not self._kind.resize(mount, self.size, size):
                    return self.lacking <= 0 and search.is_least(self.size)
            os.ftruncate(self._fd, size)
            self.size = size
        return False

    def _lacking(self, wanted: Wanted) -> int:
        # What was free may be taken at the end of the first mount, or given back at the next.
        with self._mounted() as mount:
            lacking = wanted.buffer_bytes - mount.free_bytes()
            if self._kind.inode_bytes:
                inodes = self._spare_inodes - os.fstatvfs(mount.root).f_favail
                lacking = max(lacking, inodes * self._kind.inode_bytes)
            return lacking

    def places(self, root: Inode) -> tuple[list[Place], int, int]:
        """Return where file data lies, and the bytes and inodes that are free."""
        with self._mounted() as mount:
            mount.trim()  # what was moved, or written only for a while, would be kept
            free = mount.free_bytes(), os.fstatvfs(mount.root).f_favail
            return list(fill.places(mount.root, root)), *free

    def _mounted(self) -> AbstractContextManager[Mount]:
        return loopmount.mounted(self._fd, self._kind.name, self._at, self._kind.options)


def _extents(
    fd: int, places: Iterable[Place], sources: Mapping[int, int], translate: Callable[[int], int | None]
) -> Iterator[ImageExtent]:
    """Yield the places whose bytes in the image are those of the payload: only these can be put in later."""
    for place in places:
        for done in range(0, place.count, _COMPARE_BLOCKS):
            count = min(_COMPARE_BLOCKS, place.count - done)
            offset = translate(place.address + done * BLOCK_BYTES)
            if offset is None or offset % BLOCK_BYTES:
                continue
            block = place.payload_block + done
            data = os.pread(sources[place.source], count * BLOCK_BYTES, block * BLOCK_BYTES)
            if os.pread(fd, count * BLOCK_BYTES, offset) == data:
                yield ImageExtent(offset // BLOCK_BYTES, place.source, block, count)
