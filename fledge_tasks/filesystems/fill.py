"""A merged tree, written into a mounted filesystem, and where its file data came to lie.

The target is an empty filesystem, and every name is made inside the descriptor of its folder, so no
link is ever followed, and nothing of the host is reached by a name from a layer. Owners come before
attributes, since chown(2) drops capabilities, and attributes before modes, since ACLs change
those; times come last, those of folders after their content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fledge_tasks.errors import FilesystemError
from fledge_tasks.fsutil import pwrite_all
from fledge_tasks.oci.layer_index import BLOCK_BYTES, FILE_TYPES, Entry, Kind, file_runs
from fledge_tasks.tree import Inode, show

_CHUNK_BYTES = 1 << 20
_MAX_PATH_BYTES = 4000  # PATH_MAX, less what stands before it where it has to be named in /proc
# Linux Documentation/filesystems/fiemap: struct fiemap, struct fiemap_extent and their flags.
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP, _FIEMAP_EXTENT = struct.Struct("<QQIIII"), struct.Struct("<QQQ16xI12x")
_FIEMAP_EXTENTS = 128
_IS_LAST, _IS_PLAIN = 0x0001, 0x1001  # FIEMAP_EXTENT_MERGED says nothing about the data


class FullError(FilesystemError):
    """There is no room left in the filesystem."""


@dataclass(frozen=True, slots=True)
class Place:
    """`count` blocks of the payload `source` from `payload_block` on lie in the filesystem at the byte `address`."""

    address: int
    source: int
    payload_block: int
    count: int


def fill(root: int, tree: Inode, sources: Mapping[int, int]) -> None:
    """Write the tree into the empty folder of the descriptor `root`; `sources` are descriptors of payloads.

    Raises FilesystemError naming the path that the filesystem does not take. What was written stays.
    """
    _raise_file_limit()
    first: dict[int, bytes] = {}
    for path, folder, name, inode in _walk(root, tree, is_new=True):
        try:
            if id(inode) in first:
                with reached(root, first[id(inode)]) as (source, path_there):
                    os.link(path_there, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
            else:
                first[id(inode)] = path
                _make(folder, name, inode, sources)
        except OSError as error:
            raise _refused(error, path) from None


def places(root: int, tree: Inode) -> Iterator[Place]:
    """Yield where the data of all files lies, in whole blocks, as the filesystem tells it (FS_IOC_FIEMAP)."""
    seen: set[int] = set()
    for _, folder, name, inode in _walk(root, tree, is_new=False):
        if inode.entry.kind is Kind.FILE and inode.entry.size and id(inode) not in seen:
            seen.add(id(inode))
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                yield from _places_of(fd, inode)
            finally:
                os.close(fd)


@contextlib.contextmanager
def reached(root: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the descriptor of a folder and a path below it that system calls take: that of `path` below `root`.

    Layers are merged below symbolic links, so a path can be longer than PATH_MAX.
    """
    with contextlib.ExitStack() as stack:
        while len(path) > _MAX_PATH_BYTES:
            cut = path.rindex(b"/", 0, _MAX_PATH_BYTES)
            root = os.open(path[:cut], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
            stack.callback(os.close, root)
            path = path[cut + 1 :]
        yield root, path


def _walk(root: int, tree: Inode, *, is_new: bool) -> Iterator[tuple[bytes, int, bytes, Inode]]:
    """Yield (path, descriptor of the folder, name, inode) of every name; folders are made, and finished, here."""
    stack = [(b"", os.dup(root), tree, iter(sorted((tree.children or {}).items())))]
    try:
        while stack:
            path, folder, inode, names = stack[-1]
            name, child = next(names, (None, None))
            if name is None or child is None:
                if is_new:
                    _dress(folder, inode.entry)
                os.close(folder)
                stack.pop()
                continue
            below = path + b"/" + name if path else name
            if child.children is None:
                yield below, folder, name, child
                continue
            if is_new:
                os.mkdir(name, 0o700, dir_fd=folder)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            stack.append((below, fd, child, iter(sorted(child.children.items()))))
    except OSError as error:
        raise _refused(error, stack[-1][0]) from None
    finally:
        for _, folder, _, _ in stack:
            os.close(folder)


def _make(folder: int, name: bytes, inode: Inode, sources: Mapping[int, int]) -> None:
    entry = inode.entry
    if entry.kind is Kind.FILE:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            _write(fd, entry, sources[inode.source])
            _dress(fd, entry)
        finally:
            os.close(fd)
        return
    if entry.kind is Kind.SYMLINK:
        os.symlink(entry.link, name, dir_fd=folder)
    else:
        os.mknod(name, FILE_TYPES[entry.kind] | 0o600, os.makedev(*entry.rdev), dir_fd=folder)
    os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
    for attribute, value in entry.xattrs.items():
        # There is no setxattrat(2) yet; the folder is named by its descriptor, so no link is followed.
        os.setxattr(b"/proc/self/fd/%d/%s" % (folder, name), attribute, value, follow_symlinks=False)
    if entry.kind is not Kind.SYMLINK:
        os.chmod(name, entry.mode, dir_fd=folder)
    os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)


