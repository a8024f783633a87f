"""What makes images of the read-only types: which programs, of which versions, and what to do when there is none."""

from __future__ import annotations

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.index import Index
from fledge_tasks.run import package_of
from fledge_tasks.tools import MKFS_EROFS, SQFSTAR, TAR2SQFS, Tool

MIN_SQFSTAR = (4, 6)
"""4.5.1 gives the root folder another owner and the time of the day, and does not take a level of compression."""

MIN_EROFS_TAR = (1, 8, 4)
"""mkfs.erofs reads archives since 1.7; what was wrong with that was put right by 1.8.4 (its ChangeLog)."""

_EROFS_WRITER = "fledge-tasks erofs 1"  # what erofs_write.py writes for the same tree; version history: 1 first


def made_by(kind: str, compression: str | None, index: Index | None = None) -> str:
    """Return package and version of what makes a type, for keys. Raises FilesystemError, ToolError if there is none."""
    tool = tool_for(kind, compression, index)
    return tool.identity(index) if tool else _EROFS_WRITER


def check(kind: str, compression: str | None, index: Index | None = None) -> str | None:
    """Raise FilesystemError when a type cannot be made here, whoever asks; ToolError as `Tool.version`.

    Returns None if anybody can, else how one could do without mounting, in words after 'run as root, or'.
    """
    tool = tool_for(kind, compression, index)
    if tool is None:
        return None
    if compression != "none" and not tool.offers(str(compression), index):
        raise FilesystemError(
            f"the {tool.name} that is installed was built without {compression}",
            hint=f"choose another compression of {kind}: {', '.join(OPTIONS[kind].compressions)}",
        )
    if tool is not MKFS_EROFS or reads_tar(index):
        return None
    return (
        f"install erofs-utils {dotted(MIN_EROFS_TAR)} or later, which needs none (here is {tool.version(index)}), "
        "or choose compression none, or squashfs"
    )


def tool_for(kind: str, compression: str | None, index: Index | None = None) -> Tool | None:
    """Return the program that makes images of a type, None if we do. Raises FilesystemError when there is none.

    tar2sqfs keeps everything, and so comes before sqfstar; only that has no compression.
    """
    if kind == "erofs":
        if compression == "none":
            return None
        if MKFS_EROFS.path is None:
            raise FilesystemError(
                f"compressed erofs images need {MKFS_EROFS.name}, which is not installed (not found on PATH)",
                hint=f"install it, for example: sudo apt-get install {package_of(MKFS_EROFS.name)}",
            )
        return MKFS_EROFS
    if TAR2SQFS.path and compression != "none":
        return TAR2SQFS
    if SQFSTAR.path is None:
        found = "it is not installed" if compression == "none" else "neither is installed (not found on PATH)"
    elif SQFSTAR.numbers(index) >= MIN_SQFSTAR:
        return SQFSTAR
    else:
        found = f"found sqfstar {SQFSTAR.version(index)}, which does not keep the root folder's owner and time"
    if compression == "none":
        raise FilesystemError(
            f"squashfs images without compression need sqfstar {dotted(MIN_SQFSTAR)} or later: {found}",
            hint="choose compression lz4, which is as quick, or type erofs, which has none by default",
        )
    raise FilesystemError(
        f"squashfs images need tar2sqfs, or sqfstar {dotted(MIN_SQFSTAR)} or later: {found}",
        hint=f"install it, for example: sudo apt-get install {package_of(TAR2SQFS.name)}",
    )


def reads_tar(index: Index | None = None) -> bool:
    """Tell whether the mkfs.erofs that is installed makes images from archives as we need them. Raises ToolError."""
    return MKFS_EROFS.numbers(index) >= MIN_EROFS_TAR


def dotted(version: tuple[int, ...]) -> str:
    """Return a version as text."""
    return ".".join(map(str, version))
