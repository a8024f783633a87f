"""EROFS images: written here, or, when they are to be compressed, by mkfs.erofs.

Uncompressed ones share their file data with payloads, and are the same bytes everywhere. mkfs.erofs gets
the merged tree as an archive; versions that cannot read one get, as root, a folder to read: our own
uncompressed image of it, mounted where nobody else sees it. Either way every file is cut into pieces
of one block, since Linux 5.10 knows no larger ones, and lz4 is the only algorithm that it knows.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import comparison, erofs_read, erofs_write, loopmount, read_only, tarstream
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import check_holes
from fledge_tasks.fsutil import RangeCopier, opened, pwrite_all
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from fledge_tasks.run import run
from fledge_tasks.tree import Inode, show, walk

_MAX_HEADER_BYTES = 16 << 10  # what mkfs.erofs keeps of an archive; it misreads records that are longer
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 254, 3 << 10  # 1.5 cuts a name of 255 bytes, and a path at PATH_MAX
_LEFT_OUT = b"lost+found"  # in any folder that it reads (lib/inode.c of erofs-utils)
_BUILD_TIME_AT, _UUID_AT, _MTIME_AT = 24, 48, 32  # in the superblock, and in an extended inode
_BILLION = 1_000_000_000


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says: the same bytes each time, a compressed one from the same mkfs.erofs."""
    if parameters.compression == "none":
        return Filled(erofs_write.write(root, parameters, image), 0, 0)
    if read_only.reads_tar():
        _from_archive(root, parameters, payloads, image, scratch)
    else:
        _from_folder(root, parameters, payloads, image, scratch)
    _finish(root, parameters, image)
    return Filled([], 0, 0)


def _from_archive(
    root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path
) -> None:
    reader = tarstream.Reader(
        program="mkfs.erofs", time_ns=int, max_header_bytes=_MAX_HEADER_BYTES,
        has_root=True, has_holes=False, has_any_name=False,
    )  # fmt: skip
    check_holes(root, "erofs")
    with opened(payloads) as sources:
        run(
            [*_mkfs(parameters), f"-b{BLOCK_BYTES}", "--tar=f", image],
            env={"TMPDIR": str(scratch)},  # it puts the data of all files into a file there
            feed=partial(tarstream.write, root=root, sources=sources, reader=reader),
        )


def _from_folder(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> None:
    for path, _ in walk(root):
        reason, name = None, path.rpartition(b"/")[2]
        if len(name) > _MAX_NAME_BYTES or len(path) > _MAX_PATH_BYTES:
            reason = "has a name or path that is too long for this mkfs.erofs"
        elif name == _LEFT_OUT:
            reason = "has a name that this mkfs.erofs leaves out"
        if reason is not None:
            least = read_only.dotted(read_only.MIN_EROFS_TAR)
            raise FilesystemError(
                reason,
                where=show(path),
                hint=f"install erofs-utils {least} or later, or choose compression none",
            )
    plain, at = scratch / "plain", scratch / "mnt"
    at.mkdir()
    extents = erofs_write.write(root, parameters, plain)
    fd = os.open(plain, os.O_RDWR | os.O_CLOEXEC)
    try:
        with opened(payloads) as sources:
            copier = RangeCopier(fd, lambda _: None)
            for extent in extents:
                offsets = extent.payload_block * BLOCK_BYTES, extent.block * BLOCK_BYTES
                copier.copy(sources[extent.source], *offsets, extent.count * BLOCK_BYTES)
        loopmount.unshare_mounts()
        with loopmount.mounted(fd, "erofs", at, "", read_only=True):
            run([*_mkfs(parameters), image, at])
    finally:
        os.close(fd)


def _mkfs(parameters: Parameters) -> list[str | Path]:
    level = f",{parameters.compression_level}" if parameters.compression_level else ""
    # Inodes that are not extended have no time of their own.
    return ["mkfs.erofs", "--quiet", f"-z{parameters.compression}{level}", f"-C{BLOCK_BYTES}", "-Eforce-inode-extended"]


def _finish(root: Inode, parameters: Parameters, image: Path) -> None:
    """Put in what mkfs.erofs took from the clock, or by chance, or misread, and look whether it left nothing out."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        if any(_is_misread(inode) for _, inode in walk(root)):
            with erofs_read.opened(image) as found:
                _put_times_right(fd, root, found)
        head = bytearray(os.pread(fd, BLOCK_BYTES - erofs_write.SUPERBLOCK_AT, erofs_write.SUPERBLOCK_AT))
        struct.pack_into("<QI", head, _BUILD_TIME_AT, parameters.epoch, 0)
        struct.pack_into("<16s16s", head, _UUID_AT, parameters.uuid, parameters.label.encode())
        pwrite_all(fd, erofs_write.checksummed(bytes(head)), erofs_write.SUPERBLOCK_AT)
    finally:
        os.close(fd)
    with erofs_read.opened(image) as found:
        comparison.require(found, root, int, "mkfs.erofs")


def _is_misread(inode: Inode) -> bool:
    """Tell whether an archive's time of an inode is one of which mkfs.erofs takes the sign for that of the seconds."""
    return inode.entry.mtime_ns < 0 and inode.entry.mtime_ns % _BILLION != 0


def _put_times_right(fd: int, root: Inode, image: erofs_read.ErofsImage) -> None:
    pending = [(root, image.root)]
    while pending:
        inode, number = pending.pop()
        if _is_misread(inode):
            place = image.place(number) + _MTIME_AT
            pwrite_all(fd, struct.pack("<qI", *divmod(inode.entry.mtime_ns, _BILLION)), place)
        if inode.children:
            names = image.names(number)
            pending += [(child, names[name][0]) for name, child in inode.children.items() if name in names]
