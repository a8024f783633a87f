"""xfs and btrfs images without a mount: the tree is written into a folder, from which mkfs fills the image.

    tree ─► folder, as root of a user namespace ─► mkfs ─► what mkfs cannot do ─► blocks that payloads hold, too

What does not fit into the folder, or what mkfs would change, is not put there: devices are FIFOs in
it, and attributes of some names are missing. The module of a type adds these to the image. What it
cannot add is refused before anything is written.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fledge_tasks import userns
from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems import fill
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.skeleton import ImageExtent, merge_extents
from fledge_tasks.fsutil import crash_point, data_ranges, opened, remove_tree
from fledge_tasks.oci.layer_index import BLOCK_BYTES, FILE_TYPES, Entry, Kind, file_runs
from fledge_tasks.run import run
from fledge_tasks.tree import Inode, show, walk

_PRIVATE = "private"
FOLDER = f"{_PRIVATE}/tree"
"""Where the folder is in the scratch folder."""

ACLS = {b"system.posix_acl_access", b"system.posix_acl_default"}
WAY_OUT = "build it as root, or choose ext4"
_DEVICES = {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}
_MAX_PATH_BYTES = 4095  # PATH_MAX of Linux, which mkfs is bound to
_MAX_DEPTH = 500  # Python removes folders by recursion
_CHUNK_BYTES = 1 << 20
_ZERO = bytes(BLOCK_BYTES)


@dataclass(frozen=True)
class Type:
    """One type of filesystem that mkfs fills from a folder.

    refusal    tells why it cannot hold an entry with this path, None if it can
    is_taken   tells whether mkfs takes an attribute of this name and value from the folder as it is
    has_times  whether mkfs takes times from the folder as they are
    populate   fills an image of no size yet: gets it, the tree, the parameters, and the scratch folder that
               holds the folder; returns the bytes and inodes that are free
    check      the checker's command line but for the image
    """

    name: str
    refusal: Callable[[bytes, Entry], str | None]
    is_taken: Callable[[bytes, bytes], bool]
    has_times: bool
    populate: Callable[[Path, Inode, Parameters, Path], tuple[int, int]]
    check: tuple[str, ...]


def make(
    kind: Type, root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path
) -> Filled:
    """Make an image as `parameters.Make` says. The folder is gone afterwards, unless this process is killed."""
    _refuse(kind, root, scratch / FOLDER)
    return userns.call(lambda: _make(kind, root, parameters, payloads, image, scratch))


def _make(
    kind: Type, root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path
) -> Filled:
    fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Programs of the image with a set-uid bit are ours in the folder: nobody else may come near them.
        (scratch / _PRIVATE).mkdir(0o700)
        try:
            with opened(payloads) as sources:
                _fill(kind, root, sources, scratch / FOLDER)
                crash_point("rootless: folder filled")
                free_bytes, free_inodes = kind.populate(image, root, parameters, scratch)
        finally:
            remove_tree(scratch / _PRIVATE)
        try:
            run([*kind.check, image])
        except CommandError as error:
            hint = f"please report this; {WAY_OUT}"
            raise FilesystemError(f"the {kind.name} image is not sound: {error.message}", hint=hint) from None
        with opened(payloads) as sources:
            return Filled(shared_blocks(fd, root, sources), free_bytes, free_inodes)
    finally:
        os.close(fd)


def _refuse(kind: Type, root: Inode, folder: Path) -> None:
    """Raise FilesystemError for the first entry that cannot get into the image."""
    ids = userns.ids()
    longest = _MAX_PATH_BYTES - len(os.fsencode(folder)) - 1
    for path, inode in walk(root):
        entry = inode.entry
        if len(path) > longest or path.count(b"/") > _MAX_DEPTH:
            raise FilesystemError("its path is too long for mkfs", where=show(path), hint=WAY_OUT)
        if not ids.hold(entry.uid, entry.gid):
            raise FilesystemError(
                f"belongs to {entry.uid}:{entry.gid}, and you have no such ids",
                where=show(path),
                hint=f"grant more of them in {userns.SUBUID} and {userns.SUBGID}, {WAY_OUT}",
            )
        reason = kind.refusal(path, entry)
        if reason is not None:
            raise FilesystemError(reason, where=show(path), hint=WAY_OUT)


def _fill(kind: Type, root: Inode, sources: Mapping[int, int], folder: Path) -> None:
    """Write what mkfs takes as it is into the new folder, and see that it is there."""
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in ACLS & set(map(os.fsencode, os.listxattr(fd))):
            os.removexattr(fd, name)  # else everything in the folder would have them, too
        plain = _plain(kind, root)
        fill.fill(fd, plain, sources)
    finally:
        os.close(fd)
    for path, inode in walk(plain):
        differs = _difference(os.path.join(os.fsencode(folder), path), inode.entry, with_time=kind.has_times)
        if differs:
            hint = f"set FLEDGE_CACHE_DIR to a folder on another filesystem, {WAY_OUT}"
            raise FilesystemError(f"its {differs} is not kept by the disk of {folder}", where=show(path), hint=hint)


def _plain(kind: Type, root: Inode) -> Inode:
    """Return a copy of the tree as it is in the folder."""
    copies: dict[int, Inode] = {}
    for _, inode in walk(root):
        entry = inode.entry
        taken = {name: value for name, value in entry.xattrs.items() if kind.is_taken(name, value)}
        is_device = entry.kind in _DEVICES
        if is_device or len(taken) < len(entry.xattrs):
            entry = Entry(
                entry.path, Kind.FIFO if is_device else entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime_ns,
                entry.size, entry.block, entry.link, (0, 0), taken, entry.runs,
            )  # fmt: skip
        copies.setdefault(id(inode), Inode(entry, inode.source))
    for _, inode in walk(root):
        if inode.children is not None:
            copies[id(inode)].children = {name: copies[id(child)] for name, child in inode.children.items()}
    return copies[id(root)]


def _difference(path: bytes, entry: Entry, *, with_time: bool) -> str | None:
    status = os.lstat(path)
    if set(map(os.fsencode, os.listxattr(path, follow_symlinks=False))) != set(entry.xattrs):
        return "list of extended attributes"
    if entry.kind is not Kind.SYMLINK and stat.S_IMODE(status.st_mode) != entry.mode:
        return "mode"
    if (stat.S_IFMT(status.st_mode), status.st_uid, status.st_gid) != (FILE_TYPES[entry.kind], entry.uid, entry.gid):
        return "owner"
    return "time" if with_time and status.st_mtime_ns != entry.mtime_ns else None


def shared_blocks(fd: int, root: Inode, sources: Mapping[int, int]) -> list[ImageExtent]:
    """Return which blocks of an image are blocks of the tree's payloads as well, wherever they lie.

    They are found by their XXH3, and then compared. Blocks of zeros are none.
    """
    known: dict[int, tuple[int, int]] = {}
    seen: set[int] = set()
    for _, inode in walk(root):
        if inode.entry.kind is not Kind.FILE or id(inode) in seen:
            continue
        seen.add(id(inode))
        source = sources[inode.source]
        for extent in file_runs(inode.entry):
            for block, data in _blocks(source, extent.payload * BLOCK_BYTES, extent.count * BLOCK_BYTES):
                known.setdefault(xxhash.xxh3_64_intdigest(data), (inode.source, block))
    found = []
    for start, length in data_ranges(fd, os.fstat(fd).st_size):
        first = start // BLOCK_BYTES * BLOCK_BYTES
        for block, data in _blocks(fd, first, start + length - first):
            place = known.get(xxhash.xxh3_64_intdigest(data))
            if place and os.pread(sources[place[0]], BLOCK_BYTES, place[1] * BLOCK_BYTES) == data != _ZERO:
                found.append(ImageExtent(block, *place, 1))
    return merge_extents(found)


def _blocks(fd: int, start: int, length: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number, data) of the blocks of a range, the last one whole."""
    end = start + length
    while start < end:
        data = os.pread(fd, min(_CHUNK_BYTES, -(-(end - start) // BLOCK_BYTES) * BLOCK_BYTES), start)
        if not data:
            return
        for at in range(0, len(data), BLOCK_BYTES):
            yield (start + at) // BLOCK_BYTES, data[at : at + BLOCK_BYTES]
        start += len(data)
