"""What an image holds, as Linux finds it: mounted read-only where nobody else sees it. For root.

The same face as `ext4_read.Ext4Image`, for types that no library reads.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import loopmount
from fledge_tasks.filesystems.ext4_read import KINDS, Found
from fledge_tasks.filesystems.fill import reached
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.fsutil import data_ranges
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind

_SHOWN_TWICE = {"xfs": {"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"}}
"""Attributes that are shown to root beside the access control lists that they are."""

_OPTIONS = {"xfs": "ro,norecovery,nouuid", "btrfs": "ro"}

# struct xfs_dsb, sb_features_incompat; XFS_SB_FEAT_INCOMPAT_BIGTIME; fs/xfs/libxfs/xfs_format.h on times.
_XFS_FEATURES, _XFS_BIGTIME = struct.Struct(">216xI"), 1 << 3
_XFS_FIRST, _XFS_LAST, _XFS_LAST_BIGTIME = -1 << 31, (1 << 31) - 1, 16_299_260_424


class MountedImage:
    """An image that is mounted. Inodes go by their numbers, and are found again by the first name that was seen."""

    def __init__(self, root: int, hidden: Collection[str]) -> None:
        self._root = root
        self._hidden = hidden
        self.root = os.fstat(root).st_ino
        self._paths = {self.root: b"."}

    def inode(self, number: int) -> Found:
        """Return an inode whose name was seen. Raises FilesystemError."""
        with self._reached(number) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            kind = _kind(status)
            place = b"/proc/self/fd/%d/%s" % (folder, name)
            xattrs = {
                os.fsencode(name): os.getxattr(place, name, follow_symlinks=False)
                for name in os.listxattr(place, follow_symlinks=False)
                if name not in self._hidden
            }
            link = os.readlink(name, dir_fd=folder) if kind is Kind.SYMLINK else b""
            extents = tuple(_extents(folder, name, status.st_size)) if kind is Kind.FILE else ()
        is_device = kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}
        rdev = (os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0)
        return Found(
            number, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns,
            status.st_size, status.st_nlink, link, rdev, xattrs, extents,
        )  # fmt: skip

    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        """Return inode number and kind of each name in a folder. Raises FilesystemError."""
        path = self._paths[number]
        found: dict[bytes, tuple[int, Kind]] = {}
        with (
            self._reached(number) as (folder, name),
            _open(folder, name, os.O_DIRECTORY) as fd,
            os.scandir(fd) as entries,
        ):
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                self._paths.setdefault(status.st_ino, path + b"/" + os.fsencode(entry.name))
                found[os.fsencode(entry.name)] = status.st_ino, _kind(status)
        return found

    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes:
        """Return `count` blocks of a file from its block `start` on, filled up to whole blocks with zeros.

        Raises FilesystemError.
        """
        del extent  # Linux finds it
        with self._reached(found.number) as (folder, name), _open(folder, name) as fd:
            return os.pread(fd, count * BLOCK_BYTES, start * BLOCK_BYTES).ljust(count * BLOCK_BYTES, b"\0")

    @contextlib.contextmanager
    def _reached(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield an inode as a name for system calls; what they raise is a FilesystemError here."""
        try:
            with reached(self._root, self._paths[number]) as place:
                yield place
        except OSError as error:
            raise FilesystemError(str(error.strerror), where=f"inode {number}") from None


@contextlib.contextmanager
def _open(folder: int, name: bytes, flags: int = 0) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _extents(folder: int, name: bytes, size: int) -> Iterator[Extent]:
    with _open(folder, name) as fd:
        for offset, length in data_ranges(fd, size):
            first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
            yield Extent(first, first, end - first, is_unwritten=False)


def _kind(status: os.stat_result) -> Kind:
    kind = KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        raise FilesystemError(f"the unknown file type {stat.S_IFMT(status.st_mode):#o}", where=f"inode {status.st_ino}")
    return kind


def clamping(image: Path, kind: str) -> Callable[[int], int]:
    """Return what a filesystem makes of nanoseconds: Linux takes the nearest time that it holds, without a fraction.

    Raises OSError.
    """
    if kind == "btrfs":  # 64 bits for seconds
        return int
    with image.open("rb") as file:
        head = file.read(_XFS_FEATURES.size)
    features = _XFS_FEATURES.unpack(head)[0] if len(head) == _XFS_FEATURES.size else 0
    most = _XFS_LAST_BIGTIME if features & _XFS_BIGTIME else _XFS_LAST
    seconds = 1_000_000_000
    return lambda ns: (
        ns if _XFS_FIRST * seconds < ns < most * seconds else max(min(ns // seconds, most), _XFS_FIRST) * seconds
    )


@contextlib.contextmanager
def opened(image: Path, kind: str) -> Iterator[MountedImage]:
    """Mount an image read-only; this process gets a mount namespace of its own. Raises FilesystemError, OSError.

    MountError where this process cannot mount anything.
    """
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with tempfile.TemporaryDirectory(prefix="fledge-") as at:
            loopmount.unshare_mounts()
            with loopmount.mounted(fd, kind, Path(at), _OPTIONS[kind], read_only=True) as mount:
                yield MountedImage(mount.root, _SHOWN_TWICE.get(kind, ()))
    finally:
        os.close(fd)
