"""btrfs images filled by `mkfs.btrfs --rootdir`. What it leaves out is put into the trees of the image afterwards.

mkfs.btrfs, as tried from 6.2 to 7.3, cuts times to seconds, takes no devices from a user namespace, and takes
nothing but names from the root folder before 6.5.3; it gives chunks half as much room again as they
need. From 6.10.1 to 6.11 it makes files of their own of hard links.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import btrfs, rootless
from fledge_tasks.filesystems.btrfs_tree import DATA, DIR_INDEX, DIR_ITEM, FILE_TREE, INODE_ITEM, Node, Trees
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import Wanted, too_small, whole_mib
from fledge_tasks.oci.layer_index import BLOCK_BYTES, FILE_TYPES, Entry, Kind, file_runs
from fledge_tasks.tools import MKFS_BTRFS
from fledge_tasks.tree import Inode, show

_ROOT = 256  # BTRFS_FIRST_FREE_OBJECTID, the root folder of a subvolume
_MAX_HOLES_BYTES = 1 << 30
# struct btrfs_inode_item: uid, gid, mode, rdev; atime, ctime, mtime, otime in seconds and nanoseconds.
_OWNER, _AT_OWNER = struct.Struct("<IIIQ"), 44
_TIMES, _AT_TIMES = struct.Struct("<qIqIqIqI"), 112
# struct btrfs_dir_item: location, transid, data_len, name_len, type.
_NAME = struct.Struct("<QBQQHHB")
_TYPES = {Kind.CHAR_DEVICE: 3, Kind.BLOCK_DEVICE: 4}  # BTRFS_FT_CHRDEV, _BLKDEV


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says. Small files are in metadata, and share no blocks."""
    version = MKFS_BTRFS.numbers()
    if version < (6, 5, 3) and root.entry.xattrs:
        text = f"has extended attributes, which mkfs.btrfs {MKFS_BTRFS.version()} leaves out (6.5.3 does not)"
        raise FilesystemError(text, where=show(b""), hint=rootless.WAY_OUT)
    kind = rootless.Type(
        "btrfs",
        lambda _, entry: btrfs.refusal(entry, parameters) or _refusal(entry, version),
        _is_taken,
        False,
        _populate,
        ("btrfs", "check", "--readonly"),
    )
    return rootless.make(kind, root, parameters, payloads, image, scratch)


def _refusal(entry: Entry, version: tuple[int, ...]) -> str | None:
    names = [name for name, value in entry.xattrs.items() if not _is_taken(name, value)]
    if names:
        return f"has the extended attribute {names[0].decode(errors='backslashreplace')}, which only root can set"
    if version < (7, 0) and entry.kind is Kind.FILE:
        holes = entry.size - sum(run.count for run in file_runs(entry)) * BLOCK_BYTES
        if holes > _MAX_HOLES_BYTES:
            return f"has holes of {holes >> 20} MiB, which mkfs.btrfs before 7.0 fills with zeros"
    return None


def _is_taken(name: bytes, value: bytes) -> bool:
    del value
    return name.startswith(b"user.") or name in {b"security.capability", *rootless.ACLS}


def _populate(image: Path, root: Inode, parameters: Parameters, scratch: Path) -> tuple[int, int]:
    os.truncate(image, btrfs.MIN_BYTES)  # mkfs makes the file larger as it needs
    identity = str(uuid.UUID(bytes=parameters.uuid))
    env = {"SOURCE_DATE_EPOCH": str(parameters.epoch), "DETERMINISTIC_SEED": "1"}  # 7.3 looks at them
    env |= btrfs.NO_OTHER_DEVICES
    btrfs.mkfs(image, parameters, "-U", identity, "--rootdir", rootless.FOLDER, env=env, cwd=scratch)
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        trees = Trees(fd)
        _complete(trees, root, parameters.epoch)
        return _resize(trees, parameters.wanted), 0
    finally:
        os.close(fd)


def _resize(trees: Trees, wanted: Wanted) -> int:
    """Make the image as small as the buffer lets it, or of the size that is wanted, and return what is free then.

    Unused block groups for metadata stay: where there is little room in them, Linux takes more as soon as
    it mounts the image, from what was promised to be free.
    """
    data = [group for group in trees.groups() if group.flags == DATA]
    trees.drop([group for group in data[1:] if not group.used])
    size = max(btrfs.MIN_BYTES, whole_mib(trees.end))
    missing = wanted.buffer_bytes - trees.free_bytes(size)
    while missing > 0:
        size += whole_mib(missing)
        missing = wanted.buffer_bytes - trees.free_bytes(size)
    if wanted.size_bytes is not None:
        if wanted.size_bytes < size:
            raise too_small(wanted, size)
        size = wanted.size_bytes
    trees.resize(size)
    return trees.free_bytes(size)


def _complete(trees: Trees, root: Inode, epoch: int) -> None:
    """Set owners, modes, devices and times of all inodes as the tree has them; atime is mtime, as Linux would have it.

    Raises FilesystemError when the image does not hold the names of the tree.
    """
    entries = _entries(trees, root)
    for leaf in trees.leaves(FILE_TREE):
        for key, start, size in leaf.items():
            if key.type == INODE_ITEM and key.objectid in entries:
                entry = entries[key.objectid]
                mode = FILE_TYPES[entry.kind] | (0o777 if entry.kind is Kind.SYMLINK else entry.mode)
                device = entry.rdev[0] << 20 | entry.rdev[1]
                _OWNER.pack_into(leaf.data, start + _AT_OWNER, entry.uid, entry.gid, mode, device)
                mtime = divmod(entry.mtime_ns, 1_000_000_000)
                _TIMES.pack_into(leaf.data, start + _AT_TIMES, *mtime, epoch, 0, *mtime, epoch, 0)
            elif key.type in {DIR_ITEM, DIR_INDEX}:
                for at, number, _ in _names(leaf, start, size):
                    kind = entries[number].kind
                    if kind in _TYPES:
                        leaf.data[at + _NAME.size - 1] = _TYPES[kind]
        trees.write(leaf)


def _entries(trees: Trees, root: Inode) -> dict[int, Entry]:
    """Return what inode numbers stand for, by the names in the image."""
    folders: dict[int, dict[bytes, int]] = {}
    for leaf, key, start, size in trees.items(FILE_TREE):
        if key.type == DIR_INDEX:
            folders.setdefault(key.objectid, {}).update((name, number) for _, number, name in _names(leaf, start, size))
    entries: dict[int, Entry] = {}
    pending = [(b"", _ROOT, root)]
    while pending:
        path, number, inode = pending.pop()
        entries[number] = inode.entry
        children, found = inode.children or {}, folders.get(number, {})
        if children.keys() != found.keys():
            [name, *_] = sorted(children.keys() ^ found.keys())
            raise FilesystemError("mkfs.btrfs left it out, or made it up", where=show(path + b"/" + name))
        pending.extend((path + b"/" + name, found[name], child) for name, child in children.items())
    return entries


def _names(leaf: Node, start: int, size: int) -> list[tuple[int, int, bytes]]:
    """Return place, inode number and name of each of the names that an item holds."""
    found, end = [], start + size
    while start < end:
        number, _, _, _, data_bytes, name_bytes, _ = _NAME.unpack_from(leaf.data, start)
        name = bytes(leaf.data[start + _NAME.size : start + _NAME.size + name_bytes])
        found.append((start, number, name))
        start += _NAME.size + name_bytes + data_bytes
    return found
