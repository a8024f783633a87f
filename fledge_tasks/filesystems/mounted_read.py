"""What an image holds, as Linux finds it: mounted read-only where nobody else sees it. For root.

The same face as `ext4_read.Ext4Image`, for types that no library reads.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import loopmount
from fledge_tasks.filesystems.ext4_read import KINDS, Found
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.fsutil import data_ranges
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind

_SHOWN_TWICE = {"xfs": {"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"}}
"""Attributes that are shown to root beside the access control lists that they are."""

_OPTIONS = {"xfs": "ro,norecovery,nouuid", "btrfs": "ro"}


class MountedImage:
    """An image that is mounted. Inodes go by their numbers, and are found again by the first name that was seen."""

    def __init__(self, root: int, hidden: Collection[str]) -> None:
        self._root = root
        self._hidden = hidden
        self.root = os.fstat(root).st_ino
        self._paths = {self.root: b"."}

    def inode(self, number: int) -> Found:
        """Return an inode whose name was seen. Raises FilesystemError."""
        path = self._paths[number]
        try:
            status = os.stat(path, dir_fd=self._root, follow_symlinks=False)
            kind = KINDS[stat.S_IFMT(status.st_mode)]
            place = b"/proc/self/fd/%d/%s" % (self._root, path)
            xattrs = {
                os.fsencode(name): os.getxattr(place, name, follow_symlinks=False)
                for name in os.listxattr(place, follow_symlinks=False)
                if name not in self._hidden
            }
            link = os.readlink(path, dir_fd=self._root) if kind is Kind.SYMLINK else b""
            extents = tuple(self._extents(path, status.st_size)) if kind is Kind.FILE else ()
        except OSError as error:
            raise FilesystemError(str(error.strerror), where=f"inode {number}") from None
        is_device = kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}
        rdev = (os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0)
        return Found(
            number, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns,
            status.st_size, status.st_nlink, link, rdev, xattrs, extents,
        )  # fmt: skip

    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        """Return inode number and kind of each name in a folder. Raises FilesystemError."""
        folder = self._paths[number]
        found: dict[bytes, tuple[int, Kind]] = {}
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        status = entry.stat(follow_symlinks=False)
                        self._paths.setdefault(status.st_ino, folder + b"/" + name)
                        found[name] = status.st_ino, KINDS[stat.S_IFMT(status.st_mode)]
            finally:
                os.close(fd)
        except OSError as error:
            raise FilesystemError(str(error.strerror), where=f"inode {number}") from None
        return found

    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes:
        """Return `count` blocks of a file from its block `start` on, filled up to whole blocks with zeros."""
        del extent  # Linux finds it
        fd = os.open(self._paths[found.number], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            return os.pread(fd, count * BLOCK_BYTES, start * BLOCK_BYTES).ljust(count * BLOCK_BYTES, b"\0")
        finally:
            os.close(fd)

    def _extents(self, path: bytes, size: int) -> Iterator[Extent]:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            for offset, length in data_ranges(fd, size):
                first, end = offset // BLOCK_BYTES, -(-(offset + length) // BLOCK_BYTES)
                yield Extent(first, first, end - first, is_unwritten=False)
        finally:
            os.close(fd)


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
