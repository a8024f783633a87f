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
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import fill, loopmount
from fledge_tasks.filesystems.fill import Place
from fledge_tasks.filesystems.loopmount import Mount
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.skeleton import ImageExtent
from fledge_tasks.fsutil import opened
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind, file_runs
from fledge_tasks.tree import Inode, walk

_MIB = 1 << 20
_ATTEMPTS = 6
_SPARE_BYTES, _SPARE_SHARE = 16 * _MIB, 20  # at most 16 MiB, or 5 % of the image, more than asked for
_COMPARE_BLOCKS = 256
_NAME_BYTES = 16  # what folders and lists of attributes hold beside a name


@dataclass(frozen=True)
class Content:
    """What a tree comes to: blocks of file data, in how many runs, inodes, bytes of names, attributes and targets."""

    blocks: int
    inodes: int
    name_bytes: int
    xattr_bytes: int
    runs: int


@dataclass(frozen=True)
class Type:
    """One type of filesystem that Linux fills.

    make       puts an empty filesystem into a file that has the image's size
    options    of mount(2)
    min_bytes  what an image has at least
    room       whether it has twice the room while it is being filled, and is made smaller afterwards
    estimate   bytes that a tree takes, without what an empty filesystem takes
    translate  returns what turns an address that FIEMAP tells into a byte of the image
    resize     brings the mounted filesystem from one size to another, or returns False if it cannot
    finish     does what is left to do once the image is not mounted any more
    """

    name: str
    make: Callable[[Path, Parameters], None]
    options: str
    min_bytes: int
    room: bool
    estimate: Callable[[Content], int]
    translate: Callable[[Path], Callable[[int], int | None]]
    resize: Callable[[Mount, int, int], bool]
    finish: Callable[[Path, Parameters], None]


def make(
    kind: Type, root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path
) -> Filled:
    """Make an image as `parameters.Make` says.

    This process gets a mount namespace of its own. What is free is at least the buffer, and at most
    16 MiB or 5 % of the image more, but for the type's own least size.
    """
    loopmount.unshare_mounts()
    needed = kind.estimate(measure(root)) + parameters.buffer_bytes
    room = needed if kind.room else 0
    size = max(kind.min_bytes, _rounded(needed + room))
    at = scratch / "mnt"
    at.mkdir()
    with opened(payloads) as sources:
        for _ in range(_ATTEMPTS):
            image.unlink(missing_ok=True)
            fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
                kind.make(image, parameters)
                attempt = _Attempt(kind, fd, at, size)
                if attempt.fill(root, sources, needed + room) and attempt.settle(parameters.buffer_bytes):
                    places, free_bytes, free_inodes = attempt.places(root)
                    kind.finish(image, parameters)
                    extents = list(_extents(fd, places, sources, kind.translate(image)))
                    return Filled(extents, free_bytes, free_inodes)
            finally:
                os.close(fd)
            needed += attempt.shortfall if attempt.was_filled else 0
            size = max(kind.min_bytes, _rounded(size + attempt.shortfall))
    raise FilesystemError(f"no {kind.name} filesystem of about {size} bytes fits: please report this")


class _Attempt:
    """One image of one size. `shortfall` is by how many bytes it is too small or, negative, too large."""

    def __init__(self, kind: Type, fd: int, at: Path, size: int) -> None:
        self._kind = kind
        self._fd = fd
        self._at = at
        self._size = size
        self.shortfall = 0
        self.was_filled = False

    def fill(self, root: Inode, sources: Mapping[int, int], needed: int) -> bool:
        """Fill the image, if what an empty one has free promises that it will do."""
        with self._mounted() as mount:
            # An empty filesystem is quick to make, so its own needs are found out with those.
            self.shortfall = needed - mount.free_bytes()
            if not self._fits():
                return False
            try:
                fill.fill(mount.root, root, sources)
                mount.sync()
            except fill.FullError:
                self.shortfall = max(needed // 10, _SPARE_BYTES)
                return False
            finally:
                self.was_filled = True
        return True

    def settle(self, buffer: int) -> bool:
        """Bring the size of the filled filesystem in line, as far as the type can be resized."""
        for _ in range(_ATTEMPTS):
            # What was free may be taken at the end of the first mount, or given back at the next.
            with self._mounted() as mount:
                self.shortfall = buffer - mount.free_bytes()
                size = max(self._kind.min_bytes, _rounded(self._size + self.shortfall))
                if self._fits():
                    return True
                if not self._kind.resize(mount, self._size, size):
                    return False
            os.ftruncate(self._fd, size)
            self._size = size
        return False

    def places(self, root: Inode) -> tuple[list[Place], int, int]:
        """Return where file data lies, and the bytes and inodes that are free."""
        with self._mounted() as mount:
            mount.trim()  # what was moved, or written only for a while, would be kept
            free = mount.free_bytes(), os.fstatvfs(mount.root).f_favail
            return list(fill.places(mount.root, root)), *free

    def _mounted(self) -> AbstractContextManager[Mount]:
        return loopmount.mounted(self._fd, self._kind.name, self._at, self._kind.options)

    def _fits(self) -> bool:
        spare = max(_SPARE_BYTES, self._size // _SPARE_SHARE)
        return self.shortfall <= 0 and (self._size <= self._kind.min_bytes or -self.shortfall <= spare)


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


def _rounded(size: int) -> int:
    return -(-size // _MIB) * _MIB
