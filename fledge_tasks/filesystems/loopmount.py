"""A filesystem image, mounted where nobody else sees it. For root; the rest of Linux's API that Python lacks.

The mount is made in a mount namespace of this process, and the loop device lets go of its file by
itself (LO_FLAGS_AUTOCLEAR), so both end with the process, however it ends: namespaces die with
their last process (mount_namespaces(7)), and the last close of a loop device detaches it (loop(4)).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import FilesystemError, MountError

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE, _MS_NOATIME, _MS_NODEV, _MS_NOEXEC, _MS_NOSUID, _MS_RDONLY = 0x4000, 1 << 18, 0x400, 4, 8, 2, 1
_MS_BIND = 0x1000
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_SET_CAPACITY = 0x4C82, 0x4C0A, 0x4C07
_FITRIM = 0xC0185879
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
# struct loop_config: fd, block_size, struct loop_info64 (232 bytes, lo_flags at 52), 8 reserved words.
_LOOP_CONFIG = struct.Struct("<II52xI176x64x")
_ATTEMPTS = 50


def unshare_mounts() -> None:
    """Give this process a mount namespace of its own, from which nothing spreads. Raises MountError."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise _failed("a mount namespace of our own cannot be had", MountError)
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) != 0:
        raise _failed("mounts cannot be made private", MountError)


def hide_devices() -> None:
    """Have this process and its children find no block devices by looking for them. Raises MountError.

    `unshare_mounts` comes first. Devices can be used by their names as before.
    """
    for place, source, kind, flags in (
        (b"/sys/block", b"none", b"tmpfs", _MS_RDONLY),
        (b"/proc/partitions", b"/dev/null", None, _MS_BIND),
    ):
        if os.path.exists(place) and _libc.mount(source, place, kind, ctypes.c_ulong(flags), None) != 0:
            raise _failed(f"{os.fsdecode(place)} cannot be covered", MountError)


@dataclass(frozen=True)
class Mount:
    """A mounted image: where, descriptors of its root folder and of its file, and the loop device between them."""

    at: Path
    root: int
    image: int
    device: str

    def free_bytes(self) -> int:
        """Return what statfs says is available (f_bavail)."""
        status = os.fstatvfs(self.root)
        return status.f_bavail * status.f_frsize

    def sync(self) -> None:
        """Write all that is in memory to the image. Raises OSError."""
        if _libc.syncfs(self.root) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def trim(self) -> None:
        """Make holes in the image where the filesystem is free (ioctl FITRIM), if this host can."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.root, _FITRIM, struct.pack("<QQQ", 0, (1 << 64) - 1, 0))

    def grow(self, size: int) -> None:
        """Make image file and device larger; the filesystem in it is for its own tool to grow. Raises OSError."""
        os.ftruncate(self.image, size)
        fd = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_SET_CAPACITY)
        finally:
            os.close(fd)


@contextlib.contextmanager
def mounted(image: int, kind: str, at: Path, options: str, *, read_only: bool = False) -> Iterator[Mount]:
    """Mount the image file of a descriptor at the folder `at`.

    `unshare_mounts` comes first. When the block ends everything is written to the image, and
    neither mount nor device is left. Raises FilesystemError, MountError when there is no loop device.
    """
    device, fd = _loop_device(image, read_only=read_only)
    try:
        flags = ctypes.c_ulong(_MS_NOATIME | _MS_NODEV | _MS_NOEXEC | _MS_NOSUID | _MS_RDONLY * read_only)
        if _libc.mount(os.fsencode(device), os.fsencode(at), kind.encode(), flags, options.encode()) != 0:
            raise _failed(f"the {kind} image cannot be mounted")
    finally:
        os.close(fd)  # from here on the mount holds the device
    try:
        root = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield Mount(at, root, image, device)
        finally:
            os.close(root)
    finally:
        if _libc.umount2(os.fsencode(at), 0) != 0:
            error = _failed(f"the {kind} image cannot be unmounted")
            _libc.umount2(os.fsencode(at), 2)  # MNT_DETACH
            raise error
    if not read_only:
        os.fsync(image)


def _loop_device(image: int, *, read_only: bool) -> tuple[str, int]:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"there are no loop devices here: {error.strerror}") from None
    flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_READ_ONLY * read_only
    try:
        for _ in range(_ATTEMPTS):
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(
                    fd,
                    _LOOP_CONFIGURE,
                    _LOOP_CONFIG.pack(image, 0, flags),
                )
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:  # somebody else took it
                    raise
                continue
            return device, fd
    except OSError as error:
        raise MountError(f"a loop device cannot be had: {error.strerror}") from None
    finally:
        os.close(control)
    raise MountError("no loop device is free")


def _failed(what: str, kind: type[FilesystemError] = FilesystemError) -> FilesystemError:
    return kind(f"{what}: {os.strerror(ctypes.get_errno())}", hint="this needs root (CAP_SYS_ADMIN)")
