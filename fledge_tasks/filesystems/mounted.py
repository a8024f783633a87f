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
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

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
    settle       has the mounted filesystem do now what it would do in the background, to what is free
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
    settle: Callable[[Mount], None]
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
    with opened(payloads) as sources, closing(_Maker(kind, root, parameters, sources, image, scratch / "mnt")) as maker:
        estimate = kind.estimate(maker.content)
        sizing.fit(maker, kind.name, parameters.wanted, kind.min_bytes, estimate, has_room=kind.room)
        return maker.finish()


class _Maker:
    """Makes images as `sizing.Maker` says. `content` is what the tree comes to."""

    def __init__(
        self, kind: Type, root: Inode, parameters: Parameters, sources: Mapping[int, int], image: Path, at: Path
    ) -> None:
        self._kind = kind
        self._root = root
        self._parameters = parameters
        self._sources = sources
        self._image = image
        self._at = at
        self._fd: int | None = None
        self._size = 0
        self.content = sizing.measure(root)

    def close(self) -> None:
        """Close the image that was made last."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def empty(self, size: int) -> int:
        self.close()
        self._image.unlink(missing_ok=True)
        self._fd = os.open(self._image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size = size
        os.ftruncate(self._fd, size)
        self._kind.make(self._image, self._parameters)
        with self._mounted() as mount:
            return mount.free_bytes()

    def fill(self, search: Search, wanted: Wanted) -> tuple[int, int]:
        """Fill the image, and bring its size in line as far as the type can be resized."""
        with self._mounted() as mount:
            try:
                fill.fill(mount.root, self._root, self._sources)
                mount.sync()
            except fill.FullError:
                return self._size, sizing.lacking_when_full(self._size)
        for _ in range(_ATTEMPTS):
            lacking = self._lacking(wanted)
            if search.fits(self._size, lacking):
                break
            size = search.next(self._size, lacking)
            with self._mounted() as mount:
                if size == self._size or not self._kind.resize(mount, self._size, size):
                    break
            os.ftruncate(self._opened(), size)
            self._size = size
        return self._size, lacking

    def _lacking(self, wanted: Wanted) -> int:
        # What was free may be taken at the end of the first mount, or given back at the next.
        with self._mounted() as mount:
            self._kind.settle(mount)
            lacking = wanted.buffer_bytes - mount.free_bytes()
            if self._kind.inode_bytes:
                inodes = sizing.spare_inodes(self.content.inodes) - os.fstatvfs(mount.root).f_favail
                lacking = max(lacking, inodes * self._kind.inode_bytes)
            return lacking

    def finish(self) -> Filled:
        """Do what is left to do, and return what the image is."""
        with self._mounted() as mount:
            self._kind.settle(mount)
            mount.trim()  # what was moved, or written only for a while, would be kept
            free = mount.free_bytes(), os.fstatvfs(mount.root).f_favail
            places = list(fill.places(mount.root, self._root))
        self._kind.finish(self._image, self._parameters)
        extents = list(_extents(self._opened(), places, self._sources, self._kind.translate(self._image)))
        return Filled(extents, *free)

    def _opened(self) -> int:
        assert self._fd is not None
        return self._fd

    def _mounted(self) -> AbstractContextManager[Mount]:
        return loopmount.mounted(self._opened(), self._kind.name, self._at, self._kind.options)


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