def _write(fd: int, entry: Entry, source: int) -> None:
    end = 0
    for run in file_runs(entry):
        offset, at = run.logical * BLOCK_BYTES, run.payload * BLOCK_BYTES
        end = min(offset + run.count * BLOCK_BYTES, entry.size)
        while offset < end:
            data = os.pread(source, min(_CHUNK_BYTES, end - offset), at)
            pwrite_all(fd, data, offset)
            offset, at = offset + len(data), at + len(data)
    if end < entry.size:  # btrfs writes a file out when it is truncated, even to the size that it has
        os.ftruncate(fd, entry.size)


def _dress(fd: int, entry: Entry) -> None:
    os.fchown(fd, entry.uid, entry.gid)
    for attribute, value in entry.xattrs.items():
        os.setxattr(fd, attribute, value)
    os.fchmod(fd, entry.mode)
    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))


def _places_of(fd: int, inode: Inode) -> Iterator[Place]:
    runs = iter(file_runs(inode.entry))
    run = next(runs, None)
    for logical, address, length, flags in _fiemap(fd):
        if flags & ~_IS_PLAIN or (logical | address | length) % BLOCK_BYTES:
            continue
        block, end = logical // BLOCK_BYTES, (logical + length) // BLOCK_BYTES
        while run is not None and run.logical < end:
            start, stop = max(block, run.logical), min(end, run.logical + run.count)
            if start < stop:
                at = address + start * BLOCK_BYTES - logical
                yield Place(at, inode.source, run.payload + start - run.logical, stop - start)
            if run.logical + run.count > end:
                break
            run = next(runs, None)


def _fiemap(fd: int) -> Iterator[tuple[int, int, int, int]]:
    start = 0
    while True:
        request = bytearray(_FIEMAP.pack(start, (1 << 64) - 1 - start, 0, 0, _FIEMAP_EXTENTS, 0))
        request += bytes(_FIEMAP_EXTENT.size * _FIEMAP_EXTENTS)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        count = _FIEMAP.unpack_from(request)[3]
        for number in range(count):
            extent = _FIEMAP_EXTENT.unpack_from(request, _FIEMAP.size + number * _FIEMAP_EXTENT.size)
            yield extent
            start = extent[0] + extent[2]
            if extent[3] & _IS_LAST:
                return
        if not count:
            return


def _raise_file_limit() -> None:
    """Allow as many open files as a deep tree has folders above each other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _refused(error: OSError, path: bytes) -> FilesystemError:
    kind = FullError if error.errno in {errno.ENOSPC, errno.EDQUOT} else FilesystemError
    return kind(f"cannot be written: {error.strerror}", where=show(path))
