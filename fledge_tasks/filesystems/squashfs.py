"""squashfs images: the merged tree goes as an archive into tar2sqfs, or sqfstar, without root.

The format (Linux Documentation/filesystems/squashfs.rst) has no access control lists, no part of a
second, no time before 1970 or after 2106, and at most 65,535 different owners. Lists and owners are
refused, times are clamped, as in other types. Which program makes it is for `read_only` to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import comparison, read_only, squashfs_read, tarstream
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import check_holes
from fledge_tasks.fsutil import opened
from fledge_tasks.run import run
from fledge_tasks.tools import SQFSTAR, TAR2SQFS
from fledge_tasks.tree import Inode, show, walk

MAX_IDS = (1 << 16) - 1
MAX_XATTR_NAME_BYTES = 255  # Linux's own limit (xattr(7)); the programs cut what is longer
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_MAX_SECONDS = (1 << 32) - 1
_MAX_TAR2SQFS_HEADER = 1 << 16  # TAR_MAX_PAX_LEN of squashfs-tools-ng
_MAX_SQFSTAR_HEADER = 1 << 24
_PLAIN = re.compile(rb"[A-Za-z0-9._-]+")


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says: whole, without extents.

    The same bytes from the same program and compressor's library, whatever the number of processors.
    """
    del scratch
    check_holes(root, "squashfs")
    _check(root)
    is_complete = read_only.tool_for("squashfs", parameters.compression) is TAR2SQFS
    program = TAR2SQFS.name if is_complete else SQFSTAR.name
    reader = tarstream.Reader(
        program=program,
        time_ns=clamped,
        max_header_bytes=_MAX_TAR2SQFS_HEADER if is_complete else _MAX_SQFSTAR_HEADER,
        has_root=is_complete,
        has_holes=True,
        has_any_name=is_complete,
    )
    argv = _tar2sqfs(parameters) if is_complete else _sqfstar(root, parameters)
    with opened(payloads) as sources:
        run(
            [*argv, image],
            env={"SOURCE_DATE_EPOCH": str(_seconds(parameters.epoch))} if is_complete else None,
            feed=partial(tarstream.write, root=root, sources=sources, reader=reader),
        )
    with squashfs_read.opened(image) as found:
        comparison.require(found, root, clamped, program)
    return Filled([], 0, 0)


def clamped(nanoseconds: int) -> int:
    """Return a time as an inode holds it: whole seconds, 32 bits, counted from 1970."""
    return _seconds(nanoseconds // 1_000_000_000) * 1_000_000_000


def _seconds(seconds: int) -> int:
    return min(max(seconds, 0), _MAX_SECONDS)


def _check(root: Inode) -> None:
    """Raise FilesystemError for what squashfs cannot hold and its programs would leave out."""
    ids: set[int] = set()
    for path, inode in walk(root):
        entry = inode.entry
        ids |= {entry.uid, entry.gid}
        if len(ids) > MAX_IDS:
            message = f"with it there are more than {MAX_IDS} different owners and groups, squashfs has no more"
            raise FilesystemError(message, where=show(path), hint="choose ext4 or erofs")
        for name in entry.xattrs:
            if name.startswith(_NAMESPACES) and len(name) <= MAX_XATTR_NAME_BYTES:
                continue
            hint = "remove it in the image"
            if name.startswith(b"system."):
                hint = "choose ext4 or erofs, which can, or remove it in the image, for example with `setfacl -b`"
            what = "access control list" if name.startswith(b"system.") else "extended attribute"
            message = f"has the {what} {show(name)[1:]}, which squashfs cannot hold"
            raise FilesystemError(message, where=show(path), hint=hint)


def _tar2sqfs(parameters: Parameters) -> list[str | Path]:
    level = parameters.compression_level
    return [
        "tar2sqfs", "--quiet", "--no-skip",
        "--compressor", str(parameters.compression), *(["--comp-extra", f"level={level}"] if level else []),
        "--block-size", str(_block_bytes(parameters)),
        "--num-jobs", str(_processors()),
    ]  # fmt: skip


def _sqfstar(root: Inode, parameters: Parameters) -> list[str | Path]:
    """Return the command, which tells of the root folder, too: sqfstar passes over its member."""
    level, entry = parameters.compression_level, root.entry
    comp = ["-comp", str(parameters.compression), *(["-Xcompression-level", str(level)] if level else [])]
    if parameters.compression == "none":
        comp = ["-noI", "-noId", "-noD", "-noF", "-noX"]
    for name, value in sorted(entry.xattrs.items()):
        if not _PLAIN.fullmatch(name) or not value:
            message = f"its extended attribute {show(name)[1:]} cannot be told to sqfstar"
            raise FilesystemError(message, where="/", hint="install squashfs-tools-ng, whose tar2sqfs keeps it")
        comp += ["-p", f"/ x {name.decode()}=0x{value.hex()}"]
    return [
        "sqfstar", "-quiet", "-no-progress", "-exit-on-error", "-reproducible", *comp,
        "-b", str(_block_bytes(parameters)),
        "-processors", str(_processors()),
        "-mkfs-time", str(_seconds(parameters.epoch)),
        "-root-time", str(clamped(entry.mtime_ns) // 1_000_000_000),
        "-root-mode", f"{entry.mode:o}", "-root-uid", str(entry.uid), "-root-gid", str(entry.gid),
    ]  # fmt: skip


def _block_bytes(parameters: Parameters) -> int:
    return parameters.block_bytes or OPTIONS["squashfs"].block_sizes[-1]


def _processors() -> int:
    return len(os.sched_getaffinity(0))
