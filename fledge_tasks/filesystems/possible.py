"""Which types of filesystem can be made here, why not, and what to do about it.

ext4 can be made by anybody; what the read-only types need is told by `read_only`. The others are filled by
Linux in a loop mount, or, where this process may not mount, by mkfs from a folder. Nothing is tried out but
whether there are user namespaces.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fledge_tasks import userns
from fledge_tasks.errors import FilesystemError, ToolError
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.read_only import check as check_read_only
from fledge_tasks.filesystems.read_only import made_by as read_only_made_by
from fledge_tasks.index import Index
from fledge_tasks.run import package_of
from fledge_tasks.tools import (
    BTRFS,
    BTRFSTUNE,
    MKE2FS,
    MKFS_BTRFS,
    MKFS_XFS,
    XFS_DB,
    XFS_GROWFS,
    XFS_REPAIR,
    Tool,
)

MAKERS = {"ext4": ("e2fsprogs", MKE2FS), "xfs": ("xfsprogs", MKFS_XFS), "btrfs": ("btrfs-progs", MKFS_BTRFS)}
"""For each type the package that makes it and the program whose version is part of keys."""

_WITH_MOUNT = {"xfs": (MKFS_XFS, XFS_GROWFS), "btrfs": (MKFS_BTRFS, BTRFS, BTRFSTUNE)}
_WITHOUT_MOUNT = {"xfs": (MKFS_XFS, XFS_DB, XFS_REPAIR), "btrfs": (MKFS_BTRFS, BTRFS)}


def made_by(kind: str, compression: str | None = None, index: Index | None = None) -> str:
    """Return package and version of what makes a type, for keys. Raises ToolError when it is not installed.

    A read-only type is asked about with a compression, here and below.
    """
    if OPTIONS[kind].is_read_only:
        return read_only_made_by(kind, compression, index)
    package, tool = MAKERS[kind]
    return f"{package} {tool.version(index)}"


def obstacle(
    kind: str, *, is_plain: bool = True, compression: str | None = None, index: Index | None = None
) -> FilesystemError | None:
    """Return what `check` raises, None if it raises nothing."""
    try:
        check(kind, is_plain=is_plain, compression=compression, index=index)
    except FilesystemError as error:
        return error
    return None


def check(kind: str, *, is_plain: bool = True, compression: str | None = None, index: Index | None = None) -> None:
    """Raise FilesystemError when images of a type cannot be made here, with the reason and a way out.

    `is_plain` tells that features and block size are those of the type. Versions are remembered in `index`.
    """
    if OPTIONS[kind].is_read_only:
        other_way = check_read_only(kind, compression, index)
        by_mount = _obstacle_to_loop_mount(kind) if other_way else None
        if by_mount is not None:
            message = f"compressed {kind} images {by_mount.message}"
            raise FilesystemError(message, hint=f"{by_mount.hint}, or {other_way}")
        return
    missing = _missing(MAKERS[kind][1])
    if missing is not None:
        raise FilesystemError(f"{kind} images {missing.message}", hint=missing.hint)
    by_mount = obstacle_to_mounting(kind)
    without = obstacle_to_populating(kind, is_plain=is_plain) if by_mount else None
    if by_mount is not None and without is not None:
        hint = f"{by_mount.hint}; or {without.hint}; or choose ext4, which needs none of it"
        raise FilesystemError(f"{kind} images {by_mount.message}; without a mount: {without.message}", hint=hint)


def obstacle_to_mounting(kind: str) -> FilesystemError | None:
    """Return why a type cannot be made in a loop mount, None if it can or, as ext4 and read-only types, need not.

    The message goes on after 'KIND images'.
    """
    if kind == "ext4" or OPTIONS[kind].is_read_only:
        return None
    return _obstacle_to_loop_mount(kind)


def _obstacle_to_loop_mount(kind: str) -> FilesystemError | None:
    if not userns.capabilities() >> userns.CAP_SYS_ADMIN & 1:
        return FilesystemError("can only be made by root", hint="run as root")
    for tool in _WITH_MOUNT.get(kind, ()):
        missing = _missing(tool)
        if missing is not None:
            return missing
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        hint = "load it with `modprobe loop` (a container needs --privileged)"
        return FilesystemError("need a loop device, and there is no /dev/loop-control to use", hint=hint)
    if not _is_known(kind):
        return FilesystemError("need a kernel that knows them", hint=f"load what it lacks with `modprobe {kind}`")
    return None


def obstacle_to_populating(kind: str, *, is_plain: bool = True) -> FilesystemError | None:
    """Return why a type, which is not ext4, cannot be made by mkfs from a folder, None if it can."""
    if not is_plain:
        reason = "they have the features and the block size of the type and no others"
        return FilesystemError(reason, hint="leave features and block_size out")
    package, mkfs = MAKERS[kind]
    for tool in _WITHOUT_MOUNT[kind]:
        missing = _missing(tool)
        if missing is not None:
            return FilesystemError(f"they {missing.message}", hint=missing.hint)
    try:
        incomplete = _INCOMPLETE[kind](mkfs.numbers())
    except ToolError as error:
        return FilesystemError(error.message, hint=error.hint)
    if incomplete is not None:
        reason, needed = incomplete
        hint = f"install {package} {needed} or later"
        return FilesystemError(f"{mkfs.name} {mkfs.version()} {reason}", hint=hint)
    return userns.obstacle()


def _incomplete_xfs(version: tuple[int, ...]) -> tuple[str, str] | None:
    """Return what mkfs.xfs of a version does wrong, and from which version on it does not."""
    # 6.17 brought folders, 7.1 right hard links in them (its change log); 7.2 is what was tried.
    return ("does not fill an image from a folder completely", "7.2") if version < (7, 2) else None


def _incomplete_btrfs(version: tuple[int, ...]) -> tuple[str, str] | None:
    # See btrfs_rootless; 6.2, 6.14 and 7.3 were tried.
    if version < (6, 2):
        return "is older than what was tried", "6.2"
    if (6, 10, 1) <= version < (6, 12):
        return "makes files of their own of hard links", "6.12"
    return None


_INCOMPLETE = {"xfs": _incomplete_xfs, "btrfs": _incomplete_btrfs}


def _missing(tool: Tool) -> FilesystemError | None:
    if tool.path is not None:
        return None
    return FilesystemError(
        f"need {tool.name}, which is not installed (not found on PATH)",
        hint=f"install it, for example: sudo apt-get install {package_of(tool.name)}",
    )


def _is_known(kind: str) -> bool:
    """Tell whether the kernel has a filesystem, or a module that mount(2) loads."""
    if re.search(rf"^(nodev)?\t{kind}$", Path("/proc/filesystems").read_text(), re.MULTILINE):
        return True
    modules = Path("/lib/modules") / os.uname().release
    for name in ("modules.builtin", "modules.dep"):
        try:
            if f"/{kind}.ko" in (modules / name).read_text():
                return True
        except OSError:
            continue
    return False
