"""Which types of filesystem can be made here, why not, and what to do about it. Nothing is tried out."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.index import Index
from fledge_tasks.run import package_of
from fledge_tasks.tools import BTRFS, BTRFSTUNE, MKE2FS, MKFS_BTRFS, MKFS_XFS, XFS_GROWFS, Tool

MAKERS = {"ext4": ("e2fsprogs", MKE2FS), "xfs": ("xfsprogs", MKFS_XFS), "btrfs": ("btrfs-progs", MKFS_BTRFS)}
"""For each type the package that makes it and the program whose version is part of keys."""

_OTHERS = {"ext4": (), "xfs": (XFS_GROWFS,), "btrfs": (BTRFS, BTRFSTUNE)}
_CAP_SYS_ADMIN = 21


def made_by(kind: str, index: Index | None = None) -> str:
    """Return package and version of what makes a type, for keys. Raises ToolError when it is not installed."""
    package, tool = MAKERS[kind]
    return f"{package} {tool.version(index)}"


def obstacle(kind: str) -> FilesystemError | None:
    """Return what `check` raises, None if it raises nothing."""
    try:
        check(kind)
    except FilesystemError as error:
        return error
    return None


def check(kind: str) -> None:
    """Raise FilesystemError when images of a type cannot be made here, with the reason and a way out."""
    for tool in (MAKERS[kind][1], *_OTHERS[kind]):
        _check_tool(kind, tool)
    if kind == "ext4":
        return
    if not _is_capable():
        hint = f"run as root, or choose ext4, which needs none: only Linux itself can fill {kind}"
        raise FilesystemError(f"{kind} images can only be made by root", hint=hint)
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        raise FilesystemError(
            f"{kind} images need a loop device, and there is no /dev/loop-control to use",
            hint="load it with `modprobe loop`; a container needs --privileged",
        )
    if not _is_known(kind):
        raise FilesystemError(
            f"this kernel does not know {kind}", hint=f"load it with `modprobe {kind}`, or choose ext4"
        )


def _check_tool(kind: str, tool: Tool) -> None:
    if tool.path is None:
        raise FilesystemError(
            f"{kind} images need {tool.name}, which is not installed (not found on PATH)",
            hint=f"install it, for example: sudo apt-get install {package_of(tool.name)}",
        )


def _is_capable() -> bool:
    """Tell whether this process may mount (capabilities(7), /proc/self/status)."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> _CAP_SYS_ADMIN & 1)


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
